"""A sweep as a picture. matplotlib draws it; it is an optional dependency (the extra ``plot``)."""

from __future__ import annotations

import importlib.util
import io
import os
from typing import TYPE_CHECKING

from ckpt_avg.errors import UsageError

if TYPE_CHECKING:
    from ckpt_avg.sweeping import SweepResult

KINDS = ("png", "svg", "pdf")


def kind_of(path: str | os.PathLike[str]) -> str:
    """Returns the kind of picture that a path's suffix asks for.

    Raises:
        UsageError: it is none of those, or matplotlib is missing.
    """
    kind = os.path.splitext(path)[1].removeprefix(".").lower()
    if kind not in KINDS:
        raise UsageError(f"--plot {path}: expected a name that ends in {', '.join('.' + each for each in KINDS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot: matplotlib draws the picture, and it is not installed. pip install 'ckpt-avg[plot]'")
    return kind


def draw_sweep(result: SweepResult, kind: str) -> bytes:
    """Returns a picture: the metric over the number of checkpoints averaged, a line for each side of the run."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Without date and random names the same figures give the same bytes.
    with rc_context({"svg.hashsalt": "ckpt-avg"}):
        figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for side, colour, marker in (("last", "C0", "o"), ("first", "C1", "s")):
            of_side = [
                window
                for window in result.windows
                if window.side == side or len(window.checkpoints) == len(result.checkpoints)
            ]
            if any(window.side == side for window in of_side):
                of_side.sort(key=lambda window: len(window.checkpoints))
                axes.plot(
                    [len(window.checkpoints) for window in of_side],
                    [window.metrics[result.metric] for window in of_side],
                    color=colour,
                    marker=marker,
                    markersize=4,
                    label=f"average of the {side} k",
                )
        axes.axhline(
            result.last.metrics[result.metric],
            color="0.4",
            linestyle="--",
            label=f"{result.last.name}, as it is",
        )
        best = result.best
        axes.plot(
            [len(best.checkpoints)],
            [best.metrics[result.metric]],
            linestyle="none",
            marker="*",
            markersize=14,
            color="C3",
            label=f"best ({best.metrics[result.metric]:.6g})",
        )
        axes.set_xlabel("checkpoints averaged, k")
        axes.set_ylabel(result.metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        picture = io.BytesIO()
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        figure.savefig(picture, format=kind, metadata=metadata)
    return picture.getvalue()
