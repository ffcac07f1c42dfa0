"""Text that several commands print: names of checkpoints, skipped files, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_avg.tables import WIDTH, shortened, table
from ckpt_avg.text import distinct_names, ends, escaped, one_line, quote, safe_text
from ckpt_avg.user_code.comparison import Evaluation, difference_text, spread_of

if TYPE_CHECKING:
    from ckpt_avg.commands.sweep import Measured
    from ckpt_avg.runs.run_folder import Skipped

REFERENCE = "last, statistics refreshed"


def names_text(paths: Sequence[Path]) -> str:
    """Returns the names of checkpoints; of many, the first and the last ones."""
    return ends([escaped(name) for name in distinct_names(paths)])


def path_lines(paths: Iterable[str | Path], width: float = WIDTH) -> list[str]:
    """Returns a line for each path, without its middle if it is longer than a line."""
    texts = [safe_text(one_line(path)) for path in paths]
    return [f"  {text if math.isinf(width) else shortened(text, int(width) - 2)}" for text in texts]


def detail_lines(engine: str, skipped: Sequence[Skipped]) -> list[str]:
    """Returns what ``--verbose`` adds to the result of a command that computes."""
    return [f"computed by the {engine} engine", *skipped_lines(skipped)]


def skipped_lines(items: Sequence[Skipped]) -> list[str]:
    """Returns a line for each skipped entry, with the reason."""
    return [f"skipped: {quote(item.path.name)}: {one_line(item.reason)}" for item in items]


def weights_lines(
    checkpoints: Sequence[Path],
    steps: Sequence[int | None],
    weights: Sequence[float] | None,
    unit: str = "step",
    width: float = WIDTH,
) -> list[str]:
    """Returns a table of checkpoints and their unequal weights; nothing if these are None."""
    if weights is None:
        return []
    names = distinct_names(checkpoints)
    rows = [
        (name, "-" if step is None else str(step), f"{each:.6g}")
        for name, step, each in zip(names, steps, weights, strict=True)
    ]
    return table([("checkpoint", unit, "weight"), *rows], width, constant=[unit])


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
