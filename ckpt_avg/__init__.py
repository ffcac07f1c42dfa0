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

from ckpt_avg.version import __version__

if TYPE_CHECKING:
    from ckpt_avg.batchnorm.hooks import LayerStatistics
    from ckpt_avg.batchnorm.refresh import BatchNormReport, refresh_batch_norm
    from ckpt_avg.checkpoint.spec import Checkpoint, CheckpointSpec, DType, Part, TensorSpec
    from ckpt_avg.checkpoint.training_record import Record
    from ckpt_avg.commands.average import average
    from ckpt_avg.commands.check import check
    from ckpt_avg.commands.inspect import Inspection, Listed, inspect
    from ckpt_avg.commands.publish import AverageResult
    from ckpt_avg.commands.refresh_bn import refresh_weights
    from ckpt_avg.commands.sweep import Measured, SweepResult, sweep
    from ckpt_avg.commands.verify import VerifyReport, verify
    from ckpt_avg.distributed.launch import join_ranks
    from ckpt_avg.distributed.ranks import Ranks
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
    from ckpt_avg.formats.open import open_checkpoint
    from ckpt_avg.progress import Progress
    from ckpt_avg.runs.compatibility import CompatibilityReport, Difference
    from ckpt_avg.user_code.evaluate import Evaluation
    from ckpt_avg.user_code.gate import Outcome, Requirement

_HOMES = {
    "ckpt_avg.commands.average": ("average",),
    "ckpt_avg.commands.check": ("check",),
    "ckpt_avg.batchnorm.refresh": ("BatchNormReport", "refresh_batch_norm"),
    "ckpt_avg.runs.compatibility": ("CompatibilityReport", "Difference"),
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
    "ckpt_avg.user_code.evaluate": ("Evaluation",),
    "ckpt_avg.commands.inspect": ("Inspection", "Listed", "inspect"),
    "ckpt_avg.distributed.launch": ("join_ranks",),
    "ckpt_avg.batchnorm.hooks": ("LayerStatistics",),
    "ckpt_avg.progress": ("Progress",),
    "ckpt_avg.distributed.ranks": ("Ranks",),
    "ckpt_avg.formats.open": ("open_checkpoint",),
    "ckpt_avg.checkpoint.training_record": ("Record",),
    "ckpt_avg.commands.refresh_bn": ("refresh_weights",),
    "ckpt_avg.user_code.gate": ("Outcome", "Requirement"),
    "ckpt_avg.commands.publish": ("AverageResult",),
    "ckpt_avg.checkpoint.spec": ("Checkpoint", "CheckpointSpec", "DType", "Part", "TensorSpec"),
    "ckpt_avg.commands.sweep": ("Measured", "SweepResult", "sweep"),
    "ckpt_avg.commands.verify": ("VerifyReport", "verify"),
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
