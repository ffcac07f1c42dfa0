"""The long part of `average`, once everything is checked: mean → refresh → evaluate → publish."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ckpt_avg.commands.agreement import agree_on_header
from ckpt_avg.commands.draft import AverageResult, Draft
from ckpt_avg.errors import RankError, RequirementError
from ckpt_avg.mean.memory_output import write_tensors
from ckpt_avg.mean.stream import Mean, write_means
from ckpt_avg.mean.weighting import summed
from ckpt_avg.output.digests import TreeDigest, digest_stream
from ckpt_avg.output.header import refuse_damaged
from ckpt_avg.output.paths import write_checksum
from ckpt_avg.output.unpublished_file import UnpublishedFile, unpublished_file
from ckpt_avg.text import listing, plural

if TYPE_CHECKING:
    import torch

    from ckpt_avg.batchnorm.refresh import BatchNormReport


def publish(draft: Draft) -> AverageResult:
    """Computes the output and publishes it. Every rank calls this; rank 0 measures and publishes.

    Raises:
        CkptAvgError: anything failed; nothing is published then.
    """
    ranks, request = draft.context.ranks, draft.request
    draft.evaluations.measure_saved()
    agree_on_header(ranks, draft.header)
    digest = TreeDigest(draft.prepared.plan.nbytes)
    data_digest: str | None = None
    sha256: str | None = None
    with unpublished_file(draft.target, draft.nbytes, ranks) as unpublished:
        _write_mean(draft, unpublished, digest)
        report = _refresh_and_measure(draft, unpublished, digest)
        if ranks.is_first:
            draft.evaluations.notice_chance()
            data_digest, sha256 = _complete(draft, unpublished, digest, report)
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

    indices, weights = summed(prepared.selected.sum_order, prepared.weights)
    share = plan.share(ranks.rank, ranks.size, begin=begin)
    if ranks.is_first:
        unpublished.write(draft.header, 0)
    progress.start(prepared.nbytes * len(share) // max(1, plan.nbytes))
    write_means(
        prepared.checkpoints,
        plan,
        [Mean(indices, write, weights)],
        device=prepared.mean_device,
        threads=prepared.threads,
        memory=draft.request.memory,
        readers=draft.request.readers,
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


def _refresh_and_measure(draft: Draft, unpublished: UnpublishedFile, digest: TreeDigest) -> BatchNormReport | None:
    """Measures the average, and again after the refresh of its statistics, if there is one."""
    prepared, evaluations = draft.prepared, draft.evaluations

    def overwrite(contents: memoryview, offset: int) -> None:
        digest.invalidate(offset, len(contents))
        unpublished.write(contents, len(draft.header) + offset)

    def weights() -> dict[str, torch.Tensor]:
        from ckpt_avg.user_code.model import weights_in

        return weights_in(unpublished.readable_path)

    if prepared.plan.spectral_norms:
        _write_spectral_vectors(draft, unpublished, weights, overwrite)
    if len(prepared.checkpoints) > 1 or prepared.refresh is None:  # a single checkpoint has been measured as it is
        evaluations.measure_average(weights, is_refreshed=False)
    if prepared.refresh is None:
        return None
    report, statistics = evaluations.refresh(weights(), prepared.frozen)
    if draft.context.ranks.is_first:
        write_tensors(statistics, prepared.plan, overwrite)
    evaluations.measure_average(weights, is_refreshed=True)
    evaluations.measure_refreshed_checkpoints()  # later, so that the output does not depend on it
    return report


def _write_spectral_vectors(
    draft: Draft,
    unpublished: UnpublishedFile,
    weights: Callable[[], Mapping[str, torch.Tensor]],
    overwrite: Callable[[memoryview, int], None],
) -> None:
    """Computes the vectors of spectral norm on rank 0, before any rank loads the weights."""
    ranks, prepared = draft.context.ranks, draft.prepared
    if ranks.is_first:
        from ckpt_avg.mean.spectral_norm import leading_vectors

        vectors = leading_vectors(prepared.plan, prepared.last, weights(), draft.context.notice, ranks.check)
        write_tensors(vectors, prepared.plan, overwrite)
    if ranks.size > 1:
        unpublished.sync()
        ranks.exchange("spectral norm", None)
        unpublished.drop_cache()


def _complete(
    draft: Draft, unpublished: UnpublishedFile, digest: TreeDigest, report: BatchNormReport | None
) -> tuple[str, str | None]:
    """Writes the final header; returns the digest of the data section, and SHA-256 of the file if requested."""
    begin = len(draft.header)

    def read(offset: int, length: int) -> bytes:
        draft.context.ranks.check()  # the others wait, and take this for a sign of life
        return unpublished.read(offset, length)

    data_digest = digest.finish(lambda offset, length: read(begin + offset, length))
    header = draft.final_header(report, data_digest)
    unpublished.write(header, 0)
    refuse_damaged(unpublished.readable_path, header, draft.nbytes, unpublished.target)
    return data_digest, None if draft.checksum is None else digest_stream(read, draft.nbytes)


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
        if result.comparison is not None and not result.comparison.averaging:
            advice = "Keep the statistics that these weights have, or measure over other data"
        raise RequirementError(
            f"{result.output}: not published, because {len(unmet)} of {plural(len(result.outcomes), 'requirement')} "
            f"failed: {listing(map(str, unmet), separator='; ')}. {advice}, or relax the requirement.",
            result,
        )
