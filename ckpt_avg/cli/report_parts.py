"""What the sections of a report share: tables, numbers as text, and names of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckpt_avg.cli.html_tags import Html, join, tag
from ckpt_avg.text import distinct_names, escaped

_MOST_ROWS = 200
_LONG = 24  # rows after which a table scrolls


def table(
    caption: str,
    header: Sequence[object],
    rows: Sequence[Sequence[object]],
    *,
    texts: Collection[int] = (),
    far: Collection[int] = (),
    best: Collection[int] = (),
) -> Html:
    """Returns a table whose first column names its rows, the others being numbers.

    Args:
        caption: above it.
        header, rows: cells.
        texts: columns of words, which may break into lines.
        far: rows to mark as far off.
        best: rows to mark as the best.
    """

    def kind(column: int) -> str | None:
        return "text" if column in texts else "number" if column else None

    shown = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=kind(0)),
            *(tag("td", cell, class_=kind(column)) for column, cell in enumerate(row[1:], 1)),
            class_="far" if number in far else "best" if number in best else None,
        )
        for number, row in enumerate(rows[:_MOST_ROWS])
    ]
    more = len(rows) - len(shown)
    if more > 0:
        caption = f"{caption} (the first {len(shown)}; {more:,} more in the JSON report)"
    heads = [tag("th", cell, scope="col", class_=kind(column)) for column, cell in enumerate(header)]
    contents = tag("table", tag("caption", caption), tag("thead", tag("tr", *heads)), tag("tbody", *shown))
    is_long = len(rows) > _LONG
    return tag(
        "div", contents, class_="scroll long" if is_long else "scroll", tabindex="0", role="region", aria_label=caption
    )


def charts(*figures: Html | None) -> Html:
    """Returns charts next to each other, as far as there is room."""
    shown = [each for each in figures if each]
    return tag("div", *shown, class_="charts") if shown else Html("")


def beside(chart: Html, numbers: Html) -> Html:
    """Returns a chart and the table of its numbers next to each other, if there is room."""
    return tag("div", chart, numbers, class_="charts beside")


def number(value: float | None, digits: int = 6) -> str:
    """Returns a number as text; a dash for what is not known."""
    return "-" if value is None else f"{value:.{digits}g}"


def share(value: float | None) -> str:
    """Returns a ratio in percent."""
    return "-" if value is None else f"{100 * value:.3g} %"


def signed(value: float | None) -> str:
    """Returns a difference with its sign."""
    return "-" if value is None else f"{value + 0.0:+.3g}"


def names_of(paths: Sequence[str]) -> list[str]:
    """Returns the names of paths, with as many folders as tell them apart."""
    return [escaped(each) for each in distinct_names([Path(path) for path in paths])]


def listed(value: Any) -> str:
    """Returns a value of the metadata on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {listed(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(listed, value))
    return value if isinstance(value, str) else json.dumps(value)


def paragraphs(*texts: object) -> Html:
    """Returns paragraphs; those that are None or empty are left out."""
    return join(*(tag("p", text) for text in texts if text))


def far_off(compared: Mapping[str, Any] | None) -> set[str]:
    """Returns the paths of the checkpoints in which `compare` found something."""
    return {path for finding in compared["findings"] for path in finding["checkpoints"]} if compared else set()


def moment_of(checkpoint: Mapping[str, Any], unit: str, place: int) -> float:
    """Returns the step or epoch of a checkpoint; its position if it records none."""
    return float(place + 1 if checkpoint[unit] is None else checkpoint[unit])


def moments_of(checkpoints: Sequence[Mapping[str, Any]], unit: str) -> list[str]:
    """Returns the steps or epochs of checkpoints as text; their positions if some are not known."""
    known = all(each[unit] is not None for each in checkpoints)
    return [str(each[unit]) if known else str(place + 1) for place, each in enumerate(checkpoints)]


def points_of(pairs: Iterable[Sequence[float | None]]) -> list[tuple[float, float]]:
    """Returns the pairs whose numbers are known."""
    return [(float(x), float(y)) for x, y in pairs if x is not None and y is not None]
