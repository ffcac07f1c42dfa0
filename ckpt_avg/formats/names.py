"""Tensor names: they are data, shown escaped; what safetensors cannot hold is refused."""

from __future__ import annotations

from pathlib import Path

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import quote


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8: it cannot with a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_name(name: str, path: Path) -> None:
    """Raises CheckpointFormatError for a name that no safetensors file can hold; ``path`` says where it stands."""
    if name.isascii() and len(name) <= LIMITS.name and "\0" not in name and name != "__metadata__":
        return
    where = f"{path}: tensor {quote(name)}"
    if not is_text(name):
        raise CheckpointFormatError(f"{where}: the name holds a lone surrogate, so it is no text. Rename the tensor.")
    if name == "__metadata__":
        raise CheckpointFormatError(f"{where}: safetensors keeps this name for its metadata. Rename the tensor.")
    length = len(name.encode("utf-8"))
    if "\0" in name:
        raise CheckpointFormatError(f"{where}: expected a name without NUL, got one with it. Rename the tensor.")
    if length > LIMITS.name:
        raise CheckpointFormatError(
            f"{where}: expected a name of at most {LIMITS.name:,} bytes, got {length:,}. Rename the tensor."
        )
