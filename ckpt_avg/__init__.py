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
    from ckpt_avg.api import average
    from ckpt_avg.batchnorm import BatchNormReport, refresh_batch_norm
    from ckpt_avg.compat import CompatibilityReport, Difference, check
    from ckpt_avg.errors import (
        ChangedWhileReadingError,
        CheckpointFormatError,
        CkptAvgError,
        IncompatibleError,
        NonFiniteError,
        NoWeightsError,
        OutputError,
        RankError,
        RequirementError,
        ResourceError,
        UsageError,
        UserCodeError,
        VerificationError,
    )
    from ckpt_avg.evaluate import Evaluation
    from ckpt_avg.inspection import Inspection, Listed, inspect
    from ckpt_avg.joining import join_ranks
    from ckpt_avg.measuring import LayerStatistics
    from ckpt_avg.progress import Progress
    from ckpt_avg.ranks import Ranks
    from ckpt_avg.readers import Checkpoint, open_checkpoint
    from ckpt_avg.record import Record
    from ckpt_avg.refreshing import refresh_weights
    from ckpt_avg.requirements import Outcome, Requirement
    from ckpt_avg.results import AverageResult
    from ckpt_avg.spec import CheckpointSpec, DType, Part, TensorSpec
    from ckpt_avg.sweeping import Measured, SweepResult, sweep
    from ckpt_avg.verifying import VerifyReport, verify

__version__ = "0.1.0"

_HOMES = {
    "ckpt_avg.api": ("average",),
    "ckpt_avg.batchnorm": ("BatchNormReport", "refresh_batch_norm"),
    "ckpt_avg.compat": ("CompatibilityReport", "Difference", "check"),
    "ckpt_avg.errors": (
        "ChangedWhileReadingError",
        "CheckpointFormatError",
        "CkptAvgError",
        "IncompatibleError",
        "NoWeightsError",
        "NonFiniteError",
        "OutputError",
        "RankError",
        "RequirementError",
        "ResourceError",
        "UsageError",
        "UserCodeError",
        "VerificationError",
    ),
    "ckpt_avg.evaluate": ("Evaluation",),
    "ckpt_avg.inspection": ("Inspection", "Listed", "inspect"),
    "ckpt_avg.joining": ("join_ranks",),
    "ckpt_avg.measuring": ("LayerStatistics",),
    "ckpt_avg.progress": ("Progress",),
    "ckpt_avg.ranks": ("Ranks",),
    "ckpt_avg.readers": ("Checkpoint", "open_checkpoint"),
    "ckpt_avg.record": ("Record",),
    "ckpt_avg.refreshing": ("refresh_weights",),
    "ckpt_avg.requirements": ("Outcome", "Requirement"),
    "ckpt_avg.results": ("AverageResult",),
    "ckpt_avg.spec": ("CheckpointSpec", "DType", "Part", "TensorSpec"),
    "ckpt_avg.sweeping": ("Measured", "SweepResult", "sweep"),
    "ckpt_avg.verifying": ("VerifyReport", "verify"),
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
    "Evaluation",
    "IncompatibleError",
    "Inspection",
    "LayerStatistics",
    "Listed",
    "Measured",
    "NoWeightsError",
    "NonFiniteError",
    "Outcome",
    "OutputError",
    "Part",
    "Progress",
    "RankError",
    "Ranks",
    "Record",
    "Requirement",
    "RequirementError",
    "ResourceError",
    "SweepResult",
    "TensorSpec",
    "UsageError",
    "UserCodeError",
    "VerificationError",
    "VerifyReport",
    "__version__",
    "average",
    "check",
    "inspect",
    "join_ranks",
    "open_checkpoint",
    "refresh_batch_norm",
    "refresh_weights",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
