"""Messages in the words of the caller: ``--last 3`` on the command line, ``last=3`` in Python.

Messages are written once, in the words of the command line. `worded` translates the options in them for Python: their
names, and the numbers, choices and placeholders after them. Any other value is a text that could be anything: write
``{setting("--exclude", name)}`` for it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, dataclass
from typing import Any

from ckpt_avg.text import argument

_FLAG = re.compile(r"(?<![\w'-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w-])")
_QUOTED = re.compile(r" ('[^'\n]*')")
_PLACEHOLDER = re.compile(r" ([A-Z][A-Z0-9]*(?:[:,.][A-Z.,]*(?:[A-Z]|\.{3}))?)(?![\w'])")
_NUMBER = re.compile(r" (-?\d+(?:\.\d+)?(?:e[+-]?\d+)?%?)(?!\w)")
_CHOICE = re.compile(r" ([a-z][\w-]*)")
_COMMAND = re.compile(r"(?<![\w/-])ckpt-avg (average|refresh-bn|sweep|soup|compare|check|verify|inspect)(?![\w-])")
_FUNCTIONS = {"refresh-bn": "refresh_weights"}
_is_command_line = False


@dataclass(frozen=True, slots=True)
class _Option:
    name: str  # of the keyword
    is_switch: bool
    choices: tuple[str, ...]


_OPTIONS: dict[str, _Option] = {}  # flag → option


def flag_of(name: str, field: Field[Any]) -> str:
    """Returns the command line's name of an option, for example ``--from-step``."""
    return str(field.metadata.get("flag", "--" + name.replace("_", "-")))


def declare(group: type) -> None:
    """Makes the options of a group known: its fields, before they become a dataclass's."""
    for name, field in vars(group).items():
        if isinstance(field, Field) and field.init is not False:
            choices = field.metadata.get("choices", ()) or str(field.metadata.get("metavar", "")).split("|")
            is_switch = field.default is not MISSING and field.default is False
            _OPTIONS[flag_of(name, field)] = _Option(name, is_switch, tuple(choices))


@contextlib.contextmanager
def for_command_line() -> Iterator[None]:
    """Inside, messages use the words of the command line."""
    global _is_command_line  # noqa: PLW0603 (of the whole process: its threads have messages, too)
    before, _is_command_line = _is_command_line, True
    try:
        yield
    finally:
        _is_command_line = before


def setting(flag: str, *values: str | os.PathLike[str]) -> str:
    """Returns an option with texts as its values: ``--exclude a.pt``, or ``exclude='a.pt'``."""
    if _is_command_line:
        return " ".join(f"{flag} {argument(value)}" for value in values)
    texts = [repr(os.fspath(value)) for value in values]
    return f"{_keyword(flag)}={texts[0] if len(texts) == 1 else '[' + ', '.join(texts) + ']'}"


def either(command_line: str, python: str) -> str:
    """Returns the text that suits the caller."""
    return command_line if _is_command_line else python


def worded(text: str) -> str:
    """Returns a message for the caller: as it is for the command line, with Python's names of options in Python."""
    return text if _is_command_line else in_python(text)


def in_python(text: str) -> str:
    """Returns a message, which is in the words of the command line, in those of Python."""
    if "--" not in text and "ckpt-avg " not in text:
        return text
    text = _COMMAND.sub(lambda found: f"{_FUNCTIONS.get(found[1], found[1])}()", text)
    parts: list[str] = []
    begin = 0
    for found in _FLAG.finditer(text):
        if found[0] in _OPTIONS:  # not of another program
            shown, end = _keyword_argument(text, found)
            parts += [text[begin : found.start()], shown]
            begin = end
    return "".join([*parts, text[begin:]])


def worded_all(texts: Iterable[str]) -> tuple[str, ...]:
    """Returns messages for the caller."""
    return tuple(map(worded, texts))


def _keyword(flag: str) -> str:
    return "output" if flag == "-o" else _OPTIONS[flag].name


def _keyword_argument(text: str, found: re.Match[str]) -> tuple[str, int]:
    """Returns how Python writes an option, with the value after it, and where that ends."""
    option, end = _OPTIONS[found[0]], found.end()
    if re.match(r":|,(?: --[a-z-]+,?)+:| function", text[end:]):
        return option.name, end
    if option.is_switch:
        return f"{option.name}=True", end
    if value := _QUOTED.match(text, end) or _NUMBER.match(text, end):
        quoted = f"'{value[1]}'" if value[1].endswith("%") else value[1]
        return f"{option.name}={quoted}", value.end()
    if (value := _CHOICE.match(text, end)) and value[1] in option.choices:
        return f"{option.name}='{value[1]}'", value.end()
    if value := _PLACEHOLDER.match(text, end):
        return f"{option.name}={'…' if set(value[1]) & set(':,') else value[1]}", value.end()
    return f"{option.name}=…", end
