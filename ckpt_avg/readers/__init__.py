"""Readers: each turns one format's header into a table of `TensorSpec`; `MappedFile` serves the bytes.

`open_checkpoint` looks at the first bytes of a file, never at its suffix alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.mapped import MappedFile
from ckpt_avg.readers import safetensors, torch_zip
from ckpt_avg.spec import CheckpointSpec


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint: what it holds, and the files that hold it. Use it as a context manager."""

    spec: CheckpointSpec
    files: Sequence[MappedFile]

    def check_unchanged(self) -> None:
        """Raises ChangedWhileReadingError if a file was truncated or modified since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Closes the files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike[str], *, state_key: str | None = None) -> Checkpoint:
    """Opens one checkpoint file and reads its header; no tensor is read and no code in it runs.

    Args:
        path: a safetensors file, or a zip file written by ``torch.save``, whatever its suffix.
        state_key: the dotted key of the state dict inside a torch file, for example ``model.ema``; found
            from the common wrapper keys if not given.

    Returns:
        The open checkpoint.

    Raises:
        CheckpointFormatError: the file is corrupt, unsafe, or of an unknown kind.

    Example:
        >>> with open_checkpoint("fixtures/mnist_cnn/epoch_20.pt") as checkpoint:
        ...     print(checkpoint.spec.format, checkpoint.spec.state_key)
        torch zip model
    """
    with ExitStack() as on_error:
        file = on_error.enter_context(MappedFile(Path(path)))
        head = file.read(0, min(file.size, 512))
        if head.startswith(torch_zip.MAGIC):
            spec = torch_zip.read_spec(file, state_key)
        elif safetensors.looks_like(head):
            if state_key is not None:
                raise CheckpointFormatError(
                    f"{path}: a safetensors file holds one flat state dict, so --state-key {state_key} names "
                    "nothing in it. Leave it out."
                )
            spec = safetensors.read_spec(file)
        else:
            raise CheckpointFormatError(f"{path}: {_explain(head)}")
        on_error.pop_all()  # the checkpoint keeps the file open
        return Checkpoint(spec, (file,))


def _explain(head: bytes) -> str:
    """Says what a file that is no checkpoint seems to be, and what to do."""
    expected = "expected a safetensors file or a zip written by torch.save, got"
    if not head:
        return f"{expected} an empty file. Copy or save it again."
    if head.startswith(b"version https://git-lfs"):
        return f"{expected} a Git LFS pointer. Fetch the file itself: git lfs pull."
    if head.startswith(b"\x80") and b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" in head[:32]:
        return (
            f"{expected} the stream of torch before 1.6. Save it again in a trusted environment: "
            "torch.save(torch.load(path, weights_only=True), new_path)."
        )
    if head.startswith(b"\x80"):
        return f"{expected} a bare pickle, which is not opened. Save the weights with torch.save or safetensors."
    if len(head) > 262 and head[257:262] == b"ustar":
        return f"{expected} a tar archive. Unpack it, or save the weights again with torch.save."
    if head.lstrip()[:1] == b"<":
        return f"{expected} an HTML or XML page, probably a failed download. Download the file again."
    if len(head) < 8:
        return f"{expected} {len(head)} bytes. Copy or save it again."
    return f"{expected} something else (first bytes {head[:8]!r}). Name checkpoint files only."
