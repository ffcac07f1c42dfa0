"""The section of a report on the BatchNorm refresh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt_avg.cli.html_tags import Html, join, name
from ckpt_avg.cli.report_parts import charts, number, paragraphs, table
from ckpt_avg.cli.svg_charts import Row, row_chart

_MOST_LAYERS = 20  # in a chart
_RATIOS = "After the refresh, divided by before: the geometric mean of the channels, and their range."
_SHIFTS = "Shift in standard deviations: the root mean square of the channels, and the largest."


def batch_norm(document: Mapping[str, Any]) -> Html | None:
    """Returns how much the refresh changed each layer."""
    changes = document.get("batch_norm_changes")
    if not changes:
        return None
    summary = document["batch_norm"]
    most = sorted(changes, key=lambda each: each["shift"] or 0.0, reverse=True)[:_MOST_LAYERS]
    shown = [each for each in changes if each in most]
    ratios = [
        Row(_layer(each), each["ratio"], number(each["ratio"], 3), each["least_ratio"], each["largest_ratio"])
        for each in shown
    ]
    shifts = [
        Row(_layer(each), each["shift"], number(each["shift"], 3), 0.0, each["largest_shift"], colour="green")
        for each in shown
    ]
    before = "the mean of the checkpoints' statistics" if len(document["checkpoints"]) > 1 else "the saved statistics"
    return join(
        paragraphs(
            f"Before: {before}. After: measured on the weights of the output, over {summary['samples']:,} samples in "
            f"{summary['batches']:,} batches.",
            f"The charts show the {len(shown)} layers whose means moved most." if len(shown) < len(changes) else "",
        ),
        charts(
            row_chart("Running variances", _RATIOS, ratios, lines=[(1.0, "no change")], log=True),
            row_chart("Running means", _SHIFTS, shifts),
        ),
        _numbers(changes),
    )


def _layer(change: Mapping[str, Any]) -> str:
    return change["layer"] or "the model"


def _numbers(changes: list[Mapping[str, Any]]) -> Html:
    columns = [
        ("mean before", "mean_before", 4),
        ("after", "mean_after", 4),
        ("variance before", "variance_before", 4),
        ("after", "variance_after", 4),
        ("shift", "shift", 3),
        ("ratio", "ratio", 3),
    ]
    rows = [
        [name(_layer(each)), str(each["channels"]), *(number(each[key], digits) for _, key, digits in columns)]
        for each in changes
    ]
    header = ["layer", "channels", *(title for title, _, _ in columns)]
    return table("Running statistics, mean over the channels", header, rows, texts=(0,))
