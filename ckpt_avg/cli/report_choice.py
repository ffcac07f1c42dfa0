"""The sections of a report on how checkpoints were chosen: the decisions of a soup, the windows of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_avg.cli.html_tags import Html, join, name
from ckpt_avg.cli.report_parts import beside, names_of, number, points_of, table
from ckpt_avg.cli.svg_charts import Marks, line_chart

_COLOURS = ("blue", "green", "orange", "red", "grey")


def decisions(document: Mapping[str, Any]) -> Html | None:
    """Returns what a soup decided."""
    found = document.get("decisions")
    if not found:
        return None
    metric = document["metric"]

    def points(key: str, kept: Sequence[bool]) -> list[tuple[float, float]]:
        places = enumerate(found, 1)
        return points_of((place, each[key].get(metric)) for place, each in places if each["kept"] in kept)

    series = [
        Marks("kept", points("soup_metrics", [True]), "dot", "blue"),
        Marks("not kept", points("soup_metrics", [False]), "cross", "red"),
        Marks("alone", points("metrics", [True, False]), "ring", "grey"),
    ]
    text = f"With each candidate, in the order of the decisions; {_better(document)} is better."
    rows = [
        [
            name(label),
            number(each["metrics"].get(metric)),
            number(each["soup_metrics"].get(metric)),
            "kept" if each["kept"] else "not kept",
        ]
        for label, each in zip(names_of([each["checkpoint"] for each in found]), found, strict=True)
    ]
    header = ["checkpoint", join(name(metric), " alone"), "soup with it", "decision"]
    return beside(
        line_chart(f"{metric} of the soup", text, "candidate", metric, series),
        table("The decisions, in their order", header, rows),
    )


def windows(document: Mapping[str, Any]) -> Html | None:
    """Returns what a sweep measured."""
    found = document.get("windows")
    if not found:
        return None
    metric, best, rules = document["metric"], document["best"], document["weightings"]
    series = []
    for colour, rule in zip(_COLOURS, rules, strict=False):
        for side, line, shape in (("last", "solid", "dot"), ("first", "dashed", "ring")):
            of_side = [each for each in found if (each["weighting"], each["side"]) == (rule, side)]
            points = sorted(points_of((each["size"], each["metrics"].get(metric)) for each in of_side))
            label = f"the {side} k{f', {rule}' if len(rules) > 1 else ''}"
            series.append(Marks(label, points, shape, colour, line))
    reference = document["reference"]["metrics"].get(metric)
    across = points_of([(1, reference), (len(document["checkpoints"]), reference)])
    series.append(Marks("the last checkpoint", across, "none", "grey", "dashed"))
    series.append(Marks("best", points_of([(best["size"], best["metrics"].get(metric))]), "star", "orange"))
    rows = [
        [f"{each['side']} {each['size']}", each["weighting"], *(number(value) for value in each["metrics"].values())]
        for each in found
    ]
    header = ["window", "weights", *map(name, best["metrics"])]
    marked = [place for place, each in enumerate(found) if each == best]
    title, text = f"{metric} over the number of checkpoints", f"{_better(document).capitalize()} is better."
    return beside(
        line_chart(title, text, "checkpoints averaged, k", metric, series),
        table("Every window; the best one is marked", header, rows, texts=(1,), best=marked),
    )


def _better(document: Mapping[str, Any]) -> str:
    return "higher" if document["mode"] == "max" else "lower"
