"""Checkpoint averaging: the equal-weighted mean of saved checkpoints, BatchNorm refreshed, in constant memory.

    >>> from ckpt_avg import average
    >>> result = average(["fixtures/mnist_cnn"], "release.safetensors", last=8, bn="keep", dry_run=True)
    >>> len(result.checkpoints)
    8

Importing this package does not import torch; the first use of a function does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_avg.api import AverageResult, Progress, average
    from ckpt_avg.batchnorm import BatchNormReport, LayerStatistics, refresh_batch_norm
    from ckpt_avg.compat import CompatibilityReport, Difference, check
    from ckpt_avg.errors import (
        ChangedWhileReadingError,
        CheckpointFormatError,
        CkptAvgError,
        IncompatibleError,
        NonFiniteError,
        NoWeightsError,
        OutputError,
        ResourceError,
        UsageError,
        UserCodeError,
    )
    from ckpt_avg.inspection import Inspection, Listed, inspect
    from ckpt_avg.readers import Checkpoint, open_checkpoint
    from ckpt_avg.record import Record
    from ckpt_avg.spec import CheckpointSpec, DType, Part, TensorSpec

__version__ = "0.1.0"

_HOMES = {
    "ckpt_avg.api": ("AverageResult", "Progress", "average"),
    "ckpt_avg.batchnorm": ("BatchNormReport", "LayerStatistics", "refresh_batch_norm"),
    "ckpt_avg.compat": ("CompatibilityReport", "Difference", "check"),
    "ckpt_avg.errors": (
        "ChangedWhileReadingError",
        "CheckpointFormatError",
        "CkptAvgError",
        "IncompatibleError",
        "NoWeightsError",
        "NonFiniteError",
        "OutputError",
        "ResourceError",
        "UsageError",
        "UserCodeError",
    ),
    "ckpt_avg.inspection": ("Inspection", "Listed", "inspect"),
    "ckpt_avg.readers": ("Checkpoint", "open_checkpoint"),
    "ckpt_avg.record": ("Record",),
    "ckpt_avg.spec": ("CheckpointSpec", "DType", "Part", "TensorSpec"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AverageResult",
    "BatchNormReport",
    "ChangedWhileReadingError",
    "Checkpoint",
    "CheckpointFormatError",
    "CheckpointSpec",
    "CkptAvgError",
    "CompatibilityReport",
    "DType",
    "Difference",
    "IncompatibleError",
    "Inspection",
    "LayerStatistics",
    "Listed",
    "NoWeightsError",
    "NonFiniteError",
    "OutputError",
    "Part",
    "Progress",
    "Record",
    "ResourceError",
    "TensorSpec",
    "UsageError",
    "UserCodeError",
    "__version__",
    "average",
    "check",
    "inspect",
    "open_checkpoint",
    "refresh_batch_norm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
