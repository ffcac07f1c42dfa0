"""Text for messages: names escaped, long lists cut, numbers counted."""

from __future__ import annotations

import itertools
import os
import re
import reprlib
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

_LONGEST_NAME = 120
_LONGEST_LIST = 20
_LONGEST_ARGUMENT = 500
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = 70
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


def quote(name: object) -> str:
    """Returns ``repr(name)``, which escapes control characters, cut to a readable length."""
    return _cut(_repr(name))


def escaped(name: str | os.PathLike[str]) -> str:
    """Returns a name as `quote` does, without the quotes."""
    return _cut(_repr(name)[1:-1])


def argument(name: str | os.PathLike[str]) -> str:
    """Returns a name as a shell needs it in a command to paste; as `quote` does if it is not printable or very long."""
    text = os.fspath(name)
    return shlex.quote(text) if text.isprintable() and len(text) <= _LONGEST_ARGUMENT else quote(text)


def _repr(name: object) -> str:
    try:
        name = os.fspath(name) if isinstance(name, os.PathLike) else name
        # A few objects that are shared can expand to very many: show only the top level of containers.
        return repr(name) if isinstance(name, (str, bytes, int, float)) else _SHORT.repr(name)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return f"<{type(name).__name__} too long to print>"


def _cut(text: str) -> str:
    if len(text) <= _LONGEST_NAME:
        return text
    return f"{text[: _LONGEST_NAME - 20]}…{text[-16:]} ({len(text)} characters)"


def safe_text(text: str) -> str:
    """Returns text for a terminal, with control characters escaped, except line breaks."""
    return "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)


def one_line(text: str | os.PathLike[str]) -> str:
    """Returns text with line breaks escaped, so that a file's name cannot forge a line of our output."""
    return os.fspath(text).replace("\n", "\\n")


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Returns the names of paths, with their folder if two names are equal, or with as many as tell them apart."""
    names = [path.name or str(path) for path in paths]
    folders = 1
    while len(set(names)) < len(set(paths)):
        folders += 1
        names = [Path(*path.parts[-folders:]).as_posix() for path in paths]
    return names


def listing(items: Iterable[str], *, separator: str = ", ") -> str:
    """Joins at most 20 items, and counts the others."""
    iterator = iter(items)
    shown = list(itertools.islice(iterator, _LONGEST_LIST))
    rest = sum(1 for _ in iterator)
    if rest:
        shown.append(f"… and {rest:,} more")
    return separator.join(shown)


def ends(items: Sequence[str]) -> str:
    """Joins at most four items; of more, the first two and the last."""
    return ", ".join(items if len(items) <= 4 else [*items[:2], "…", items[-1]])


def nearest(word: object, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the choice that is most like a word, whatever their case, if one is like it."""
    import difflib  # only on the way to an error

    known = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(str(word).lower(), known, n=1, cutoff=cutoff)
    return known[near[0]] if near else None


def suggestion(word: object, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns `` Did you mean 'bfloat16'?`` for the choice nearest to a word, or an empty string."""
    near = nearest(word, choices, cutoff)
    return "" if near is None else f" Did you mean {near!r}?"


def parse_size(text: str) -> int:
    """Returns a number of bytes: ``5GB`` → 5000000000, ``256MiB`` and ``256M`` → 268435456. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(I?B)?|B)?", text.strip().upper())
    if match is None:
        raise ValueError(f"{text[:40]!r} is not a size")
    number, prefix, unit = match.groups()
    amount = float(number) * (1000 if unit == "B" else 1024) ** " KMGT".index(prefix or " ")
    if amount > sys.maxsize:
        raise ValueError(f"{text[:40]!r} is too large")
    return int(amount)


def size(count: int) -> str:
    """Returns a number of bytes for people: ``1536`` → ``1.5 KiB``."""
    amount = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return plural(count, "byte") if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def decimal_size(count: float) -> str:
    """Returns a number of bytes as storage and its speed are given: ``4800000000`` → ``4.8 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 9.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def plural(count: int, noun: str) -> str:
    """Returns ``1 tensor``, ``3,000 tensors``."""
    if count != 1:
        noun = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}es" if noun.endswith(("ch", "ss")) else f"{noun}s"
    return f"{count:,} {noun}"


def type_of(value: object) -> str:
    """Returns ``a str``, ``an int``, ``None``: the type of a value, with its article."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"
