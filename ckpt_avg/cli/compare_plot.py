"""The path of the weights as a picture: the plane of its two main directions, with the averages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_avg.cli.plots import BLUE, ORANGE, VERMILION, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ckpt_avg.commands.compare import CompareResult
    from ckpt_avg.commands.distances import ComparedCheckpoint

_MOST_LABELS = 24  # checkpoints that are labelled: more would cover each other
_PATH, _AVERAGES, _FAR = ORANGE, BLUE, VERMILION


def draw_comparison(result: CompareResult, kind: str) -> bytes:
    """Returns a picture of one of `plots.KINDS`. Raises what `plots.picture` raises."""
    return picture(lambda figure: _draw(result, figure), kind)


def _draw(result: CompareResult, figure: Figure) -> None:
    axes = figure.add_subplot()
    shown = [each for each in result.checkpoints if not each.nonfinite]
    unit = "epoch" if all(each.step is None for each in shown) else "step"
    points = [each.plane for each in shown]
    axes.plot(
        *zip(*points, strict=True),
        color=_PATH,
        marker="s",
        markersize=4,
        linestyle="--",
        linewidth=1,
        label=f"checkpoints, by {unit}",
    )
    step = -(-len(shown) // _MOST_LABELS)
    for checkpoint in shown[::-step]:
        axes.annotate(_label(checkpoint, unit), checkpoint.plane, xytext=(4, 4), textcoords="offset points", fontsize=7)
    means = [_mean(points[-size:]) for size in range(2, len(points) + 1)]
    axes.plot(
        *zip(*means, strict=True), color=_AVERAGES, marker="o", markersize=3, linewidth=1, label="average of the last k"
    )
    axes.plot(*means[-1], linestyle="none", marker="*", markersize=12, color=_AVERAGES, label="average of all")
    far = {path for finding in result.findings for path in finding.checkpoints}
    if marked := [each.plane for each in shown if each.path in far]:
        axes.plot(
            *zip(*marked, strict=True),
            linestyle="none",
            marker="x",
            markersize=10,
            markeredgewidth=2,
            color=_FAR,
            label="far off",
        )
    axes.set_aspect("equal", adjustable="datalim")  # distances look as long as they are
    axes.margins(0.1)
    axes.set_title(f"{len(shown)} checkpoints in the plane in which they differ most")
    axes.set_xlabel(f"first main direction ({result.shares[0]:.0%} of the squared distances)")
    axes.set_ylabel(f"second ({result.shares[1]:.0%})")
    axes.grid(alpha=0.3)


def _label(checkpoint: ComparedCheckpoint, unit: str) -> str:
    number = checkpoint.epoch if unit == "epoch" else checkpoint.step
    return checkpoint.path.name[:20] if number is None else str(number)


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
