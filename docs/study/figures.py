"""How the documentation's pictures look, and how one that is out of date is found.

A colour, a mark and a line mean the same in every picture, and the marks and lines tell them apart in grey. Needs
matplotlib, which brings Pillow.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ckpt_avg.cli.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION

KEY = "ckpt-avg: drawn from"  # the picture's record of its inputs


class Look(NamedTuple):
    """What a kind of result looks like."""

    color: str
    marker: str
    line: str


AVERAGE = Look(BLUE, "o", "-")
SINGLE = Look(ORANGE, "s", "--")
CONVENTIONAL = Look(GREEN, "^", "-.")
ENSEMBLE = Look(PURPLE, "D", ":")
MISTAKE = Look(VERMILION, "X", ":")
WITHOUT_KINKS = Look(SKY, "v", "-")
TRAINING, HELD_OUT = Look("k", "v", "-"), Look(SKY, "P", "--")

Spread = tuple[float, float]  # mean and standard deviation over seeds


def set_style() -> None:
    """Sets what all pictures share."""
    mpl.use("Agg")
    mpl.rcParams |= {
        "axes.grid": True,
        "axes.titlesize": 10,
        "figure.titlesize": 12,
        "figure.titleweight": "bold",
        "font.size": 9,
        "grid.alpha": 0.3,
        "lines.markersize": 5,
    }


def spread(values: Sequence[float]) -> Spread:
    """Returns the mean and the standard deviation of values, one for each seed."""
    return fmean(values), stdev(values)


def rows_of(
    ax: Axes, names: Sequence[str], values: Sequence[Sequence[float] | Spread], looks: Sequence[Look], *, seeds: bool
) -> None:
    """Draws a row for each name: a mark for each seed and a bar for their mean, or the mean and its deviation."""
    for row, (each, look) in enumerate(zip(values, looks, strict=True)):
        if not each:
            middle = {"xy": (0.5, row), "xycoords": ("axes fraction", "data"), "ha": "center", "va": "center"}
            ax.annotate("not measured", **middle, color="0.45", fontsize=8)  # type: ignore[arg-type]
        elif seeds:
            ax.plot(each, [row] * len(each), look.marker, color=look.color, alpha=0.7, linestyle="none")
            ax.plot([fmean(each)], [row], "|", color="k", markersize=15, markeredgewidth=1.8)
        else:
            ax.errorbar(each[0], row, xerr=each[1], color=look.color, marker=look.marker, capsize=3, markersize=6)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)


def line(ax: Axes, xs: Sequence[float], ys: Iterable[Spread], look: Look, label: str) -> None:
    """Draws means over seeds, and a band of a standard deviation to each side."""
    means, deviations = zip(*ys, strict=True)
    ax.plot(xs, means, look.line, color=look.color, marker=look.marker, label=label)
    low, high = zip(*((m - d, m + d) for m, d in zip(means, deviations, strict=True)), strict=True)
    ax.fill_between(xs, low, high, color=look.color, alpha=0.15, linewidth=0)


def key(figure: Figure, looks: dict[str, Look], title: str, *, seeds: bool) -> None:
    """Adds a key below the panels: what each mark means, and what stands for the seeds."""
    ax = figure.axes[0]
    marks = [
        ax.plot([], [], look.marker, color=look.color, linestyle="none", label=name)[0] for name, look in looks.items()
    ]
    if seeds:
        marks.append(ax.plot([], [], "|", color="k", markersize=11, markeredgewidth=1.8, label="mean of the seeds")[0])
    figure.legend(handles=marks, title=title, loc="outside lower center", ncols=len(marks))


def save(figure: Figure, path: Path, inputs: str) -> None:
    """Writes a picture with the digest of what it was drawn from."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    plt.close(figure)
    # A palette takes half the bytes.
    write_png(Image.open(drawn).convert("RGB").quantize(256), path, inputs)


def write_png(image: Image.Image, path: Path, inputs: str) -> None:
    """Writes an image as PNG with the digest of what it was drawn from."""
    record = PngInfo()
    record.add_text(KEY, inputs)
    image.save(path, pnginfo=record, optimize=True)


def digest_of(parts: Iterable[bytes]) -> str:
    """Returns a digest of what a picture is drawn from."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(hashlib.sha256(part).digest())
    return sha256.hexdigest()


def recorded(path: Path) -> str | None:
    """Returns the digest that a picture records."""
    with Image.open(path) as image:
        found = image.info.get(KEY)
    return found if isinstance(found, str) else None
