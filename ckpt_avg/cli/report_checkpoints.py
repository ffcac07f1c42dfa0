"""The section of a report on the checkpoints of the output: what they record, and how much each counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_avg.cli.html_tags import Html, join, name
from ckpt_avg.cli.report_parts import (
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
from ckpt_avg.cli.svg_charts import Marks, column_chart, line_chart

_MOST_METRICS = 4


def checkpoints(document: Mapping[str, Any]) -> Html | None:
    """Returns what the checkpoints record, and how much each counts."""
    sources = document.get("sources")
    if not sources:
        return None
    unit, run, count = document["unit"], document["run"], len(sources)
    metrics = _recorded_metrics(document)
    figures: list[Html | None] = []
    if len(run) > 1:
        figures += [
            _over_time(document, metric, [each["metrics"].get(metric) for each in run], metric) for metric in metrics
        ]
        figures.append(_learning_rate(document))
    if document["weights"] is not None:
        weights = list(zip(moments_of(sources, unit), document["weights"], strict=True))
        figures.append(
            column_chart("Weights", "How much each checkpoint counts; they sum to 1.", unit, "weight", weights)
        )
    equal = f"All {count} checkpoints have the same weight, 1/{count}."
    return join(
        paragraphs(equal if count > 1 and document["weights"] is None else ""),
        charts(*figures),
        _numbers(document, metrics),
    )


def _numbers(document: Mapping[str, Any], metrics: Sequence[str]) -> Html:
    sources, unit, compared = document["sources"], document["unit"], document["compared"]
    relative = {each["path"]: each["relative"] for each in compared["checkpoints"]} if compared else {}
    columns: list[tuple[object, list[str]]] = [
        (unit, ["-" if each[unit] is None else str(each[unit]) for each in sources]),
        *((name(metric), [number(each["metrics"].get(metric)) for each in sources]) for metric in metrics),
        ("learning rate", [number(each["learning_rate"]) for each in sources]),
        ("weight", [number(each["weight"]) for each in sources]),
        ("from the mean", [share(relative.get(each["path"])) for each in sources]),
    ]
    shown = [(title, cells) for title, cells in columns if set(cells) != {"-"}]
    names = names_of([each["path"] for each in sources])
    rows = [[name(label), *(cells[place] for _, cells in shown)] for place, label in enumerate(names)]
    far = far_off(compared)
    marked = [place for place, each in enumerate(sources) if each["path"] in far]
    return table("The checkpoints of the output", ["checkpoint", *(title for title, _ in shown)], rows, far=marked)


def _recorded_metrics(document: Mapping[str, Any]) -> list[str]:
    """Returns the recorded metrics to show: those that were measured, too, then the most frequent ones."""
    counts: dict[str, int] = {}
    for each in document["run"]:
        for metric, value in each["metrics"].items():
            counts[metric] = counts.get(metric, 0) + (value is not None)
    measured = {metric for each in document["evaluations"] for metric in each["metrics"]}
    order = sorted(counts, key=lambda metric: (metric not in measured, -counts[metric], metric))
    return order[:_MOST_METRICS]


def _learning_rate(document: Mapping[str, Any]) -> Html | None:
    rates = [each["learning_rate"] for each in document["run"]]
    logged = points_of(document["rates"]) if document["unit"] == "step" else []
    if len({*rates, *(rate for _, rate in logged)} - {None}) < 2:
        return None  # the table has it
    return _over_time(document, "Learning rate", rates, "learning rate", logged)


def _over_time(
    document: Mapping[str, Any],
    title: str,
    values: Sequence[float | None],
    label: str,
    logged: Sequence[tuple[float, float]] = (),
) -> Html:
    """Returns what the checkpoints of the run record over its steps, those of the output marked."""
    unit, run = document["unit"], document["run"]
    points = [
        (moment_of(each, unit, place), value) for place, (each, value) in enumerate(zip(run, values, strict=True))
    ]
    chosen, others = (
        points_of(point for point, each in zip(points, run, strict=True) if each["selected"] is kind)
        for kind in (True, False)
    )
    series = [
        Marks("", logged or points_of(points), "none", "grey", "solid"),
        Marks("not in the output", others, "ring", "grey"),
        Marks("in the output", chosen, "dot", "blue"),
    ]
    return line_chart(title, f"As the training run recorded it, over the {unit}.", unit, label, series)
