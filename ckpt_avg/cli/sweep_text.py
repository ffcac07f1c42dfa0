"""The result of `sweep` as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_avg.cli.shared_text import REFERENCE, detail_lines, measured_cells, weights_lines
from ckpt_avg.tables import WIDTH, table
from ckpt_avg.text import escaped
from ckpt_avg.user_code.comparison import difference_text

if TYPE_CHECKING:
    from ckpt_avg.commands.sweep import SweepResult


def sweep_text(result: SweepResult, command: str, *, verbose: bool = False, width: float = WIDTH) -> str:
    """Returns the table of a sweep, its best window, and the command that writes the best average."""
    reference, best, change, total = result.reference, result.best, result.change, len(result.checkpoints)
    name = result.last.name if reference is result.last else "the refreshed last checkpoint"
    several = len(result.weightings) > 1
    rows, what = (_by_rule(result), "rule") if several else (_by_metric(result), "metric")
    rule = f" with {best.weighting}" if several else ""
    steps = dict(zip(result.checkpoints, result.steps, strict=True))
    if change.verdict == "better":
        compared = f"{difference_text(change.difference, change.spread)} compared with {name}"
    elif change.verdict == "within the spread":
        compared = f"{difference_text(change.difference, change.spread)}, within the spread, compared with {name}"
    else:
        compared = f"no better than {name} ({reference.metrics[result.metric]:.6g})"
    value = best.metrics[result.metric]
    return "\n".join(
        [
            *table(rows, width, important=[best.weighting, result.metric], what=what, fold=several),
            *(detail_lines(result.engine, result.skipped) if verbose else []),
            "",
            f"best by {escaped(result.metric)}: the average of "
            f"{_window(best.side, len(best.checkpoints), total, 'the ')}{rule}, {value:.6g}, {compared}",
            *weights_lines(
                best.checkpoints, [steps[path] for path in best.checkpoints], best.weights, result.unit, width
            ),
            f"to write it{'' if change.verdict == 'better' else ' anyway'}: {command}",
        ]
    )


def _by_metric(result: SweepResult) -> list[list[str]]:
    """Returns a row for each window, with all metrics and their differences to the reference."""
    reference, order, last = result.reference, list(result.last.metrics), f"{result.last.name} (last)"
    rows = [["", *order], measured_cells(last, result.last, order, None if reference is result.last else reference)]
    if reference is not result.last:
        rows.append(measured_cells(REFERENCE, reference, order, None))
    for window in result.windows:
        label = _window(window.side, len(window.checkpoints), len(result.checkpoints))
        rows.append(measured_cells(label + ("  ← best" if window is result.best else ""), window, order, reference))
    return rows


def _by_rule(result: SweepResult) -> list[list[str]]:
    """Returns a row for each window, with the metric for each rule."""
    count = len(result.weightings)
    lasts = {f"{result.last.name} (last)": result.last}
    if result.reference is not result.last:
        lasts[REFERENCE] = result.reference
    rows = [[result.metric, *result.weightings]]
    rows += [[*measured_cells(name, each, [result.metric], None), *[""] * (count - 1)] for name, each in lasts.items()]
    for start in range(0, len(result.windows), count):
        windows = result.windows[start : start + count]
        row = [_window(windows[0].side, len(windows[0].checkpoints), len(result.checkpoints))]
        for window in windows:
            _, cell = measured_cells("", window, [result.metric], None)
            row.append(cell + (" ← best" if window is result.best else ""))
        rows.append(row)
    return rows


def _window(side: str, count: int, total: int, article: str = "") -> str:
    return f"all {total}" if count == total else f"{article}{side} {count}"
