"""Results as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckpt_avg.compat import CompatibilityReport
from ckpt_avg.discover import Discovery
from ckpt_avg.messages import listing, plural, quote, size
from ckpt_avg.spec import CheckpointSpec, batch_norm_layers

if TYPE_CHECKING:
    from ckpt_avg.api import AverageResult

_ROWS = 60


def average_text(result: AverageResult) -> str:
    """Says what was averaged, how, and where it went."""
    names = [path.name for path in result.checkpoints]
    shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, …, {names[-1]}"
    lines = [
        f"{'averaged' if result.written else 'would average'} {plural(len(names), 'checkpoint')}: {shown}",
        f"{plural(result.tensors, 'tensor')}, float64 sums on {result.device}",
    ]
    if result.batch_norm is not None:
        report = result.batch_norm
        lines.append(
            f"BatchNorm statistics of {plural(len(report.statistics), 'layer')} recomputed over "
            f"{plural(report.samples, 'sample')} in {plural(report.batches, 'batch')}"
        )
    elif result.statistics != "none":
        lines.append(
            {
                "refreshed": "BatchNorm statistics would be recomputed",
                "mean": "BatchNorm statistics: the mean of the checkpoints'",
                "frozen": "BatchNorm statistics: frozen, as in every checkpoint",
            }[result.statistics]
        )
    lines.append(f"{'wrote' if result.written else 'would write'} {result.output} ({size(result.nbytes)})")
    return "\n".join(lines)


def average_json(result: AverageResult) -> dict[str, Any]:
    """Returns the result as plain values."""
    report = result.batch_norm
    return {
        "output": str(result.output),
        "written": result.written,
        "checkpoints": [str(path) for path in result.checkpoints],
        "skipped": [{"path": str(item.path), "reason": item.reason} for item in result.skipped],
        "tensors": result.tensors,
        "bytes": result.nbytes,
        "device": result.device,
        "batch_norm": {
            "statistics": result.statistics,
            "layers": sorted(report.statistics) if report else [],
            "frozen": list(report.frozen) if report else [],
            "batches": report.batches if report else 0,
            "samples": report.samples if report else 0,
        },
        "notices": list(result.notices),
    }


def compatibility_json(report: CompatibilityReport) -> dict[str, Any]:
    """Returns every difference as plain values."""
    return {
        "compatible": report.compatible,
        "checkpoints": list(report.checkpoints),
        "tensors": report.tensors,
        "differences": [
            {
                "tensor": difference.tensor,
                "aspect": difference.aspect,
                "expected": difference.expected,
                "found": difference.found,
                "checkpoints": list(difference.checkpoints),
            }
            for difference in report.differences
        ],
        "advice": "" if report.compatible else report.advice,
    }


def checkpoint_text(spec: CheckpointSpec) -> str:
    """Shows one checkpoint: what it is, what it says of itself, and its tensors in a table."""
    lines = [f"{spec.path}: {spec.format}"]
    if spec.format == "torch zip":
        lines.append(f"state dict: {'the file itself' if spec.state_key is None else f'under {quote(spec.state_key)}'}")
    lines.append(f"{plural(len(spec.tensors), 'tensor')}, {size(spec.nbytes)}: {_dtypes(spec)}")
    layers = batch_norm_layers(spec.tensors)
    if layers:
        lines.append(f"{plural(len(layers), 'layer')} with running statistics: {listing(map(quote, layers))}")
    lines += [f"tied: {' = '.join(map(quote, names))}" for names in spec.tied()[:_ROWS]]
    if spec.metadata:
        lines.append("says of itself:")
        lines += [f"  {quote(key)}: {quote(value)}" for key, value in list(spec.metadata.items())[:_ROWS]]
    lines += [f"note: {note}" for note in spec.notes]
    rows = [(quote(t.name)[1:-1], t.dtype.name, "×".join(map(str, t.shape)) or "scalar") for t in spec.tensors.values()]
    lines += _table(("tensor", "dtype", "shape"), rows[:_ROWS])
    if len(rows) > _ROWS:
        lines.append(f"… and {len(rows) - _ROWS:,} more (--json lists all)")
    return "\n".join(lines)


def checkpoint_json(spec: CheckpointSpec) -> dict[str, Any]:
    """Returns one checkpoint as plain values."""
    return {
        "path": str(spec.path),
        "format": spec.format,
        "state_key": spec.state_key,
        "bytes": spec.nbytes,
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
            }
            for tensor in spec.tensors.values()
        ],
    }


def folder_text(discovery: Discovery, specs: Iterable[CheckpointSpec], unreadable: Mapping[str, str]) -> str:
    """Shows the checkpoints of a run folder in their order, what cannot be read, and what was left out."""
    rows = [
        (
            spec.path.name,
            spec.format,
            spec.state_key or "-",
            str(len(spec.tensors)),
            size(spec.nbytes),
            str(len(batch_norm_layers(spec.tensors))),
        )
        for spec in specs
    ]
    lines = _table(("checkpoint", "format", "state dict", "tensors", "size", "BatchNorm layers"), rows)
    lines += [f"cannot be read: {error}" for error in unreadable.values()]
    lines += [f"left out: {quote(item.path.name)}: {item.reason}" for item in discovery.skipped]
    return "\n".join(lines)


def folder_json(discovery: Discovery, specs: Iterable[CheckpointSpec], unreadable: Mapping[str, str]) -> dict[str, Any]:
    """Returns a run folder as plain values."""
    return {
        "checkpoints": [
            {key: value for key, value in checkpoint_json(spec).items() if key != "tensors"}
            | {"tensors": len(spec.tensors)}
            for spec in specs
        ],
        "unreadable": dict(unreadable),
        "skipped": [{"path": str(item.path), "reason": item.reason} for item in discovery.skipped],
    }


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
