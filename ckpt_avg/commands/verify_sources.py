"""Whether a file is the mean of the checkpoints that it records: the mean is taken again, and nothing is written."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ckpt_avg.checkpoint.spec import Checkpoint, TensorSpec, batch_norm_buffer
from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, VerificationError
from ckpt_avg.files.input_file import IO, InputFile
from ckpt_avg.formats.open import open_with
from ckpt_avg.mean.equal_tensors import refuse_unequal
from ckpt_avg.mean.plan import OutputTensor, Plan, make_plan
from ckpt_avg.mean.stream import DEFAULT_MEMORY, Mean, check_memory, write_means
from ckpt_avg.output.digests import digest_files
from ckpt_avg.output.provenance import (
    Options,
    recorded_options,
    recorded_sources,
    recorded_statistics,
    size_of,
    text_of,
)
from ckpt_avg.progress import Progress
from ckpt_avg.runs.compatibility import refuse_differences
from ckpt_avg.runs.discover import Discovery, Sources, discover
from ckpt_avg.text import listing, one_line, plural, quote

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def compare_with_mean(
    file: InputFile,
    tensors: Mapping[str, TensorSpec],
    metadata: Mapping[str, str],
    sources: Sources,
    *,
    threads: int,
    memory: int | None,
    io: IO,
    progress: Progress,
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Compares a file's data, bit for bit, with the mean of the checkpoints that its metadata records.

    Args:
        file: the file.
        tensors: its tensors by name.
        metadata: what it says of itself.
        sources, threads, memory, io, progress: as for `verify`.

    Returns:
        The checkpoints in order, and the tensors that are not the mean since a BatchNorm refresh measured them.

    Raises:
        VerificationError: the sources are others than it records, or their mean is another.
        CheckpointFormatError: a source cannot be read.
    """
    memory = DEFAULT_MEMORY if memory is None else memory
    check_memory(memory)
    recorded, options = recorded_sources(metadata), recorded_options(metadata)
    if recorded is None or options is None:
        raise VerificationError(
            f"{file.path}: expected a record of its sources and options, got none that makes sense."
        )
    with ExitStack() as stack:
        try:
            checkpoints = _recorded_among(discover(sources), recorded, options, stack, file.path)
            for source in (source for checkpoint in checkpoints for source in checkpoint.files):
                source.use_io(io)
            specs = [checkpoint.spec for checkpoint in checkpoints]
            refuse_differences(specs)
            plan = make_plan(specs, dtype=options.dtype, non_float=options.non_float)
            refuse_unequal(checkpoints, (tensor.name for tensor in plan.tensors if tensor.rule == "equal"))
            may_differ = _measured(plan) if recorded_statistics(metadata) == "refreshed" else frozenset()
            comparison = _Comparison(file, tensors, plan, may_differ)
            progress.start(len(specs) * specs[0].nbytes)
            write_means(
                checkpoints,
                plan,
                [Mean(range(len(checkpoints)), comparison.compare)],
                device=torch.device("cpu"),
                threads=threads,
                memory=memory,
                allow_nonfinite=options.allow_nonfinite,
                progress=progress.read,
            )
        except IncompatibleError as error:
            raise VerificationError(
                f"{one_line(str(file.path))}: not the mean of these checkpoints: {error}", lines=True
            ) from error
        measured = tuple(tensor.name for tensor in plan.tensors if tensor.name in comparison.measured)
        return tuple(spec.path for spec in specs), measured


def _recorded_among(
    discovery: Discovery, recorded: Sequence[Mapping[str, Any]], options: Options, stack: ExitStack, path: Path
) -> list[Checkpoint]:
    """Returns the recorded checkpoints in their order; folders may hold others, but what is named by hand must be one.

    Raises:
        VerificationError: one is not there, or is another than when it was averaged; or one too many was named.
    """
    names = {source["name"] for source in recorded}
    found = [*discovery.paths, *(each.path for each in discovery.skipped)]
    left: list[Checkpoint] = []
    problems: dict[str, str] = {}
    for each in found:
        if each.is_dir() or names & {text_of(each), text_of(each.parent)}:
            try:
                left.append(stack.enter_context(open_with(each, options.reading)))
            except CheckpointFormatError as error:
                problems[text_of(each)] = str(error)
    chosen = []
    for source in recorded:
        match = _choose([each for each in left if _is(each, source)], source, recorded, path)
        if match is None:
            same_name = [each.spec.path for each in left if text_of(each.spec.path) == source["name"]]
            got = f"got another file of that name, {same_name[0]}" if same_name else "got none of that name"
            raise VerificationError(
                f"{path}: it records {quote(source['name'])} of {source['bytes']:,} bytes, header digest "
                f"{source['header_sha256']}: {problems.get(source['name'], got)} among the sources. Name the "
                "checkpoints that it was made of."
            )
        chosen.append(match)
        left.remove(match)
    taken = {checkpoint.spec.path for checkpoint in chosen}
    if extra := [str(each) for each in found if each in discovery.named and each not in taken]:
        raise VerificationError(
            f"{path}: it is the mean of {plural(len(chosen), 'checkpoint')}, and these are not among them: "
            f"{listing(map(quote, extra))}. Name only those, or their folder."
        )
    return chosen


def _choose(
    candidates: Sequence[Checkpoint], source: Mapping[str, Any], recorded: Sequence[Mapping[str, Any]], path: Path
) -> Checkpoint | None:
    """Returns the one of several with the recorded header that is meant: by its digest, by its name, in their order.

    Raises:
        VerificationError: nothing tells.
    """
    if len(candidates) > 1 and isinstance(source.get("sha256"), dict):
        digests = digest_files(candidates, threads=1)
        candidates = [each for each, found in zip(candidates, digests, strict=True) if found == source["sha256"]]
        return candidates[0] if candidates else None
    same_name = [each for each in candidates if text_of(each.spec.path) == source["name"]]
    candidates = same_name or candidates
    if len(candidates) > 1:
        alike = [each for each in recorded if _key(each) == _key(source)]
        if len(candidates) > len(alike):
            raise VerificationError(
                f"{path}: it records {quote(source['name'])}, and several of the sources can be that one: "
                f"{listing(quote(each.spec.path) for each in candidates)}. Name those that it was made of."
            )
    return candidates[0] if candidates else None


def _is(checkpoint: Checkpoint, source: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has the recorded header, size and name; a folder may be named after the one file in it."""
    path = checkpoint.spec.path
    names = {text_of(path), text_of(path.parent)}
    if len(checkpoint.files) == 1:
        names.add(text_of(checkpoint.files[0].path))
    return source["name"] in names and (checkpoint.spec.digest, size_of(checkpoint)) == _key(source)[1:]


def _key(source: Mapping[str, Any]) -> tuple[str, str, int]:
    return source["name"], source["header_sha256"], source["bytes"]


def _measured(plan: Plan) -> frozenset[str]:
    """Returns the tensors that a BatchNorm refresh may have written."""
    return frozenset(batch_norm_buffer(layer, buffer) for layer in plan.batch_norm for buffer in _BUFFERS)


class _Comparison:
    """Compares the mean with a file, piece by piece. Threads may share it.

    Args:
        file, tensors: the file and its tensors.
        plan: of the mean.
        may_differ: tensors whose differences are only noted.

    Raises:
        VerificationError: the file holds other tensors.
    """

    def __init__(
        self, file: InputFile, tensors: Mapping[str, TensorSpec], plan: Plan, may_differ: frozenset[str]
    ) -> None:
        expected = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.tensors}
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            others = sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name))
            raise VerificationError(
                f"{file.path}: not the mean of these checkpoints: expected tensors of their names, shapes and dtypes, "
                f"got others: {listing(map(quote, others))}."
            )
        self._file, self._tensors, self._plan, self._may_differ = file, tensors, plan, may_differ
        self._begins = [tensor.offset for tensor in plan.tensors]
        self._lock = threading.Lock()
        self.measured: set[str] = set()

    def compare(self, contents: memoryview, offset: int) -> None:
        """Compares bytes of the mean's data section with the file's.

        Raises:
            VerificationError: they differ.
        """
        contents = contents.cast("B")
        end = offset + len(contents)
        for tensor in self._plan.tensors[bisect.bisect_right(self._begins, offset) - 1 :]:
            if tensor.offset >= end:
                break
            first, stop = max(offset, tensor.offset), min(end, tensor.offset + tensor.nbytes)
            if first < stop:
                self._compare(tensor, first - tensor.offset, contents[first - offset : stop - offset])

    def _compare(self, tensor: OutputTensor, begin: int, mean: memoryview) -> None:
        found = self._file.read(self._tensors[tensor.name].offset + begin, len(mean))
        if found == mean:
            return
        if tensor.name in self._may_differ:
            with self._lock:
                self.measured.add(tensor.name)
            return
        index = next(index for index, (a, b) in enumerate(zip(found, mean, strict=True)) if a != b)
        raise VerificationError(
            f"{self._file.path}: tensor {quote(tensor.name)}: not the mean of these checkpoints: it differs at index "
            f"{(begin + index) // tensor.dtype.itemsize:,}. Average them again, or name those that it was made of."
        )
