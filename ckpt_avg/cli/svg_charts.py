"""Charts as inline SVG, without scripts: lines, dots, bars, ranges, a heat map and a path in a plane.

All are 400 units wide, so that their text is readable on a phone. Colours are classes of the page's style, and each
kind of mark has a shape of its own, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ckpt_avg.cli.html_tags import Html, join, tag
from ckpt_avg.tables import shortened

Point = tuple[float, float]

_WIDTH = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 14, 12, 40
_HEIGHT = 240
_ROW = 36  # of a chart with a name above each row
_LEVELS = 9  # of a heat map
_LARGEST = 1e300  # of the numbers that are drawn: their differences are in the range of float64
_LONGEST = 52  # characters of a name above a row


@dataclass(frozen=True, slots=True)
class Marks:
    """Points of one kind in a chart.

    Attributes:
        label: for the legend; empty if they are not in it.
        points: where.
        shape: ``dot``, ``ring``, ``star``, ``cross`` or ``none``.
        colour: a class: ``blue``, ``orange``, ``red``, ``green`` or ``grey``.
        line: how they are joined: ``solid``, ``dashed`` or not at all.
        titles: what each says when pointed at.
    """

    label: str
    points: Sequence[Point]
    shape: str = "dot"
    colour: str = "blue"
    line: str = ""
    titles: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a chart of horizontal values.

    Attributes:
        label: above it.
        value: its mark; None if it has none.
        text: the value as text.
        low, high: a range around it.
        others: small marks.
        colour, shape: as in `Marks`.
    """

    label: str
    value: float | None
    text: str
    low: float | None = None
    high: float | None = None
    others: Sequence[float] = field(default_factory=tuple)
    colour: str = "blue"
    shape: str = "dot"


def line_chart(title: str, description: str, x_label: str, y_label: str, series: Sequence[Marks]) -> Html:
    """Returns points over a number such as the step, joined or not; nothing if there are none."""
    series = [marks for marks in series if marks.points]
    points = [point for marks in series for point in marks.points]
    if not points:
        return Html("")
    x_axis, y_axis = _Axis([x for x, _ in points], margin=0.03, whole=True), _Axis([y for _, y in points])

    def place(point: Point) -> Point:
        return x_axis.place(point[0], _LEFT, _WIDTH - _RIGHT), y_axis.place(point[1], _HEIGHT - _BOTTOM, _TOP)

    parts = [_grid(x_axis, y_axis, x_label, y_label), *(_drawn(marks, place) for marks in series)]
    return _figure(title, description, _HEIGHT, parts, series)


def plane_chart(title: str, description: str, x_label: str, y_label: str, series: Sequence[Marks]) -> Html:
    """Returns points in a plane in which distances look as long as they are."""
    series = [marks for marks in series if marks.points]
    points = [point for marks in series for point in marks.points]
    if not points:
        return Html("")
    height = 300
    across, up = _WIDTH - _RIGHT - _LEFT, height - _BOTTOM - _TOP
    middle = [(min(values) + max(values)) / 2 for values in zip(*points, strict=True)]
    spans = [max(values) - min(values) for values in zip(*points, strict=True)]
    unit = max(spans[0] / across, spans[1] / up) * 1.15 or 1.0
    x_axis = _Axis([middle[0] - unit * across / 2, middle[0] + unit * across / 2], margin=0.0)
    y_axis = _Axis([middle[1] - unit * up / 2, middle[1] + unit * up / 2], margin=0.0)

    def place(point: Point) -> Point:
        return x_axis.place(point[0], _LEFT, _WIDTH - _RIGHT), y_axis.place(point[1], height - _BOTTOM, _TOP)

    parts = [_grid(x_axis, y_axis, x_label, y_label, height), *(_drawn(marks, place) for marks in series)]
    return _figure(title, description, height, parts, series)


def row_chart(
    title: str,
    description: str,
    rows: Sequence[Row],
    *,
    lines: Sequence[tuple[float, str]] = (),
    bars: bool = False,
    log: bool = False,
) -> Html:
    """Returns a row for each value, its name above it. ``lines`` are numbers with labels, drawn across all rows.

    With ``bars`` each value is a bar from 0; with ``log`` the numbers, all above 0, are on a logarithmic scale.
    """
    scale = math.log10 if log else float
    numbers = [
        scale(value)
        for row in rows
        for value in (row.value, row.low, row.high, *row.others)
        if value is not None and (value > 0 or not log)
    ]
    numbers += [scale(value) for value, _ in lines] + [0.0] * bars
    if not numbers:
        return Html("")
    axis = _Axis(numbers, margin=0.0 if bars else 0.06)
    left, right = 8, _WIDTH - 8
    height = 14 + _ROW * len(rows) + 30
    ends = [10.0 ** max(-300, min(300, end)) for end in (axis.low, axis.high)] if log else []
    ticks = _Axis(ends, margin=0.0).ticks if log else axis.ticks
    parts = []
    for tick in ticks:
        if not log or tick > 0:
            x = axis.place(scale(tick), left, right)
            parts.append(join(_line(x, 10, x, height - 26, "grid"), _label(x, height - 12, _shown(tick), _anchor(x))))
    kinds = ["grey dashed", "limit"]
    for (value, _), kind in zip(lines, kinds, strict=False):
        parts.append(_line(x := axis.place(scale(value), left, right), 10, x, height - 26, kind))
    for number, row in enumerate(rows):
        top = 14 + _ROW * number
        y = top + 22
        parts.append(_label(left, top + 11, shortened(row.label, _LONGEST), "start", "name"))
        parts.append(_label(right, top + 11, row.text, "end", "value"))

        def at(value: float) -> float:
            return axis.place(scale(value), left, right)

        if row.low is not None and row.high is not None and (row.low > 0 or not log):
            parts.append(tag("rect", x=at(row.low), y=y - 3, width=max(1.0, at(row.high) - at(row.low)), height=6,
                             rx=3, class_=f"{row.colour} faint"))  # fmt: skip
        parts += [_line(at(each), y - 5, at(each), y + 5, f"{row.colour} tick") for each in row.others]
        if row.value is None or (log and row.value <= 0):
            continue
        if bars:
            start = at(0.0)
            width = abs(at(row.value) - start)
            parts.append(tag("rect", x=min(start, at(row.value)), y=y - 6, width=max(0.5, width), height=11, rx=2,
                             class_=row.colour))  # fmt: skip
        else:
            parts.append(_mark(row.shape, at(row.value), y, row.colour))
    legend = [Marks(label, (), "none", "", kind) for (_, label), kind in zip(lines, kinds, strict=False)]
    return _figure(title, description, height, parts, legend)


def column_chart(title: str, description: str, x_label: str, y_label: str, values: Sequence[tuple[str, float]]) -> Html:
    """Returns a column for each labelled value, above or below 0."""
    axis = _Axis([0.0, *(value for _, value in values)])
    across = (_WIDTH - _LEFT - _RIGHT) / max(1, len(values))
    every = _every([label for label, _ in values])
    low = _HEIGHT - _BOTTOM
    parts = [
        _rules(axis, y_label, _HEIGHT),
        _label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, x_label, "middle", "axis"),
    ]
    zero = axis.place(0.0, low, _TOP)
    for number, (label, value) in enumerate(values):
        x, y = _LEFT + across * number, axis.place(value, low, _TOP)
        parts.append(tag("rect", tag("title", f"{label}: {_shown(value)}"), x=x + across * 0.1, y=min(y, zero),
                         width=across * 0.8, height=max(0.5, abs(y - zero)), class_="blue"))  # fmt: skip
        if (len(values) - 1 - number) % every == 0:
            parts.append(_label(x + across / 2, low + 15, shortened(label, 8), _anchor(x + across / 2)))
    return _figure(title, description, _HEIGHT, parts, ())


def heat_map(title: str, description: str, labels: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> Html:
    """Returns a square of cells, darker for larger numbers; each shade is one path, so that many cells are small."""
    count = len(labels)
    known = [value for row in matrix for value in row if value is not None]
    if not known:
        return Html("")
    top = max(known) or 1.0
    side = (_WIDTH - _LEFT - _RIGHT) / count
    cells: dict[int, list[str]] = {}
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            level = -1 if value is None else min(_LEVELS - 1, int(value / top * _LEVELS))
            cells.setdefault(level, []).append(f"M{column} {row}h1v1h-1z")
    squares = [
        tag("path", d="".join(paths), class_="unknown" if level < 0 else "blue", fill_opacity=_opacity(level))
        for level, paths in sorted(cells.items())
    ]
    size = side * count
    parts = [tag("g", *squares, transform=f"translate({_LEFT} {_TOP}) scale({side:.4f})"),
             tag("rect", x=_LEFT, y=_TOP, width=size, height=size, class_="frame")]  # fmt: skip
    every = _every(labels)
    for number, label in enumerate(labels):
        if (count - 1 - number) % every == 0:
            middle = _TOP + side * (number + 0.5)
            parts.append(_label(_LEFT - 6, middle + 4, shortened(label, 8), "end"))
            x = _LEFT + middle - _TOP
            parts.append(_label(x, _TOP + size + 15, shortened(label, 8), _anchor(x)))
    foot = _TOP + size + 30
    swatch = (_WIDTH - _LEFT - _RIGHT) / _LEVELS
    parts += [
        tag(
            "rect",
            x=_LEFT + swatch * level,
            y=foot,
            width=swatch,
            height=10,
            class_="blue",
            fill_opacity=_opacity(level),
        )
        for level in range(_LEVELS)
    ]
    parts += [_label(_LEFT, foot + 23, "0", "start"), _label(_WIDTH - _RIGHT, foot + 23, _shown(top), "end")]
    return _figure(title, description, foot + 30, parts, ())


class _Axis:
    """A range of numbers with round ticks.

    Attributes:
        low, high: the ends.
        ticks: some numbers between them.
    """

    def __init__(self, values: Sequence[float], *, margin: float = 0.08, whole: bool = False) -> None:
        low, high = (max(-_LARGEST, min(_LARGEST, end)) for end in (min(values), max(values)))
        span = high - low
        if not span > 1e-12 * max(abs(low), abs(high)):  # rounding errors of equal numbers
            span = abs(high) * 0.1 or 1.0
            low, high = low - span / 2, high + span / 2
        self.low, self.high = low - span * margin, high + span * margin
        step = _round_step((self.high - self.low) / 4.5)
        if whole:
            step = max(1.0, step) if all(value == int(value) for value in values) else step
        first = math.ceil(self.low / step - 1e-9)
        self.ticks = [step * number for number in range(first, first + 12) if step * number <= self.high + 1e-9 * step]

    def place(self, value: float, start: float, end: float) -> float:
        """Returns where a number is, between the places of both ends."""
        value = max(self.low, min(self.high, value))
        return start + (value - self.low) / (self.high - self.low) * (end - start)


def _round_step(step: float) -> float:
    """Returns 1, 2 or 5 times a power of ten, the next above a number."""
    power: float = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= step * (1 - 1e-9))


def _figure(title: str, description: str, height: float, parts: Iterable[Html], series: Sequence[Marks]) -> Html:
    labelled = [marks for marks in series if marks.label]
    keys = [
        tag("span", tag("svg", _key(marks), viewBox="0 0 24 14", class_="key", aria_hidden="true"), marks.label)
        for marks in labelled
    ]
    drawing = tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *parts,
        viewBox=f"0 0 {_WIDTH} {math.ceil(height)}",
        role="img",
        aria_label=f"{title}. {description}",
    )
    caption = tag("figcaption", tag("strong", title), " ", description)
    return tag("figure", caption, drawing, tag("div", *keys, class_="legend") if keys else None)


def _key(marks: Marks) -> Html:
    line = _line(1, 7, 23, 7, f"{marks.colour} {marks.line}") if marks.line else Html("")
    return join(line, _mark(marks.shape, 12, 7, marks.colour))


def _drawn(marks: Marks, place: Callable[[Point], Point]) -> Html:
    places = [place(point) for point in marks.points]
    joined = Html("")
    if marks.line and len(places) > 1:
        joined = tag(
            "polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), class_=f"{marks.colour} {marks.line}"
        )
    titles = itertools.chain(marks.titles, itertools.repeat(""))
    return join(
        joined, *(_mark(marks.shape, x, y, marks.colour, title) for (x, y), title in zip(places, titles, strict=False))
    )


def _mark(shape: str, x: float, y: float, colour: str, title: str = "") -> Html:
    inside = [tag("title", title)] if title else []
    if shape == "dot":
        return tag("circle", *inside, cx=x, cy=y, r=4.5, class_=f"{colour} dot")
    if shape == "ring":
        return tag("circle", *inside, cx=x, cy=y, r=3.5, class_=f"{colour} hollow")
    if shape == "cross":
        return tag("path", *inside, d=f"M{x - 6:.1f} {y - 6:.1f}l12 12m0-12l-12 12", class_=f"{colour} cross")
    if shape == "star":
        corners = (
            f"{x + radius * math.sin(math.pi * corner / 5):.1f} {y - radius * math.cos(math.pi * corner / 5):.1f}"
            for corner, radius in enumerate([8.0, 3.4] * 5)
        )
        return tag("path", *inside, d=f"M{'L'.join(corners)}z", class_=f"{colour} star")
    return Html("")


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str, height: float = _HEIGHT) -> Html:
    low = height - _BOTTOM
    parts = [_rules(y_axis, y_label, height)]
    for tick in x_axis.ticks:
        x = x_axis.place(tick, _LEFT, _WIDTH - _RIGHT)
        parts.append(join(_line(x, _TOP, x, low, "grid"), _label(x, low + 15, _shown(tick), _anchor(x))))
    return join(*parts, _label((_LEFT + _WIDTH - _RIGHT) / 2, height - 6, x_label, "middle", "axis"))


def _rules(axis: _Axis, label: str, height: float) -> Html:
    parts = []
    for tick in axis.ticks:
        y = axis.place(tick, height - _BOTTOM, _TOP)
        parts.append(join(_line(_LEFT, y, _WIDTH - _RIGHT, y, "grid"), _label(_LEFT - 6, y + 4, _shown(tick), "end")))
    middle = (height - _BOTTOM + _TOP) / 2
    name = tag(
        "text",
        shortened(label, 30),
        transform=f"translate(12 {middle:.1f}) rotate(-90)",
        text_anchor="middle",
        class_="axis",
    )
    return join(*parts, name)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=kind)


def _label(x: float, y: float, text: str, anchor: str, kind: str | None = None) -> Html:
    return tag("text", text, x=float(x), y=float(y), text_anchor=anchor, class_=kind)


def _anchor(x: float) -> str:
    return "start" if x < 28 else "end" if x > _WIDTH - 28 else "middle"


def _opacity(level: int) -> str:
    return f"{0.06 + 0.94 * max(0, level) / (_LEVELS - 1):.3f}"


def _shown(value: float) -> str:
    if value == int(value) and abs(value) < 1e7:
        return str(int(value))
    return f"{value:.4g}"


def _every(labels: Sequence[str]) -> int:
    """Returns which labels can be written next to each other: each, or every second, and so on."""
    longest = max((len(shortened(label, 8)) for label in labels), default=1)
    return -(-len(labels) // max(2, (_WIDTH - _LEFT - _RIGHT) // (7 * longest + 8)))
