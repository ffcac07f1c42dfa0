"""What `inspect` found, as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckpt_avg.checkpoint.spec import CheckpointSpec, batch_norm_layers
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.commands.inspect import Inspection, Listed
from ckpt_avg.text import escaped, listing, plural, quote, size

_ROWS = 60


def inspection_text(found: Inspection) -> str:
    """Shows one checkpoint, a run folder, or a folder that holds neither."""
    if found.checkpoint is not None:
        return checkpoint_text(found.checkpoint)
    lines = [f"note: {note}" for note in found.notes]
    if found.listed:
        lines += _run_table(found.listed)
        names = sorted({name for each in found.listed for name in each.record.metrics})
        if names:
            lines.append(f"metrics: {listing(map(quote, names))}")
        first = found.listed[0].spec
        lines += [f"note: {first.name}: {note}" for note in first.notes]
        averaged = [each.spec for each in found.listed if each.spec.averaged]
        if averaged:
            lines.append(f"an average already: {averaged[0].name}: {averaged[0].averaged} ({len(averaged)} like it)")
    lines += [f"cannot be read: {error}" for _, error in found.unreadable]
    lines += [f"left out: {quote(item.path.name)}: {item.reason}" for item in found.skipped]
    told = {name for name, _ in found.unreadable}
    if seen := [(name, what) for name, what in found.seen if name not in told]:
        lines.append(f"{found.path} holds{' also' if told else ''}:")
        lines += [f"  {escaped(name)}: {what}" for name, what in seen]
    if found.needed:
        lines.append(f"nothing to average here: {found.needed}")
    return "\n".join(lines)


def inspection_json(found: Inspection) -> dict[str, Any]:
    """Returns what was found as plain values."""
    if found.checkpoint is not None:
        return checkpoint_json(found.checkpoint)
    return {
        "path": str(found.path),
        "checkpoints": [
            {key: value for key, value in checkpoint_json(each.spec, each.record).items() if key != "tensors"}
            | {"tensors": len(each.spec.tensors)}
            for each in found.listed
        ],
        "unreadable": dict(found.unreadable),
        "skipped": [{"path": str(item.path), "reason": item.reason} for item in found.skipped],
        "seen": [{"name": name, "what": what} for name, what in found.seen],
        "needed": found.needed,
        "notes": list(found.notes),
    }


def checkpoint_text(spec: CheckpointSpec) -> str:
    """Shows one checkpoint: what it is, what it says of itself, and its tensors in a table."""
    lines = [f"{spec.path}: {spec.format}" + (f", {spec.kind}" if spec.kind else "")]
    if spec.keys:
        lines.append(f"keys: {listing(map(quote, spec.keys))}")
    if spec.format in ("torch zip", "torch stream", "pickle", "torch DCP"):
        lines.append(f"state dict: {'the file itself' if spec.state_key is None else f'under {quote(spec.state_key)}'}")
    if spec.prefix:
        lines.append(f"prefix stripped: {quote(spec.prefix)}")
    if recorded := _recorded(spec.record):
        lines.append(f"recorded: {recorded}")
    if spec.averaged:
        lines.append(f"an average already: {spec.averaged}")
    lines.append(f"{plural(len(spec.tensors), 'tensor')}, {size(spec.nbytes)}: {_dtypes(spec)}")
    layers = batch_norm_layers(spec.tensors)
    if layers:
        lines.append(f"{plural(len(layers), 'layer')} with running statistics: {listing(map(quote, layers))}")
    lines += [f"tied: {' = '.join(map(quote, names))}" for names in spec.tied()[:_ROWS]]
    if spec.metadata:
        lines.append("says of itself:")
        lines += [f"  {quote(key)}: {quote(value)}" for key, value in list(spec.metadata.items())[:_ROWS]]
    lines += [f"note: {note}" for note in spec.notes]
    rows = [(escaped(t.name), t.dtype.name, "×".join(map(str, t.shape)) or "scalar") for t in spec.tensors.values()]
    lines += _table(("tensor", "dtype", "shape"), rows[:_ROWS])
    if len(rows) > _ROWS:
        lines.append(f"… and {len(rows) - _ROWS:,} more (--json lists all)")
    return "\n".join(lines)


def checkpoint_json(spec: CheckpointSpec, record: Record | None = None) -> dict[str, Any]:
    """Returns one checkpoint as plain values."""
    record = record or spec.record
    return {
        "path": str(spec.path),
        "format": spec.format,
        "kind": spec.kind,
        "keys": list(spec.keys),
        "state_key": spec.state_key,
        "prefix": spec.prefix,
        "step": record.step,
        "epoch": record.epoch,
        "metrics": dict(record.metrics),
        "learning_rate": record.learning_rate,
        "averaged": spec.averaged or None,
        "bytes": spec.nbytes,
        "dtypes": sorted({tensor.dtype.name for tensor in spec.tensors.values()}),
        "metadata": dict(spec.metadata),
        "batch_norm_layers": batch_norm_layers(spec.tensors),
        "tied": [list(names) for names in spec.tied()],
        "notes": list(spec.notes),
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape),
                "stride": list(tensor.stride),
                "offset": tensor.offset,
                "parts": len(tensor.parts) or 1,
            }
            for tensor in spec.tensors.values()
        ],
    }


def _run_table(listed: Sequence[Listed]) -> list[str]:
    rows = [
        (
            escaped(each.spec.path.name),
            each.spec.format,
            each.spec.kind or "-",
            escaped(each.spec.state_key) if each.spec.state_key else "-",
            "-" if each.record.step is None else str(each.record.step),
            "-" if each.record.epoch is None else str(each.record.epoch),
            _metrics(each.record) or "-",
            escaped(each.spec.prefix) or "-",
            str(len(each.spec.tensors)),
            ", ".join(sorted({tensor.dtype.name for tensor in each.spec.tensors.values()})),
            str(len(each.spec.tied())),
            str(len(batch_norm_layers(each.spec.tensors))),
            size(each.spec.nbytes),
        )
        for each in listed
    ]
    header = ("checkpoint", "format", "kind", "state dict", "step", "epoch", "metrics", "prefix", "tensors", "dtypes")
    return _table((*header, "tied", "BatchNorm", "size"), rows)


def _recorded(record: Record) -> str:
    parts = [f"step {record.step}"] if record.step is not None else []
    parts += [f"epoch {record.epoch}"] if record.epoch is not None else []
    parts += [metrics] if (metrics := _metrics(record, most=20)) else []
    parts += [f"learning rate {record.learning_rate:g}"] if record.learning_rate is not None else []
    return ", ".join(parts)


def _metrics(record: Record, most: int = 3) -> str:
    shown = [f"{escaped(name)} {value:.6g}" for name, value in list(record.metrics.items())[:most]]
    return ", ".join(shown) + (", …" if len(record.metrics) > most else "")


def _dtypes(spec: CheckpointSpec) -> str:
    counts: dict[str, int] = {}
    for tensor in spec.tensors.values():
        counts[tensor.dtype.name] = counts.get(tensor.dtype.name, 0) + tensor.numel
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
