"""Draws the pictures of the documentation again, from what the repository contains.

    python docs/study/pictures.py

The numbers come from `weightings.json` and `choices.json`, which the scripts of the same names write, from the tables
of `docs/study.md`, which `study.py` prints, and from the fixture run. Each picture records the digest of its numbers
and of the code that draws it, and `--check` compares these with the present ones.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from figures import (
    AVERAGE,
    CONVENTIONAL,
    ENSEMBLE,
    HELD_OUT,
    MISTAKE,
    SINGLE,
    TRAINING,
    WITHOUT_KINKS,
    Look,
    Spread,
    digest_of,
    key,
    line,
    recorded,
    rows_of,
    save,
    set_style,
    spread,
    write_png,
)
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

STUDY = Path(__file__).resolve().parent
DOCS, ROOT = STUDY.parent, STUDY.parents[1]
PAGE = DOCS / "study.md"
FIXTURE = ROOT / "fixtures" / "mnist_cnn"
PLOTS = ROOT / "ckpt_avg" / "cli"

Table = list[dict[str, str]]


# -- The tables of the page -------------------------------------------------------------------------------------------


def tables_with(*columns: str) -> list[Table]:
    """Returns the page's tables with these first columns, in order, as a list of rows."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", PAGE.read_text(), re.MULTILINE):
        lines = [[cell.strip() for cell in each.strip("|").split("|")] for each in block.splitlines()]
        if lines[0][: len(columns)] == list(columns):
            # Columns of one name are kept apart by their position.
            names = [f"{name} {i}" if lines[0].count(name) > 1 else name for i, name in enumerate(lines[0])]
            found.append([dict(zip(names, row, strict=True)) for row in lines[2:]])
    assert found, f"{PAGE}: expected a table with the columns {columns}"
    return found


def number(cell: str) -> Spread:
    """Returns mean and deviation of a cell such as "1.5 ± 0.1" or "(1.5 ± 0.1)·10⁻²"."""
    power = re.search(r"·10(⁻?)([⁰¹²³⁴⁵⁶⁷⁸⁹]+)", cell)
    scale = 1.0
    if power:
        digits = power[2].translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789"))
        scale = 10.0 ** ((-1 if power[1] else 1) * int(digits))
    mean, deviation = re.match(r"\(?([-+]?[\d.]+) ± ([\d.]+)", cell).groups()  # type: ignore[union-attr]
    return float(mean) * scale, float(deviation) * scale


# -- The pictures -----------------------------------------------------------------------------------------------------


def draw_scores() -> Figure:
    """Mean and deviation of each method."""
    table = tables_with("", "accuracy, %", "loss")[0]
    names = [row[""] for row in table]
    looks = [_look_of(name) for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.7), sharey=True, layout="constrained")
    for ax, column, label in (
        (axes[0], "accuracy, %", "held-out accuracy, %  (right is better)"),
        (axes[1], "loss", "held-out loss, nats  (left is better)"),
    ):
        rows_of(ax, names, [number(row[column]) for row in table], looks, seeds=False)
        ax.set_xlabel(label)
    kinds = {
        "single checkpoints": SINGLE,
        "average": AVERAGE,
        "average with the last statistics": MISTAKE,
        "ensemble": ENSEMBLE,
        "conventional schedule": CONVENTIONAL,
    }
    key(figure, kinds, "mean ± standard deviation, 8 seeds", seeds=False)
    figure.suptitle("The average beats single checkpoints and matches the ensemble; stale statistics spoil it")
    return figure


def _look_of(method: str) -> Look:
    if method == "average of 12, last statistics":
        return MISTAKE
    kinds = {"average": AVERAGE, "ensemble": ENSEMBLE, "conventional": CONVENTIONAL}
    return kinds.get(method.split(maxsplit=1)[0], SINGLE)


def draw_limit() -> Figure:
    """Distance of predictions against Δ, and its slope."""
    distances = tables_with("t", "Δ(t)")[0]
    kinks, smooth = tables_with("t", "ensemble, logits")
    deltas = [number(row["Δ(t)"])[0] for row in distances]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for column, look, slope, label in (
        ("single, logits", SINGLE, 1, "single checkpoints"),
        ("ensemble, logits", ENSEMBLE, 2, "ensemble of 12"),
    ):
        values = [number(row[column]) for row in distances]
        line(axes[0], deltas, values, look, label)
        guide = [values[0][0] * (delta / deltas[0]) ** slope for delta in deltas]
        axes[0].plot(deltas, guide, color="0.3", linewidth=0.9, linestyle={1: (0, (1, 1)), 2: (0, (5, 3))}[slope])
        axes[0].annotate(f"slope {slope}", (deltas[-1], guide[-1]), xytext=(6, -3), textcoords="offset points")
    axes[0].set(
        xscale="log",
        yscale="log",
        xlabel="Δ, distance of the checkpoints from their mean (log scale)",
        ylabel="distance of logits from the average's, RMS (log scale)",
        title="the ensemble comes close faster than single checkpoints do",
    )
    axes[0].xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 3)))
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].xaxis.set_minor_locator(mpl.ticker.NullLocator())
    steps = range(len(kinks))
    for table, column, look, label in (
        (smooth, "ensemble, logits", WITHOUT_KINKS, "ensemble, network without kinks"),
        (kinks, "ensemble, logits", ENSEMBLE, "ensemble, ReLU and max pooling"),
        (kinks, "single, logits", SINGLE, "single checkpoints"),
    ):
        line(axes[1], list(steps), [number(row[column]) for row in table], look, label)
    axes[1].set_xticks(steps, [row["t"].replace(" to ", "\nto ") for row in kinks])
    axes[1].set(
        ylim=(0.8, 2.2),
        xlabel="t: checkpoints drawn towards their mean",
        ylabel="slope",
        title="the slope is 1.5 here, and 2 without kinks",
    )
    axes[0].legend(title="mean ± standard deviation, 5 seeds", loc="lower right")
    axes[1].legend(loc="center right", bbox_to_anchor=(1, 0.32))
    figure.suptitle("Averaging weights approaches averaging predictions, and faster in a network without kinks")
    return figure


def draw_rays() -> Figure:
    """Training loss and held-out error along rays: those of the average, and what the others differ by."""
    kinds = tables_with("d", "training loss")
    titles = ("uniform rays", "filter-normalised rays")
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex="col", sharey="row", layout="constrained")
    for column, (table, title) in enumerate(zip(kinds, titles, strict=True)):
        names = list(table[0])
        xs = [float(row["d"]) for row in table]
        average = [number(row["training loss"]) for row in table]
        line(axes[0, column], xs, average, AVERAGE, "average of 12")
        axes[1, column].axhline(100, color=AVERAGE.color, label="average of 12")
        for name, look, label in (
            (names[2], SINGLE, "last checkpoint"),
            (names[3], CONVENTIONAL, "conventional schedule"),
        ):
            less = [number(row[name]) for row in table]  # the average's less the other's
            pairs = list(zip(average, less, strict=True))
            means = [a[0] - d[0] for a, d in pairs]
            axes[0, column].plot(xs, means, look.line, color=look.color, marker=look.marker, label=label)
            relative = [(100 * (a[0] - d[0]) / a[0], 100 * d[1] / a[0]) for a, d in pairs]
            line(axes[1, column], xs, relative, look, label)
        axes[0, column].set(yscale="log", title=title)
        axes[1, column].set_xlabel(
            "d" + (", with noise as large as the filters at 1" if column else ", in weight space")
        )
    axes[0, 0].set_ylabel("training loss, nats (log scale)")
    axes[1, 0].set_ylabel("training loss, % of the average's\n(band: standard deviation over 5 seeds, paired)")
    for ax in axes[:, 0]:
        ax.legend(loc="upper left")
    figure.suptitle("The average is flatter than the last checkpoint, and no flatter than the conventional schedule")
    return figure


def draw_lines() -> Figure:
    """Losses on the lines from the average to the two other solutions."""
    table = tables_with("position")[0]
    at = [float(row["position"]) for row in table]
    where = sorted([*at, 0.0])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for ax, other in zip(axes, ("last checkpoint", "conventional schedule"), strict=True):
        for measure, look in (("training loss", TRAINING), ("held-out loss", HELD_OUT)):
            values = {x: number(row[f"to the {other}: {measure}"]) for x, row in zip(at, table, strict=True)}
            values[0.0] = (0.0, 0.0)
            line(ax, where, [values[x] for x in where], look, measure)
        for position, name in ((0, "average"), (1, other)):
            ax.axvline(position, color="k", linewidth=0.8)
            ax.annotate(name, (position, 0.03), xycoords=("data", "axes fraction"), xytext=(3, 0),
                        textcoords="offset points", fontsize=8)  # fmt: skip
        ax.axhline(0, color="k", linewidth=0.8)
        ax.set(xlabel=f"position on the line: 0 is the average, 1 the {other}", title=f"to the {other}")
    axes[0].set_ylabel("loss less that of the average, nats")
    axes[0].legend(loc="upper left", title="mean ± standard deviation, 5 seeds")
    figure.suptitle("No barrier on the way to either solution: the loss stays low between them")
    return figure


def draw_weightings() -> Figure:
    """Each rule's loss less that of the mean, a mark for each seed."""
    data = _read("weightings")
    panels = {"fixture run": [{name: each["loss"] for name, each in seed.items()} for seed in data["fixture run"]]}
    for window in data["language model"][0]:
        panels[f"language model, last {window} steps"] = [seed[window] for seed in data["language model"]]
    names = [name for name in dict.fromkeys(name for seeds in panels.values() for name in seeds[0]) if name != "mean"]
    names.sort(key=["last checkpoint", *names].index)
    looks = [
        SINGLE if name == "last checkpoint" else CONVENTIONAL if name.startswith("decayed") else AVERAGE
        for name in names
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4.6), sharey=True, layout="constrained")
    for ax, (title, seeds) in zip(axes, panels.items(), strict=True):
        less = [[seed[name] - seed["mean"] for seed in seeds if name in seed] for name in names]
        rows_of(ax, names, less, looks, seeds=True)
        ax.axvline(0, color="k", linewidth=0.9)
        ax.locator_params(axis="x", nbins=5)
        ax.set(title=f"{title}, {len(seeds)} seeds", xlabel="held-out loss less that of equal weights, nats")
    kinds = {"other weights": AVERAGE, "decayed rate": CONVENTIONAL, "last checkpoint": SINGLE}
    key(figure, kinds, "a mark for each seed", seeds=True)
    figure.suptitle("Left of the line beats equal weights: the window and the rate matter more than the weights")
    return figure


def draw_window() -> Figure:
    """The loss of the average of the last k checkpoints, less that of the last one alone."""
    seeds = _read("choices")
    counts = range(1, 13)
    names = ["last checkpoint", *(f"last {count}" for count in range(2, 12)), "average of 12"]
    less = [[seed[name]["loss"] - seed[names[0]]["loss"] for name in names] for seed in seeds]
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for values in less:
        axes.plot(counts, values, color="0.6", linewidth=0.8)
    axes.plot([], [], color="0.6", linewidth=0.8, label=f"each of {len(seeds)} seeds")
    line(
        axes,
        list(counts),
        [spread(values) for values in zip(*less, strict=True)],
        AVERAGE,
        "their mean ± standard deviation",
    )
    axes.plot(
        1, 0, SINGLE.marker, color=SINGLE.color, markersize=9, linestyle="none", label="the last checkpoint alone"
    )
    axes.axhline(0, color="k", linewidth=0.9)
    axes.set(
        xlabel="k: the last k checkpoints are averaged, one per epoch",
        ylabel="held-out loss less that of the last\ncheckpoint, nats (lower is better)",
    )
    axes.set_xticks(counts)
    axes.legend()
    figure.suptitle("The first few checkpoints bring most of the gain")
    return figure


def draw_mistakes() -> Figure:
    """Loss and accuracy with one thing changed."""
    seeds = _read("choices")
    reference = "average of 12"
    names = [name for name in seeds[0] if not name.startswith("last")]
    less = {name: [seed[name]["loss"] - seed[reference]["loss"] for seed in seeds] for name in names}
    ruined = {name for name in names if spread(less[name])[0] > 0.1}
    looks = [AVERAGE if name == reference else MISTAKE if name in ruined else SINGLE for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.4), sharey=True, layout="constrained")
    shown = [name.replace("`", "") for name in names]
    rows_of(axes[0], shown, [less[name] for name in names], looks, seeds=True)
    rows_of(axes[1], shown, [[100 * seed[name]["accuracy"] for seed in seeds] for name in names], looks, seeds=True)
    most = 1.15 * max(abs(value) for name in names if name not in ruined for value in less[name])
    axes[0].set_xlim(-most, most)
    for name in ruined:
        note = f"off the scale: {spread(less[name])[0]:+.1f} →"
        axes[0].annotate(note, (0.97, names.index(name)), xycoords=("axes fraction", "data"), ha="right", va="center")
    axes[0].axvline(0, color="k", linewidth=0.9)
    axes[0].set_xlabel("held-out loss less that of the average of 12, nats (left is better)")
    axes[1].set_xlabel("held-out accuracy, %  (right is better)")
    kinds = {"as recommended": AVERAGE, "one thing changed": SINGLE, "changed, and ruined": MISTAKE}
    key(figure, kinds, f"a mark for each of {len(seeds)} seeds", seeds=True)
    figure.suptitle("Two mistakes ruin the model: the wrong data for the refresh, and weights of another run")
    return figure


def draw_comparing() -> Image.Image:
    """What `ckpt-avg compare --plot` draws of the fixture run."""
    from ckpt_avg import compare
    from ckpt_avg.cli.compare_plot import draw_comparison

    drawn = draw_comparison(compare(FIXTURE), ".png")
    return Image.open(io.BytesIO(drawn)).convert("RGB").quantize(256)


def draw_sweep() -> Image.Image:
    """What `ckpt-avg sweep --plot` draws of the last eight checkpoints of the fixture run."""
    from runs import train  # finds the fixture's script

    from ckpt_avg import sweep
    from ckpt_avg.cli import plots

    result = sweep(
        FIXTURE,
        last=8,
        windows="last",
        minimize="loss",
        model=train.make_model,
        data=train.train_loader,
        evaluate=train.evaluate,
    )
    return Image.open(io.BytesIO(plots.draw_sweep(result, ".png"))).convert("RGB").quantize(256)


def _read(name: str) -> Any:
    return json.loads((STUDY / f"{name}.json").read_text())


# -- What each is drawn from ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A picture of the documentation.

    Attributes:
        path: where it is.
        draw: draws it.
        inputs: the contents of what it is drawn from, the code included.
    """

    path: Path
    draw: Callable[[], Figure | Image.Image]
    inputs: Callable[[], Iterable[bytes]]

    @property
    def digest(self) -> str:
        """The digest of what it would be drawn from now."""
        return digest_of(self.inputs())


def _of_tables() -> Iterable[bytes]:
    tables = re.findall(r"^\|.*\|$", PAGE.read_text(), re.MULTILINE)
    return ["\n".join(tables).encode(), *_code()]


def _of_scores(name: str) -> Callable[[], Iterable[bytes]]:
    return lambda: [(STUDY / f"{name}.json").read_bytes(), *_code()]


def _of_fixture() -> Iterable[bytes]:
    checkpoints = [path.read_bytes() for path in sorted(FIXTURE.glob("*.pt"))]
    return [*checkpoints, *((PLOTS / name).read_bytes() for name in ("plots.py", "compare_plot.py"))]


def _code() -> list[bytes]:
    return [(STUDY / name).read_bytes() for name in ("pictures.py", "figures.py")]


PICTURES = (
    Picture(STUDY / "scores.png", draw_scores, _of_tables),
    Picture(STUDY / "limit.png", draw_limit, _of_tables),
    Picture(STUDY / "rays.png", draw_rays, _of_tables),
    Picture(STUDY / "lines.png", draw_lines, _of_tables),
    Picture(STUDY / "weightings.png", draw_weightings, _of_scores("weightings")),
    Picture(STUDY / "window.png", draw_window, _of_scores("choices")),
    Picture(STUDY / "mistakes.png", draw_mistakes, _of_scores("choices")),
    Picture(DOCS / "comparing.png", draw_comparing, _of_fixture),
    Picture(DOCS / "sweep.png", draw_sweep, _of_fixture),
)


def main() -> None:
    """Draws all pictures, or checks them."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    parser.add_argument("--check", action="store_true", help="draw nothing; fail if one is out of date")
    check = parser.parse_args().check
    outdated = [
        picture for picture in PICTURES if not picture.path.exists() or recorded(picture.path) != picture.digest
    ]
    if check:
        for picture in outdated:
            print(f"{picture.path}: out of date. Run: python docs/study/pictures.py", file=sys.stderr)
        sys.exit(1 if outdated else 0)
    set_style()
    for picture in outdated:
        drawn = picture.draw()
        if isinstance(drawn, Figure):
            save(drawn, picture.path, picture.digest)
        else:
            write_png(drawn, picture.path, picture.digest)
        print(picture.path)


if __name__ == "__main__":
    main()
