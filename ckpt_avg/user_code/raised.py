"""What the user's code raised: its own lines, without those of libraries; one sentence; and where to fix it."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback

from ckpt_avg.wording import either

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_STANDARD = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib"))
_FRAME = re.compile(r'^(\s*)File "(.+)", line (\d+)(, in )?')
_HEADER = "Traceback (most recent call last):"
_LONGEST = 300  # characters of an exception's text in a sentence


def lines_of(error: BaseException, *, whole: bool = False) -> str:
    """Returns the traceback: the frames of the user's code alone, unless all of it is wanted.

    It is empty if there are none, and `sentence` says the rest.
    """
    lines = "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
    frames = _frames(lines)
    own = [frame for frame in frames if _is_users(frame[0])]
    if whole or len(own) == len(frames):
        return "\n".join(lines)
    if not own and not isinstance(error, SyntaxError) and "\n" not in str(error).strip():
        return ""
    hidden = {number for frame in frames if frame not in own for number in frame[2]}
    count = len(frames) - len(own)
    shown = [line for number, line in enumerate(lines) if number not in hidden and (own or line != _HEADER)]
    return "\n".join([*shown, f"({count} {'call' if count == 1 else 'calls'} of libraries hidden: -v shows them)"])


def sentence(error: BaseException) -> str:
    """Returns the kind and the text of an exception in one line, and what to do if that is known."""
    lines = str(error.msg if isinstance(error, SyntaxError) else error).strip().splitlines() or [""]
    text = lines[-1] if _is_of_a_worker(error) else f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    advice = _advice(error)
    return f"{text.rstrip('.')}. {advice}" if advice else text


def _advice(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.partition(".")[0]
        other = either("name its folder with --app-dir", "add its folder to sys.path")
        return f"Install it ({sys.executable} -m pip install {name}), or {other}."
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"See {_short(error.filename)}, line {error.lineno}."
    places = own_frames(error)[-1:]
    return "".join(f"See {_short(path)}, line {line}." for path, line in places)


def own_frames(error: BaseException) -> list[tuple[str, int]]:
    """Returns the files and lines of the user's code through which an exception came, the innermost last."""
    frames = _frames("".join(traceback.format_exception(error)).split("\n"))
    return [(path, line) for path, line, _ in frames if _is_users(path)]


def _frames(lines: list[str]) -> list[tuple[str, int, range]]:
    """Returns the frames in a traceback's lines: the file, the line in it, and the lines of the traceback."""
    found = []
    for number, line in enumerate(lines):
        if match := _FRAME.match(line):
            end = number + 1
            indent = len(match[1])
            while end < len(lines) and _belongs(lines[end], indent):
                end += 1
            if match[4]:  # a syntax error's place has no function
                found.append((match[2], int(match[3]), range(number, end)))
    return found


def _belongs(line: str, indent: int) -> bool:
    """Whether a line follows that of its frame: the source, the marks below it, or how often it was repeated."""
    is_deeper = len(line) - len(line.lstrip()) > indent
    return (is_deeper or line.lstrip().startswith("[Previous line repeated")) and not _FRAME.match(line)


def _is_users(path: str) -> bool:
    parts = path.replace(os.sep, "/").split("/")
    is_library = "site-packages" in parts or "dist-packages" in parts or path.startswith("<")
    return not is_library and not path.startswith((_OURS + os.sep, *(each + os.sep for each in _STANDARD)))


def _is_of_a_worker(error: BaseException) -> bool:
    """Whether a worker of torch's DataLoader raised it: its text contains the worker's traceback."""
    return "\nOriginal Traceback (most recent call last):\n" in str(error)


def _short(path: str) -> str:
    """Returns a path from the current folder, if it is below it."""
    below = os.path.relpath(path) if os.path.isabs(path) else path
    return path if below.startswith("..") else below
