"""The result of `check` as text."""

from __future__ import annotations

from ckpt_avg.cli.shared_text import skipped_lines
from ckpt_avg.runs.compatibility import CompatibilityReport
from ckpt_avg.text import one_line


def compatibility_text(report: CompatibilityReport, *, verbose: bool = False) -> str:
    """Says that the checkpoints fit together; with ``verbose`` also which they are, and what was skipped."""
    more = [*(f"  {one_line(path)}" for path in report.checkpoints), *skipped_lines(report.skipped)] if verbose else []
    return "\n".join([str(report), *more])
