"""The result of `inspect` as text."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckpt_avg.checkpoint.spec import CheckpointSpec, batch_norm_layers
from ckpt_avg.cli.shared_text import skipped_lines
from ckpt_avg.tables import WIDTH, table, wrapped
from ckpt_avg.text import escaped, listing, one_line, plural, quote, size

if TYPE_CHECKING:
    from ckpt_avg.checkpoint.training_record import Record
    from ckpt_avg.commands.inspect import Inspection, Listed

_MOST = 60  # tensors, tied tensors and metadata that are shown


def inspection_text(found: Inspection, *, quiet: bool = False, verbose: bool = False, width: float = WIDTH) -> str:
    """Shows one checkpoint, a run folder, or a folder that is neither.

    With ``quiet`` without notes, with ``verbose`` with all tensors.
    """
    most = sys.maxsize if verbose else _MOST
    if found.checkpoint is not None:
        return _checkpoint_text(found.checkpoint, quiet=quiet, most=most, width=width)
    lines = [] if quiet else [f"note: {note}" for note in found.notes]
    if found.listed:
        lines += _run_table(found.listed, width, selects=found.selects)
        if found.selects:
            chosen = sum(not each.skipped_by for each in found.listed)
            lines.append(f"selected: {chosen} of {plural(len(found.listed), 'checkpoint')}")
        names = sorted({name for each in found.listed for name in each.record.metrics})
        if names:
            lines += wrapped(f"metrics: {listing(map(quote, names))}", width)
        first = found.listed[0].spec
        lines += [] if quiet else [f"note: {first.name}: {note}" for note in first.notes]
        averaged = [each.spec for each in found.listed if each.spec.averaged]
        if averaged:
            count = f" ({len(averaged)} such checkpoints)" if len(averaged) > 1 else ""
            lines.append(f"already an average: {averaged[0].name}: {averaged[0].averaged}{count}")
    lines += [f"cannot be read: {error}" for _, error in found.unreadable]
    lines += skipped_lines(found.skipped)
    unreadable = {name for name, _ in found.unreadable}
    if seen := [(name, what) for name, what in found.seen if name not in unreadable]:
        lines.append(f"{one_line(found.path)} {'also ' if unreadable else ''}contains:")
        lines += [f"  {escaped(name)}: {what}" for name, what in seen]
    if found.needed:
        lines.append(found.needed)
    return "\n".join(lines)


def _checkpoint_text(spec: CheckpointSpec, *, quiet: bool, most: int, width: float) -> str:
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
        lines += [f"  {quote(key)}: {quote(value)}" for key, value in list(spec.metadata.items())[:most]]
    lines += [] if quiet else [f"note: {note}" for note in spec.notes]
    tensors = list(spec.tensors.values())
    rows = [(each.name, each.dtype.name, "×".join(map(str, each.shape)) or "scalar") for each in tensors]
    lines += table([("tensor", "dtype", "shape"), *rows[:most]], width, constant=["dtype"])
    if len(rows) > most:
        lines.append(f"… and {len(rows) - most:,} more (-v lists all)")
    return "\n".join(lines)


def _run_table(listed: Sequence[Listed], width: float, *, selects: bool) -> list[str]:
    """Returns a table of checkpoints, with a column for each metric."""
    metrics = list(dict.fromkeys(name for each in listed for name in each.record.metrics))
    # What tells checkpoints apart comes first: the last columns may not fit.
    facts = ("size", "tensors", "dtypes", "state dict", "prefix", "kind", "format", "tied", "BatchNorm")
    header = ("checkpoint", *(["selected"] if selects else []), "step", "epoch", *map(escaped, metrics), *facts)
    rows = [
        (
            spec.path.name,
            *([_selected(each)] if selects else []),
            "-" if record.step is None else str(record.step),
            "-" if record.epoch is None else str(record.epoch),
            *(f"{record.metrics[name]:.6g}" if name in record.metrics else "-" for name in metrics),
            size(spec.nbytes),
            str(len(spec.tensors)),
            ", ".join(sorted({tensor.dtype.name for tensor in spec.tensors.values()})),
            escaped(spec.state_key) if spec.state_key else "-",
            escaped(spec.prefix) or "-",
            spec.kind or "-",
            spec.format,
            str(len(spec.tied()) or "-"),
            str(len(batch_norm_layers(spec.tensors)) or "-"),
        )
        for each in listed
        for spec, record in [(each.spec, each.record)]
    ]
    return table([header, *rows], width, constant=header[1:], important=["selected", "step", "epoch"])


def _selected(each: Listed) -> str:
    return f"no: {each.skipped_by}" if each.skipped_by else "yes"


def _recorded(record: Record) -> str:
    parts = [f"step {record.step}"] if record.step is not None else []
    parts += [f"epoch {record.epoch}"] if record.epoch is not None else []
    parts += [metrics] if (metrics := _metrics(record, most=20)) else []
    parts += [f"learning rate {record.learning_rate:g}"] if record.learning_rate is not None else []
    return ", ".join(parts)


def _metrics(record: Record, most: int = 3) -> str:
    shown = [f"{escaped(name)} {value:.6g}" for name, value in list(record.metrics.items())[:most]]
    return ", ".join(shown) + (", …" if len(record.metrics) > most else "")
