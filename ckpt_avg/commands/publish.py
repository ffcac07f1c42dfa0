"""The long part of `average`, once everything is checked: mean → refresh → evaluate → publish."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckpt_avg.batchnorm.policy import COUNTS_ROOM, Statistics, summary
from ckpt_avg.batchnorm.refresh import BatchNormReport
from ckpt_avg.batchnorm.refresh_output import frozen_layers, refresh_output
from ckpt_avg.commands.agreement import agree_on_header
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.evaluations import Evaluations
from ckpt_avg.commands.prepare import Prepared
from ckpt_avg.commands.requests import AverageRequest, RecordedOptions
from ckpt_avg.errors import RankError, RequirementError
from ckpt_avg.machine import gc_paused
from ckpt_avg.mean.stream import Mean, write_means
from ckpt_avg.output.digests import TreeDigest, digest_files, digest_stream
from ckpt_avg.output.header import encode_header, encode_tensors, refuse_unreadable
from ckpt_avg.output.paths import write_checksum
from ckpt_avg.output.provenance import make_metadata, seal
from ckpt_avg.output.unpublished_file import UnpublishedFile, unpublished_file
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.text import listing, plural
from ckpt_avg.user_code.evaluate import Evaluation
from ckpt_avg.user_code.gate import Outcome
from ckpt_avg.user_code.model import weights_in


@dataclass(frozen=True, slots=True)
class AverageResult:
    """What `average` did, or with ``dry_run`` would do.

    Attributes:
        output: the file that was asked for.
        written: whether it was published; False for a dry run, and if a requirement was not met.
        checkpoints: what was averaged, in order.
        skipped: files of run folders that were skipped, with reasons.
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


@dataclass(frozen=True)
class Draft:
    """An output before it is published.

    Attributes:
        request, prepared, context: what is to be done, with what.
        target: the file to write.
        checksum: where its SHA-256 goes, if anywhere.
        sources: for each checkpoint SHA-256 of its files; None if not asked for.
    """

    request: AverageRequest
    prepared: Prepared
    context: Context
    target: Path
    checksum: Path | None
    sources: Sequence[Mapping[str, str]] | None = None

    @functools.cached_property
    def evaluations(self) -> Evaluations:
        """What is measured."""
        return Evaluations(self.request, self.prepared, self.context)

    @functools.cached_property
    def header(self) -> bytes:
        """The output's header before its digests and the refresh's counts are known; `final_header` is as long."""
        return self._encode(None, room=COUNTS_ROOM if self.prepared.statistics == "refreshed" else 0)

    @property
    def nbytes(self) -> int:
        """The output's size in bytes."""
        return len(self.header) + self.prepared.plan.nbytes

    def final_header(self, report: BatchNormReport | None, data_digest: str) -> bytes:
        """Returns the header with the digests and the counts of the refresh."""
        return seal(self._encode(report, data_digest, size=len(self.header)))

    def result(
        self,
        report: BatchNormReport | None = None,
        data_digest: str | None = None,
        sha256: str | None = None,
        *,
        written: bool = False,
    ) -> AverageResult:
        """Returns what was done so far."""
        prepared = self.prepared
        return AverageResult(
            output=Path(self.request.output),
            written=written,
            checkpoints=tuple(spec.path for spec in prepared.specs),
            skipped=prepared.skipped,
            tensors=len(prepared.plan.tensors),
            nbytes=self.nbytes,
            device=str(prepared.mean_device),
            statistics=prepared.statistics,
            batch_norm=report,
            data_digest=data_digest,
            sha256=sha256,
            evaluations=tuple(self.evaluations.measured),
            outcomes=self.evaluations.outcomes,
            notices=tuple(self.context.notices),
        )

    @functools.cached_property
    def _tensors(self) -> str:
        with gc_paused():
            return encode_tensors(self.prepared.plan)

    def _encode(
        self, report: BatchNormReport | None, data_digest: str | None = None, *, room: int = 0, size: int = 0
    ) -> bytes:
        with gc_paused():
            metadata = make_metadata(
                self.prepared.checkpoints,
                RecordedOptions.values(self.request),
                batch_norm=summary(self.prepared.statistics, report, self.request),
                digests=self.sources,
                data_digest=data_digest,
            )
            return encode_header(self._tensors, metadata, room=room, size=size)


def publish(draft: Draft) -> AverageResult:
    """Computes the output and publishes it. Every rank calls this; rank 0 measures and publishes.

    Raises:
        CkptAvgError: anything failed; nothing is published then.
    """
    request, prepared, ranks = draft.request, draft.prepared, draft.context.ranks
    draft.evaluations.measure_checkpoints()
    agree_on_header(ranks, draft.header)
    digest = TreeDigest(prepared.plan.nbytes)
    report: BatchNormReport | None = None
    data_digest: str | None = None
    sha256: str | None = None
    with unpublished_file(draft.target, draft.nbytes, ranks) as unpublished:

        def weights() -> dict[str, torch.Tensor]:
            return weights_in(unpublished.readable_path)

        _write_mean(draft, unpublished, digest)
        if len(prepared.checkpoints) > 1 or prepared.refresh is None:  # a single checkpoint has been measured as it is
            draft.evaluations.measure_average(weights, refreshed=False)
        if prepared.refresh is not None:
            report = refresh_output(
                prepared.refresh,
                prepared.plan,
                weights,
                _overwrite(draft, unpublished, digest),
                frozen=frozen_layers(prepared.refresh, prepared.frozen),
                options=request,
                device=prepared.model_device,
                progress=draft.context.progress,
                ranks=ranks,
            )
            draft.evaluations.measure_average(weights, refreshed=True)
        if ranks.is_first:
            begin = len(draft.header)

            def read(offset: int, length: int) -> bytes:
                ranks.check()  # the others wait, and take this for a sign of life
                return unpublished.read(offset, length)

            data_digest = digest.finish(lambda offset, length: read(begin + offset, length))
            unpublished.write(draft.final_header(report, data_digest), 0)
            refuse_unreadable(unpublished.readable_path, prepared.plan, unpublished.target)
            if draft.sources is not None:
                sha256 = digest_stream(read, draft.nbytes)
            _refuse_unmet(draft.result(report, data_digest, sha256))
            ranks.check()
            if not unpublished.publish(overwrite=request.overwrite):
                draft.context.notice(
                    f"{draft.target}: this file system cannot sync a folder, so a power cut within the next seconds "
                    "may take the file's name with it"
                )
        _share(draft)
    if draft.checksum is not None and sha256 is not None:
        write_checksum(draft.checksum, os.path.basename(request.output), sha256, overwrite=request.overwrite)
    return draft.result(report, data_digest, sha256, written=True)


def source_digests(prepared: Prepared, context: Context) -> list[dict[str, str]]:
    """Returns SHA-256 of the checkpoints' files, which rank 0 reads for all."""
    ranks = context.ranks
    found: list[dict[str, str]] = ranks.exchange(
        "digests",
        None,
        lambda _: digest_files(prepared.checkpoints, threads=prepared.threads, progress=lambda nbytes: ranks.check()),
    )
    return found


def _write_mean(draft: Draft, unpublished: UnpublishedFile, digest: TreeDigest) -> None:
    """Computes this rank's share of the data section, and waits until all shares are on disk."""
    prepared, ranks, progress = draft.prepared, draft.context.ranks, draft.context.progress
    plan, begin = prepared.plan, len(draft.header)

    def write(contents: memoryview, offset: int) -> None:
        unpublished.write(contents, begin + offset)
        digest.add(contents, offset)

    def read(nbytes: int) -> None:
        ranks.check()
        progress.read(nbytes)

    share = plan.share(ranks.rank, ranks.size, begin=begin)
    if ranks.is_first:
        unpublished.write(draft.header, 0)
    progress.start(prepared.nbytes * len(share) // max(1, plan.nbytes))
    write_means(
        prepared.checkpoints,
        plan,
        [Mean(range(len(prepared.checkpoints)), write)],
        device=prepared.mean_device,
        threads=prepared.threads,
        memory=draft.request.memory,
        allow_nonfinite=draft.request.allow_nonfinite,
        within=share,
        progress=read,
    )
    if ranks.size > 1:
        unpublished.sync()
    ranks.exchange("mean", digest.known() if ranks.size > 1 else None, lambda known: _update(digest, known))
    if ranks.size > 1:
        unpublished.drop_cache()


def _update(digest: TreeDigest, known: list[Any]) -> None:
    for digests in known[1:]:
        digest.update(digests)


def _overwrite(draft: Draft, unpublished: UnpublishedFile, digest: TreeDigest) -> Callable[[memoryview, int], None]:
    """Returns what writes over the mean; on every rank but the first nothing does."""

    def write(contents: memoryview, offset: int) -> None:
        if draft.context.ranks.is_first:
            digest.invalidate(offset, len(contents))
            unpublished.write(contents, len(draft.header) + offset)

    return write


def _share(draft: Draft) -> None:
    """Tells the other ranks what was measured, and that the output is published."""
    ranks = draft.context.ranks
    try:
        draft.evaluations.share()
    except RankError as error:
        if not ranks.is_first:
            raise
        draft.context.notice(f"the output is published, but {ranks.failure or error}")


def _refuse_unmet(result: AverageResult) -> None:
    """Raises RequirementError if a requirement is not met."""
    unmet = [outcome for outcome in result.outcomes if not outcome.met]
    if unmet:
        advice = "Average other checkpoints (ckpt-avg sweep shows which are best together)"
        if len(result.checkpoints) == 1:
            advice = "Keep the statistics that these weights have, or measure over other data"
        raise RequirementError(
            f"{result.output}: not published, because {len(unmet)} of {plural(len(result.outcomes), 'requirement')} "
            f"failed: {listing(map(str, unmet), separator='; ')}. {advice}, or relax the requirement.",
            result,
        )
