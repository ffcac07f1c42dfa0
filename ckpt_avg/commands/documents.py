"""Results as JSON documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckpt_avg.output.paths import MARK
from ckpt_avg.results import attributes, plain
from ckpt_avg.version import __version__

if TYPE_CHECKING:
    from ckpt_avg.commands.compare import CompareResult
    from ckpt_avg.commands.draft import AverageResult
    from ckpt_avg.commands.soup import SoupResult
    from ckpt_avg.commands.sweep import SweepResult
    from ckpt_avg.user_code.comparison import Comparison, Evaluation
    from ckpt_avg.user_code.gate import Outcome


def average_json(result: AverageResult) -> dict[str, Any]:
    """Returns the result of `average`."""
    report = result.batch_norm
    return {
        MARK: __version__,
        **attributes(
            result, ("output", "files", "written", "checkpoints", "steps", "unit", "weights", "skipped", "tensors")
        ),
        "bytes": result.nbytes,
        **attributes(result, ("device", "engine", "data_digest", "sha256", "split")),
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
            {"requirement": outcome.requirement.text, **attributes(outcome, ("value", "threshold", "met"))}
            for outcome in outcomes
        ],
    }


def sweep_json(result: SweepResult, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the result of `sweep`, and the command that writes the best average."""
    return {
        MARK: __version__,
        **plain(result),
        "windows": [each.to_dict() for each in result.windows],
        "best": result.best.to_dict(),
        **({} if command is None else {"command": list(command)}),
    }


def compare_json(result: CompareResult) -> dict[str, Any]:
    """Returns the result of `compare`."""
    return {MARK: __version__, **plain(result)}


def soup_json(result: SoupResult, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the result of `soup`: that of `average`, how it was chosen, and the command that writes the same."""
    names = ("candidates", "skipped", "decisions", "kept", "metric", "mode", "tolerance", "split", "passes", "notices")
    repeats = {} if command is None else {"command": list(command)}
    return {**average_json(result.average), **attributes(result, names), **repeats}
