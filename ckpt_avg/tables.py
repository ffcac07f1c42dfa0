"""Tables that fit a terminal: what is the same in all rows is said once, long names lose their middle, and columns that do
not fit are named below."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Sequence

from ckpt_avg.text import ends, one_line, plural, safe_text

WIDTH = 80  # columns of a terminal that is not known
_GAP = 2  # spaces between columns
_LEAST = 12  # columns of a name or a header that is cut


def columns_of(text: str) -> int:
    """Returns how many columns of a terminal a text takes: wide characters take two, combining characters none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.category(sign) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(sign) in "WF" else 1
        for sign in text
    )


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
    important: Collection[str] = (),
    what: str = "column",
    constant: Collection[str] = (),
) -> list[str]:
    """Returns the lines of a table that takes at most ``width`` columns.

    Args:
        rows: the first one is the header; the first cell of each is a name.
        width: of the terminal, in columns; infinity shows everything.
        important: headers of columns that are shown first.
        what: a noun for the columns that may not fit.
        constant: headers of the columns that may be dropped, and are said once, if all rows have the same in them.
    """
    cells = [[safe_text(one_line(cell)) for cell in row] for row in rows]
    columns = [list(column) for column in zip(*cells, strict=True)]
    lines = []
    if len(rows) > 2 and not math.isinf(width):
        same = [each for each in columns[1:] if each[0] in constant and len(set(each[1:])) == 1]
        columns = [columns[0], *(each for each in columns[1:] if each not in same)]
        said = "; ".join(f"{each[0]} {each[1]}" for each in same if each[1] not in ("-", ""))
        lines += wrapped(f"each: {said}", width) if said else []
    missing: list[str] = []
    if not math.isinf(width):
        columns, missing = _fit(columns, int(width), important)
    widths = [max(map(columns_of, column)) for column in columns]
    lines += [
        "".join(cell + " " * (room + _GAP - columns_of(cell)) for cell, room in zip(row, widths, strict=True)).rstrip()
        for row in zip(*columns, strict=True)
    ]
    if missing:
        lines += wrapped(f"not shown: {plural(len(missing), what)} ({ends(missing)}). Add --wide.", width)
    return lines


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


def _fit(columns: list[list[str]], width: int, important: Collection[str]) -> tuple[list[list[str]], list[str]]:
    """Cuts headers, then names, then columns, then what is left; returns the columns, and the headers of the others."""

    def taken(of: Sequence[Sequence[str]]) -> int:
        return sum(max(map(columns_of, each)) for each in of) + _GAP * (len(of) - 1)

    if taken(columns) <= width:
        return columns, []
    headers = [each[0] for each in columns]
    first = {place for place, header in enumerate(headers) if header in important or not header}
    for each in columns[1:]:
        each[0] = shortened(each[0], max(_LEAST, *map(columns_of, each[1:]), 0))
    longest = max(map(columns_of, columns[0]))
    room = width - min(longest, 2 * _LEAST)
    kept: list[int] = []
    for place in sorted(range(1, len(columns)), key=lambda place: place not in first):
        room -= _GAP + max(map(columns_of, columns[place]))
        if room < 0 and kept:
            break
        kept.append(place)
    shown = [columns[0], *(columns[place] for place in sorted(kept))]
    rest = taken(shown) - longest
    shown[0] = [shortened(cell, max(_LEAST, width - rest)) for cell in shown[0]]
    if (over := taken(shown) - width) > 0 and len(shown) > 1:
        shown[1] = [shortened(cell, max(map(columns_of, shown[1])) - over) for cell in shown[1]]
    return shown, [header for place, header in enumerate(headers) if place and place not in kept]
