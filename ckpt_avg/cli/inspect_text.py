"""The result of `inspect` as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckpt_avg.checkpoint.spec import CheckpointSpec, batch_norm_layers
from ckpt_avg.cli.shared_text import skipped_lines
from ckpt_avg.text import escaped, listing, one_line, plural, quote, size, table

if TYPE_CHECKING:
    from ckpt_avg.checkpoint.training_record import Record
    from ckpt_avg.commands.inspect import Inspection

_MOST = 60  # tensors, tied tensors and metadata that are shown


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
    lines += skipped_lines(found.skipped)
    unreadable = {name for name, _ in found.unreadable}
    if seen := [(name, what) for name, what in found.seen if name not in unreadable]:
        lines.append(f"{one_line(found.path)} {'also ' if unreadable else ''}contains:")
        lines += [f"  {escaped(name)}: {what}" for name, what in seen]
    if found.needed:
        lines.append(found.needed)
    return "\n".join(lines)


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
