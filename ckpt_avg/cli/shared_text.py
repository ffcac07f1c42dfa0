"""Text that several commands print: names of checkpoints, skipped files, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_avg.text import distinct_names, ends, escaped, one_line, quote, table
from ckpt_avg.user_code.comparison import Evaluation, difference_text, spread_of

if TYPE_CHECKING:
    from ckpt_avg.commands.sweep import Measured
    from ckpt_avg.runs.run_folder import Skipped

REFERENCE = "last, statistics refreshed"


def names_text(paths: Sequence[Path]) -> str:
    """Returns the names of checkpoints; of many, the first and the last ones."""
    return ends([escaped(name) for name in distinct_names(paths)])


def skipped_lines(items: Sequence[Skipped]) -> list[str]:
    """Returns a line for each skipped entry, with the reason."""
    return [f"skipped: {quote(item.path.name)}: {one_line(item.reason)}" for item in items]


def weights_lines(
    checkpoints: Sequence[Path], steps: Sequence[int | None], weights: Sequence[float] | None, unit: str = "step"
) -> list[str]:
    """Returns a table of checkpoints and their unequal weights, at most 80 columns wide; nothing if these are None."""
    if weights is None:
        return []
    numbers = [("-" if step is None else str(step), f"{each:.6g}") for step, each in zip(steps, weights, strict=True)]
    room = 80 - sum(2 + max(map(len, column)) for column in zip((unit, "weight"), *numbers, strict=True))
    names = [
        escaped(name if len(name) <= room else f"{name[: room - 26]}…{name[-25:]}")
        for name in distinct_names(checkpoints)
    ]
    rows = [(name, *cells) for name, cells in zip(names, numbers, strict=True)]
    return table([("checkpoint", unit, "weight"), *rows])


def measured_cells(
    name: str, measured: Evaluation | Measured, order: Sequence[str], reference: Evaluation | None
) -> list[str]:
    """Returns the cells of a measurement, with its spread and the differences to the reference."""
    cells = [name]
    for metric in order:
        spread = spread_of(measured.samples.get(metric, ()))
        cell = f"{measured.metrics[metric]:.6g}" + ("" if spread is None else f" ±{spread:.2g}")
        if reference is not None:
            difference = measured.metrics[metric] - reference.metrics[metric]
            cell += "" if math.isnan(difference) else f" ({difference_text(difference)})"
        cells.append(cell)
    return cells
