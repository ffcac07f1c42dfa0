"""Untrusted text inside a model card: YAML scalars for the front matter, code spans and prose for the Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from ckpt_avg.text import one_line, safe_text

# Words that every YAML reader takes for a string: no number, date, or another spelling of true, false or null.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*[A-Za-z0-9]")
_WORDS = frozenset(("true", "false", "yes", "no", "on", "off", "null", "y", "n"))


def yaml_lines(document: Mapping[str, object], indent: str = "") -> list[str]:
    """Returns a mapping of strings, numbers, lists and mappings as the lines of a YAML block."""
    lines = []
    for key, value in document.items():
        name = f"{indent}{yaml_scalar(key)}:"
        if isinstance(value, Mapping):
            lines += [name, *yaml_lines(value, f"{indent}  ")]
        elif isinstance(value, (list, tuple)):
            lines += [name, *_items(value, indent)]
        else:
            lines.append(f"{name} {yaml_scalar(value)}")
    return lines


def _items(values: Sequence[object], indent: str) -> list[str]:
    lines = []
    for value in values:
        if isinstance(value, Mapping):
            first, *others = yaml_lines(value, f"{indent}  ")
            lines += [f"{indent}- {first[len(indent) + 2 :]}", *others]
        else:
            lines.append(f"{indent}- {yaml_scalar(value)}")
    return lines


def yaml_scalar(value: object) -> str:
    """Returns a string, an integer or a float as a YAML scalar, the same for readers of YAML 1.1 and 1.2.

    A lone surrogate, which YAML cannot contain, becomes the six characters of its escape.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
        digits, exponent, power = repr(value).partition("e")
        return digits + ("" if "." in digits or not exponent else ".0") + exponent + power  # YAML 1.1: 1e-5 is a string
    if isinstance(value, int):
        return str(value)
    text = _encodable(str(value))
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return f'"{"".join(map(_quoted, text))}"'


def _quoted(sign: str) -> str:
    if sign in '\\"':
        return f"\\{sign}"
    if sign.isprintable():
        return sign
    code = ord(sign)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def code(text: object) -> str:
    """Returns text as a code span for Markdown, also inside a table: nothing in it is markup."""
    shown = _visible(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    pad = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    escaped = shown.replace("|", "\\|")
    return f"{fence}{pad}{escaped}{pad}{fence}"


def prose(text: object) -> str:
    """Returns text for Markdown with everything escaped that could be markup, HTML or a link."""
    return re.sub(r"([\\`*_\[\]<>#|~&@{}]|://|(?<=www)\.)", r"\\\1", _visible(text))


def markdown_table(rows: Sequence[Sequence[str]], *, numbers_from: int = 1) -> list[str]:
    """Returns the lines of a table of Markdown cells, the first row its header; numbers are on the right."""
    line = ["---" if place < numbers_from else "---:" for place in range(len(rows[0]))]
    return [f"| {' | '.join(cells)} |" for cells in (rows[0], line, *rows[1:])]


def _visible(text: object) -> str:
    """Returns text on one line, control characters and signs that reorder text escaped."""
    return one_line(safe_text(_encodable(str(text))))


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
