"""The picture of a sweep: the same bytes for the same figures, what is drawn, and awkward names and numbers."""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli.results import VALUES, swept, with_rule

from ckpt_avg.cli.plots import KINDS, draw_sweep, refuse_without_matplotlib
from ckpt_avg.commands.sweep import Measured, SweepResult
from ckpt_avg.errors import OutputError, UsageError

pytest.importorskip("matplotlib")

MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[SweepResult], Any]:
    """Draws, and returns the axes instead of the picture."""
    from matplotlib.figure import Figure

    def draw(result: SweepResult) -> Any:
        figures: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
        draw_sweep(result, ".png")
        (axes,) = figures[0].axes
        return axes

    return draw


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): ([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()])
        for line in axes.get_lines()
    }


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"Run: pip install 'ckpt-avg\[plot\]'"):
        refuse_without_matplotlib()


def test_looking_for_matplotlib_does_not_import_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second, and the work comes first."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    refuse_without_matplotlib()
    assert "matplotlib" not in sys.modules


# ---------------------------------------------------------------------------------------------------------------------
# The bytes


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_result_gives_the_same_bytes(kind: str) -> None:
    """No date, no random name: a picture under version control changes only where the figures do."""
    first, second = draw_sweep(swept(), kind), draw_sweep(swept(), kind)
    assert first == second
    assert first.startswith(MAGIC[kind])
    assert draw_sweep(swept(last=0.6), kind) != first


def test_no_state_of_matplotlib_changes() -> None:
    """The user's own code may draw too."""
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_sweep(swept(), ".png")
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def test_a_line_for_each_side_and_the_best(drawn: Callable[[SweepResult], Any]) -> None:
    """The average of all belongs to both lines."""
    axes = drawn(swept())
    assert lines(axes) == {
        "average of the last k": ([1, 2, 3], [0.5, 0.75, 0.625]),
        "average of the first k": ([1, 2, 3], [0.25, 0.5, 0.625]),
        "last checkpoint: step_3.pt, statistics refreshed": ([0, 1], [0.5, 0.5]),
        "best (0.75)": ([2], [0.75]),
    }
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == list(lines(axes))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("checkpoints averaged, k", "m")


@pytest.mark.parametrize("side", ["last", "first"])
def test_one_side_alone_has_no_other_line(drawn: Callable[[SweepResult], Any], side: str) -> None:
    """The average of all, which belongs to both sides, must not give the other one a line of a single point."""
    other = "first" if side == "last" else "last"
    found = lines(drawn(swept({(side, size): size / 4 for size in (1, 2, 3)}, (side, 3))))
    assert found[f"average of the {side} k"] == ([1, 2, 3], [0.25, 0.5, 0.75])
    assert f"average of the {other} k" not in found


def test_lines_run_from_few_to_many(drawn: Callable[[SweepResult], Any]) -> None:
    shuffled = {key: VALUES[key] for key in [("first", 2), ("last", 3), ("last", 1), ("first", 1), ("last", 2)]}
    assert lines(drawn(swept(shuffled)))["average of the first k"][0] == [1, 2, 3]


def test_several_rules_have_a_colour_each_and_a_style_for_each_side(drawn: Callable[[SweepResult], Any]) -> None:
    axes = drawn(with_rule(swept(), "ema:5", 0.125))
    found = lines(axes)
    assert [found[f"{rule}, last k"][1] for rule in ("mean", "ema:5")] == [[0.5, 0.75, 0.625], [0.625, 0.875, 0.75]]
    assert [found[f"{rule}, first k"][1] for rule in ("mean", "ema:5")] == [[0.25, 0.5, 0.625], [0.375, 0.625, 0.75]]
    styles = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()[:4]}
    assert (len(styles), len({colour for colour, _ in styles})) == (4, 2)


def test_a_best_average_of_the_first(drawn: Callable[[SweepResult], Any]) -> None:
    assert lines(drawn(swept(best=("first", 2))))["best (0.5)"] == ([2], [0.5])


# ---------------------------------------------------------------------------------------------------------------------
# Awkward names and numbers. Warnings are errors in tests.


@pytest.mark.parametrize("kind", [".png", ".svg"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_windows_and_a_last_checkpoint_without_a_number(value: float, kind: str) -> None:
    """A diverged window leaves a gap; the picture is drawn anyway."""
    values = {**VALUES, ("last", 1): value, ("first", 2): value}
    assert draw_sweep(swept(values, last=value), kind).startswith(MAGIC[kind])


@pytest.mark.parametrize(
    ("values", "last"),
    [
        ({**VALUES, ("last", 2): math.inf}, 0.5),
        (dict.fromkeys(VALUES, 0.5), 0.5),
        *(({key: scale * number for key, number in VALUES.items()}, scale) for scale in (1e-300, 1e30, -1e30)),
    ],
    ids=["infinitely good", "all the same", "very small", "very large", "very negative"],
)
def test_awkward_numbers_are_drawn(values: dict[tuple[str, int], float], last: float) -> None:
    assert draw_sweep(swept(values, last=last), ".png")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_that_matplotlib_cannot_draw() -> None:
    """At both ends of the range its axes overflow: an error that says so, and no traceback of matplotlib's."""
    with pytest.raises(OutputError, match="matplotlib could not draw it: "):
        draw_sweep(swept({**VALUES, ("last", 2): 1.7e308, ("first", 1): -1.7e308}), ".png")


@pytest.mark.parametrize("name", [r"$\bad$", "$x", "a_b^c", "50 $ to 60 $", r"\frac{", "%d {} %"])
@pytest.mark.parametrize("where", ["metric", "name"])
def test_names_are_text_and_no_formula(where: str, name: str) -> None:
    """A metric and a file may be called anything: the sweep is done by then, and must not be lost to the picture."""
    assert draw_sweep(swept(**{where: name}), ".png")  # type: ignore[arg-type]


def test_dollar_signs_are_shown(drawn: Callable[[SweepResult], Any]) -> None:
    """They are part of the name, and the text between them is not set in italics."""
    axes = drawn(swept(metric="cost in $, or US$"))
    assert axes.get_ylabel() == "cost in $, or US$"
    assert not axes.yaxis.get_label().get_parse_math()


def test_a_name_that_begins_with_an_underscore_is_in_the_legend(drawn: Callable[[SweepResult], Any]) -> None:
    axes = drawn(swept(name="_final.pt"))
    assert "last checkpoint: _final.pt, statistics refreshed" in [
        text.get_text() for text in axes.figure.legends[0].get_texts()
    ]


def test_signs_that_the_font_lacks_are_no_failure() -> None:
    """A name in Chinese shows as boxes; matplotlib warns, and the picture is drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert draw_sweep(swept(metric="精度"), ".png")


def test_many_windows() -> None:
    """Two hundred checkpoints: the ticks stay whole numbers."""
    paths = tuple(Path(f"step_{number}.pt") for number in range(200))
    windows = tuple(Measured("last", paths[-size:], {"m": 1 / size}) for size in range(1, 201))
    result = replace(swept(), checkpoints=paths, windows=windows, best=windows[0])
    assert draw_sweep(result, ".png")
