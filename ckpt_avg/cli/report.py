"""Results as text for people and as JSON for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckpt_avg.cli.report_evaluation import evaluation_lines, evaluations_json
from ckpt_avg.runs.compatibility import CompatibilityReport
from ckpt_avg.text import escaped, plural, quote, size, told_apart

if TYPE_CHECKING:
    from ckpt_avg.commands.results import AverageResult


def refreshed_text(result: AverageResult) -> str:
    """Says which weights were refreshed, over what, and where they went."""
    name = escaped(result.checkpoints[0].name or str(result.checkpoints[0]))
    done, would_be = ("copied", "would copy") if result.statistics == "none" else ("refreshed", "would refresh")
    lines = [f"{done if _is_done(result) else would_be} {name}"]
    lines += _statistics(result)
    lines += evaluation_lines(result.evaluations, result.outcomes)
    return "\n".join([*lines, _written(result)])


def average_text(result: AverageResult, *, verbose: bool = False) -> str:
    """Says what was averaged, how, and where it went; with ``verbose`` also what was left out."""
    names = [escaped(name) for name in told_apart(result.checkpoints)]
    shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, …, {names[-1]}"
    lines = [
        f"{'averaged' if _is_done(result) else 'would average'} {plural(len(names), 'checkpoint')}: {shown}",
        f"{plural(result.tensors, 'tensor')}, float64 sums on {result.device}",
    ]
    lines += _statistics(result)
    lines += evaluation_lines(result.evaluations, result.outcomes)
    lines.append(_written(result))
    if verbose:
        lines += [f"left out: {quote(item.path.name)}: {item.reason}" for item in result.skipped]
    elif result.skipped:
        lines.append(f"{plural(len(result.skipped), 'entry')} left out (-v says why)")
    return "\n".join(lines)


def _statistics(result: AverageResult) -> list[str]:
    report = result.batch_norm
    if report is not None:
        how = "" if report.estimator == "pooled" else f" ({report.estimator})"
        return [
            f"BatchNorm statistics of {plural(len(report.statistics), 'layer')} recomputed over "
            f"{plural(report.samples, 'sample')} in {plural(report.batches, 'batch')}{how}"
        ]
    if result.statistics == "none":
        return []
    return [
        {
            "refreshed": "BatchNorm statistics would be recomputed",
            "mean": "BatchNorm statistics: the mean of the checkpoints'",
            "copied": "BatchNorm statistics: the checkpoint's own",
            "frozen": "BatchNorm statistics: frozen, as in every checkpoint",
        }[result.statistics]
    ]


def _is_done(result: AverageResult) -> bool:
    """Whether it was made, if not published: a dry run measures nothing."""
    return result.written or bool(result.evaluations)


def _written(result: AverageResult) -> str:
    if any(not outcome.met for outcome in result.outcomes):
        return f"{result.output} is not written"
    return f"{'wrote' if result.written else 'would write'} {result.output} ({size(result.nbytes)})"


def average_json(result: AverageResult) -> dict[str, Any]:
    """Returns the result as plain values."""
    report = result.batch_norm
    return {
        "output": str(result.output),
        "written": result.written,
        "checkpoints": [str(path) for path in result.checkpoints],
        "skipped": [{"path": str(item.path), "reason": item.reason} for item in result.skipped],
        "tensors": result.tensors,
        "bytes": result.nbytes,
        "device": result.device,
        "data_digest": result.data_digest,
        "sha256": result.sha256,
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
        **evaluations_json(result.evaluations, result.outcomes),
        "notices": list(result.notices),
    }


def compatibility_text(report: CompatibilityReport, *, verbose: bool = False) -> str:
    """Says that the checkpoints fit together; with ``verbose`` also which they are, and what was left out."""
    lines = [str(report)]
    if verbose:
        lines += [f"  {path}" for path in report.checkpoints]
        lines += [f"left out: {quote(item.path.name)}: {item.reason}" for item in report.skipped]
    return "\n".join(lines)


def compatibility_json(report: CompatibilityReport) -> dict[str, Any]:
    """Returns every difference as plain values."""
    return {
        "compatible": report.compatible,
        "checkpoints": list(report.checkpoints),
        "tensors": report.tensors,
        "differences": [
            {
                "tensor": difference.tensor,
                "aspect": difference.aspect,
                "expected": difference.expected,
                "found": difference.found,
                "checkpoints": list(difference.checkpoints),
            }
            for difference in report.differences
        ],
        "advice": "" if report.compatible else report.advice,
        "skipped": [{"path": str(item.path), "reason": item.reason} for item in report.skipped],
        "notices": list(report.notices),
    }
