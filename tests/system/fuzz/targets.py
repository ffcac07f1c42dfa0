"""One entry function for each parser: bytes in, whether they were accepted out, and anything else is a find.

The bytes stand in a file in memory, which is rewritten for each input and is opened as the command opens it. So the
file also tells which input was the last one before a crash.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from system.fuzz.corpus import write_companions

from ckpt_avg.checkpoint.spec import Checkpoint, TensorSpec
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.pickles.unpickler import read_pickle

Target = Callable[[bytes], bool]

FILE_NAMES = {
    "safetensors": "input.safetensors",
    "zip": "input.pt",
    "pickle": "input.pkl",
    "stream": "input.pt",
    "index": "model.safetensors.index.json",
    "dcp": ".metadata",
}


def memory_folder() -> Path | None:
    """Returns where files are kept in memory; None: wherever temporary files are."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


def make_target(parser: str, folder: Path) -> Target:
    """Returns the entry function of a parser, which keeps its input in this folder."""
    write_companions(parser, folder)
    path = folder / FILE_NAMES[parser]
    rewrite = make_rewrite(path)
    if parser == "pickle":

        def read(content: bytes) -> bool:
            rewrite(content)
            return accepts(lambda: read_pickle(content, str(path)), path)

        return read
    opened = folder if parser == "dcp" else path

    def open_it(content: bytes) -> bool:
        rewrite(content)
        return accepts(lambda: open_and_check(opened), opened)

    return open_it


def make_rewrite(path: Path) -> Callable[[bytes], None]:
    """Returns what puts other bytes into one file, which stays open."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def rewrite(content: bytes) -> None:
        os.ftruncate(descriptor, len(content))
        os.pwrite(descriptor, content, 0)

    return rewrite


def accepts(read: Callable[[], object], path: Path) -> bool:
    """Calls a reader; a refusal must be the documented one, in one printable line that begins with the path."""
    try:
        read()
    except CheckpointFormatError as error:
        message = str(error)
        if not (message.startswith(str(path)) and message.isprintable() and len(message) < 5000):
            raise AssertionError(f"no good message: {message[:500]!r}") from None
        return False
    return True


def open_and_check(path: Path) -> None:
    """Opens a checkpoint; what it says of its tensors must lie inside their files."""
    with open_checkpoint(path) as checkpoint:
        for tensor in checkpoint.spec.tensors.values():
            for part in [each.tensor for each in tensor.parts] or [tensor]:
                _check_inside(checkpoint, part)


def _check_inside(checkpoint: Checkpoint, tensor: TensorSpec) -> None:
    last = sum((extent - 1) * step for extent, step in zip(tensor.shape, tensor.stride, strict=True))
    end = tensor.offset + (last + 1) * tensor.dtype.itemsize if tensor.numel else tensor.offset
    begin, nbytes = tensor.storage
    size = checkpoint.files[tensor.file].size
    if tensor.numel and not 0 <= begin <= tensor.offset <= end <= begin + nbytes <= size:
        raise AssertionError(f"{tensor} is outside its file of {size} bytes")
