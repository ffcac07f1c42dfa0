"""The result of `check` as text."""

from __future__ import annotations

from ckpt_avg.cli.shared_text import path_lines, skipped_lines
from ckpt_avg.runs.compatibility import CompatibilityReport
from ckpt_avg.tables import WIDTH


def compatibility_text(report: CompatibilityReport, *, verbose: bool = False, width: float = WIDTH) -> str:
    """Says that the checkpoints fit together; with ``verbose`` also which they are, and what was skipped."""
    more = [*path_lines(report.checkpoints, width), *skipped_lines(report.skipped)] if verbose else []
    return "\n".join([str(report), *more])
