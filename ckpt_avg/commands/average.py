"""`average`, the whole path: discover → open → check → plan → mean → refresh → evaluate → publish."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ckpt_avg.batchnorm.policy import check_bn
from ckpt_avg.batchnorm.refresh import check_options
from ckpt_avg.batchnorm.refresh_output import RefreshOptions
from ckpt_avg.commands.agreement import agree_on_files, agree_on_request
from ckpt_avg.commands.evaluations import Assessment
from ckpt_avg.commands.prepare import Prepared, Rules, prepare
from ckpt_avg.commands.publish import Job, Written, write_output
from ckpt_avg.commands.results import AverageResult, refuse_unmet
from ckpt_avg.distributed.launch import launch_of
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.files.input_file import check_io
from ckpt_avg.formats.open import make_reading
from ckpt_avg.machine import choose_threads
from ckpt_avg.mean.devices import choose_devices
from ckpt_avg.mean.plan import check_rules
from ckpt_avg.mean.stream import DEFAULT_MEMORY, check_memory
from ckpt_avg.output.digests import digest_files
from ckpt_avg.output.paths import check_checksum, check_output, write_checksum
from ckpt_avg.output.provenance import Options
from ckpt_avg.progress import Progress
from ckpt_avg.runs.discover import Sources, discover
from ckpt_avg.runs.select import Selection
from ckpt_avg.user_code.batches import ForwardBatch
from ckpt_avg.user_code.evaluate import Evaluate
from ckpt_avg.user_code.model import Batches, Model


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
    io: str = "auto",
    non_float: str = "equal",
    allow_nonfinite: bool = False,
    model: Model | None = None,
    data: Batches | None = None,
    forward_batch: ForwardBatch | None = None,
    bn: str = "auto",
    bn_batches: int | None = None,
    bn_estimator: str = "pooled",
    amp: str = "off",
    evaluate: Evaluate | None = None,
    evaluate_all: bool = False,
    require: str | Sequence[str] = (),
    sha256: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    ranks: Ranks | None = None,
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
        device: ``cpu``, ``cuda`` or ``cuda:N``, for the sums and the model. ``auto`` sums on the CPU, and runs the
            model on CUDA if torch finds a CUDA device.
        dtype: ``keep``, ``float64``, ``float32``, ``bfloat16`` or ``float16``, for floating-point tensors.
        threads: workers; as many as this process may use cores if not given.
        memory: bytes of working memory, shared by the workers.
        io: ``mmap``, ``pread``, or ``auto``: maps, except on network storage and where the system refuses them.
        non_float: ``equal`` (integer and bool tensors must be the same everywhere) or ``last`` (take the last one's).
        allow_nonfinite: let NaN and Inf through instead of refusing them.
        model: the model, or a factory of it, for the BatchNorm refresh. A model that is passed in is copied, not
            changed.
        data: an iterable of batches, or a factory of one, for the refresh.
        forward_batch: called as ``forward_batch(model, batch)`` where batches need more than ``model(batch)``.
        bn: ``auto`` and ``refresh`` recompute the running statistics; ``keep`` averages them like weights.
        bn_batches: refresh with at most this many batches.
        bn_estimator: ``pooled`` or ``batch-mean``, as for `refresh_batch_norm`.
        amp: ``off``, ``bfloat16`` or ``float16``: automatic mixed precision of the refresh.
        evaluate: called with the model in evaluation mode; it returns a number or a dict of them. It measures the last
            checkpoint, the average, and the average after the refresh.
        evaluate_all: measure every checkpoint.
        require: what must hold for the average to be published, for example ``accuracy>=last``.
        sha256: write ``OUTPUT.sha256`` beside the output, for ``sha256sum -c``, and SHA-256 of the checkpoints' files
            into its metadata. Both are read once more for it.
        overwrite: replace an existing output.
        dry_run: check and plan, but read no tensors (BatchNorm statistics excepted) and write nothing.
        ranks: from `join_ranks`, where several processes share the work; each calls this function with the same
            arguments. Rank 0 measures and publishes.
        progress: callbacks.

    Returns:
        What was done.

    Raises:
        UsageError: the options make no sense together, or the model or data for a refresh is missing.
        CheckpointFormatError: a checkpoint is corrupt, unsafe or of an unknown kind.
        IncompatibleError: the checkpoints don't fit together, or not the model, or hold NaN or Inf.
        OutputError: the output exists, or could not be written.
        ResourceError, MemoryError, torch.OutOfMemoryError: a resource ran out.
        UserCodeError: the model, the data or the metric failed.
        RequirementError: a requirement was not met; ``error.result`` has what was measured.
        RankError: another rank failed, or was started with other arguments.

    Example:
        >>> result = average(["fixtures/mnist_cnn"], "release.safetensors", every=3, bn="keep", dry_run=True)
        >>> [path.name for path in result.checkpoints]
        ['epoch_11.pt', 'epoch_14.pt', 'epoch_17.pt', 'epoch_20.pt']
    """
    request = dict(locals())
    ranks = ranks or Ranks()
    progress = progress or Progress()
    notices: list[str] = []

    def notice(text: str) -> None:
        notices.append(text)
        progress.notice(text)

    with ranks.share_errors(), ExitStack() as stack:
        agree_on_request(ranks, request)
        check_rules(dtype, non_float)
        check_bn(bn)
        check_memory(memory)
        way = check_io(io)
        check_options(bn_estimator, amp, bn_batches)
        assessment = Assessment(
            evaluate, measure_all=evaluate_all, require=require, has_model=model is not None, measures=ranks.is_first
        )
        selection = Selection(include, exclude, from_step, to_step, at_lr_minima, every, last, best, metric, mode)
        reading = make_reading(state_key, ema, strip_prefix)
        launch = launch_of() if ranks.size > 1 else None
        mean_device, model_device = choose_devices(device, launch)
        options = RefreshOptions(model_device, bn_estimator, bn_batches, amp, forward_batch)
        workers = choose_threads(threads, launch.local_size if launch else 1)
        discovery = discover(sources)
        target = check_output(output, discovery, overwrite=overwrite)
        if target.suffix != ".safetensors":
            notice(f"{output}: this will be a safetensors file, although its name does not end in .safetensors")
        checksum = check_checksum(output, discovery, wanted=sha256, overwrite=overwrite, notice=notice)
        rules = Rules(dtype, non_float, bn, model, data, assessment.is_wanted)
        ready = prepare(discovery, selection, reading, rules, stack, io=way, notice=notice)
        agree_on_files(ranks, ready.checkpoints)
        assessment.use(ready.model, model_device, replace(progress, notice=notice))
        job = Job(
            ready=ready,
            target=target,
            overwrite=overwrite,
            asked=Options(dtype, non_float, allow_nonfinite, state_key, ema, strip_prefix),
            data=data,
            options=options,
            device=mean_device,
            threads=workers,
            memory=memory,
            assessment=assessment,
            sources=_digests(ready, ranks, threads=workers) if sha256 and not dry_run else None,
            ranks=ranks,
            progress=replace(progress, notice=notice),
        )

        def result(made: Written, *, written: bool) -> AverageResult:
            return AverageResult(
                output=Path(output),
                written=written,
                checkpoints=tuple(spec.path for spec in ready.specs),
                skipped=ready.skipped,
                tensors=len(ready.plan.tensors),
                nbytes=len(job.header) + ready.plan.nbytes,
                device=str(mean_device),
                statistics=ready.statistics,
                batch_norm=made.batch_norm,
                data_digest=made.data_digest,
                sha256=made.sha256,
                evaluations=tuple(assessment.evaluations),
                outcomes=assessment.outcomes,
                notices=tuple(notices),
            )

        if dry_run:
            assessment.leave_out()
            return result(Written(), written=False)
        made = write_output(job, lambda made: refuse_unmet(result(made, written=False)))
        if checksum is not None and made.sha256 is not None:
            write_checksum(checksum, os.path.basename(output), made.sha256, overwrite=overwrite)
        return result(made, written=True)


def _digests(ready: Prepared, ranks: Ranks, *, threads: int) -> list[dict[str, str]]:
    """Returns SHA-256 of the checkpoints' files, which rank 0 reads for all."""
    found: list[dict[str, str]] = ranks.exchange(
        "digests",
        None,
        lambda _: digest_files(ready.checkpoints, threads=threads, progress=lambda nbytes: ranks.check()),
    )
    return found
