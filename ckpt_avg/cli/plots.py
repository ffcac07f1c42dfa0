"""Pictures, drawn by matplotlib, an optional dependency (the extra ``plot``): of a sweep, and what all share."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from ckpt_avg.errors import OutputError, UsageError
from ckpt_avg.text import safe_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ckpt_avg.commands.sweep import SweepResult

_LONGEST = 60  # characters of a name that fit under the picture

# Colours of Okabe and Ito, which most colour-blind people tell apart; shapes tell them apart too.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, "k")  # vermilion is the best
_MARKERS = ("o", "s", "^", "D", "v", "P")

KINDS = (".png", ".svg", ".pdf")


def refuse_without_matplotlib() -> None:
    """Raises UsageError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed. Run: pip install 'ckpt-avg[plot]'")


def draw_sweep(result: SweepResult, kind: str) -> bytes:
    """Returns a picture of one of the `KINDS`: the metric over the number of checkpoints, a line for each side.

    Raises what `picture` raises.
    """
    return picture(lambda figure: _draw_sweep(result, figure), kind)


def picture(draw: Callable[[Figure], None], kind: str) -> bytes:
    """Returns what ``draw`` draws, with a legend below it, as a picture of one of the `KINDS`.

    Raises OutputError if matplotlib cannot draw it, for example numbers near the end of float64's range.
    """
    try:
        return _saved(draw, kind.removeprefix("."))
    except Exception as error:
        raise OutputError(f"matplotlib could not draw it: {type(error).__name__}: {error}.") from error


def _saved(draw: Callable[[Figure], None], kind: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Without dates and random names the same figures give the same bytes. Names with a $ are not formulas.
    with rc_context({"svg.hashsalt": "ckpt-avg", "text.parse_math": False, "text.usetex": False}):
        figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
        draw(figure)
        figure.legend(loc="outside lower center", ncols=2)
        contents = io.BytesIO()
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        figure.savefig(contents, format=kind, metadata=metadata)
    return contents.getvalue()


def _draw_sweep(result: SweepResult, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    sides = ("last", "first")
    lines = [(rule, side) for rule in result.weightings for side in sides]
    for rule, side in lines:
        of_side = [
            window
            for window in result.windows
            if window.weighting == rule and (window.side == side or len(window.checkpoints) == len(result.checkpoints))
        ]
        if any(window.side == side for window in of_side):
            of_side.sort(key=lambda window: len(window.checkpoints))
            several = len(result.weightings) > 1
            look = result.weightings.index(rule) if several else sides.index(side)
            axes.plot(
                [len(window.checkpoints) for window in of_side],
                [window.metrics[result.metric] for window in of_side],
                color=_COLOURS[look % len(_COLOURS)],
                linestyle=":" if several and side == "first" else "-",
                marker=_MARKERS[look % len(_MARKERS)],
                markersize=4,
                label=f"{rule}, {side} k" if several else f"average of the {side} k",
            )
    axes.axhline(
        result.reference.metrics[result.metric],
        color="0.4",
        linestyle="--",
        label=f"last checkpoint: {_short(safe_text(result.reference.name))}",
    )
    best = result.best
    axes.plot(
        [len(best.checkpoints)],
        [best.metrics[result.metric]],
        linestyle="none",
        marker="*",
        markersize=14,
        color=VERMILION,
        label=f"best ({best.metrics[result.metric]:.6g})",
    )
    axes.set_title(f"Best: the average of {safe_text(best.name)}")
    axes.set_xlabel("checkpoints averaged, k")
    axes.set_ylabel(safe_text(result.metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.set_xlim(left=0.5)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 :]}"
