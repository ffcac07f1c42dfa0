"""The rows of a log of metrics: CSV, JSON lines, or one JSON document with a list of rows. Read as a stream."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt_avg.errors import fail
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import listing, plural, quote, size

_CHUNK = 2**20
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_KINDS = "Name a log in CSV or JSON lines"


@dataclass(frozen=True, slots=True)
class Row:
    """What a trainer logged at one time.

    Attributes:
        where: its place, such as ``line 12``.
        cells: column → text of a CSV file, or value of a JSON object; the names of nested keys are joined by dots.
    """

    where: str
    cells: Mapping[str, object]


def read_rows(path: Path, notice: Callable[[str], None]) -> Iterator[Row]:
    """Yields the rows of a log that may still be written to.

    A line that is damaged is skipped with a notice. Of a last line without a line break, what may be cut is not used.

    Raises:
        CheckpointFormatError: it cannot be read, or is no log.
    """
    with InputFile(path) as file:
        filled = ((number, line) for number, line in _lines(file) if line.strip())
        first = next(filled, None)
        if first is None:
            fail(path, "expected a header or JSON objects, got an empty file", _KINDS)
        if first[1].lstrip()[0] not in "{[":
            yield from _csv(path, itertools.chain([first], filled), notice)
        elif next(filled, None) is not None and _object(first[1]) is not None:
            yield from _json_lines(path, _lines(file), notice)
        elif file.size <= LIMITS.log_document and (found := _object(file.read(0, file.size).removeprefix(_BOM))):
            yield from _rows_of(found)
        else:
            yield from _json_lines(path, _lines(file), notice)


def _lines(file: InputFile) -> Iterator[tuple[int, str]]:
    """Yields the lines of a file with their numbers and line breaks; the last one may have no break."""
    offset, number, rest = 0, 0, b""
    while offset < file.size:
        chunk = file.read(offset, min(_CHUNK, file.size - offset))
        if offset == 0 and chunk.startswith(_UTF16):
            fail(file.path, "is UTF-16", f"Convert it: iconv -f UTF-16 -t UTF-8 {quote(file.path.name)}")
        rest += chunk.removeprefix(_BOM) if offset == 0 else chunk
        offset += len(chunk)
        *complete, rest = rest.split(b"\n")
        if offset == file.size and rest:
            complete, rest = [*complete, rest], b""
            last = len(complete)
        else:
            last = 0
        for index, line in enumerate(complete, 1):
            number += 1
            _refuse_long(file.path, number, line)
            yield number, _text(file.path, number, line) + ("" if index == last else "\n")
        _refuse_long(file.path, number + 1, rest)


def _refuse_long(path: Path, number: int, line: bytes) -> None:
    if len(line) > LIMITS.log_line:
        fail(path, f"line {number} is longer than {size(LIMITS.log_line)}", _KINDS)


def _text(path: Path, number: int, line: bytes) -> str:
    if b"\0" in line:
        fail(path, f"line {number} is not text", _KINDS)
    try:
        return line.decode()
    except UnicodeDecodeError:
        fail(path, f"line {number} is not UTF-8", _KINDS)


def _csv(path: Path, lines: Iterator[tuple[int, str]], notice: Callable[[str], None]) -> Iterator[Row]:
    """Yields the rows of a table, whose header may be repeated where a run was resumed."""
    number, line = next(lines)
    delimiter = max(",\t;", key=line.count)

    def texts() -> Iterator[str]:
        nonlocal number, line
        yield line
        for number, line in lines:  # noqa: B007 (the messages below name it)
            yield line

    header: list[str] = []
    damaged: list[int] = []
    count = 0
    try:
        for cells in csv.reader(texts(), delimiter=delimiter, skipinitialspace=True):
            row = list(map(str.strip, cells))
            if not header or (row[0] and row[0] == header[0]):
                header = _header(path, row, notice)
                continue
            while len(row) > len(header) and not row[-1]:
                del row[-1]
            if not line.endswith("\n"):
                del row[-1]
                notice(f"{path.name}: line {number} has no line break, so its last value may be cut and is not used")
            elif len(row) != len(header):
                damaged.append(number)
                continue
            count += 1
            yield Row(f"line {number}", dict(zip(header, row, strict=False)))
    except csv.Error as error:
        fail(path, f"line {number} is no CSV: {error}", _KINDS)
    _tell_damaged(path, damaged, count, f"without the {plural(len(header), 'cell')} of the header", notice)


def _header(path: Path, row: list[str], notice: Callable[[str], None]) -> list[str]:
    """Returns the names of the columns; of several with one name the first has it."""
    repeated = sorted({name for name in row if name and row.count(name) > 1})
    if repeated:
        notice(f"{path.name}: several columns are called {listing(map(quote, repeated))}: the first of them counts")
    return [name if row.index(name) == index else f"{name} ({index + 1})" for index, name in enumerate(row)]


def _json_lines(path: Path, lines: Iterator[tuple[int, str]], notice: Callable[[str], None]) -> Iterator[Row]:
    damaged: list[int] = []
    count = 0
    for number, line in lines:
        if not line.strip():
            continue
        found = _object(line)
        if isinstance(found, dict):
            count += 1
            yield Row(f"line {number}", dict(_cells(found)))
        elif line.endswith("\n"):
            damaged.append(number)
        else:
            notice(f"{path.name}: line {number} is incomplete and is not used")
    _tell_damaged(path, damaged, count, "that are no JSON objects", notice)


def _tell_damaged(path: Path, damaged: list[int], count: int, what: str, notice: Callable[[str], None]) -> None:
    if damaged and not count:
        fail(path, f"has only lines {what}", _KINDS)
    if damaged:
        notice(f"{path.name}: skipped {plural(len(damaged), 'line')} {what}, the first is line {damaged[0]}")


def _rows_of(found: object) -> Iterator[Row]:
    """Yields the rows of a document: of the only list in it, such as transformers' ``log_history``, or itself."""
    lists = [found] if isinstance(found, list) else list(found.values()) if isinstance(found, dict) else []
    tables = [each for each in lists if isinstance(each, list) and each and isinstance(each[0], dict)]
    rows = tables[0] if len(tables) == 1 else [found]
    for index, entry in enumerate(rows, 1):
        if isinstance(entry, dict):
            yield Row(f"entry {index}", dict(_cells(entry)))


def _cells(found: Mapping[str, object], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    for name, value in found.items():
        if isinstance(value, dict):
            if depth < LIMITS.nesting:
                yield from _cells(value, f"{prefix}{name}.", depth + 1)
        elif not isinstance(value, list):
            yield prefix + name, value


def _object(text: str | bytes) -> object:
    """Returns what a text in JSON is; None if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
