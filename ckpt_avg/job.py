"""The long part of averaging, once everything is checked: mean → refresh → measure → publish, on one rank or many."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ckpt_avg.agreement import agree_on_header
from ckpt_avg.assessment import Assessment, name_of_average
from ckpt_avg.atomic import UnpublishedFile
from ckpt_avg.batchnorm import BatchNormReport
from ckpt_avg.collector import collector_paused
from ckpt_avg.errors import RankError
from ckpt_avg.header import encode_header, refuse_unreadable
from ckpt_avg.mean import divide_memory, write_mean
from ckpt_avg.models import Batches, weights_in
from ckpt_avg.preparation import Prepared
from ckpt_avg.progress import Progress
from ckpt_avg.provenance import make_metadata
from ckpt_avg.ranks import Ranks
from ckpt_avg.refresh import RefreshOptions, frozen_layers, refresh_output
from ckpt_avg.running_statistics import summary
from ckpt_avg.shared_output import shared_output


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        ready: the checkpoints, the plan and the model.
        target: the file to write.
        overwrite: replace it.
        dtype: as for `make_plan`; the metadata names it.
        data: what the batches came from; the metadata names it.
        options: how to refresh, and on which device.
        device: where to compute the mean.
        threads, memory, allow_nonfinite: as for `average`.
        assessment: what is measured.
        ranks: who shares the work.
        progress: callbacks.
    """

    ready: Prepared
    target: Path
    overwrite: bool
    dtype: str
    data: Batches | None
    options: RefreshOptions
    device: torch.device
    threads: int
    memory: int
    allow_nonfinite: bool
    assessment: Assessment
    ranks: Ranks
    progress: Progress

    @functools.cached_property
    def header(self) -> bytes:
        """The output's header, with room for the refresh's figures where they are still to come."""
        return self._encode(None)

    def final_header(self, report: BatchNormReport) -> bytes:
        """Returns the header with the figures of the refresh, as long as `header`."""
        return self._encode(report, reserve=len(self.header))

    def _encode(self, report: BatchNormReport | None, reserve: int = 0) -> bytes:
        about = summary(self.ready.statistics, report, self.options, self.data)
        metadata = make_metadata(self.ready.specs, dtype=self.dtype, batch_norm=about)
        with collector_paused():
            return encode_header(self.ready.plan, metadata, reserve=reserve)

    def name(self, *, refreshed: bool) -> str:
        """Returns what to call the output in a table of measurements."""
        return name_of_average(self.ready.statistics, len(self.ready.specs), refreshed=refreshed)


def write_output(job: Job, accept: Callable[[BatchNormReport | None], None]) -> BatchNormReport | None:
    """Computes the output and publishes it. Every rank calls this; rank 0 measures and publishes.

    Args:
        job: what to do.
        accept: called before publishing; it raises where the output is not to be published.

    Returns:
        What the refresh did, if there was one.

    Raises:
        CkptAvgError: anything failed; nothing is published then.
    """
    job.assessment.measure_checkpoints(job.ready.checkpoints)
    report: BatchNormReport | None = None
    agree_on_header(job.ranks, job.header)
    with shared_output(job.target, len(job.header) + job.ready.plan.nbytes, job.ranks) as unpublished:

        def weights() -> dict[str, torch.Tensor]:
            return weights_in(unpublished.readable_path)

        _write_mean(job, unpublished)
        if len(job.ready.specs) > 1 or job.ready.refresh is None:  # a single checkpoint has been measured as it is
            job.assessment.measure_average(job.name(refreshed=False), weights)
        if job.ready.refresh is not None:
            report = refresh_output(
                job.ready.refresh,
                job.ready.plan,
                weights,
                _write_at(unpublished, len(job.header)) if job.ranks.is_first else lambda contents, offset: None,
                frozen=frozen_layers(job.ready.refresh, job.ready.frozen),
                options=job.options,
                progress=job.progress,
                ranks=job.ranks,
            )
            if job.ranks.is_first:
                unpublished.write(job.final_header(report), 0)
            job.assessment.measure_average(job.name(refreshed=True), weights)
        if job.ranks.is_first:
            refuse_unreadable(unpublished.readable_path, job.ready.plan, unpublished.target)
            accept(report)
            job.ranks.check()
            unpublished.publish(overwrite=job.overwrite)
        _finish(job)
    return report


def _write_mean(job: Job, unpublished: UnpublishedFile) -> None:
    """Computes this rank's share of the data section, and waits until all shares are on disk."""
    plan, ranks = job.ready.plan, job.ranks
    share = plan.share(ranks.rank, ranks.size, begin=len(job.header))
    total = job.ready.nbytes

    def read(nbytes: int) -> None:
        ranks.check()
        job.progress.read(nbytes)

    if ranks.is_first:
        unpublished.write(job.header, 0)
    job.progress.start(total * len(share) // max(1, plan.nbytes))
    write_mean(
        job.ready.checkpoints,
        plan,
        _write_at(unpublished, len(job.header)),
        budget=divide_memory(
            job.memory,
            plan,
            parts=ranks.size,
            threads=job.threads,
            checkpoints=len(job.ready.checkpoints),
            device=job.device,
        ),
        device=job.device,
        allow_nonfinite=job.allow_nonfinite,
        within=share,
        progress=read,
    )
    if ranks.size > 1:
        unpublished.sync()
    ranks.exchange("mean", None)
    if ranks.size > 1:
        unpublished.forget()


def _write_at(unpublished: UnpublishedFile, begin: int) -> Callable[[memoryview, int], None]:
    return lambda contents, offset: unpublished.write(contents, begin + offset)


def _finish(job: Job) -> None:
    """Tells the other ranks what was measured, and that the output is published."""
    try:
        job.assessment.share(job.ranks)
    except RankError as error:
        if not job.ranks.is_first:
            raise
        job.progress.notice(f"the output is published, but {job.ranks.failure or error}")
