"""The sections of a report on what `compare` measures: distances, the path of the weights, what moved most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_avg.cli.html_tags import Html, join, name, tag
from ckpt_avg.cli.report_parts import (
    beside,
    charts,
    far_off,
    moment_of,
    moments_of,
    names_of,
    number,
    paragraphs,
    points_of,
    share,
    table,
)
from ckpt_avg.cli.svg_charts import Marks, Row, heat_map, line_chart, plane_chart, row_chart

_MOST_BARS = 12
_MOST_TENSORS = 20  # in the table
_MOST_NUMBERS = 12  # checkpoints of which the distances to each other are a table


def distances(document: Mapping[str, Any]) -> Html | None:
    """Returns how far the checkpoints are from each other, and what is far off."""
    compared = _compared(document)
    if compared is None:
        failure = document.get("compare_failure")
        return paragraphs(f"The distances could not be measured: {failure}") if failure else None
    found, unit = compared["checkpoints"], _unit(compared)
    labels = moments_of(found, unit)
    figures = [
        _from_the_mean(compared),
        _path(compared),
        heat_map(
            "Distances between the checkpoints",
            f"The stronger the colour, the farther; rows and columns are {unit}s.",
            labels,
            compared["distances"],
        ),
    ]
    parts = [_findings(compared["findings"]), charts(*figures), _numbers(compared)]
    if len(found) <= _MOST_NUMBERS:
        for title, matrix, digits in (
            ("Distances between the checkpoints", compared["distances"], 4),
            ("Cosines of the differences from the mean", compared["centred_cosines"], 2),
        ):
            cells = ([number(value, digits) for value in row] for row in matrix)
            rows = [[label, *row] for label, row in zip(labels, cells, strict=True)]
            parts.append(table(title, [unit, *labels], rows))
    return join(*parts)


def layers(document: Mapping[str, Any]) -> Html | None:
    """Returns the tensors that moved most."""
    compared = _compared(document)
    if compared is None:
        return None
    found = [each for each in compared["tensors"] if each["group"] == "weights" and each["relative"] is not None]
    if not found:
        return None
    unit = _unit(compared)
    labels = moments_of(compared["checkpoints"], unit)
    bars = [Row(each["name"], each["relative"] * 100, share(each["relative"])) for each in found[:_MOST_BARS]]
    rows = [_tensor(each, labels) for each in found[:_MOST_TENSORS]]
    caption = f"The {len(rows)} of {len(found):,} tensors that moved most"
    header = ["tensor", "shape", "norm", "relative", "farthest", f"at {unit}"]
    text = "Root mean square distance from the mean, in percent of the tensor's norm."
    return beside(row_chart("Tensors that moved most", text, bars, bars=True), table(caption, header, rows, texts=(0,)))


def _compared(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns what `compare` measured: it is the report itself, or a part of it."""
    return document if document["kind"] == "compare" else document.get("compared")


def _unit(compared: Mapping[str, Any]) -> str:
    return "epoch" if all(each["step"] is None for each in compared["checkpoints"]) else "step"


def _findings(findings: Sequence[Mapping[str, Any]]) -> Html:
    if not findings:
        return paragraphs("Nothing is far off.")
    return tag("ul", *(tag("li", tag("span", each["kind"], class_="unmet"), ": ", each["text"]) for each in findings))


def _from_the_mean(compared: Mapping[str, Any]) -> Html:
    found, unit, far = compared["checkpoints"], _unit(compared), far_off(compared)
    points = [
        (moment_of(each, unit, place), None if each["relative"] is None else 100 * each["relative"])
        for place, each in enumerate(found)
    ]
    near, off = (
        points_of(point for point, each in zip(points, found, strict=True) if (each["path"] in far) is kind)
        for kind in (False, True)
    )
    series = [
        Marks("", points_of(points), "none", "blue", "solid"),
        Marks("checkpoints", near, "dot", "blue"),
        Marks("far off", off, "cross", "red"),
    ]
    return line_chart("Distance from the mean", "In percent of the norm of the mean of all weights.", unit, "%", series)


def _numbers(compared: Mapping[str, Any]) -> Html:
    found, unit, far = compared["checkpoints"], _unit(compared), far_off(compared)
    has_statistics = any(each["statistics_to_mean"] is not None for each in found)
    names = names_of([each["path"] for each in found])
    rows = []
    for label, moment, each in zip(names, moments_of(found, unit), found, strict=True):
        cells = [number(each["norm"], 4), number(each["to_mean"], 4), share(each["relative"])]
        cells.append(number(each["to_previous"], 4))
        rows.append([name(label), moment, *cells, *([share(each["statistics_to_mean"])] if has_statistics else [])])
    header = ["checkpoint", unit, "norm", "from the mean", "relative", "from the one before"]
    header += ["statistics"] if has_statistics else []
    marked = [place for place, each in enumerate(found) if each["path"] in far]
    return table("Norms and distances of all weights", header, rows, far=marked)


def _path(compared: Mapping[str, Any]) -> Html | None:
    """Returns the checkpoints in the plane of the two main directions, and the averages of the last ones."""
    found = [each for each in compared["checkpoints"] if None not in each["plane"]]
    if len(found) < 3:
        return None
    unit, far = _unit(compared), far_off(compared)
    points = points_of(each["plane"] for each in found)
    means = [_mean(points[-count:]) for count in range(2, len(points) + 1)]
    titles = [f"{unit} {label}" for label in moments_of(found, unit)]
    off = [point for point, each in zip(points, found, strict=True) if each["path"] in far]
    series = [
        Marks("", points, "none", "blue", "solid"),
        Marks(titles[0], points[:1], "ring", "blue", "", titles),
        Marks(f"to {titles[-1]}", points[1:], "dot", "blue", "", titles[1:]),
        Marks("average of the last k", means, "none", "orange", "dashed"),
        Marks("average of all", means[-1:], "star", "orange"),
        Marks("far off", off, "cross", "red"),
    ]
    first, second = map(share, compared["shares"])
    text = f"The plane of the two main directions: {first} and {second} of the squared distances."
    if compared["straightness"] is not None:
        text += f" First to last is {compared['straightness']:.2f} of the path (1 is straight)."
    return plane_chart("Path of the weights", text, "first main direction", "second", series)


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _tensor(tensor: Mapping[str, Any], labels: Sequence[str]) -> list[object]:
    shape = "×".join(map(str, tensor["shape"])) or "scalar"
    known = [(distance, place) for place, distance in enumerate(tensor["to_mean"]) if distance is not None]
    distance, place = max(known, default=(None, 0))
    farthest = share(distance / tensor["norm"]) if distance is not None and tensor["norm"] else "-"
    return [name(tensor["name"]), shape, number(tensor["norm"], 4), share(tensor["relative"]), farthest, labels[place]]
