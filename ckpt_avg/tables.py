"""Tables that fit a terminal.

What is the same in all rows has one line, long names lose their middle, and columns that do not fit are named.
"""

from __future__ import annotations

import math
import shutil
import sys
import unicodedata
from collections.abc import Collection, Sequence

from ckpt_avg.text import ends, one_line, plural, safe_text

WIDTH = 80  # columns of a terminal that is not known
_GAP = 2  # spaces between columns
_LEAST = 12  # columns of a name or a header that is cut


def terminal_width() -> int:
    """Returns the columns of the terminal that stdout is, at least 80; 80 if it is none."""
    return max(WIDTH, shutil.get_terminal_size().columns) if sys.stdout is not None and sys.stdout.isatty() else WIDTH


def columns_of(text: str) -> int:
    """Returns how many columns of a terminal a text takes: wide characters take two, combining characters none."""
    if text.isascii():
        return len(text)
    shown = [sign for sign in text if unicodedata.category(sign) not in ("Mn", "Me", "Cf")]
    return len(shown) + sum(unicodedata.east_asian_width(sign) in "WF" for sign in shown)


def shortened(text: str, room: int) -> str:
    """Returns a text that takes at most ``room`` columns, without its middle if it is longer."""
    if columns_of(text) <= room:
        return text
    end = _fitting(text[::-1], room - 1 - (room - 1) // 2)[::-1]
    while end and columns_of(end[0]) == 0:
        end = end[1:]  # what it combines with is cut off
    return _fitting(text, (room - 1) // 2) + "…" * (room > 0) + end


def _fitting(text: str, room: int) -> str:
    """Returns the longest beginning of a text that takes at most ``room`` columns."""
    end = 0
    for sign in text:
        room -= columns_of(sign)
        if room < 0:
            break
        end += 1
    return text[:end]


def table(
    rows: Sequence[Sequence[str]],
    width: float = WIDTH,
    *,
    constant: Collection[str] = (),
    important: Collection[str] = (),
    what: str = "column",
    fold: bool = False,
) -> list[str]:
    """Returns the lines of a table that takes at most ``width`` columns of a terminal.

    Args:
        rows: the first one is the header; the first cell of each is a name.
        width: of the terminal; infinity shows everything.
        constant: headers of the columns that are dropped, and said once, if all of several rows have the same in them,
            or a dash.
        important: headers of the columns that are shown in any case.
        what: a noun for the columns.
        fold: whether columns that do not fit follow below, or are only named.
    """
    cells = [[safe_text(one_line(cell)) for cell in row] for row in rows]
    columns = [list(column) for column in zip(*cells, strict=True)]
    if math.isinf(width):
        return _lines(columns)
    lines = []
    if len(rows) > 1:
        same = [each for each in columns[1:] if each[0] in constant and len(set(each[1:])) == 1]
        same = [each for each in same if len(rows) > 2 or each[1] == "-"]
        columns = [columns[0], *(each for each in columns[1:] if each not in same)]
        said = "; ".join(f"{each[0]} {each[1]}" for each in same if each[1] not in ("-", ""))
        lines += wrapped(f"each: {said}", width) if said else []
    shown, rest = _fit(columns, int(width), important)
    lines += _lines(shown)
    while rest and fold:
        shown, rest = _fit([columns[0], *rest], int(width), important)
        lines += _lines(shown)
    if rest:
        headers = ends([each[0] for each in rest])
        lines += wrapped(f"not shown: {plural(len(rest), what)} ({headers}). Add --wide.", width)
    return lines


def _lines(columns: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(columns_of, column)) for column in columns]
    return [
        "".join(cell + " " * (room + _GAP - columns_of(cell)) for cell, room in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]


def wrapped(text: str, width: float = WIDTH) -> list[str]:
    """Returns the lines of a text, after the first one indented; a word that is too long is cut."""
    lines: list[str] = []
    for word in safe_text(one_line(text)).split(" "):
        cut = word if math.isinf(width) else shortened(word, int(width) - _GAP)
        if lines and columns_of(f"{lines[-1]} {cut}") <= width:
            lines[-1] += f" {cut}"
        else:
            lines.append(f"{' ' * _GAP * bool(lines)}{cut}")
    return lines


def _fit(
    columns: Sequence[list[str]], width: int, important: Collection[str]
) -> tuple[Sequence[list[str]], list[list[str]]]:
    """Cuts headers, then names, then what is left; returns the columns that fit, and the others."""
    if _taken(columns) <= width:
        return columns, []
    cut = [[shortened(each[0], max(_LEAST, 0, *map(columns_of, each[1:]))), *each[1:]] for each in columns]
    cut[0] = columns[0]
    first = {place for place, each in enumerate(columns) if each[0] in important or not each[0]}
    room = width - min(_taken(columns[:1]), 2 * _LEAST)
    kept: list[int] = []
    for place in sorted(range(1, len(columns)), key=lambda place: place not in first):
        room -= _GAP + _taken(cut[place : place + 1])
        if room < 0 and kept:
            break
        kept.append(place)
    shown = [cut[0], *(cut[place] for place in sorted(kept))]
    free = width - _taken(shown) + _taken(shown[:1])
    shown[0] = [shortened(cell, max(_LEAST, free)) for cell in shown[0]]
    if (over := _taken(shown) - width) > 0:
        shown[1] = [shortened(cell, _taken(shown[1:2]) - over) for cell in shown[1]]
    return shown, [each for place, each in enumerate(columns) if place and place not in kept]


def _taken(columns: Sequence[Sequence[str]]) -> int:
    """Returns the width of a table of these columns."""
    return sum(max(map(columns_of, each)) for each in columns) + _GAP * (len(columns) - 1)
