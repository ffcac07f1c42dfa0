"""The output of `average` before it is published: its header, and what is reported of it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_avg.batchnorm.policy import COUNTS_ROOM, Statistics, summary
from ckpt_avg.checkpoint.spec import Checkpoint, batch_norm_buffer
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.evaluations import Evaluations
from ckpt_avg.commands.parts import Part, only_part
from ckpt_avg.commands.prepare import Prepared
from ckpt_avg.commands.release import Release
from ckpt_avg.commands.requests import AverageRequest, RecordedOptions
from ckpt_avg.engine import engine_for
from ckpt_avg.formats.models import prefix_of
from ckpt_avg.machine import gc_paused
from ckpt_avg.output.digests import digest_files
from ckpt_avg.output.header import encode_header, encode_tensors
from ckpt_avg.output.provenance import make_metadata, seal, with_digests
from ckpt_avg.output.shards import ordered
from ckpt_avg.progress import Phase
from ckpt_avg.results import Result, Rows, counted, notices_counted, paths_counted
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.text import escaped, plural, size
from ckpt_avg.user_code.comparison import Comparison, Evaluation
from ckpt_avg.user_code.gate import Outcome

if TYPE_CHECKING:
    from ckpt_avg.batchnorm.refresh import BatchNormReport


@dataclass(frozen=True, slots=True, repr=False)
class AverageResult(Result):
    """What `average` did, or with ``dry_run`` would do.

    Attributes:
        output: the path that was given.
        files: of an output folder, the names of its files, the weights first; empty for a file.
        written: whether it was published; False for a dry run, and if a requirement was not met.
        checkpoints: what was averaged, in order.
        steps: that each records, in the same order; None if it records none. Epochs if the run records no steps.
        unit: of these: ``step`` or ``epoch``.
        weights: of each, in the same order; None if all are equal, so that the mean divides by their number.
        run: what each checkpoint of the run records, selected or not.
        places: the indices of ``checkpoints`` among these.
        skipped: files of run folders that were skipped, with reasons.
        tensors: how many tensors the output contains.
        nbytes: the output's size in bytes.
        device: where the mean was computed.
        engine: ``native`` or ``torch``, which computed it.
        statistics: where the BatchNorm statistics come from: ``none`` (no BatchNorm layers), ``refreshed``,
            ``mean`` (of the checkpoints' statistics), ``frozen`` (the same in every checkpoint, kept), or ``copied``
            (from the only checkpoint).
        batch_norm: what the refresh did, if there was one.
        spectral_norms: the weights with spectral norm, whose vectors u and v are computed from the averaged weight.
        data_digest: of the output's data section, as its metadata records it, of several shards together; None for a
            dry run, and on every rank but the first.
        sha256: of the whole output, if requested; for a folder of the list of all its files' SHA-256, ``SHA256SUMS``.
        uploaded: the URL of the repository that an output folder was uploaded to.
        evaluations: what ``evaluate`` measured: the last checkpoint as it was saved (without a refresh every one that
            was measured), checkpoints with refreshed statistics, the average before and after the refresh. The last one
            is that of the output.
        comparison: what averaging and what the refresh changed; None if nothing was measured.
        outcomes: each requirement, and whether it was met.
        split: as given.
        metadata: what the output records of itself, without its digests.
        notices: what the user should know.
    """

    output: Path
    files: tuple[str, ...]
    written: bool
    checkpoints: tuple[Path, ...]
    steps: tuple[int | None, ...]
    unit: str
    weights: tuple[float, ...] | None
    run: tuple[Record, ...]
    places: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    tensors: int
    nbytes: int
    device: str
    engine: str
    statistics: Statistics
    batch_norm: BatchNormReport | None
    spectral_norms: tuple[str, ...]
    data_digest: str | None
    sha256: str | None
    uploaded: str | None
    evaluations: tuple[Evaluation, ...]
    comparison: Comparison | None
    outcomes: tuple[Outcome, ...]
    split: str | None
    metadata: Mapping[str, str]
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as ``ckpt-avg average --json`` prints them."""
        from ckpt_avg.commands.documents import average_json

        return average_json(self)

    def _title(self) -> str:
        done = "written" if self.written else "not written"
        return f"{escaped(self.output.name or str(self.output))}, {size(self.nbytes)}, {done}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "output", str(self.output) + (f", {plural(len(self.files), 'file')}" if self.files else "")
        yield "checkpoints", paths_counted(self.checkpoints)
        known = [step for step in self.steps if step is not None]
        yield "steps", f"{known[0]:,} to {known[-1]:,} ({self.unit}s)" if known else ""
        yield "weights", "" if self.weights is None else counted(self.weights, (f"{each:.4g}" for each in self.weights))
        refreshed = "" if self.batch_norm is None else f", {self.batch_norm._title()}"
        yield "statistics", "" if self.statistics == "none" else f"{self.statistics}{refreshed}"
        yield "evaluations", self.evaluations[-1]._title() if self.evaluations else ""
        changes = self.comparison.averaging or self.comparison.refresh if self.comparison is not None else ()
        yield "comparison", ", ".join(each._title() for each in changes)
        unmet = [each for each in self.outcomes if not each.met]
        yield "outcomes", f"{len(self.outcomes) - len(unmet)} of {len(self.outcomes)} met" if self.outcomes else ""
        yield "notices", notices_counted(self.notices)

    def _tables(self) -> Iterator[Rows]:
        names = list(self.evaluations[0].metrics) if self.evaluations else []
        rows = [(each.name, *(f"{each.metrics[name]:.6g}" for name in names)) for each in self.evaluations]
        yield Rows("evaluations", ("weights", *names), rows)


class Draft:
    """An output before it is published.

    Attributes:
        request, prepared, context: what is to be done, with what.
        target: the file or folder to write.
        parts: the models; mostly one.
        shards: what is in each file of the weights; a single one if that is one file.
        checksum: where the SHA-256 of a file goes, if anywhere.
        release: what a folder will contain; None for a file.
        evaluations: what is measured, or was before, as `Evaluations` takes it.
    """

    def __init__(
        self,
        request: AverageRequest,
        prepared: Prepared,
        context: Context,
        target: Path,
        checksum: Path | None,
        measured: Sequence[Evaluation] = (),
        directions: Mapping[str, bool] | None = None,
        release: Release | None = None,
    ) -> None:
        self.parts = (only_part(prepared, target.name),) if release is None else release.parts
        self.shards = [shard for part in self.parts for shard in part.shards]
        self.request, self.context = request, context
        self.prepared = replace(prepared, plan=ordered(prepared.plan, self.shards))
        self.target, self.checksum, self.release = target, checksum, release
        self.evaluations = Evaluations(request, prepared, context, measured, directions)

    @functools.cached_property
    def headers(self) -> list[bytes]:
        """The files' headers before their digests and the refresh's counts are known; `final_headers` are as long."""
        return self._encode(None, room=COUNTS_ROOM if self.prepared.statistics == "refreshed" else 0)

    @property
    def tied(self) -> dict[str, str]:
        """The tensors of the plan of all checkpoints that are not stored, as `Part.tied`."""
        return {
            prefix_of(part.model) + name: prefix_of(part.model) + kept
            for part in self.parts
            for name, kept in part.tied.items()
        }

    @property
    def nbytes(self) -> int:
        """The size of the weights in bytes, in all files together."""
        return sum(map(len, self.headers)) + self.prepared.plan.nbytes

    @property
    def phases(self) -> int:
        """How many phases `publish` has on rank 0."""
        prepared = self.prepared
        some = (self.request.sha256, prepared.plan.spectral_norms, prepared.refresh is not None)
        return 2 + sum(map(bool, some)) + self.evaluations.phases

    def final_headers(self, report: BatchNormReport | None, data_digests: Sequence[str]) -> list[bytes]:
        """Returns the headers with the digests and the counts of the refresh."""
        return list(map(seal, self._encode(report, data_digests, sizes=list(map(len, self.headers)))))

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
            files=() if self.release is None else self.release.files,
            written=written,
            checkpoints=tuple(spec.path for spec in prepared.specs),
            steps=prepared.selected.moments,
            unit=prepared.selected.unit or "step",
            weights=prepared.weights,
            run=prepared.selected.run,
            places=prepared.selected.places,
            skipped=prepared.selected.skipped,
            tensors=len(prepared.plan.tensors),
            nbytes=self.nbytes,
            device=prepared.mean_device,
            engine=engine_for(prepared.mean_device),
            statistics=prepared.statistics,
            batch_norm=report,
            spectral_norms=tuple(layer.weight for layer in prepared.plan.spectral_norms),
            data_digest=data_digest,
            sha256=sha256,
            uploaded=None,
            evaluations=self.evaluations.measured,
            comparison=self.evaluations.comparison,
            outcomes=self.evaluations.outcomes,
            split=self.request.split,
            metadata=self._metadata(report, self.parts[0] if len(self.parts) == 1 else None),
            notices=tuple(self.context.notices),
        )

    @functools.cached_property
    def _tensors(self) -> list[bytes]:
        with gc_paused():
            return [encode_tensors(shard.tensors, shard.prefix) for shard in self.shards]

    @functools.cached_property
    def _source_digests(self) -> dict[str, list[dict[str, str]]]:
        """For each model and checkpoint SHA-256 of its files, which rank 0 reads for all; empty if not requested."""
        if not self.request.sha256 or self.request.dry_run:
            return {}
        ranks, prepared, progress = self.context.ranks, self.prepared, self.context.progress
        nbytes = sum(file.size for checkpoint in prepared.checkpoints for file in checkpoint.files)
        self.context.phase(Phase("computing the digests of the checkpoints", nbytes, "bytes"))

        def read(nbytes: int) -> None:
            ranks.check()
            progress.advance(nbytes)

        def digests(checkpoints: Sequence[Checkpoint]) -> list[dict[str, str]]:
            return digest_files(checkpoints, threads=prepared.threads, progress=read)

        found: dict[str, list[dict[str, str]]] = ranks.exchange(
            "digests", None, lambda _: {part.model: digests(part.checkpoints) for part in self.parts}
        )
        return found

    def _metadata(self, report: BatchNormReport | None, part: Part | None) -> dict[str, str]:
        """Returns the metadata of a model's files; of all together without ``part``."""
        plan = self.prepared.plan
        names: Collection[str] = ()
        if plan.batch_norm or plan.spectral_norms:
            names = plan.by_name() if part is None else part.names
        has_batch_norm = any(batch_norm_buffer(layer, "running_mean") in names for layer in plan.batch_norm)
        return make_metadata(
            self.prepared.checkpoints if part is None else part.checkpoints,
            RecordedOptions.values(self.request),
            weights=self.prepared.weighting,
            batch_norm=summary(self.prepared.statistics if has_batch_norm else "none", report, self.request),
            spectral_norms=sum(each.weight in names for each in plan.spectral_norms),
            split=self.request.split,
            sum_order=self.prepared.selected.sum_order,
            log=self.prepared.selected.log,
            digests=None if part is None else self._source_digests.get(part.model),
            files=None if self.release is None else self.release.recorded,
            tied=None if part is None else part.tied,
        )

    def _encode(
        self,
        report: BatchNormReport | None,
        data_digests: Sequence[str] | None = None,
        *,
        room: int = 0,
        sizes: Sequence[int] = (),
    ) -> list[bytes]:
        with gc_paused():
            metadata: list[dict[str, str]] = []
            for part in self.parts:
                first, count = len(metadata), len(part.shards)
                known = None if data_digests is None else data_digests[first : first + count]
                metadata += with_digests(self._metadata(report, part), known, count)
            return [
                encode_header(tensors, own, room=room, size=size)
                for tensors, own, size in zip(self._tensors, metadata, sizes or [0] * len(metadata), strict=True)
            ]
