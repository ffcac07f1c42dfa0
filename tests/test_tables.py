"""Tables that fit a terminal."""

from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_avg.tables import columns_of, shortened, table, wrapped

TEXT = st.one_of(
    st.text(max_size=60),
    st.text("日本語チェックポイント한국어👍ｱ", max_size=60),
    st.text("e\u0301a\u0308\u200d-_.", max_size=90),
    st.text("abc_.0123456789", max_size=120),
)


@st.composite
def tables(draw: st.DrawFn) -> list[list[str]]:
    """Rows of up to 15 cells, with a header."""
    count = draw(st.integers(1, 15))
    cell = st.sampled_from(draw(st.lists(TEXT, min_size=1, max_size=12)))
    return draw(st.lists(st.lists(cell, min_size=count, max_size=count), min_size=1, max_size=8))


def terminal_columns(line: str) -> int:
    """By the Unicode standard's annex 11, written out a second time."""
    total = 0
    for sign in line:
        if unicodedata.category(sign) not in {"Mn", "Me", "Cf"}:
            total += {"W": 2, "F": 2}.get(unicodedata.east_asian_width(sign), 1)
    return total


@given(tables(), st.integers(80, 200))
def test_no_line_is_wider_than_the_terminal(rows: list[list[str]], width: int) -> None:
    lines = table(rows, width, constant=rows[0], what="metric")
    assert max(map(terminal_columns, lines), default=0) <= width
    assert all(line.isprintable() for line in lines)
    assert len(lines) >= len(rows)


@given(tables())
def test_columns_are_aligned(rows: list[list[str]]) -> None:
    """Whatever characters the cells before them contain."""
    marked = [[*row, "|"] for row in rows]
    places = {terminal_columns(line[: line.rindex("|")]) for line in table(marked, math.inf)}
    assert len(places) == 1


@given(TEXT, st.integers(1, 60))
def test_a_name_loses_its_middle_only_if_it_must(name: str, room: int) -> None:
    cut = shortened(name, room)
    assert columns_of(cut) <= room
    if columns_of(name) <= room:
        assert cut == name
    else:
        begin, mark, end = cut.rpartition("…")
        assert mark
        assert name.startswith(begin)
        assert name.endswith(end)


@pytest.mark.parametrize(
    ("text", "columns"),
    [("abc", 3), ("日本", 4), ("ｱ", 1), ("한", 2), ("e\u0301", 1), ("ü", 1), ("👍", 2), ("×…±", 3), ("", 0)],
)
def test_wide_and_combining_characters_are_counted(text: str, columns: int) -> None:
    assert columns_of(text) == columns


def test_a_combining_character_is_not_left_alone() -> None:
    assert shortened("abcdefe\u0301x", 3) == "a…x"


def test_what_is_the_same_in_all_rows_is_said_once() -> None:
    rows = [["name", "format", "step", "kind"], ["a", "zip", "1", "-"], ["b", "zip", "2", "-"]]
    said = ["each: format zip", "name  step", "a     1", "b     2"]
    assert table(rows, constant=["format", "kind", "step"]) == said
    assert table(rows, math.inf, constant=["format"])[0] == "name  format  step  kind", "--wide shows all"
    assert table(rows[:2], constant=["format"])[0] == "name  format  step  kind", "of a single row, all is the same"


def test_metrics_that_do_not_fit_are_named() -> None:
    metrics = [f"metric_{number:02}" for number in range(12)]
    rows = [["", *metrics], ["epoch_20.pt (last)", *["0.123456 (+0.0123)"] * 12]]
    lines = table(rows, important=["metric_07"], what="metric")
    assert lines[0].split() == ["metric_00", "metric_01", "metric_07"][: len(lines[0].split())]
    assert "metric_07" in lines[0]
    assert " ".join(lines[2:]).startswith("not shown: ")
    assert " ".join(lines[2:]).endswith("metric_11). Add --wide.")
    assert table(rows, math.inf)[0].split() == metrics


def test_long_words_and_lines_are_wrapped() -> None:
    lines = wrapped(f"{'word ' * 30}{'x' * 100} 日本語" + "語" * 60)
    assert max(map(terminal_columns, lines)) <= 80
    assert all(line.startswith("  ") for line in lines[1:])
