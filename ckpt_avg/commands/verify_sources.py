"""`verify --sources`: whether a file is the mean of the checkpoints that it records. Nothing is written."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt_avg.checkpoint.spec import Checkpoint, CheckpointSpec, TensorSpec, batch_norm_buffer
from ckpt_avg.commands.context import Context, reading
from ckpt_avg.commands.requests import RecordedOptions, VerifyRequest
from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, VerificationError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.models import prefix_of
from ckpt_avg.formats.open import open_with
from ckpt_avg.mean.equal_tensors import refuse_unequal
from ckpt_avg.mean.plan import OutputTensor, Plan
from ckpt_avg.mean.stream import Mean, write_means
from ckpt_avg.mean.value_kinds import plan_of
from ckpt_avg.mean.weighting import summed
from ckpt_avg.output.digests import digest_files
from ckpt_avg.output.provenance import (
    MODEL,
    recorded_options,
    recorded_sources,
    recorded_statistics,
    recorded_sum_order,
    recorded_tied,
    recorded_weights,
    size_of,
    text_of,
)
from ckpt_avg.output.written_file import WrittenFile
from ckpt_avg.progress import Phase
from ckpt_avg.runs.compatibility import refuse_differences
from ckpt_avg.runs.discover import Discovery, discover
from ckpt_avg.text import listing, one_line, plural, quote

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_NAME_THE_SOURCES = "Name the checkpoints that it was made of."


@dataclass(frozen=True, slots=True)
class Compared:
    """What was compared, as in `VerifyReport`."""

    checkpoints: tuple[Path, ...]
    weights: tuple[float, ...] | None
    measured: tuple[str, ...]
    spectral_norms: tuple[str, ...]


def compare_with_mean(
    files: Sequence[WrittenFile], request: VerifyRequest, *, threads: int, context: Context
) -> Compared:
    """Compares the data of a model's files, bit for bit, with the mean of the checkpoints that they record.

    Raises VerificationError if the sources are not the recorded ones, or their mean differs.
    """
    path, metadata = Path(request.path), files[0].metadata
    tensors = {
        name: replace(tensor, file=index) for index, each in enumerate(files) for name, tensor in each.tensors.items()
    }
    recorded = recorded_sources(metadata)
    options = RecordedOptions.read(recorded_options(metadata) or {"": None})
    weights = None
    try:
        weights = recorded_weights(recorded or ())
    except ValueError:
        recorded = None
    if recorded is None or options is None:
        raise VerificationError(
            f"{path}: expected its sources and options in its metadata, got none that can be read. Average the "
            "checkpoints again."
        )
    model = str(metadata.get(MODEL, ""))
    context.phase(Phase("opening checkpoints"))
    with ExitStack() as stack:
        try:
            checkpoints = _recorded_among(discover(request.sources or ()), recorded, options, model, stack, path)
            for source in (source for checkpoint in checkpoints for source in checkpoint.files):
                source.use_io(request.io)
            specs = [checkpoint.spec for checkpoint in checkpoints]
            refuse_differences(specs, dtype=options.dtype)
            plan = plan_of(checkpoints, dtype=options.dtype, non_float=options.non_float)
            refuse_unequal(checkpoints, plan)
            is_refreshed = recorded_statistics(metadata) == "refreshed"
            free = _batch_norm_buffers(plan) if is_refreshed else set()
            vectors = {name for layer in plan.spectral_norms for name in (layer.u, layer.v)}
            tied = _tied_names(recorded_tied(metadata), specs, path)
            comparison = _Comparison(path, [each.file for each in files], tensors, plan, free | vectors, tied)
            context.phase(reading("averaging", len(specs), plan.source_nbytes))
            indices, unequal = summed(recorded_sum_order(recorded), weights)
            write_means(
                checkpoints,
                plan,
                [Mean(indices, comparison.compare, unequal)],
                device="cpu",
                threads=threads,
                memory=request.memory,
                readers=request.readers,
                allow_nonfinite=options.allow_nonfinite,
                progress=context.progress.advance,
            )
        except IncompatibleError as error:
            raise VerificationError(
                f"{one_line(str(path))}: not the mean of these checkpoints: {error}", lines=True
            ) from error
        if plan.spectral_norms:
            from ckpt_avg.mean.spectral_norm import differing_vectors
            from ckpt_avg.user_code.model import weights_of

            found = Checkpoint(CheckpointSpec(path, "safetensors", tensors), [each.file for each in files])
            others = list(differing_vectors(plan, checkpoints[-1], weights_of(found)))
            if others:
                raise VerificationError(
                    f"{path}: spectral norm of {listing(map(quote, others))}: u and v are not the vectors of the "
                    "averaged weight. Average the checkpoints again."
                )
    prefix = prefix_of(model)
    measured = tuple(prefix + name for name in plan.by_name() if name in comparison.measured - vectors)
    spectral_norms = tuple(prefix + layer.weight for layer in plan.spectral_norms)
    return Compared(tuple(map(_path_of, specs)), weights, measured, spectral_norms)


def _path_of(spec: CheckpointSpec) -> Path:
    """Returns the path of a checkpoint: of one of its models, that of its folder."""
    return spec.path.parent if spec.model else spec.path


def _tied_names(tied: Mapping[str, str], specs: Sequence[CheckpointSpec], path: Path) -> frozenset[str]:
    """Returns the names that an output does not store, because they are tied to others in every checkpoint.

    Raises VerificationError if they are not.
    """
    for spec in specs if tied else ():
        groups = spec.tied()
        if apart := [name for name, kept in tied.items() if not any({name, kept} <= set(each) for each in groups)]:
            raise VerificationError(
                f"{path}: lacks {listing(map(quote, apart))}, which {spec.path} has, not tied to other tensors. "
                f"{_NAME_THE_SOURCES}"
            )
    return frozenset(tied)


def _recorded_among(
    discovery: Discovery,
    recorded: Sequence[Mapping[str, Any]],
    options: RecordedOptions,
    model: str,
    stack: ExitStack,
    path: Path,
) -> list[Checkpoint]:
    """Returns the recorded checkpoints in their order, of several models the one that is meant.

    Folders may contain others; named checkpoints must be recorded.

    Raises VerificationError if one is missing or was changed, or if one that is not recorded was named.
    """
    names = {source["name"] for source in recorded}
    found = [*discovery.paths, *(each.path for each in discovery.skipped)]
    left: list[Checkpoint] = []
    problems: dict[str, str] = {}
    for each in found:
        if each.is_dir() or names & {text_of(each), text_of(each.parent)}:
            try:
                checkpoint = stack.enter_context(open_with(each, options))
                left.append(checkpoint.models.get(model, checkpoint))
            except CheckpointFormatError as error:
                problems[text_of(each)] = str(error)
    chosen = []
    for source in recorded:
        match = _match(left, source, recorded, path)
        if match is None:
            same_name = [each.spec.path for each in left if text_of(each.spec.path) == source["name"]]
            got = f"got another file of that name, {same_name[0]}" if same_name else "got none of that name"
            raise VerificationError(
                f"{path}: expected {quote(source['name'])} ({source['bytes']:,} bytes, header digest "
                f"{source['header_sha256']}) among the sources, {problems.get(source['name'], got)}. "
                f"{_NAME_THE_SOURCES}"
            )
        chosen.append(match)
        left.remove(match)
    paths = {_path_of(checkpoint.spec) for checkpoint in chosen}
    if extra := [str(each) for each in discovery.named if each not in paths]:
        raise VerificationError(
            f"{path}: is the mean of {plural(len(chosen), 'checkpoint')}, and these are not among them: "
            f"{listing(map(quote, extra))}. Name only those, or their folder."
        )
    return chosen


def _match(
    checkpoints: Sequence[Checkpoint], source: Mapping[str, Any], recorded: Sequence[Mapping[str, Any]], path: Path
) -> Checkpoint | None:
    """Returns the checkpoint that has the recorded name, size and header, and the recorded digest if there is one.

    Raises VerificationError if several could be meant.
    """
    candidates = [each for each in checkpoints if _fits(each, source)]
    if len(candidates) > 1 and isinstance(source.get("sha256"), dict):
        digests = digest_files(candidates, threads=1)
        candidates = [each for each, found in zip(candidates, digests, strict=True) if found == source["sha256"]]
    else:
        candidates = [each for each in candidates if text_of(each.spec.path) == source["name"]] or candidates
        # If as many with this name, header and size were averaged, they are in their order.
        if len(candidates) > sum(_key(each) == _key(source) for each in recorded):
            raise VerificationError(
                f"{path}: several sources could be the recorded {quote(source['name'])}: "
                f"{listing(quote(each.spec.path) for each in candidates)}. {_NAME_THE_SOURCES}"
            )
    return candidates[0] if candidates else None


def _fits(checkpoint: Checkpoint, source: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has the recorded header, size and name; a folder may have the name of the one file in it."""
    path = checkpoint.spec.path
    names = {text_of(path), text_of(path.parent)}
    if len(checkpoint.files) == 1:
        names.add(text_of(checkpoint.files[0].path))
    return source["name"] in names and (checkpoint.spec.digest, size_of(checkpoint)) == _key(source)[1:]


def _key(source: Mapping[str, Any]) -> tuple[str, str, int]:
    return source["name"], source["header_sha256"], source["bytes"]


def _batch_norm_buffers(plan: Plan) -> set[str]:
    return {batch_norm_buffer(layer, buffer) for layer in plan.batch_norm for buffer in _BUFFERS}


class _Comparison:
    """Compares the mean with an output, block by block; tensors in ``free`` may differ, those in ``tied`` lack.

    Threads may share it.

    Raises VerificationError if the output has other tensors.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[InputFile],
        tensors: Mapping[str, TensorSpec],
        plan: Plan,
        free: Collection[str],
        tied: Collection[str],
    ) -> None:
        planned = [tensor for tensor in plan.tensors if tensor.name not in tied]
        expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in planned}
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            others = sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name))
            raise VerificationError(
                f"{path}: not the mean of these checkpoints: these tensors have another name, shape or dtype: "
                f"{listing(map(quote, others))}. {_NAME_THE_SOURCES}"
            )
        self._files, self._tensors, self._plan, self._free, self._tied = files, tensors, plan, free, tied
        self._begins = [tensor.offset for tensor in plan.tensors]
        self._lock = threading.Lock()
        self.measured: set[str] = set()

    def compare(self, contents: memoryview, offset: int) -> None:
        """Raises VerificationError if bytes of the mean's data section differ from the file's."""
        contents = contents.cast("B")
        end = offset + len(contents)
        for tensor in self._plan.tensors[bisect.bisect_right(self._begins, offset) - 1 :]:
            if tensor.offset >= end:
                break
            first, stop = max(offset, tensor.offset), min(end, tensor.offset + tensor.nbytes)
            if first < stop and tensor.name not in self._tied:
                self._compare(tensor, first - tensor.offset, contents[first - offset : stop - offset])

    def _compare(self, tensor: OutputTensor, begin: int, mean: memoryview) -> None:
        file = self._files[self._tensors[tensor.name].file]
        found = file.read(self._tensors[tensor.name].offset + begin, len(mean))
        if found == mean:
            return
        if tensor.name in self._free:
            with self._lock:
                self.measured.add(tensor.name)
            return
        index = next(index for index, (a, b) in enumerate(zip(found, mean, strict=True)) if a != b)
        raise VerificationError(
            f"{file.path}: tensor {quote(tensor.name)}: not the mean of these checkpoints: it differs at index "
            f"{(begin + index) // tensor.dtype.itemsize:,}. Average them again, or name the checkpoints that it was "
            "made of."
        )
