"""The result of `soup` as text."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckpt_avg.cli.average_text import outcome_lines
from ckpt_avg.cli.shared_text import detail_lines, names_text
from ckpt_avg.tables import WIDTH, table
from ckpt_avg.text import distinct_names, escaped, plural, quote
from ckpt_avg.user_code.comparison import difference_text, spread_of

if TYPE_CHECKING:
    from ckpt_avg.commands.soup import SoupResult


def soup_text(result: SoupResult, command: Sequence[str], *, verbose: bool = False, width: float = WIDTH) -> str:
    """Returns the table of decisions, what the soup is and what was written, and the command that makes the same."""
    count = len(result.candidates)
    average = result.average
    if not result.decisions:
        return "\n".join(
            [
                f"would measure {plural(count, 'checkpoint')}, then {plural(count - 1, 'soup')}, in "
                f"{plural(result.passes, 'pass')} over checkpoints: {names_text(result.candidates)}",
                f"would write {average.output}",
            ]
        )
    metric = escaped(result.metric)
    names = distinct_names([each.checkpoint for each in result.decisions])
    rows = [["checkpoint", metric, "soup with it", ""]]
    for name, each in zip(names, result.decisions, strict=True):
        alone = _number(result.metric, each.metrics, each.samples)
        rows.append([name, alone, _number(result.metric, each.soup_metrics, each.soup_samples), _verdict(each.kept)])
    kept = [each for each in result.decisions if each.kept]
    value, best = kept[-1].soup_metrics[result.metric], kept[0].metrics[result.metric]
    change = "" if math.isnan(value - best) else f", {difference_text(value - best)} compared with the best one alone"
    last = result.candidates[-1]
    measured = tuple(each for each in average.evaluations if each.path in (None, last))
    lines = [
        *table(rows, width),
        "",
        f"soup of {len(kept)} of {plural(count, 'checkpoint')}: {metric} {value:.6g}{change}",
        *outcome_lines(replace(average, evaluations=measured), width, important=[result.metric]),
    ]
    if verbose:
        lines += detail_lines(average.engine, result.skipped)
    if result.split is not None:
        lines.append(f"chosen on the split {quote(result.split)}: report the numbers of another one")
    return "\n".join([*lines, f"the same output: {shlex.join(command)}"])


def _number(metric: str, metrics: Mapping[str, float], samples: Mapping[str, Sequence[float]]) -> str:
    spread = spread_of(samples.get(metric, ()))
    return f"{metrics[metric]:.6g}" + ("" if spread is None else f" ±{spread:.2g}")


def _verdict(kept: bool) -> str:
    return "kept" if kept else "not kept"
