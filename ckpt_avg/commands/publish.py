"""The long part of `average`, once everything is checked: mean → refresh → evaluate → publish."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt_avg.commands.agreement import agree_on_header
from ckpt_avg.commands.context import reading
from ckpt_avg.commands.draft import AverageResult, Draft
from ckpt_avg.commands.release import complete_folder
from ckpt_avg.errors import RankError, RequirementError
from ckpt_avg.mean.memory_output import write_tensors
from ckpt_avg.mean.stream import Mean, write_means
from ckpt_avg.mean.weighting import summed
from ckpt_avg.output.paths import write_checksum
from ckpt_avg.output.provenance import digest_of
from ckpt_avg.output.release_folder import ReleaseFolder, release_folder
from ckpt_avg.output.unpublished_weights import UnpublishedWeights, unpublished_weights
from ckpt_avg.progress import Phase
from ckpt_avg.text import decimal_size, listing, plural

if TYPE_CHECKING:
    from ckpt_avg.batchnorm.refresh import BatchNormReport


def publish(draft: Draft) -> AverageResult:
    """Computes the output and publishes it. Every rank calls this; rank 0 measures and publishes.

    Raises:
        CkptAvgError: anything failed; nothing is published then.
    """
    ranks, request = draft.context.ranks, draft.request
    draft.evaluations.measure_saved()
    agree_on_header(ranks, b"".join(draft.headers))
    data_digest: str | None = None
    sha256: str | None = None
    with _output_folder(draft) as folder:
        shown = [draft.target if folder is None else draft.target / shard.name for shard in draft.shards]
        paths = shown if folder is None else [folder.path / shard.name for shard in draft.shards]
        with unpublished_weights(paths, draft.shards, draft.headers, ranks, shown=shown, tied=draft.tied) as weights:
            _write_mean(draft, weights)
            report = _refresh_and_measure(draft, weights)
            if ranks.is_first:
                draft.evaluations.notice_chance()
                data_digests, file_digests = _complete(draft, weights, report)
                named = zip((shard.name for shard in draft.shards), data_digests, strict=True)
                data_digest = digest_of([digest for _, digest in sorted(named)])
                if file_digests and folder is None:
                    sha256 = file_digests[0]
                _refuse_unmet(draft.result(report, data_digest, sha256))
                ranks.check()
                is_durable = weights.publish(overwrite=request.overwrite and folder is None)
                if folder is not None and draft.release is not None:
                    weights.close()
                    sha256 = complete_folder(
                        folder, draft.release, draft.result(report, data_digest), data_digests, file_digests
                    )
                    is_durable = folder.publish(draft.release.files, overwrite=request.overwrite)
                if not is_durable:
                    draft.context.notice(
                        f"{draft.target}: this file system cannot sync a folder, so a power cut within the next "
                        "seconds may take its name with it"
                    )
            _share(draft)
    if draft.checksum is not None and sha256 is not None:
        write_checksum(draft.checksum, os.path.basename(request.output), sha256, overwrite=request.overwrite)
    return draft.result(report, data_digest, sha256, written=True)


@contextlib.contextmanager
def _output_folder(draft: Draft) -> Iterator[ReleaseFolder | None]:
    """Yields the folder to write, with its side files; None if the output is a file."""
    if draft.release is None:
        yield None
        return
    with release_folder(draft.target, draft.context.ranks) as folder:
        if draft.context.ranks.is_first:
            for each in draft.release.side_files:
                folder.add(each.name, each.size, each.pieces())
        yield folder


def _write_mean(draft: Draft, weights: UnpublishedWeights) -> None:
    """Computes this rank's share of the data section, and waits until all shares are on disk."""
    prepared, ranks, context = draft.prepared, draft.context.ranks, draft.context
    plan = prepared.plan

    def read(nbytes: int) -> None:
        ranks.check()
        context.progress.advance(nbytes)

    indices, unequal = summed(prepared.selected.sum_order, prepared.weights)
    share = weights.share(ranks.rank, ranks.size)
    weights.write_headers_of(share, draft.headers)
    count, nbytes = len(prepared.checkpoints), prepared.nbytes
    whole = reading("averaging", count, nbytes // count)
    context.phase(replace(whole, total=nbytes * len(share) // max(1, plan.nbytes)))
    write_means(
        prepared.checkpoints,
        plan,
        [Mean(indices, weights.write, unequal)],
        device=prepared.mean_device,
        threads=prepared.threads,
        memory=draft.request.memory,
        readers=draft.request.readers,
        allow_nonfinite=draft.request.allow_nonfinite,
        within=share,
        progress=read,
    )
    if ranks.size > 1:
        weights.sync()
    ranks.exchange("mean", weights.known_digests() if ranks.size > 1 else None, lambda known: _add(weights, known))
    if ranks.size > 1:
        weights.drop_cache()


def _add(weights: UnpublishedWeights, known: list[Any]) -> None:
    for digests in known[1:]:
        weights.add_digests(digests)


def _refresh_and_measure(draft: Draft, weights: UnpublishedWeights) -> BatchNormReport | None:
    """Measures the average, and again after the refresh of its statistics, if there is one."""
    prepared, evaluations = draft.prepared, draft.evaluations
    if prepared.plan.spectral_norms:
        _write_spectral_vectors(draft, weights)
    evaluations.measure_average(weights.tensors, is_refreshed=False)
    if prepared.refresh is None:
        return None
    draft.context.phase(Phase("refreshing BatchNorm"))
    report, statistics = evaluations.refresh(weights.tensors(), prepared.frozen)
    if draft.context.ranks.is_first:
        write_tensors(statistics, prepared.plan, weights.overwrite)
    evaluations.measure_average(weights.tensors, is_refreshed=True)
    evaluations.measure_refreshed_checkpoints()  # later, so that the output does not depend on it
    return report


def _write_spectral_vectors(draft: Draft, weights: UnpublishedWeights) -> None:
    """Computes the vectors of spectral norm on rank 0, before any rank loads the weights."""
    ranks, prepared = draft.context.ranks, draft.prepared
    draft.context.phase(Phase(f"computing spectral norm of {plural(len(prepared.plan.spectral_norms), 'weight')}"))
    if ranks.is_first:
        from ckpt_avg.mean.spectral_norm import leading_vectors

        vectors = leading_vectors(prepared.plan, prepared.last, weights.tensors(), draft.context.notice, ranks.check)
        write_tensors(vectors, prepared.plan, weights.overwrite)
    if ranks.size > 1:
        weights.sync()
        ranks.exchange("spectral norm", None)
        weights.drop_cache()


def _complete(draft: Draft, weights: UnpublishedWeights, report: BatchNormReport | None) -> tuple[list[str], list[str]]:
    """Writes the final headers; returns the digest of each file's data, and SHA-256 of each file if requested."""
    context = draft.context
    context.phase(Phase(f"completing the output, {decimal_size(draft.nbytes)}"))

    def read(nbytes: int) -> None:
        context.ranks.check()  # the others wait, and take this for a sign of life
        context.progress.advance(nbytes)

    digests = weights.data_digests(read)
    headers = draft.final_headers(report, digests)
    weights.write_headers(headers)
    weights.refuse_damaged(headers)
    if not draft.request.sha256:
        return digests, []
    context.progress.step(Phase("computing its digest", draft.nbytes, "bytes"))
    return digests, weights.sha256(read)


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
