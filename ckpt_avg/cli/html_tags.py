"""HTML and SVG from Python calls. Text is escaped wherever it is put in; only `Html` is markup."""

from __future__ import annotations

import html

from ckpt_avg.text import one_line, safe_text

_EMPTY = frozenset(("br", "meta", "circle", "line", "path", "polyline", "rect"))


class Html(str):
    """Markup."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Returns an element. Children and attributes that are None are left out; ``class_`` is the attribute ``class``."""
    named = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY and not children:
        return Html(f"<{name}{named}>" if name in ("br", "meta") else f"<{name}{named}/>")
    return Html(f"<{name}{named}>{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """Returns children one after the other, text escaped."""
    return Html("".join(each if isinstance(each, Html) else _text(each) for each in children if each is not None))


def name(text: object) -> Html:
    """Returns a name that somebody else chose, kept apart from the direction of the text around it."""
    return tag("bdi", text)


def _text(value: object) -> str:
    """Returns text without markup; control characters and signs that reorder text are shown as escapes."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return html.escape(one_line(safe_text(str(value))), quote=True)
