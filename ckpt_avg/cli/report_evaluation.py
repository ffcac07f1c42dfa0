"""The section of a report on what was measured before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_avg.cli.html_tags import Html, join, name, tag
from ckpt_avg.cli.report_parts import charts, number, paragraphs, table
from ckpt_avg.cli.svg_charts import Row, row_chart
from ckpt_avg.user_code.gate import parse_requirement

_MOST_METRICS = 4  # with a chart
_MOST_ROWS = 8  # of a chart


def evaluation(document: Mapping[str, Any]) -> Html | None:
    """Returns what was measured before and after, and whether the requirements are met."""
    measured = document.get("evaluations")
    if not measured:
        return None
    metrics = list(measured[-1]["metrics"])
    last = [each["path"] for each in measured if each["path"] is not None][-1:]
    rows = [[name(_label(each, last)), *(_measured(each, metric) for metric in metrics)] for each in measured]
    split = document["split"]
    return join(
        paragraphs(
            "The last row is the output. The difference in the first box is from the last checkpoint, with its "
            "statistics refreshed if those of the output are: so it shows what averaging adds.",
            f"The checkpoints were chosen on the split {split}: its numbers are too optimistic." if split else "",
        ),
        charts(*(_chart(document, metric, last) for metric in metrics[:_MOST_METRICS])),
        table("Measured by the --eval function", ["weights", *map(name, metrics)], rows, texts=(0,)),
        _gate(document["requirements"]),
    )


def _label(measured: Mapping[str, Any], last: Sequence[str]) -> str:
    return f"{measured['name']}{' (last)' if measured['path'] in last and not measured['refreshed'] else ''}"


def _measured(measured: Mapping[str, Any], metric: str) -> str:
    samples = _samples(measured, metric)
    spread = f" ({number(min(samples))} to {number(max(samples))})" if len(set(samples)) > 1 else ""
    return number(measured["metrics"].get(metric)) + spread


def _samples(measured: Mapping[str, Any], metric: str) -> list[float]:
    return [value for value in measured["samples"].get(metric, ()) if value is not None]


def _gate(requirements: Sequence[Mapping[str, Any]]) -> Html | None:
    if not requirements:
        return None
    rows = [
        [
            tag("code", each["requirement"]),
            number(each["value"]),
            number(each["threshold"]),
            tag("span", "✓ met" if each["met"] else "✗ not met", class_="met" if each["met"] else "unmet"),
        ]
        for each in requirements
    ]
    return table("Requirements (the gate)", ["requirement", "value", "limit", "outcome"], rows)


def _chart(document: Mapping[str, Any], metric: str, last: Sequence[str]) -> Html:
    """Returns a row for each measurement that the table is about; one row for all others if there are many."""
    measured = document["evaluations"]
    shown = [each for each in measured if each["path"] is None or each["path"] in last or len(measured) <= _MOST_ROWS]
    others = [each["metrics"].get(metric) for each in measured if each not in shown]
    rows = []
    if known := [value for value in others if value is not None]:
        rows.append(Row(f"{len(others)} other measurements of checkpoints", None, "", others=known, colour="grey"))
    for each in shown:
        samples, value, is_average = _samples(each, metric), each["metrics"].get(metric), each["path"] is None
        rows.append(
            Row(
                _label(each, last),
                value,
                number(value),
                low=min(samples, default=None),
                high=max(samples, default=None),
                colour="orange" if is_average else "blue",
                shape="star" if each is shown[-1] else "dot" if is_average or each["refreshed"] else "ring",
            )
        )
    compared = [each["metrics"].get(metric) for each in shown if each["path"] in last][-1:]
    limits = [
        each["threshold"]
        for each in document["requirements"]
        if parse_requirement(each["requirement"]).metric == metric
    ]
    lines = [(value, "compared with") for value in compared if value is not None]
    lines += [(value, "limit of the requirement") for value in limits[:1] if _is_near(value, rows)]
    return row_chart(metric, "Each measurement; the star is the output.", rows, lines=lines)


def _is_near(limit: float | None, rows: Sequence[Row]) -> bool:
    """Whether a limit can be drawn without squeezing the measurements."""
    values = [row.value for row in rows if row.value is not None]
    if limit is None or not values:
        return False
    low, high = min(values), max(values)
    return low - 2 * (high - low) <= limit <= high + 2 * (high - low)
