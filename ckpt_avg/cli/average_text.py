"""The results of `average` and `refresh-bn` as text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckpt_avg.cli.shared_text import (
    REFERENCE,
    detail_lines,
    measured_cells,
    names_text,
    weights_lines,
)
from ckpt_avg.tables import WIDTH, table
from ckpt_avg.text import one_line, plural, size
from ckpt_avg.user_code.comparison import Comparison, Evaluation, mean_of, summary

if TYPE_CHECKING:
    from ckpt_avg.commands.draft import AverageResult
    from ckpt_avg.user_code.gate import Outcome


def average_text(result: AverageResult, *, verbose: bool = False, width: float = WIDTH) -> str:
    """Says what was averaged, how, and what was written; with ``verbose`` also what was skipped."""
    lines = [
        f"{'averaged' if _is_done(result) else 'would average'} {plural(len(result.checkpoints), 'checkpoint')}: "
        f"{names_text(result.checkpoints)}",
        *weights_lines(result.checkpoints, result.steps, result.weights, result.unit, width),
        f"{plural(result.tensors, 'tensor')}, float64 sums on {result.device}",
        *outcome_lines(result, width),
    ]
    if verbose:
        lines += detail_lines(result.engine, result.skipped)
    elif result.skipped:
        lines.append(f"skipped {plural(len(result.skipped), 'entry')} (-v lists them with the reasons)")
    return "\n".join(lines)


def refreshed_text(result: AverageResult, *, verbose: bool = False, width: float = WIDTH) -> str:
    """Says which weights were refreshed, over what, and what was written."""
    done, would_be = ("copied", "would copy") if result.statistics == "none" else ("refreshed", "would refresh")
    return "\n".join(
        [
            f"{done if _is_done(result) else would_be} {names_text(result.checkpoints)}",
            *outcome_lines(result, width),
            *(detail_lines(result.engine, result.skipped) if verbose else []),
        ]
    )


def evaluation_lines(
    evaluations: Sequence[Evaluation],
    comparison: Comparison | None,
    outcomes: Sequence[Outcome],
    width: float = WIDTH,
    important: Sequence[str] = (),
) -> list[str]:
    """Returns a table with a row for each measurement, a sentence on what helped, and a line for each requirement.

    The difference to the last checkpoint, refreshed if the average is, is in brackets.
    """
    if not evaluations:
        return []
    saved = [each for each in evaluations if each.path is not None and not each.refreshed]
    refreshed = [each for each in evaluations if each.path is not None and each.refreshed]
    last = saved[-1]
    reference = next((each for each in refreshed if each.path == last.path), last)
    order = list(last.metrics)
    rows = [["", *order]]
    for each in (*saved, *refreshed):
        name = f"{each.name} (last)" if each is last else each.name if each is not reference else REFERENCE
        rows.append(measured_cells(name, each, order, None if each is reference else reference))
    compared = refreshed or saved
    if len(compared) > 1:
        mean = {metric: mean_of([each.metrics[metric] for each in compared]) for metric in order}
        name = f"mean of the {len(compared)}{', statistics refreshed' if refreshed else ''}"
        rows.append(measured_cells(name, Evaluation(name, None, mean), order, reference))
    rows += [measured_cells(each.name, each, order, reference) for each in evaluations if each.path is None]
    sentence = summary(comparison)
    first = {*important, *(each.requirement.metric for each in outcomes)}  # of many metrics
    return (
        table(rows, width, important=first, what="metric")
        + [sentence] * bool(sentence)
        + [f"{'met' if each.met else 'NOT MET'}: {each}" for each in outcomes]
    )


def _is_done(result: AverageResult) -> bool:
    """Whether it was computed, even if not published; a dry run evaluates nothing."""
    return result.written or bool(result.evaluations)


def outcome_lines(result: AverageResult, width: float = WIDTH, important: Sequence[str] = ()) -> list[str]:
    """Says where the BatchNorm statistics come from, what was measured, and what was written."""
    lines = []
    if report := result.batch_norm:
        how = "" if report.estimator == "pooled" else f" ({report.estimator})"
        lines.append(
            f"BatchNorm statistics of {plural(len(report.statistics), 'layer')} recomputed over "
            f"{plural(report.samples, 'sample')} in {plural(report.batches, 'batch')}{how}"
        )
    elif result.statistics != "none":
        statistics = {
            "refreshed": "would be recomputed",
            "mean": "averaged, not recomputed",
            "copied": "copied from the checkpoint",
            "frozen": "frozen, the same in every checkpoint",
        }
        lines.append(f"BatchNorm statistics: {statistics[result.statistics]}")
    if result.spectral_norms:
        would = "" if _is_done(result) else "would be "
        weights = plural(len(result.spectral_norms), "weight")
        lines.append(f"spectral norm of {weights}: u and v {would}computed from the averaged weight")
    lines += evaluation_lines(result.evaluations, result.comparison, result.outcomes, width, important)
    if all(outcome.met for outcome in result.outcomes):
        wrote = "wrote" if result.written else "would write"
        if result.files:
            files = f"{plural(len(result.files), 'file')}, {size(result.nbytes)} of weights"
            lines.append(f"{wrote} {one_line(os.path.join(result.output, ''))} ({files})")
        else:
            lines.append(f"{wrote} {one_line(result.output)} ({size(result.nbytes)})")
        if result.uploaded is not None:
            lines.append(f"uploaded to {result.uploaded}")
    else:
        lines.append(f"did not write {result.output}")
    return lines
