"""`average`, the whole path: discover → open → check → plan → mean → refresh → publish."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from ckpt_avg.atomic import UnpublishedFile, atomic_output, check_target
from ckpt_avg.batches import ForwardBatch
from ckpt_avg.batchnorm import BatchNormReport
from ckpt_avg.compat import refuse_differences
from ckpt_avg.devices import choose_device, usable_cores
from ckpt_avg.discover import Sources, discover
from ckpt_avg.errors import IncompatibleError, OutputError, UsageError
from ckpt_avg.header import encode_header
from ckpt_avg.identical import differing
from ckpt_avg.inputs import notice_what_is_read, open_inputs, refuse_output_among
from ckpt_avg.mean import divide_memory, write_mean
from ckpt_avg.messages import listing, plural, quote
from ckpt_avg.open_files import allow_open_files
from ckpt_avg.plan import OUTPUT_DTYPES, Plan, make_plan
from ckpt_avg.provenance import make_metadata
from ckpt_avg.readers import Checkpoint, make_reading
from ckpt_avg.refresh import Batches, Model, frozen_layers, refresh_output
from ckpt_avg.run_folder import Skipped
from ckpt_avg.running_statistics import Statistics, choose_refresh, frozen_buffers, source_of_statistics, summary
from ckpt_avg.select import Selection, check_selection, patterns

DEFAULT_MEMORY = 128 * 2**20
_MOST_THREADS = 1024


@dataclass(frozen=True, slots=True)
class AverageResult:
    """What `average` did, or with ``dry_run`` would do.

    Attributes:
        output: the file that was asked for.
        written: whether it was published; False for a dry run.
        checkpoints: what was averaged, in order.
        skipped: files of run folders that were left out, with reasons.
        tensors: how many tensors the output holds.
        nbytes: the output's size in bytes.
        device: where the mean was computed.
        statistics: where the BatchNorm statistics come from: ``none`` (no BatchNorm layers), ``refreshed``,
            ``mean`` (of the checkpoints' statistics), or ``frozen`` (the same in every checkpoint, kept).
        batch_norm: what the refresh did, if there was one.
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
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """Callbacks; each may be called from several threads, one at a time.

    Attributes:
        start: the input bytes that will be read.
        read: input bytes that have just been averaged.
        refreshed: batches and samples that have passed the model so far.
        notice: something that the user should know.
    """

    start: Callable[[int], None] = lambda total: None
    read: Callable[[int], None] = lambda nbytes: None
    refreshed: Callable[[int, int], None] = lambda batches, samples: None
    notice: Callable[[str], None] = lambda text: None


def average(
    sources: Sources,
    output: str | os.PathLike[str],
    *,
    last: int | None = None,
    every: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    best: int | None = None,
    metric: str | None = None,
    mode: str | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    at_lr_minima: bool = False,
    state_key: str | None = None,
    ema: bool = False,
    strip_prefix: str | None = None,
    device: str = "auto",
    dtype: str = "keep",
    threads: int | None = None,
    memory: int = DEFAULT_MEMORY,
    non_float: str = "equal",
    allow_nonfinite: bool = False,
    model: Model | None = None,
    data: Batches | None = None,
    forward_batch: ForwardBatch | None = None,
    bn: str = "auto",
    bn_batches: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> AverageResult:
    """Writes the equal-weighted mean of checkpoints, BatchNorm refreshed, to one safetensors file.

    Each element is the float64 sum over the checkpoints in their order, divided once by their number, and rounded once
    to the output dtype. Until everything is done the output path is untouched.

    Args:
        sources: checkpoint files and checkpoint folders, in the order given, and run folders, in the order of their
            steps.
        output: the safetensors file to write.
        last: average the last N of them.
        every: take each K-th only, counted back from the last.
        from_step, to_step: leave out what lies before and behind, in steps; in epochs where the run records no steps.
        best: average the N best by ``metric``, a name that the trainer recorded.
        metric, mode: which metric, and whether ``min`` or ``max`` is better.
        include, exclude: glob patterns for file names.
        at_lr_minima: take the checkpoints at the bottom of the learning rate's cycles only.
        state_key: the dotted key of the state dict inside torch files, where it isn't a common one.
        ema: average the running averages that some trainers keep beside the weights.
        strip_prefix: take this prefix off the names that carry it.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, for the sums and the refresh.
        dtype: ``keep``, ``float64``, ``float32``, ``bfloat16`` or ``float16``, for floating-point tensors.
        threads: workers; as many as this process may use cores if not given.
        memory: bytes of working memory, shared by the workers.
        non_float: ``equal`` (integer and bool tensors must be the same everywhere) or ``last`` (take the last one's).
        allow_nonfinite: let NaN and Inf through instead of refusing them.
        model: the model, or a factory of it, for the BatchNorm refresh. A model that is passed in is copied, not
            changed.
        data: an iterable of batches, or a factory of one, for the refresh.
        forward_batch: called as ``forward_batch(model, batch)`` where batches need more than ``model(batch)``.
        bn: ``auto`` and ``refresh`` recompute the running statistics; ``keep`` averages them like weights.
        bn_batches: refresh with at most this many batches.
        overwrite: replace an existing output.
        dry_run: check and plan, but read no tensors (BatchNorm statistics excepted) and write nothing.
        progress: callbacks.

    Returns:
        What was done.

    Raises:
        UsageError: the options make no sense together, or the model or data for a refresh is missing.
        CheckpointFormatError: a checkpoint is corrupt, unsafe or of an unknown kind.
        IncompatibleError: the checkpoints don't fit together, or not the model, or hold NaN or Inf.
        OutputError: the output exists, or could not be written.
        ResourceError, MemoryError, torch.OutOfMemoryError: a resource ran out.
        UserCodeError: the model or the data failed during the refresh.

    Example:
        >>> result = average(["fixtures/mnist_cnn"], "release.safetensors", every=3, bn="keep", dry_run=True)
        >>> [path.name for path in result.checkpoints]
        ['epoch_11.pt', 'epoch_14.pt', 'epoch_17.pt', 'epoch_20.pt']
    """
    progress = progress or Progress()
    notices: list[str] = []

    def notice(text: str) -> None:
        notices.append(text)
        progress.notice(text)

    _check_options(dtype, non_float, bn, threads, memory, bn_batches)
    names = patterns(include), patterns(exclude)
    selection = check_selection(Selection(*names, from_step, to_step, at_lr_minima, every, last, best, metric, mode))
    reading = make_reading(state_key, ema, strip_prefix)
    target_device = choose_device(device)
    workers = threads or usable_cores()
    discovery = discover(sources)
    refuse_output_among(output, discovery)
    target = check_target(output, overwrite=overwrite)
    if target.suffix != ".safetensors":
        notice(f"{output}: the output is a safetensors file, whatever its suffix says")
    with ExitStack() as stack:
        inputs = open_inputs(discovery, selection, reading, stack, notice)
        checkpoints = inputs.checkpoints
        allow_open_files((1 + workers) * sum(len(checkpoint.files) for checkpoint in checkpoints))
        specs = [checkpoint.spec for checkpoint in checkpoints]
        refuse_differences(specs)
        plan = make_plan(specs, dtype=dtype, non_float=non_float)
        notice_what_is_read(checkpoints, notice)
        frozen = frozen_buffers(checkpoints, plan)
        refresh = choose_refresh(plan, frozen, model, data, bn, notice)
        _check_equal(checkpoints, plan)
        statistics = source_of_statistics(plan, frozen, refresh)

        def header(report: BatchNormReport | None, reserve: int = 0) -> bytes:
            batch_norm = summary(statistics, report, data)
            return encode_header(plan, make_metadata(specs, dtype=dtype, batch_norm=batch_norm), reserve=reserve)

        # The refresh reads the output before its own figures can stand in the header: their room is reserved.
        provisional = header(None)
        size = len(provisional) + plan.nbytes
        batch_norm: BatchNormReport | None = None
        if not dry_run:
            budget = divide_memory(memory, threads=workers, checkpoints=len(checkpoints), device=target_device)
            with atomic_output(target, size) as unpublished:

                def write(contents: memoryview, offset: int) -> None:
                    unpublished.write(contents, len(provisional) + offset)

                unpublished.write(provisional, 0)
                progress.start(sum(spec.nbytes for spec in specs))
                write_mean(
                    checkpoints,
                    plan,
                    write,
                    budget=budget,
                    device=target_device,
                    allow_nonfinite=allow_nonfinite,
                    progress=progress.read,
                )
                if refresh is not None:
                    batch_norm = refresh_output(
                        refresh,
                        plan,
                        unpublished.readable_path,
                        write,
                        frozen=frozen_layers(refresh, frozen),
                        device=target_device,
                        max_batches=bn_batches,
                        forward_batch=forward_batch,
                        progress=progress.refreshed,
                    )
                    if batch_norm.used_twice:
                        used_twice = listing(map(quote, batch_norm.used_twice))
                        notice(f"layers used more than once in a pass, over all uses: {used_twice}")
                    unpublished.write(header(batch_norm, reserve=len(provisional)), 0)
                _check_readable(unpublished, plan)
                unpublished.publish(overwrite=overwrite)
    return AverageResult(
        output=Path(output),
        written=not dry_run,
        checkpoints=tuple(spec.path for spec in specs),
        skipped=inputs.survey.skipped,
        tensors=len(plan.tensors),
        nbytes=size,
        device=str(target_device),
        statistics=statistics,
        batch_norm=batch_norm,
        notices=tuple(notices),
    )


def _check_options(
    dtype: str, non_float: str, bn: str, threads: int | None, memory: int, bn_batches: int | None
) -> None:
    for option, value, choices in (
        ("--dtype", dtype, OUTPUT_DTYPES),
        ("--non-float", non_float, ("equal", "last")),
        ("--bn", bn, ("auto", "refresh", "keep")),
    ):
        if value not in choices:
            raise UsageError(f"{option}: expected one of {', '.join(choices)}, got {value!r}.")
    for option, number, least in (
        ("--threads", threads, 1),
        ("--memory", memory, 2**20),
        ("--bn-batches", bn_batches, 1),
    ):
        if number is not None and number < least:
            raise UsageError(f"{option}: expected {least:,} or more, got {number:,}.")
    if threads is not None and threads > _MOST_THREADS:
        raise UsageError(f"--threads: expected at most {_MOST_THREADS:,}, got {threads:,}.")


def _check_equal(checkpoints: Sequence[Checkpoint], plan: Plan) -> None:
    unequal = differing(checkpoints, (tensor.name for tensor in plan.tensors if tensor.rule == "equal"))
    if unequal:
        raise IncompatibleError(
            f"{plural(len(unequal), 'integer or bool tensor')} differ from {checkpoints[0].spec.path}, and numbers of "
            f"these dtypes are never averaged:\n  {listing(map(str, unequal.values()), separator=chr(10) + '  ')}\n"
            "Take the last checkpoint's with --non-float last."
        )


def _check_readable(unpublished: UnpublishedFile, plan: Plan) -> None:
    """Opens the finished file with safetensors itself before anybody else can."""
    try:
        with safe_open(str(unpublished.readable_path), framework="pt") as reader:
            names = set(reader.keys())
    except Exception as error:
        raise OutputError(
            f"{unpublished.target}: safetensors cannot read what was written: {error}. Nothing is published."
        ) from error
    if names != {tensor.name for tensor in plan.tensors}:
        raise OutputError(
            f"{unpublished.target}: safetensors reads other tensors than were written. Nothing is published."
        )
