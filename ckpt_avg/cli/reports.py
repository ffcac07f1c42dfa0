"""Results as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_avg.checkpoint.spec import CheckpointSpec, batch_norm_layers
from ckpt_avg.runs.compatibility import CompatibilityReport
from ckpt_avg.text import distinct_names, ends, escaped, listing, one_line, plural, quote, size, table
from ckpt_avg.user_code.comparison import Change, Comparison, Evaluation, helped, mean_of, spread_of

if TYPE_CHECKING:
    from ckpt_avg.checkpoint.training_record import Record
    from ckpt_avg.commands.draft import AverageResult
    from ckpt_avg.commands.inspect import Inspection
    from ckpt_avg.commands.sweep import Measured, SweepResult
    from ckpt_avg.commands.verify import VerifyReport
    from ckpt_avg.runs.run_folder import Skipped
    from ckpt_avg.user_code.gate import Outcome

_REFERENCE = "last, statistics refreshed"
_MOST = 60  # tensors, tied tensors and metadata of one checkpoint that are shown


def average_text(result: AverageResult, *, verbose: bool = False) -> str:
    """Says what was averaged, how, and what was written; with ``verbose`` also what was skipped."""
    lines = [
        f"{'averaged' if _is_done(result) else 'would average'} {plural(len(result.checkpoints), 'checkpoint')}: "
        f"{_names(result.checkpoints)}",
        f"{plural(result.tensors, 'tensor')}, float64 sums on {result.device}"
        f"{f' by the {result.engine} engine' if verbose else ''}",
        *_outcome(result),
    ]
    if verbose:
        lines += _skipped(result.skipped)
    elif result.skipped:
        lines.append(f"skipped {plural(len(result.skipped), 'entry')} (-v lists them with the reasons)")
    return "\n".join(lines)


def refreshed_text(result: AverageResult) -> str:
    """Says which weights were refreshed, over what, and what was written."""
    done, would_be = ("copied", "would copy") if result.statistics == "none" else ("refreshed", "would refresh")
    return "\n".join([f"{done if _is_done(result) else would_be} {_names(result.checkpoints)}", *_outcome(result)])


def compatibility_text(report: CompatibilityReport, *, verbose: bool = False) -> str:
    """Says that the checkpoints fit together; with ``verbose`` also which they are, and what was skipped."""
    more = [*(f"  {one_line(path)}" for path in report.checkpoints), *_skipped(report.skipped)] if verbose else []
    return "\n".join([str(report), *more])


def verify_text(report: VerifyReport) -> str:
    """Says that the file is as it was written, and of which checkpoints it is the mean."""
    lines = [
        f"{one_line(report.path)} is complete and undamaged: {plural(report.tensors, 'tensor')}, {size(report.nbytes)}",
        f"data digest: {report.data_digest}",
    ]
    if report.checkpoints is not None:
        count = len(report.checkpoints)
        lines.append(
            f"it is {'the mean' if count > 1 else 'a copy'} of {plural(count, 'checkpoint')}, bit for bit: "
            f"{_names(report.checkpoints)}"
        )
    if report.spectral_norms:
        weights = plural(len(report.spectral_norms), "weight")
        lines.append(f"spectral norm of {weights}: u and v give the same norm as when computed again, to 1e-6")
    if report.measured:
        lines.append(f"not compared: {plural(len(report.measured), 'BatchNorm tensor')} that were refreshed")
    return "\n".join(lines)


def evaluation_lines(
    evaluations: Sequence[Evaluation], comparison: Comparison | None, outcomes: Sequence[Outcome]
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
        name = f"{each.name} (last)" if each is last else each.name if each is not reference else _REFERENCE
        rows.append(_row(name, each, order, None if each is reference else reference))
    compared = refreshed or saved
    if len(compared) > 1:
        mean = {metric: mean_of([each.metrics[metric] for each in compared]) for metric in order}
        name = f"mean of the {len(compared)}{', statistics refreshed' if refreshed else ''}"
        rows.append(_row(name, Evaluation(name, None, mean), order, reference))
    rows += [_row(each.name, each, order, reference) for each in evaluations if each.path is None]
    sentence = [_summary(comparison)] if comparison and (comparison.averaging or comparison.refresh) else []
    return table(rows) + sentence + [f"{'met' if each.met else 'NOT MET'}: {each}" for each in outcomes]


def sweep_text(result: SweepResult, command: str) -> str:
    """Returns the table of a sweep, its best window, and the command that writes the best average."""
    reference, best, change, total = result.reference, result.best, result.change, len(result.checkpoints)
    order = list(result.last.metrics)
    name = result.last.name
    rows = [["", *order], _row(f"{name} (last)", result.last, order, None if reference is result.last else reference)]
    if reference is not result.last:
        rows.append(_row(_REFERENCE, reference, order, None))
        name = "the refreshed last checkpoint"
    for window in result.windows:
        label = _window(window.side, len(window.checkpoints), total) + ("  ← best" if window is best else "")
        rows.append(_row(label, window, order, reference))
    if change.verdict == "better":
        compared = f"{_difference(change.difference, change.spread)} compared with {name}"
    elif change.verdict == "within the spread":
        compared = f"{_difference(change.difference, change.spread)}, within the spread, compared with {name}"
    else:
        compared = f"no better than {name} ({reference.metrics[result.metric]:.6g})"
    value = best.metrics[result.metric]
    return "\n".join(
        [
            *table(rows),
            "",
            f"best by {escaped(result.metric)}: the average of "
            f"{_window(best.side, len(best.checkpoints), total, 'the ')}, {value:.6g}, {compared}",
            f"to write it{'' if change.verdict == 'better' else ' anyway'}: {command}",
        ]
    )


def inspection_text(found: Inspection) -> str:
    """Shows one checkpoint, a run folder, or a folder that is neither."""
    if found.checkpoint is not None:
        return _checkpoint_text(found.checkpoint)
    lines = [f"note: {note}" for note in found.notes]
    if found.listed:
        lines += _run_table([(each.spec, each.record) for each in found.listed])
        names = sorted({name for each in found.listed for name in each.record.metrics})
        if names:
            lines.append(f"metrics: {listing(map(quote, names))}")
        first = found.listed[0].spec
        lines += [f"note: {first.name}: {note}" for note in first.notes]
        averaged = [each.spec for each in found.listed if each.spec.averaged]
        if averaged:
            count = f" ({len(averaged)} such checkpoints)" if len(averaged) > 1 else ""
            lines.append(f"already an average: {averaged[0].name}: {averaged[0].averaged}{count}")
    lines += [f"cannot be read: {error}" for _, error in found.unreadable]
    lines += _skipped(found.skipped)
    unreadable = {name for name, _ in found.unreadable}
    if seen := [(name, what) for name, what in found.seen if name not in unreadable]:
        lines.append(f"{one_line(found.path)} {'also ' if unreadable else ''}contains:")
        lines += [f"  {escaped(name)}: {what}" for name, what in seen]
    if found.needed:
        lines.append(found.needed)
    return "\n".join(lines)


def _names(paths: Sequence[Path]) -> str:
    return ends([escaped(name) for name in distinct_names(paths)])


def _skipped(items: Sequence[Skipped]) -> list[str]:
    return [f"skipped: {quote(item.path.name)}: {one_line(item.reason)}" for item in items]


def _is_done(result: AverageResult) -> bool:
    """Whether it was computed, even if not published; a dry run evaluates nothing."""
    return result.written or bool(result.evaluations)


def _outcome(result: AverageResult) -> list[str]:
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
    lines += evaluation_lines(result.evaluations, result.comparison, result.outcomes)
    if all(outcome.met for outcome in result.outcomes):
        lines.append(
            f"{'wrote' if result.written else 'would write'} {one_line(result.output)} ({size(result.nbytes)})"
        )
    else:
        lines.append(f"did not write {result.output}")
    return lines


def _row(name: str, measured: Evaluation | Measured, order: Sequence[str], reference: Evaluation | None) -> list[str]:
    """Returns the cells of a measurement, with its spread and the differences to the reference."""
    cells = [name]
    for metric in order:
        spread = spread_of(measured.samples.get(metric, ()))
        cell = f"{measured.metrics[metric]:.6g}" + ("" if spread is None else f" ±{spread:.2g}")
        if reference is not None:
            difference = measured.metrics[metric] - reference.metrics[metric]
            cell += "" if math.isnan(difference) else f" ({_difference(difference)})"
        cells.append(cell)
    return cells


def _difference(difference: float, spread: float | None = None) -> str:
    return f"{difference + 0.0:+.3g}" + ("" if spread is None else f" ±{spread:.2g}")


def _summary(comparison: Comparison) -> str:
    """Says in one sentence what averaging changed, and what the refresh of the statistics changed."""
    parts = {"averaging": comparison.averaging, "the refresh": comparison.refresh}
    return "; ".join(_changes(what, changes) for what, changes in parts.items() if changes)


def _changes(what: str, changes: Sequence[Change]) -> str:
    helps = {True: " helped", False: " did not help", None: ""}[helped(changes)]
    shown = listing(
        f"{escaped(change.metric)} cannot be compared ({change.verdict})"
        if math.isnan(change.difference)
        else f"{escaped(change.metric)} {_difference(change.difference, change.spread)}"
        + (f" ({change.verdict})" if change.verdict else "")
        for change in changes
    )
    return f"{what}{helps}: {shown}"


def _window(side: str, count: int, total: int, article: str = "") -> str:
    return f"all {total}" if count == total else f"{article}{side} {count}"


def _checkpoint_text(spec: CheckpointSpec) -> str:
    lines = [f"{one_line(spec.path)}: {spec.format}" + (f", {spec.kind}" if spec.kind else "")]
    if spec.keys:
        lines.append(f"keys: {listing(map(quote, spec.keys))}")
    if spec.format in ("torch zip", "torch stream", "pickle", "torch DCP"):
        lines.append(f"state dict: {'the file itself' if spec.state_key is None else f'under {quote(spec.state_key)}'}")
    if spec.prefix:
        lines.append(f"prefix stripped: {quote(spec.prefix)}")
    if recorded := _recorded(spec.record):
        lines.append(f"recorded: {recorded}")
    if spec.averaged:
        lines.append(f"already an average: {spec.averaged}")
    elements: dict[str, int] = {}
    for tensor in spec.tensors.values():
        elements[tensor.dtype.name] = elements.get(tensor.dtype.name, 0) + tensor.numel
    counts = ", ".join(f"{count:,} {dtype}" for dtype, count in elements.items())
    lines.append(f"{plural(len(spec.tensors), 'tensor')}, {size(spec.nbytes)}: {counts}")
    if layers := batch_norm_layers(spec.tensors):
        lines.append(f"{plural(len(layers), 'layer')} with running statistics: {listing(map(quote, layers))}")
    lines += [f"tied: {listing(map(quote, names), separator=' = ')}" for names in spec.tied()[:_MOST]]
    if spec.metadata:
        lines.append("metadata:")
        lines += [f"  {quote(key)}: {quote(value)}" for key, value in list(spec.metadata.items())[:_MOST]]
    lines += [f"note: {note}" for note in spec.notes]
    tensors = list(spec.tensors.values())
    rows = [(escaped(each.name), each.dtype.name, "×".join(map(str, each.shape)) or "scalar") for each in tensors]
    lines += table([("tensor", "dtype", "shape"), *rows[:_MOST]])
    if len(rows) > _MOST:
        lines.append(f"… and {len(rows) - _MOST:,} more (--json lists all)")
    return "\n".join(lines)


def _run_table(checkpoints: Sequence[tuple[CheckpointSpec, Record]]) -> list[str]:
    """Returns a table of checkpoints; a line above it says what is the same in all of them."""
    header = ("checkpoint", "format", "kind", "state dict", "step", "epoch", "metrics", "prefix", "tensors", "dtypes",
              "tied", "BatchNorm", "size")  # fmt: skip
    rows = [
        (
            escaped(spec.path.name),
            spec.format,
            spec.kind or "-",
            escaped(spec.state_key) if spec.state_key else "-",
            "-" if record.step is None else str(record.step),
            "-" if record.epoch is None else str(record.epoch),
            _metrics(record) or "-",
            escaped(spec.prefix) or "-",
            str(len(spec.tensors)),
            ", ".join(sorted({tensor.dtype.name for tensor in spec.tensors.values()})),
            str(len(spec.tied()) or "-"),
            str(len(batch_norm_layers(spec.tensors)) or "-"),
            size(spec.nbytes),
        )
        for spec, record in checkpoints
    ]
    columns = list(zip(header, *rows, strict=True))
    varying = [column for column in columns if len(rows) == 1 or column[0] == header[0] or len(set(column[1:])) > 1]
    same = [f"{column[0]} {column[1]}" for column in columns if column not in varying and column[1] != "-"]
    lines = [f"each: {'; '.join(same)}"] if same else []
    return lines + table(list(zip(*varying, strict=True)))


def _recorded(record: Record) -> str:
    parts = [f"step {record.step}"] if record.step is not None else []
    parts += [f"epoch {record.epoch}"] if record.epoch is not None else []
    parts += [metrics] if (metrics := _metrics(record, most=20)) else []
    parts += [f"learning rate {record.learning_rate:g}"] if record.learning_rate is not None else []
    return ", ".join(parts)


def _metrics(record: Record, most: int = 3) -> str:
    shown = [f"{escaped(name)} {value:.6g}" for name, value in list(record.metrics.items())[:most]]
    return ", ".join(shown) + (", …" if len(record.metrics) > most else "")
