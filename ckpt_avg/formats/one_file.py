"""One checkpoint file: told apart by its first bytes, never by its suffix alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from weakref import WeakValueDictionary

from ckpt_avg.checkpoint.spec import METHOD_KEY, ORIGIN_KEY, Checkpoint, CheckpointSpec, TensorSpec
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats import safetensors_header as safetensors
from ckpt_avg.formats import torch_legacy as torch_stream
from ckpt_avg.formats import torch_zip
from ckpt_avg.formats.pickles.unpickler import read_pickle
from ckpt_avg.formats.place import FileContents
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.torch_file import Names, assemble, rename, settle_names
from ckpt_avg.formats.unknown import explain
from ckpt_avg.limits import LIMITS
from ckpt_avg.machine import gc_paused

DCP_SHARDING = "DCP_SHARDING_INFO"


def open_file(path: Path, reading: Reading, *, strip: bool = True) -> Checkpoint:
    """Opens a checkpoint file and reads its header.

    Args:
        path: the file.
        reading: how to read it.
        strip: take wrappers' prefixes off; a shard keeps them, since they belong to the whole.

    Raises:
        CheckpointFormatError: the file is corrupt, unsafe, or of an unknown kind.
    """
    with ExitStack() as on_error:
        file = on_error.enter_context(InputFile(path))
        head = file.read(0, min(file.size, 512))
        if head.startswith(torch_zip.MAGIC):
            checkpoint = assemble(file, "torch zip", torch_zip.read_contents(file), reading, strip=strip)
        elif safetensors.looks_like(head):
            checkpoint = _open_safetensors(file, reading, strip=strip)
        elif torch_stream.looks_like(head):
            checkpoint = assemble(file, "torch stream", torch_stream.read_contents(file), reading, strip=strip)
        elif head.startswith(b"\x80"):
            checkpoint = assemble(file, "pickle", _pickled(file), reading, strip=strip)
        else:
            raise CheckpointFormatError(f"{path}: {explain(head, path.name)}")
        on_error.pop_all()  # the checkpoint keeps the file open
        return checkpoint


class _Table(dict[str, TensorSpec]):
    """The tensors of a safetensors file, and what its header says beside them. It is shared, so nothing changes it."""

    def __init__(self, tensors: Mapping[str, TensorSpec], names: Names, metadata: dict[str, str], digest: str) -> None:
        super().__init__(tensors)
        self.names, self.metadata, self.digest = names, metadata, digest


# Checkpoints of one run mostly have the same header, byte for byte. It is parsed once while any of them is open.
_TABLES: WeakValueDictionary[tuple[str, int, str | None, bool], _Table] = WeakValueDictionary()


def _read_table(file: InputFile, reading: Reading, *, strip: bool) -> _Table:
    header = safetensors.read_header(file)
    # All that the table follows from. Only what passed every check is kept, and no path is in it.
    digest = hashlib.sha256(header).hexdigest()
    key = (digest, file.size, reading.strip_prefix, strip)
    table = _TABLES.get(key)
    if table is None:
        with gc_paused():
            tensors, metadata = safetensors.parse_header(file, header)
            scalars = {name: tensor.shape == () for name, tensor in tensors.items()}
            names = settle_names(scalars, reading, file.path, strip=strip)
            table = _TABLES[key] = _Table(rename(tensors.values(), names.stripped.names), names, metadata, digest)
    return table


def _open_safetensors(file: InputFile, reading: Reading, *, strip: bool) -> Checkpoint:
    refuse_choice(reading, file.path)
    table = _read_table(file, reading, strip=strip)
    names, metadata = table.names, table.metadata
    if DCP_SHARDING in metadata and file.path.name.startswith("shard-"):
        raise CheckpointFormatError(
            f"{file.path}: one shard of a checkpoint that torch.distributed.checkpoint wrote, with parts of tensors. "
            f"Name its folder: {file.path.parent}."
        )
    notes = names.notes
    if strip and (shard := re.search(r"-(\d+)-of-(\d+)\.safetensors$", file.path.name)) and int(shard[2]) > 1:
        notes += (f"one of {int(shard[2])} shards, by its name: the folder or its index stands for the whole model",)
    spec = CheckpointSpec(
        file.path,
        "safetensors",
        table,
        kind=names.kind or ("torch DCP" if DCP_SHARDING in metadata else None),
        prefix=names.stripped.prefix,
        lacks_prefix=names.stripped.lacking,
        averaged="ckpt-avg made it" if metadata.get(METHOD_KEY) == "mean" or ORIGIN_KEY in metadata else names.averaged,
        metadata=metadata,
        notes=notes,
        digest=table.digest,
    )
    return Checkpoint(spec, (file,))


def refuse_choice(reading: Reading, path: Path) -> None:
    """Raises CheckpointFormatError where a choice is asked of safetensors, which leave none."""
    if reading.state_key is not None or reading.ema:
        option = "--ema" if reading.ema else f"--state-key {reading.state_key}"
        raise CheckpointFormatError(
            f"{path}: a safetensors file holds one flat state dict, so {option} names nothing in it. Leave it out."
        )


def _pickled(file: InputFile) -> FileContents:
    """Returns what a bare pickle holds, whose arrays are in it: detectron2's model zoo has such files."""
    if file.size > LIMITS.pickle:
        raise CheckpointFormatError(
            f"{file.path}: expected a pickle of at most {LIMITS.pickle:,} bytes, got {file.size:,}. In a trusted "
            "environment, save the weights with torch.save or safetensors."
        )
    pickle = file.read(0, file.size)
    return FileContents(read_pickle(pickle, str(file.path)), lambda key: None, hashlib.sha256(pickle).hexdigest())
