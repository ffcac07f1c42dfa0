"""What the output says of itself in ``__metadata__``: reproducible, so no time, no host, no absolute path."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from ckpt_avg import __version__
from ckpt_avg.spec import METHOD_KEY, CheckpointSpec


def make_metadata(
    specs: Sequence[CheckpointSpec], *, dtype: str, batch_norm: dict[str, object] | None
) -> dict[str, str]:
    """Returns the metadata of an average.

    Args:
        specs: the averaged checkpoints in order.
        dtype: the dtype that was asked for.
        batch_norm: how the running statistics came about; None without BatchNorm layers.
    """
    metadata = {
        "format": "pt",  # transformers refuses a file without it
        METHOD_KEY: "mean",
        "ckpt_avg.version": __version__,
        "ckpt_avg.checkpoints": json.dumps([_text(spec.name) for spec in specs], ensure_ascii=False),
        "ckpt_avg.dtype": dtype,
    }
    if batch_norm is not None:
        metadata["ckpt_avg.batch_norm"] = json.dumps(batch_norm, ensure_ascii=False, sort_keys=True)
    return metadata


def _text(name: str) -> str:
    """Returns a file name as text, bytes that are no UTF-8 escaped: metadata is UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")
