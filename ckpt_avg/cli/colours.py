"""Colours on a terminal, for a few words that also tell everything without them."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Sequence
from typing import TextIO

WHEN = ("auto", "always", "never")
_RED, _GREEN, _YELLOW = "31", "32", "33"
_COLOURED = (
    (r"^(?:\[rank \d+\] )?(Error:)", _RED),
    (r"^(Notice:)", _YELLOW),
    (r"^(NOT MET:)", _RED),
    (r"^(met:)", _GREEN),
    (r"\((worse)\)", _RED),
    (r"\((better)\)", _GREEN),
    (r"(← best)", _GREEN),
    (r"  (far off)$", _YELLOW),
)
_chosen = [WHEN[0]]


def choose(arguments: Sequence[str]) -> None:
    """Takes ``--color WHEN`` from a command line, even one that is invalid otherwise."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    given = [value for option, value in itertools.pairwise(words) if option == "--color" and value in WHEN]
    _chosen[0] = given[-1] if given else WHEN[0]


def coloured(text: str, stream: TextIO | None) -> str:
    """Returns a text with its telling words in colour, if the stream is a terminal, or the user asked for colours."""
    if stream is None or not _wanted(stream):
        return text
    for pattern, colour in _COLOURED:
        text = re.sub(pattern, functools.partial(_with, colour), text, flags=re.MULTILINE)
    return text


def _with(colour: str, found: re.Match[str]) -> str:
    begin, end = found.start(1) - found.start(), found.end(1) - found.start()
    return f"{found[0][:begin]}\x1b[{colour}m{found[1]}\x1b[0m{found[0][end:]}"


def _wanted(stream: TextIO) -> bool:
    """Whether to use colours: the option, then NO_COLOR, FORCE_COLOR and TERM, then whether it is a terminal."""
    if _chosen[0] != WHEN[0]:
        return _chosen[0] == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()
