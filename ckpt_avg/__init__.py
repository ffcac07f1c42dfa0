"""Checkpoint averaging: the equal-weighted mean of saved checkpoints, BatchNorm refreshed, in constant memory.

    >>> from ckpt_avg import average
    >>> result = average(["fixtures/mnist_cnn"], "release.safetensors", last=8, bn="keep", dry_run=True)
    >>> len(result.checkpoints)
    8

Importing this package does not import torch; the first use of a function does.
"""

# isort: skip_file
# ``name as name`` exports a name, for type checkers too. At run time its first use imports it.

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ckpt_avg.version import __version__ as __version__

if TYPE_CHECKING:
    from ckpt_avg.batchnorm.pools import LayerStatistics as LayerStatistics
    from ckpt_avg.batchnorm.refresh import BatchNormReport as BatchNormReport
    from ckpt_avg.batchnorm.refresh import refresh_batch_norm as refresh_batch_norm
    from ckpt_avg.choices import AMP as AMP, IO as IO, BatchNormMode as BatchNormMode, BestMode as BestMode
    from ckpt_avg.choices import Estimator as Estimator, NonFloat as NonFloat, OutputDType as OutputDType
    from ckpt_avg.choices import WeightingBy as WeightingBy, WeightingRule as WeightingRule, Windows as Windows
    from ckpt_avg.checkpoint.spec import Checkpoint as Checkpoint, CheckpointSpec as CheckpointSpec, DType as DType
    from ckpt_avg.checkpoint.spec import Part as Part, TensorSpec as TensorSpec
    from ckpt_avg.checkpoint.training_record import Record as Record
    from ckpt_avg.commands.average import average as average
    from ckpt_avg.commands.check import check as check
    from ckpt_avg.commands.compare import CompareResult as CompareResult, compare as compare
    from ckpt_avg.commands.distances import ComparedCheckpoint as ComparedCheckpoint
    from ckpt_avg.commands.distances import ComparedTensor as ComparedTensor
    from ckpt_avg.commands.findings import Finding as Finding
    from ckpt_avg.commands.inspect import Inspection as Inspection, Listed as Listed, inspect as inspect
    from ckpt_avg.commands.draft import AverageResult as AverageResult
    from ckpt_avg.commands.load_average import load_average as load_average
    from ckpt_avg.commands.refresh_bn import refresh_weights as refresh_weights
    from ckpt_avg.commands.soup import Decision as Decision, SoupResult as SoupResult, soup as soup
    from ckpt_avg.commands.sweep import Measured as Measured, SweepResult as SweepResult, sweep as sweep
    from ckpt_avg.commands.verify import VerifyReport as VerifyReport, verify as verify
    from ckpt_avg.distributed.launch import join_ranks as join_ranks
    from ckpt_avg.distributed.ranks import Ranks as Ranks
    from ckpt_avg.errors import ChangedWhileReadingError as ChangedWhileReadingError
    from ckpt_avg.errors import CheckpointFormatError as CheckpointFormatError, CkptAvgError as CkptAvgError
    from ckpt_avg.errors import IncompatibleError as IncompatibleError, NonFiniteError as NonFiniteError
    from ckpt_avg.errors import NoWeightsError as NoWeightsError, OutputError as OutputError, PartError as PartError
    from ckpt_avg.errors import RankError as RankError
    from ckpt_avg.errors import RequirementError as RequirementError, ResourceError as ResourceError
    from ckpt_avg.errors import UsageError as UsageError, UserCodeError as UserCodeError
    from ckpt_avg.errors import VerificationError as VerificationError
    from ckpt_avg.formats.open import open_checkpoint as open_checkpoint
    from ckpt_avg.progress import Phase as Phase, Progress as Progress
    from ckpt_avg.runs.discover import Sources as Sources
    from ckpt_avg.runs.run_folder import Skipped as Skipped
    from ckpt_avg.runs.compatibility import CompatibilityReport as CompatibilityReport, Difference as Difference
    from ckpt_avg.user_code.comparison import Change as Change, Comparison as Comparison
    from ckpt_avg.user_code.comparison import Evaluation as Evaluation
    from ckpt_avg.user_code.batches import ForwardBatch as ForwardBatch
    from ckpt_avg.user_code.evaluate import Evaluate as Evaluate
    from ckpt_avg.user_code.model import Batches as Batches, Model as Model
    from ckpt_avg.user_code.gate import Outcome as Outcome, Requirement as Requirement

_HOMES = {
    "ckpt_avg.batchnorm.pools": ("LayerStatistics",),
    "ckpt_avg.batchnorm.refresh": ("BatchNormReport", "refresh_batch_norm"),
    "ckpt_avg.checkpoint.spec": ("Checkpoint", "CheckpointSpec", "DType", "Part", "TensorSpec"),
    "ckpt_avg.checkpoint.training_record": ("Record",),
    "ckpt_avg.choices": (
        "AMP",
        "IO",
        "BatchNormMode",
        "BestMode",
        "Estimator",
        "NonFloat",
        "OutputDType",
        "WeightingBy",
        "WeightingRule",
        "Windows",
    ),
    "ckpt_avg.commands.average": ("average",),
    "ckpt_avg.commands.check": ("check",),
    "ckpt_avg.commands.compare": ("CompareResult", "compare"),
    "ckpt_avg.commands.distances": ("ComparedCheckpoint", "ComparedTensor"),
    "ckpt_avg.commands.findings": ("Finding",),
    "ckpt_avg.commands.inspect": ("Inspection", "Listed", "inspect"),
    "ckpt_avg.commands.draft": ("AverageResult",),
    "ckpt_avg.commands.load_average": ("load_average",),
    "ckpt_avg.commands.refresh_bn": ("refresh_weights",),
    "ckpt_avg.commands.soup": ("Decision", "SoupResult", "soup"),
    "ckpt_avg.commands.sweep": ("Measured", "SweepResult", "sweep"),
    "ckpt_avg.commands.verify": ("VerifyReport", "verify"),
    "ckpt_avg.distributed.launch": ("join_ranks",),
    "ckpt_avg.distributed.ranks": ("Ranks",),
    "ckpt_avg.errors": (
        "ChangedWhileReadingError",
        "CheckpointFormatError",
        "CkptAvgError",
        "IncompatibleError",
        "NonFiniteError",
        "NoWeightsError",
        "OutputError",
        "PartError",
        "RankError",
        "RequirementError",
        "ResourceError",
        "UsageError",
        "UserCodeError",
        "VerificationError",
    ),
    "ckpt_avg.formats.open": ("open_checkpoint",),
    "ckpt_avg.progress": ("Phase", "Progress"),
    "ckpt_avg.runs.compatibility": ("CompatibilityReport", "Difference"),
    "ckpt_avg.runs.discover": ("Sources",),
    "ckpt_avg.runs.run_folder": ("Skipped",),
    "ckpt_avg.user_code.batches": ("ForwardBatch",),
    "ckpt_avg.user_code.comparison": ("Change", "Comparison", "Evaluation"),
    "ckpt_avg.user_code.evaluate": ("Evaluate",),
    "ckpt_avg.user_code.gate": ("Outcome", "Requirement"),
    "ckpt_avg.user_code.model": ("Batches", "Model"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["__version__", *_HOME]  # noqa: PLE0604 (they are strings)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
