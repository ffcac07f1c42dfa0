"""How results are shown: a few lines for people, a small table for notebooks, plain values for programs."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ckpt_avg.text import ends, escaped, one_line, plural, safe_text

_WIDTH = 88  # characters of a line
_LINES = 10
_ROWS = 20  # of a table in HTML
_LONGEST_CELL = 400  # characters


class Rows(NamedTuple):
    """A table for notebooks."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Result:
    """Base of what the public functions return: a summary instead of the ``repr`` of all values."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as ``--json`` prints them: NaN and infinity are None, paths are texts."""
        found: dict[str, Any] = plain(self)
        return found

    def _title(self) -> str:
        """Returns the result in a few words."""
        raise NotImplementedError

    def _facts(self) -> Iterator[tuple[str, str]]:
        """Yields attributes and what to say of them, the most important first."""
        yield from ()

    def _tables(self) -> Iterator[Rows]:
        """Yields tables that notebooks show as well."""
        yield from ()

    def __repr__(self) -> str:
        facts = [(name, _printable(text)) for name, text in self._facts() if text]
        if not facts:
            return _cut(f"{type(self).__name__}({_printable(self._title())})")
        width = max(len(name) for name, _ in facts)
        lines = [f"{type(self).__name__}: {_printable(self._title())}"]
        lines += [f"  {name.ljust(width)}  {text}" for name, text in facts]
        return "\n".join(map(_cut, lines[:_LINES]))

    def _repr_html_(self) -> str:
        left = 'style="text-align: left; vertical-align: top"'
        rows = [
            f"<tr><th {left}>{_cell(name)}</th><td {left}>{_cell(text)}</td></tr>"
            for name, text in self._facts()
            if text
        ]
        parts = [f"<p><b>{type(self).__name__}</b>: {_cell(self._title())}</p>", _html_table(rows)]
        for table in self._tables():
            head = "".join(f"<th {left}>{_cell(name)}</th>" for name in table.header)
            shown = ("".join(f"<td {left}>{_cell(cell)}</td>" for cell in row) for row in table.rows[:_ROWS])
            rows = [f"<tr>{cells}</tr>" for cells in shown]
            rest = f", and {len(table.rows) - _ROWS:,} more" if len(table.rows) > _ROWS else ""
            if table.rows:
                parts += [f"<p>{_cell(table.caption)}{rest}</p>", _html_table([f"<tr>{head}</tr>", *rows])]
        return f"<div>{''.join(parts)}</div>"


def plain(value: Any) -> Any:
    """Returns a value as JSON has it: NaN and infinity are null, a dataclass is an object of its attributes."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if is_dataclass(value):
        return attributes(value, (each.name for each in fields(value)))
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    return value


def attributes(value: Any, names: Iterable[str]) -> dict[str, Any]:
    """Returns some attributes as JSON has them."""
    return {name: plain(getattr(value, name)) for name in names}


def counted(items: Sequence[object], names: Iterable[str] | None = None) -> str:
    """Returns how many items there are, and the first and the last; nothing if there are none."""
    shown = [escaped(str(name)) for name in (items if names is None else names)]
    return f"{len(items):,}: {ends(shown)}" if items else ""


def paths_counted(paths: Sequence[Path]) -> str:
    """Returns how many paths there are, and the names of the first and the last."""
    return counted(paths, [path.name for path in paths])


def numbers(metrics: Mapping[str, float]) -> str:
    """Returns metrics with six digits."""
    return ", ".join(f"{escaped(name)} {value:.6g}" for name, value in metrics.items())


def notices_counted(notices: Sequence[str]) -> str:
    """Returns the first notice, and how many more there are."""
    more = f" (and {plural(len(notices) - 1, 'other')})" if len(notices) > 1 else ""
    return f"{notices[0]}{more}" if notices else ""


def number(value: float | None) -> str:
    """Returns a number for a table; nothing if there is none."""
    return "" if value is None or math.isnan(value) else f"{value:.6g}"


def _printable(text: str) -> str:
    return safe_text(one_line(text))


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"


def _cell(text: str) -> str:
    text = _printable(text)
    return html.escape(text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 1]}…")


def _html_table(rows: Sequence[str]) -> str:
    return f"<table>{''.join(rows)}</table>" if rows else ""
