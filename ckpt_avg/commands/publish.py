"""The long part of averaging, once everything is checked: mean → refresh → measure → publish, on one rank or many."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckpt_avg.batchnorm.policy import summary
from ckpt_avg.batchnorm.refresh import BatchNormReport
from ckpt_avg.batchnorm.refresh_output import RefreshOptions, frozen_layers, refresh_output
from ckpt_avg.commands.agreement import agree_on_header
from ckpt_avg.commands.evaluations import Assessment, name_of_average
from ckpt_avg.commands.prepare import Prepared
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import RankError
from ckpt_avg.machine import gc_paused
from ckpt_avg.mean.stream import Mean, write_means
from ckpt_avg.output.digests import TreeDigest, digest_stream
from ckpt_avg.output.header import encode_header, encode_tensors, refuse_unreadable
from ckpt_avg.output.provenance import Options, make_metadata, seal
from ckpt_avg.output.unpublished_file import UnpublishedFile, unpublished_file
from ckpt_avg.progress import Progress
from ckpt_avg.user_code.model import Batches, weights_in


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        ready: the checkpoints, the plan and the model.
        target: the file to write.
        overwrite: replace it.
        asked: on what the bytes depend; the metadata names it.
        data: what the batches came from; the metadata names it.
        options: how to refresh, and on which device.
        device: where to compute the mean.
        threads, memory: as for `average`.
        assessment: what is measured.
        sources: for each checkpoint SHA-256 of its files, for the metadata; None where none was asked for.
        ranks: who shares the work.
        progress: callbacks.
    """

    ready: Prepared
    target: Path
    overwrite: bool
    asked: Options
    data: Batches | None
    options: RefreshOptions
    device: torch.device
    threads: int
    memory: int
    assessment: Assessment
    sources: Sequence[Mapping[str, str]] | None
    ranks: Ranks
    progress: Progress

    @functools.cached_property
    def header(self) -> bytes:
        """The output's header, with room for the digests, and for the refresh's figures, which are still to come."""
        return self._encode(None)

    @functools.cached_property
    def _tensors(self) -> str:
        with gc_paused():
            return encode_tensors(self.ready.plan)

    def final_header(self, report: BatchNormReport | None, data_digest: str) -> bytes:
        """Returns the header with the digests and the figures of the refresh, as long as `header`."""
        return seal(self._encode(report, data_digest, reserve=len(self.header)))

    def _encode(self, report: BatchNormReport | None, data_digest: str | None = None, reserve: int = 0) -> bytes:
        with gc_paused():
            metadata = make_metadata(
                self.ready.checkpoints,
                self.asked,
                batch_norm=summary(self.ready.statistics, report, self.options, self.data),
                digests=self.sources,
                data_digest=data_digest,
            )
            return encode_header(self._tensors, metadata, reserve=reserve)

    def name(self, *, refreshed: bool) -> str:
        """Returns what to call the output in a table of measurements."""
        return name_of_average(self.ready.statistics, len(self.ready.specs), refreshed=refreshed)


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Attributes:
        batch_norm: what the refresh did, if there was one.
        data_digest: of the data section; None on every rank but the first.
        sha256: of the whole file, where those of the sources were asked for.
    """

    batch_norm: BatchNormReport | None = None
    data_digest: str | None = None
    sha256: str | None = None


def write_output(job: Job, accept: Callable[[Written], None]) -> Written:
    """Computes the output and publishes it. Every rank calls this; rank 0 measures and publishes.

    Args:
        job: what to do.
        accept: called before publishing; it raises where the output is not to be published.

    Raises:
        CkptAvgError: anything failed; nothing is published then.
    """
    job.assessment.measure_checkpoints(job.ready.checkpoints)
    report: BatchNormReport | None = None
    agree_on_header(job.ranks, job.header)
    size = len(job.header) + job.ready.plan.nbytes
    digest = TreeDigest(job.ready.plan.nbytes)
    with unpublished_file(job.target, size, job.ranks) as unpublished:

        def weights() -> dict[str, torch.Tensor]:
            return weights_in(unpublished.readable_path)

        _write_mean(job, unpublished, digest)
        if len(job.ready.specs) > 1 or job.ready.refresh is None:  # a single checkpoint has been measured as it is
            job.assessment.measure_average(job.name(refreshed=False), weights)
        if job.ready.refresh is not None:
            report = refresh_output(
                job.ready.refresh,
                job.ready.plan,
                weights,
                _overwrite(job, unpublished, digest),
                frozen=frozen_layers(job.ready.refresh, job.ready.frozen),
                options=job.options,
                progress=job.progress,
                ranks=job.ranks,
            )
            job.assessment.measure_average(job.name(refreshed=True), weights)
        written = Written(report)
        if job.ranks.is_first:
            begin = len(job.header)
            data_digest = digest.finish(lambda offset, length: unpublished.read(begin + offset, length))
            unpublished.write(job.final_header(report, data_digest), 0)
            refuse_unreadable(unpublished.readable_path, job.ready.plan, unpublished.target)
            whole = digest_stream(unpublished.read, size) if job.sources is not None else None
            written = Written(report, data_digest, whole)
            accept(written)
            job.ranks.check()
            if not unpublished.publish(overwrite=job.overwrite):
                job.progress.notice(
                    f"{job.target}: this file system cannot sync a folder, so a power cut within the next seconds may "
                    "take the file's name with it"
                )
        _finish(job)
    return written


def _write_mean(job: Job, unpublished: UnpublishedFile, digest: TreeDigest) -> None:
    """Computes this rank's share of the data section, and waits until all shares are on disk."""

    def write(contents: memoryview, offset: int) -> None:
        unpublished.write(contents, len(job.header) + offset)
        digest.add(contents, offset)

    plan, ranks = job.ready.plan, job.ranks
    share = plan.share(ranks.rank, ranks.size, begin=len(job.header))
    total = job.ready.nbytes

    def read(nbytes: int) -> None:
        ranks.check()
        job.progress.read(nbytes)

    if ranks.is_first:
        unpublished.write(job.header, 0)
    job.progress.start(total * len(share) // max(1, plan.nbytes))
    write_means(
        job.ready.checkpoints,
        plan,
        [Mean(range(len(job.ready.checkpoints)), write)],
        device=job.device,
        threads=job.threads,
        memory=job.memory,
        allow_nonfinite=job.asked.allow_nonfinite,
        within=share,
        progress=read,
    )
    if ranks.size > 1:
        unpublished.sync()
    ranks.exchange("mean", digest.known() if ranks.size > 1 else None, lambda known: _join(digest, known))
    if ranks.size > 1:
        unpublished.drop_cache()


def _join(digest: TreeDigest, known: list[Any]) -> None:
    for runs in known[1:]:
        digest.join(runs)


def _overwrite(job: Job, unpublished: UnpublishedFile, digest: TreeDigest) -> Callable[[memoryview, int], None]:
    """Returns what writes over the mean; on every rank but the first nothing does."""

    def write(contents: memoryview, offset: int) -> None:
        if job.ranks.is_first:
            digest.forget(offset, len(contents))
            unpublished.write(contents, len(job.header) + offset)

    return write


def _finish(job: Job) -> None:
    """Tells the other ranks what was measured, and that the output is published."""
    try:
        job.assessment.share(job.ranks)
    except RankError as error:
        if not job.ranks.is_first:
            raise
        job.progress.notice(f"the output is published, but {job.ranks.failure or error}")
