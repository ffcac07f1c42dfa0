"""The first screen of a report: did averaging help, what was averaged, is something off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt_avg.cli.html_tags import Html, join, name, tag
from ckpt_avg.cli.report_parts import names_of, number, paragraphs, signed
from ckpt_avg.tables import shortened
from ckpt_avg.text import ends, plural, size

_LONGEST_NAME = 48
_LONGEST_NOTICE = 140


def answers(document: Mapping[str, Any]) -> Html:
    """Returns the answers, each in a box."""
    kind = document["kind"]
    if kind == "compare":
        boxes = [_compared(document), _off(document, document)]
    elif kind == "sweep":
        boxes = [_best_window(document), _swept(document), _off(document, None)]
    else:
        boxes = [_helped(document), _averaged(document), _off(document, document.get("compared"))]
    return tag("div", *boxes, class_="answers")


def _box(question: str, verdict: str, *contents: object, state: str = "") -> Html:
    return tag(
        "section",
        tag("h2", question),
        tag("p", verdict, class_="verdict"),
        *contents,
        class_=f"answer {state}".strip(),
    )


def _helped(document: Mapping[str, Any]) -> Html:
    """Says whether averaging helped, or for a single checkpoint the refresh, and what became of the requirements."""
    several = len(document["checkpoints"]) > 1
    what = "averaging" if several else "the refresh"
    question = f"Did {what} help?"
    comparison = document["comparison"] or {}
    changes = comparison.get("averaging" if several else "refresh") or []
    outcomes = _outcomes(document["requirements"])
    unmet = any(not each["met"] for each in document["requirements"])
    if not changes:
        advice = "Add --eval MODULE:FUNCTION to measure a metric before and after."
        return _box(question, "Not measured", paragraphs(advice), outcomes, state="bad" if unmet else "")
    verdict, state = _verdict(changes)
    reference = "the last checkpoint" if several else "the same weights as they were saved"
    if several and any(each["refreshed"] and each["path"] for each in document["evaluations"]):
        reference += ", its statistics refreshed, too"
    after = document["evaluations"][-1]["metrics"]
    items = [
        tag("li", name(each["metric"]), f" {number(after.get(each['metric']))} ({_change(each)})") for each in changes
    ]
    return _box(
        question,
        "Not published" if unmet else verdict,
        paragraphs(verdict) if unmet else None,
        tag("ul", *items),
        tag("p", f"In brackets: the difference from {reference}.", class_="soft"),
        outcomes,
        state="bad" if unmet else state,
    )


def _verdict(changes: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    verdicts = {each["verdict"] for each in changes} - {"not a number"}
    better, worse = "better" in verdicts, "worse" in verdicts
    if better and worse:
        return "Some metrics are better, some worse", ""
    if better:
        return "✓ Yes", "good"
    if worse:
        return "✗ No, it is worse", "bad"
    if verdicts and "" not in verdicts:
        return "No difference", ""
    return "The metric's direction is unknown", ""


def _change(change: Mapping[str, Any]) -> str:
    spread = "" if not change["spread"] else f" ±{change['spread']:.2g}"
    verdict = f", {change['verdict']}" if change["verdict"] else ""
    return f"{signed(change['difference'])}{spread}{verdict}"


def _outcomes(requirements: Sequence[Mapping[str, Any]]) -> Html | None:
    items = [
        tag(
            "li",
            tag("span", "✓ met" if each["met"] else "✗ not met", class_="met" if each["met"] else "unmet"),
            ": ",
            tag("code", each["requirement"]),
            f" (got {number(each['value'])}, the limit is {number(each['threshold'])})",
        )
        for each in requirements
    ]
    return tag("ul", *items) if items else None


def _averaged(document: Mapping[str, Any]) -> Html:
    paths, run = document["checkpoints"], document.get("run", ())
    count, unit = len(paths), document["unit"]
    names = [shortened(each, _LONGEST_NAME) for each in names_of(paths)]
    total = len(document.get("candidates", run))
    verdict = plural(count, "checkpoint") if total <= count else f"{count} of {total} checkpoints"
    moments = [each for each in document["steps"] if each is not None]
    between = f"{unit}s {min(moments):,} to {max(moments):,}" if len(set(moments)) > 1 else ""
    weights = "equal weights" if document["weights"] is None else "unequal weights"
    statistics = {
        "none": "no BatchNorm layers",
        "refreshed": "BatchNorm statistics recomputed",
        "mean": "BatchNorm statistics averaged, not recomputed",
        "copied": "BatchNorm statistics copied",
        "frozen": "BatchNorm statistics frozen",
    }[document["batch_norm"]["statistics"]]
    facts = [each for each in (between, weights if count > 1 else "", statistics) if each]
    written = "published" if document["written"] else "not published"
    return _box(
        "What was averaged?" if count > 1 else "What is it?",
        verdict,
        tag("p", ends(names)),
        paragraphs("; ".join(facts)),
        tag("p", f"{document['tensors']:,} tensors, {size(document['bytes'])}, {written}", class_="soft"),
    )


def _off(document: Mapping[str, Any], compared: Mapping[str, Any] | None) -> Html:
    """Says what `compare` found, and how many notices there are."""
    findings = (compared or {}).get("findings", ())
    notices = document.get("notices", ())
    failure = document.get("compare_failure")
    items = [tag("li", each["text"]) for each in findings[:3]]
    if len(findings) > 3:
        items.append(tag("li", f"and {len(findings) - 3} more, below"))
    if failure:
        items.append(tag("li", f"The distances could not be measured: {failure}"))
    if notices:
        link = tag("a", plural(len(notices), "notice"), href="#provenance")
        items.append(tag("li", link, f": {shortened(notices[0], _LONGEST_NOTICE)}"))
    if findings:
        verdict, state = f"{plural(len(findings), 'finding')}", "bad"
    elif compared is not None:
        verdict, state = "Nothing is far off", "good"
    else:
        verdict, state = "Not looked at" if not notices else plural(len(notices), "notice"), ""
    advice = "The checkpoints fit together." if compared else "ckpt-avg compare looks for checkpoints that are far off."
    contents = tag("ul", *items) if items else paragraphs(advice)
    return _box("Is something off?", verdict, contents, state=state)


def _compared(document: Mapping[str, Any]) -> Html:
    names = names_of([each["path"] for each in document["checkpoints"]])
    weights = sum(each["group"] == "weights" for each in document["tensors"])
    return _box(
        "What was compared?",
        plural(len(names), "checkpoint"),
        tag("p", ends(names)),
        paragraphs(f"{document['elements']:,} weights in {weights:,} tensors"),
    )


def _best_window(document: Mapping[str, Any]) -> Html:
    best, metric, change = document["best"], document["metric"], document["change"]
    size_of = f"the {best['side']} {best['size']}"
    rule = "" if best["weighting"] == "mean" else f", weights by {best['weighting']}"
    better = change["verdict"] == "better"
    return _box(
        "Which window is best?",
        f"{size_of[0].upper()}{size_of[1:]}{rule}",
        tag("ul", tag("li", name(metric), f" {number(best['metrics'][metric])} ({_change(change)})")),
        tag("p", "In brackets: the difference from the last checkpoint.", class_="soft"),
        state="good" if better else "bad" if change["verdict"] == "worse" else "",
    )


def _swept(document: Mapping[str, Any]) -> Html:
    names = names_of(document["checkpoints"])
    words = join(tag("code", " ".join(document["command"])))
    return _box(
        "What was measured?", plural(len(document["windows"]), "average"), tag("p", ends(names)), tag("p", words)
    )
