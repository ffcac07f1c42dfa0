"""What the user's metric said, as a table for people and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt_avg.commands.sweep import SweepResult
    from ckpt_avg.user_code.evaluate import Evaluation
    from ckpt_avg.user_code.gate import Outcome


def evaluation_lines(evaluations: Sequence[Evaluation], outcomes: Sequence[Outcome]) -> list[str]:
    """Returns a table with a row for each measurement, and a line for each requirement.

    In brackets: the difference to the last checkpoint.
    """
    if not evaluations:
        return []
    checkpoints = [each for each in evaluations if each.path is not None]
    last = checkpoints[-1]
    rows: list[tuple[str, Mapping[str, float], Mapping[str, float] | None]] = [
        (f"{each.name} (last)" if each is last else each.name, each.metrics, None) for each in checkpoints
    ]
    if len(checkpoints) > 1:
        mean = {name: sum(each.metrics[name] for each in checkpoints) / len(checkpoints) for name in last.metrics}
        rows.append((f"mean of the above {len(checkpoints)}", mean, last.metrics))
    rows += [(each.name, each.metrics, last.metrics) for each in evaluations if each.path is None]
    lines = table(list(last.metrics), rows)
    return lines + [f"{'met' if outcome.met else 'NOT MET'}: {outcome}" for outcome in outcomes]


def table(
    metrics: Sequence[str], rows: Sequence[tuple[str, Mapping[str, float], Mapping[str, float] | None]]
) -> list[str]:
    """Returns lines of a table with a column for each metric.

    Args:
        metrics: their names.
        rows: what was measured, its metrics, and those that it is compared with.
    """
    cells = [["", *metrics]] + [
        [name, *(_cell(found[metric], None if base is None else base[metric]) for metric in metrics)]
        for name, found, base in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(metrics) + 1)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cell(value: float, base: float | None) -> str:
    shown = f"{value:.6g}"
    return shown if base is None else f"{shown} ({value - base:+.3g})"


def evaluations_json(evaluations: Sequence[Evaluation], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the measurements and the requirements as plain values."""
    return {
        "evaluations": [
            {
                "name": each.name,
                "path": None if each.path is None else str(each.path),
                "metrics": metrics_json(each.metrics),
            }
            for each in evaluations
        ],
        "requirements": [
            {
                "requirement": outcome.requirement.text,
                "value": _number(outcome.value),
                "threshold": _number(outcome.threshold),
                "met": outcome.met,
            }
            for outcome in outcomes
        ],
    }


def metrics_json(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Returns metrics for JSON, which knows neither NaN nor infinity: null stands for them."""
    return {name: _number(value) for name, value in metrics.items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def sweep_text(result: SweepResult, command: str) -> str:
    """Returns the table of a sweep, its best window, and the command that makes it."""
    base = result.last.metrics
    rows: list[tuple[str, Mapping[str, float], Mapping[str, float] | None]] = [
        (f"{result.last.name}, as it is", base, None)
    ]
    for window in result.windows:
        mark = "  ← best" if window is result.best else ""
        count = len(window.checkpoints)
        rows.append((f"{_name(window.side, count, len(result.checkpoints))}{mark}", window.metrics, base))
    lines = table(list(base), rows)
    best = result.best
    change = best.metrics[result.metric] - base[result.metric]
    helps = change > 0 if result.mode == "max" else change < 0
    lines += [
        "",
        f"best by {result.metric}: the average of "
        f"{_name(best.side, len(best.checkpoints), len(result.checkpoints), article='the ')}, "
        f"{best.metrics[result.metric]:.6g}, "
        + (
            f"{change:+.3g} against {result.last.name} as it is"
            if helps
            else f"which is no better than {result.last.name} as it is ({base[result.metric]:.6g})"
        ),
        f"to make it{'' if helps else ' all the same'}: {command}",
    ]
    return "\n".join(lines)


def _name(side: str, count: int, total: int, article: str = "") -> str:
    return f"all {total}" if count == total else f"{article}{side} {count}"


def sweep_json(result: SweepResult, command: Sequence[str]) -> dict[str, Any]:
    """Returns a sweep as plain values."""

    def window(index: int) -> dict[str, Any]:
        each = result.windows[index]
        return {
            "side": each.side,
            "size": len(each.checkpoints),
            "checkpoints": [str(path) for path in each.checkpoints],
            "metrics": metrics_json(each.metrics),
        }

    return {
        "checkpoints": [str(path) for path in result.checkpoints],
        "skipped": [{"path": str(item.path), "reason": item.reason} for item in result.skipped],
        "metric": result.metric,
        "mode": result.mode,
        "refreshed": result.refreshed,
        "last": {"path": str(result.last.path), "metrics": metrics_json(result.last.metrics)},
        "windows": [window(index) for index in range(len(result.windows))],
        "best": window(result.windows.index(result.best)),
        "command": list(command),
        "passes": result.passes,
        "notices": list(result.notices),
    }
