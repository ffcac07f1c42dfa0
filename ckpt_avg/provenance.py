"""What the output says of itself in ``__metadata__``: reproducible, so no time, no host, no absolute path."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from ckpt_avg import __version__
from ckpt_avg.spec import METHOD_KEY, CheckpointSpec

_BATCH_NORM = "ckpt_avg.batch_norm"


def make_metadata(
    specs: Sequence[CheckpointSpec], *, dtype: str, batch_norm: dict[str, object] | None
) -> dict[str, str]:
    """Returns the metadata of an average. That of a copy, of a single checkpoint, keeps what its source says of itself.

    Args:
        specs: the averaged checkpoints in order.
        dtype: the dtype that was asked for.
        batch_norm: how the running statistics came about; None without BatchNorm layers.
    """
    source = _own_words(specs[0]) if len(specs) == 1 else {}
    metadata = {
        METHOD_KEY: "mean" if len(specs) > 1 else "copy",
        "ckpt_avg.checkpoints": json.dumps([_text(spec.name) for spec in specs], ensure_ascii=False),
        "ckpt_avg.dtype": dtype,
        **source,
        "format": "pt",  # transformers refuses a file without it
        "ckpt_avg.version": __version__,
    }
    if dtype != "keep":
        metadata["ckpt_avg.dtype"] = dtype
    if batch_norm is not None and not (batch_norm["statistics"] == "copied" and _BATCH_NORM in source):
        metadata[_BATCH_NORM] = json.dumps(batch_norm, ensure_ascii=False, sort_keys=True)
    return metadata


def _own_words(spec: CheckpointSpec) -> dict[str, str]:
    """Returns the metadata of a safetensors file; what a torch file holds beside its weights is no metadata."""
    if spec.format != "safetensors":
        return {}
    return {key: value for key, value in spec.metadata.items() if isinstance(value, str)}


def _text(name: str) -> str:
    """Returns a file name as text, bytes that are no UTF-8 escaped: metadata is UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")
