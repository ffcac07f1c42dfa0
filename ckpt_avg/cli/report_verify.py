"""The result of `verify` as text for people and as JSON for programs."""

from __future__ import annotations

from typing import Any

from ckpt_avg.commands.verify import VerifyReport
from ckpt_avg.text import escaped, one_line, plural, size, told_apart


def verify_text(report: VerifyReport) -> str:
    """Says that the file is as it was written, and of which checkpoints it is the mean."""
    lines = [
        f"{one_line(str(report.path))} is whole and undamaged: {plural(report.tensors, 'tensor')}, "
        f"{size(report.nbytes)}",
        f"digest of the data: {report.data_digest}",
    ]
    if report.checkpoints is not None:
        names = [escaped(name) for name in told_apart(report.checkpoints)]
        shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, …, {names[-1]}"
        what = "the mean of" if len(names) > 1 else "a copy of"
        lines.append(f"it is {what} {plural(len(names), 'checkpoint')}, bit for bit: {shown}")
    if report.measured:
        lines.append(f"but for {plural(len(report.measured), 'tensor')} whose statistics a BatchNorm refresh measured")
    return "\n".join(lines)


def verify_json(report: VerifyReport) -> dict[str, Any]:
    """Returns the result as plain values."""
    return {
        "path": str(report.path),
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "data_digest": report.data_digest,
        "metadata": report.metadata,
        "checkpoints": None if report.checkpoints is None else [str(path) for path in report.checkpoints],
        "measured": list(report.measured),
    }
