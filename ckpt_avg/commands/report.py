"""The report of a command: its JSON result, and what a reader of the result asks next, in one versioned document.

docs/report.md describes it, and docs/report.schema.json is its JSON Schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.output.provenance import recorded_sources, text_of
from ckpt_avg.results import plain

if TYPE_CHECKING:
    from ckpt_avg.commands.compare import CompareResult
    from ckpt_avg.commands.draft import AverageResult

SCHEMA = "ckpt-avg report"
SCHEMA_VERSION = 1
_MOST_RATES = 1_000  # points of the learning rate
_SECRET = re.compile(r"token|secret|passw|api[-_]?key|credential", re.IGNORECASE)
_TOKEN = re.compile(
    r"\b(hf|ghp|gho|glpat|sk|xox[a-z])[-_][A-Za-z0-9_-]{16,}|\bAKIA[A-Z0-9]{16}\b|(?<=://)[^/@\s]+(?=@)"
)
_HIDDEN = "***"


def report_document(kind: str, found: Mapping[str, Any], command_line: Sequence[str]) -> dict[str, Any]:
    """Returns the JSON result of a command as a report: every key of it, and what it is.

    Args:
        kind: the command: ``average``, ``refresh-bn``, ``soup``, ``sweep`` or ``compare``.
        found: the JSON result.
        command_line: the words of the command.
    """
    name, *others = found
    about = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "command_line": without_secrets(command_line),
    }
    return {name: found[name], **about, **{key: found[key] for key in others}}


def output_report(
    kind: str,
    found: Mapping[str, Any],
    command_line: Sequence[str],
    result: AverageResult,
    compared: CompareResult | str | None,
) -> dict[str, Any]:
    """Returns the report of a command that makes an output.

    Args:
        kind, found, command_line: as for `report_document`.
        result: the output.
        compared: what `compare` says of the checkpoints, or why it could not be measured; None if it was not.
    """
    failed = isinstance(compared, str)
    changes = result.batch_norm.changes if result.batch_norm else {}
    return {
        **report_document(kind, found, command_line),
        "sources": _sources(result),
        "run": [{**_moment(record), "selected": place in result.places} for place, record in enumerate(result.run)],
        "rates": _rates(result.run),
        "batch_norm_changes": [{"layer": layer, **plain(change)} for layer, change in changes.items()],
        "compared": None if failed or compared is None else plain(compared),
        "compare_failure": compared if failed else None,
        "provenance": _provenance(result.metadata),
    }


def comparison_of(result: AverageResult, measure: Callable[[], CompareResult]) -> CompareResult | str | None:
    """Returns what `compare` measures, or why it fails: the output, its result and the report do not depend on it."""
    if len(result.checkpoints) < 2 or not (result.written or result.evaluations):
        return None
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def without_secrets(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line with what looks like a token or a password replaced by ``***``."""
    shown: list[str] = []
    hides_next = False
    for word in words:
        name, equals, _ = word.partition("=")
        if hides_next and not word.startswith("-"):
            shown.append(_HIDDEN)
        elif word.startswith("-") and equals and _SECRET.search(name):
            shown.append(f"{name}={_HIDDEN}")
        else:
            shown.append(_TOKEN.sub(_HIDDEN, word))
        hides_next = word.startswith("--") and not equals and bool(_SECRET.search(word))
    return shown


def _sources(result: AverageResult) -> list[dict[str, Any]]:
    """Returns what is known of each checkpoint, in order; the digests as the output's metadata records them."""
    recorded = recorded_sources(result.metadata) or []
    if len(recorded) != len(result.checkpoints):  # a copy keeps the sources of the average that it is a copy of
        recorded = [{}] * len(result.checkpoints)
    count = len(result.checkpoints)
    weights = result.weights or (1 / count,) * count
    return [
        {
            "path": str(path),
            "name": text_of(path),
            **_moment(result.run[place]),
            "weight": weight,
            "bytes": source.get("bytes"),
            "header_sha256": source.get("header_sha256"),
            "sha256": source.get("sha256"),
        }
        for path, place, weight, source in zip(result.checkpoints, result.places, weights, recorded, strict=True)
    ]


def _moment(record: Record) -> dict[str, Any]:
    return {
        "step": record.step,
        "epoch": record.epoch,
        "metrics": plain(record.metrics),
        "learning_rate": plain(record.learning_rate),
    }


def _rates(records: Sequence[Record]) -> list[list[float]]:
    """Returns (step, learning rate) as the trainer logged them, thinned out."""
    longest = max((record.rates for record in records), key=len, default=())
    every = -(-len(longest) // _MOST_RATES) or 1
    return [list(pair) for pair in longest[::every]]


def _provenance(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns what the output's metadata records of its making; values that are JSON are parsed."""
    found: dict[str, Any] = {}
    for key, value in metadata.items():
        if key.startswith("ckpt_avg."):
            try:
                found[key.removeprefix("ckpt_avg.")] = json.loads(value) if value[:1] in "[{" else value
            except (ValueError, RecursionError):
                found[key.removeprefix("ckpt_avg.")] = value
    return found
