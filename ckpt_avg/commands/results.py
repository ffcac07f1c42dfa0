"""What averaging gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt_avg.batchnorm.policy import Statistics
from ckpt_avg.batchnorm.refresh import BatchNormReport
from ckpt_avg.errors import RequirementError
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.text import listing, plural
from ckpt_avg.user_code.evaluate import Evaluation
from ckpt_avg.user_code.gate import Outcome


@dataclass(frozen=True, slots=True)
class AverageResult:
    """What `average` did, or with ``dry_run`` would do.

    Attributes:
        output: the file that was asked for.
        written: whether it was published; False for a dry run, and where a requirement was not met.
        checkpoints: what was averaged, in order.
        skipped: files of run folders that were left out, with reasons.
        tensors: how many tensors the output holds.
        nbytes: the output's size in bytes.
        device: where the mean was computed.
        statistics: where the BatchNorm statistics come from: ``none`` (no BatchNorm layers), ``refreshed``,
            ``mean`` (of the checkpoints' statistics), ``frozen`` (the same in every checkpoint, kept), or ``copied``
            (from the only checkpoint).
        batch_norm: what the refresh did, if there was one.
        data_digest: of the output's data section, as its metadata records it; None for a dry run, and on every rank but
            the first.
        sha256: of the whole output, if it was asked for.
        evaluations: what ``evaluate`` measured: checkpoints in their order, then the average, before and after the
            refresh. The last one is that of the output.
        outcomes: each requirement, and whether it was met.
        notices: what the user should know.
    """

    output: Path
    written: bool
    checkpoints: tuple[Path, ...]
    skipped: tuple[Skipped, ...]
    tensors: int
    nbytes: int
    device: str
    statistics: Statistics
    batch_norm: BatchNormReport | None
    data_digest: str | None
    sha256: str | None
    evaluations: tuple[Evaluation, ...]
    outcomes: tuple[Outcome, ...]
    notices: tuple[str, ...]


def refuse_unmet(result: AverageResult) -> None:
    """Raises RequirementError where a requirement is not met."""
    unmet = [outcome for outcome in result.outcomes if not outcome.met]
    if unmet:
        advice = "Average other checkpoints (ckpt-avg sweep shows which are best together)"
        if len(result.checkpoints) == 1:
            advice = "Keep the statistics that these weights have, or measure over other data"
        raise RequirementError(
            f"{result.output}: not published, since {plural(len(unmet), 'requirement')} of {len(result.outcomes)} "
            f"{'is' if len(unmet) == 1 else 'are'} not met: {listing(map(str, unmet), separator='; ')}. {advice}, or "
            "ask for less.",
            result,
        )
