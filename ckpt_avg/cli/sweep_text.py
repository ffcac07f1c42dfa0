"""The result of `sweep` as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_avg.cli.shared_text import REFERENCE, difference_text, measured_cells
from ckpt_avg.text import escaped, table

if TYPE_CHECKING:
    from ckpt_avg.commands.sweep import SweepResult


def sweep_text(result: SweepResult, command: str) -> str:
    """Returns the table of a sweep, its best window, and the command that writes the best average."""
    reference, best, change, total = result.reference, result.best, result.change, len(result.checkpoints)
    order = list(result.last.metrics)
    name = result.last.name
    rows = [
        ["", *order],
        measured_cells(f"{name} (last)", result.last, order, None if reference is result.last else reference),
    ]
    if reference is not result.last:
        rows.append(measured_cells(REFERENCE, reference, order, None))
        name = "the refreshed last checkpoint"
    for window in result.windows:
        label = _window(window.side, len(window.checkpoints), total) + ("  ← best" if window is best else "")
        rows.append(measured_cells(label, window, order, reference))
    if change.verdict == "better":
        compared = f"{difference_text(change.difference, change.spread)} compared with {name}"
    elif change.verdict == "within the spread":
        compared = f"{difference_text(change.difference, change.spread)}, within the spread, compared with {name}"
    else:
        compared = f"no better than {name} ({reference.metrics[result.metric]:.6g})"
    value = best.metrics[result.metric]
    return "\n".join(
        [
            *table(rows),
            "",
            f"best by {escaped(result.metric)}: the average of "
            f"{_window(best.side, len(best.checkpoints), total, 'the ')}, {value:.6g}, {compared}",
            f"to write it{'' if change.verdict == 'better' else ' anyway'}: {command}",
        ]
    )


def _window(side: str, count: int, total: int, article: str = "") -> str:
    return f"all {total}" if count == total else f"{article}{side} {count}"
