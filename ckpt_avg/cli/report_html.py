"""A report as one page that loads nothing and needs no script; the first screen answers what everybody asks."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ckpt_avg.cli.html_tags import Html, join, name, tag
from ckpt_avg.cli.report_answers import answers
from ckpt_avg.cli.report_batch_norm import batch_norm
from ckpt_avg.cli.report_checkpoints import checkpoints
from ckpt_avg.cli.report_choice import decisions, windows
from ckpt_avg.cli.report_distances import distances, layers
from ckpt_avg.cli.report_evaluation import evaluation
from ckpt_avg.cli.report_parts import listed, table
from ckpt_avg.cli.report_style import STYLE
from ckpt_avg.output.paths import HTML_MARK
from ckpt_avg.output.provenance import text_of
from ckpt_avg.text import size

# Heading, anchor, and what makes the contents: None if a report has nothing of it.
SECTIONS: tuple[tuple[str, str, Callable[[Mapping[str, Any]], Html | None]], ...] = (
    ("Evaluation", "evaluation", evaluation),
    ("The soup", "soup", decisions),
    ("Windows", "windows", windows),
    ("Checkpoints", "checkpoints", checkpoints),
    ("Distances", "distances", distances),
    ("Layers that moved most", "layers", layers),
    ("BatchNorm", "batch-norm", batch_norm),
)


def report_html(document: Mapping[str, Any]) -> bytes:
    """Returns a report of `commands.report` as one page, in UTF-8."""
    title, about = _title(document)
    sections = [
        (heading, anchor, contents) for heading, anchor, make in SECTIONS if (contents := make(document)) is not None
    ]
    sections.append(("Provenance", "provenance", _provenance(document)))
    links = [tag("li", tag("a", heading, href=f"#{anchor}")) for heading, anchor, _ in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy()),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"ckpt-avg {document['ckpt_avg']}"),
        tag("title", title),
        Html(f"<style>{STYLE}</style>"),
    )
    body = tag(
        "body",
        tag("header", tag("h1", name(title)), tag("p", about, class_="soft"), answers(document)),
        tag("main", tag("nav", tag("ul", *links), aria_label="Sections"), *(_section(*each) for each in sections)),
        tag("footer", f"Made by ckpt-avg {document['ckpt_avg']}. The same numbers as JSON: --report FILE.json"),
    )
    page = tag("html", head, body, lang="en")
    return HTML_MARK + page.encode() + b"\n"


def _policy() -> str:
    """Returns what the page may load: nothing but its own style, by its digest."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _title(document: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the heading of the page, and what it is a report of."""
    kind = document["kind"]
    if kind == "compare":
        return f"{len(document['checkpoints'])} checkpoints compared", "A report of ckpt-avg compare."
    if kind == "sweep":
        return f"Windows of {len(document['checkpoints'])} checkpoints", "A report of ckpt-avg sweep."
    state = "published" if document["written"] else "not published"
    return text_of(Path(document["output"])), f"A report of ckpt-avg {kind}: the output was {state}."


def _section(heading: str, anchor: str, contents: Html) -> Html:
    return tag("section", tag("h2", heading, id=anchor), contents, aria_labelledby=anchor)


def _provenance(document: Mapping[str, Any]) -> Html:
    facts: list[tuple[str, object]] = []
    if "output" in document:
        facts += [
            ("Output", tag("code", name(document["output"]))),
            ("Size", f"{size(document['bytes'])}, {document['tensors']:,} tensors"),
            ("Computed on", f"{document['device']} by the {document['engine']} engine"),
        ]
        for label, key in (("Digest of the data", "data_digest"), ("SHA-256 of the file", "sha256")):
            if document[key] is not None:
                facts.append((label, tag("code", document[key])))
    recorded = document.get("provenance", {})
    shown = {key: value for key, value in recorded.items() if key not in ("sources", "version", "header_digest")}
    for key, value in sorted(shown.items()):
        facts.append((key, tag("code", listed(value))))
    facts.append(("Tool", f"ckpt-avg {document['ckpt_avg']}"))
    parts = [
        tag("h3", "Command"),
        tag("code", shlex.join(document["command_line"]), class_="words"),
        tag("dl", *(join(tag("dt", label), tag("dd", value)) for label, value in facts)),
    ]
    digests = [
        (each["name"], each["bytes"], _digest(each["sha256"]), each["header_sha256"])
        for each in document.get("sources", ())
        if each["header_sha256"] is not None
    ]
    if digests:
        has_files = any(files for _, _, files, _ in digests)
        rows = [
            [name(source), f"{nbytes:,}", tag("code", (files if has_files else header) or "-")]
            for source, nbytes, files, header in digests
        ]
        what = "SHA-256" if has_files else "SHA-256 of the header"
        parts.append(
            table("The checkpoints, as the output records them", ["checkpoint", "bytes", what], rows, texts=(2,))
        )
    if notices := document.get("notices"):
        parts += [tag("h3", "Notices"), tag("ul", *(tag("li", text) for text in notices))]
    if skipped := document.get("skipped"):
        rows = [[name(each["path"]), each["reason"]] for each in skipped]
        parts.append(table("Skipped", ["file", "reason"], rows, texts=(0, 1)))
    return join(*parts)


def _digest(files: Mapping[str, str] | None) -> str:
    if not files:
        return ""
    return next(iter(files.values())) if len(files) == 1 else listed(files)
