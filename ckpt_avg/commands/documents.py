"""Results as JSON documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_avg.checkpoint.spec import CheckpointSpec, batch_norm_layers
from ckpt_avg.output.paths import MARK
from ckpt_avg.runs.compatibility import CompatibilityReport
from ckpt_avg.version import __version__

if TYPE_CHECKING:
    from ckpt_avg.checkpoint.training_record import Record
    from ckpt_avg.commands.compare import CompareResult
    from ckpt_avg.commands.draft import AverageResult
    from ckpt_avg.commands.inspect import Inspection
    from ckpt_avg.commands.soup import SoupResult
    from ckpt_avg.commands.sweep import Measured, SweepResult
    from ckpt_avg.commands.verify import VerifyReport
    from ckpt_avg.user_code.comparison import Comparison, Evaluation
    from ckpt_avg.user_code.gate import Outcome


def plain(value: Any) -> Any:
    """Returns a value as JSON has it: NaN and infinity are null, a dataclass is an object of its attributes."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if is_dataclass(value):
        return _attributes(value, (each.name for each in fields(value)))
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    return value


def _attributes(value: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: plain(getattr(value, name)) for name in names}


def average_json(result: AverageResult) -> dict[str, Any]:
    """Returns the result of `average`."""
    report = result.batch_norm
    return {
        MARK: __version__,
        **_attributes(result, ("output", "written", "checkpoints", "steps", "unit", "weights", "skipped", "tensors")),
        "bytes": result.nbytes,
        **_attributes(result, ("device", "engine", "data_digest", "sha256", "split")),
        "batch_norm": {
            "statistics": result.statistics,
            "layers": sorted(report.statistics) if report else [],
            "frozen": list(report.frozen) if report else [],
            "untracked": list(report.untracked) if report else [],
            "batches": report.batches if report else 0,
            "samples": report.samples if report else 0,
            "estimator": report.estimator if report else None,
            "amp": report.amp if report else None,
        },
        "spectral_norms": list(result.spectral_norms),
        **evaluations_json(result.evaluations, result.comparison, result.outcomes),
        "notices": list(result.notices),
    }


def evaluations_json(
    evaluations: Sequence[Evaluation], comparison: Comparison | None, outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Returns what was measured, what averaging and the refresh changed, and the requirements."""
    return {
        "evaluations": plain(evaluations),
        "comparison": plain(comparison),
        "requirements": [
            {"requirement": outcome.requirement.text, **_attributes(outcome, ("value", "threshold", "met"))}
            for outcome in outcomes
        ],
    }


def sweep_json(result: SweepResult, command: Sequence[str]) -> dict[str, Any]:
    """Returns the result of `sweep`."""

    def window(each: Measured) -> dict[str, Any]:
        return {**plain(each), "size": len(each.checkpoints)}

    return {
        MARK: __version__,
        **plain(result),
        "windows": [window(each) for each in result.windows],
        "best": window(result.best),
        "command": list(command),
    }


def compare_json(result: CompareResult) -> dict[str, Any]:
    """Returns the result of `compare`."""
    return {MARK: __version__, **plain(result)}


def soup_json(result: SoupResult, command: Sequence[str]) -> dict[str, Any]:
    """Returns the result of `soup`: that of `average`, and how it was chosen."""
    names = ("candidates", "skipped", "decisions", "kept", "metric", "mode", "tolerance", "split", "passes", "notices")
    return {**average_json(result.average), **_attributes(result, names), "command": list(command)}


def compatibility_json(report: CompatibilityReport) -> dict[str, Any]:
    """Returns the result of `check`."""
    return {"compatible": report.compatible, **plain(report), "advice": "" if report.compatible else report.advice}


def verify_json(report: VerifyReport) -> dict[str, Any]:
    """Returns the result of `verify`."""
    document: dict[str, Any] = plain(report)
    document["bytes"] = document.pop("nbytes")
    return document


def inspection_json(found: Inspection) -> dict[str, Any]:
    """Returns the result of `inspect`."""
    if found.checkpoint is not None:
        return _checkpoint_json(found.checkpoint)
    return {
        "path": str(found.path),
        "checkpoints": [
            {
                **_checkpoint_json(each.spec, each.record),
                "tensors": len(each.spec.tensors),
                "skipped_by": each.skipped_by or None,
            }
            for each in found.listed
        ],
        "unreadable": dict(found.unreadable),
        "skipped": plain(found.skipped),
        "seen": [{"name": name, "what": what} for name, what in found.seen],
        **_attributes(found, ("needed", "notes")),
    }


def _checkpoint_json(spec: CheckpointSpec, record: Record | None = None) -> dict[str, Any]:
    return {
        **_attributes(spec, ("path", "format", "kind", "keys", "state_key", "prefix")),
        **_attributes(record or spec.record, ("step", "epoch", "metrics", "learning_rate")),
        "averaged": spec.averaged or None,
        "bytes": spec.nbytes,
        "dtypes": sorted({tensor.dtype.name for tensor in spec.tensors.values()}),
        "metadata": plain(spec.metadata),
        "batch_norm_layers": batch_norm_layers(spec.tensors),
        "tied": plain(spec.tied()),
        "notes": list(spec.notes),
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype.name,
                **_attributes(tensor, ("shape", "stride", "offset")),
                "parts": len(tensor.parts) or 1,
            }
            for tensor in spec.tensors.values()
        ],
    }
