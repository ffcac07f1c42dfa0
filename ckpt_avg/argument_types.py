"""Whether an argument has the type that its option declares. A type checker says so earlier, but few run one."""

from __future__ import annotations

import numbers
import os
from collections.abc import Callable, Iterable
from typing import Any


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _are(kinds: type | tuple[type, ...]) -> Callable[[object], bool]:
    """Returns a check of a series. What it gives only once, such as a generator's items, is not looked at."""

    def check(value: object) -> bool:
        items = value if isinstance(value, (tuple, list, set, frozenset)) else ()
        return (
            isinstance(value, Iterable)
            and not isinstance(value, (str, bytes))
            and all(isinstance(item, kinds) for item in items)
        )

    return check


# The name of a type in a signature → how to call it, and whether a value has it.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda value: isinstance(value, numbers.Integral) and _is_number(value)),
    "float": ("a number", _is_number),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "str": ("a text", lambda value: isinstance(value, str)),
    "os.PathLike[str]": ("a path", lambda value: isinstance(value, os.PathLike)),
    "Iterable[str]": ("texts", _are(str)),
    "Sequence[str]": ("texts", _are(str)),
    "Sources": (
        "a path, or paths",
        lambda value: isinstance(value, (str, os.PathLike)) or _are((str, os.PathLike))(value),
    ),
    "ForwardBatch": ("a function of a model and a batch", callable),
    "Progress": ("callbacks", lambda value: hasattr(value, "notice")),
    "Ranks": ("what join_ranks() gives", lambda value: hasattr(value, "share_errors")),
    "None": ("", lambda value: value is None),
}


def expected_instead(annotation: str, value: object) -> str:
    """Returns what a signature allows instead of this value; empty if it is allowed, or some type is not known here."""
    names = annotation.split(" | ")
    if any(name not in _KINDS or _KINDS[name][1](value) for name in names):
        return ""
    return " or ".join(_KINDS[name][0] for name in names if name != "None")


def as_python(annotation: str, value: Any) -> Any:
    """Returns a number of another library as Python's, so that it can be recorded and compared; other values as is."""
    names = annotation.split(" | ")
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if "int" in names and isinstance(value, numbers.Integral) else float(value)
