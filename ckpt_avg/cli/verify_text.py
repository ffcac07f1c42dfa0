"""The result of `verify` as text."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ckpt_avg.cli.shared_text import names_text, path_lines
from ckpt_avg.output.provenance import recorded_shard
from ckpt_avg.tables import WIDTH
from ckpt_avg.text import argument, listing, one_line, plural, quote, size

if TYPE_CHECKING:
    from ckpt_avg.commands.verify import VerifyReport


def verify_text(report: VerifyReport, *, verbose: bool = False, width: float = WIDTH) -> str:
    """Says that the file is as it was written, and of which checkpoints it is the mean; with ``verbose`` of all."""
    what = f"{plural(report.tensors, 'tensor')}, {size(report.nbytes)}"
    if report.files:
        what = f"{plural(len(report.files), 'file')}, {what} of weights"
    lines = [f"{one_line(report.path)} is complete and undamaged: {what}", f"data digest: {report.data_digest}"]
    if not report.files and (shard := recorded_shard(report.metadata)):
        folder = argument(os.path.join(report.path.parent, ""))
        lines.append(f"it is shard {shard[0]} of {shard[1]}: ckpt-avg verify {folder} checks all of them")
    if report.unknown:
        files = plural(len(report.unknown), "file")
        lines.append(f"not checked: {files} that the weights do not record: {listing(map(quote, report.unknown))}")
    if report.checkpoints is not None:
        count = len(report.checkpoints)
        what = "a copy" if count == 1 else "the mean" if report.weights is None else "the weighted mean"
        lines.append(f"it is {what} of {plural(count, 'checkpoint')}, bit for bit: {names_text(report.checkpoints)}")
        lines += path_lines(report.checkpoints, width) if verbose else []
    if report.spectral_norms:
        weights = plural(len(report.spectral_norms), "weight")
        lines.append(f"spectral norm of {weights}: u and v give the same norm as when computed again, to 1e-6")
    if report.measured:
        lines.append(f"not compared: {plural(len(report.measured), 'BatchNorm tensor')} that were refreshed")
    return "\n".join(lines)
