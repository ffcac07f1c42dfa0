"""The BatchNorm refresh as a step of averaging.

The model loads its weights from the unpublished output, so they are exactly those that users will load. The measured
statistics then replace the buffers in that output.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ckpt_avg.batchnorm.options import RefreshOptions
from ckpt_avg.batchnorm.pools import refuse
from ckpt_avg.batchnorm.refresh import BatchNormReport, refresh_batch_norm, rounded_statistic
from ckpt_avg.checkpoint.spec import batch_norm_buffer
from ckpt_avg.checkpoint.tensor_reads import torch_dtype
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.mean.plan import Plan
from ckpt_avg.progress import Phase, Progress
from ckpt_avg.text import listing, quote
from ckpt_avg.user_code.batches import expected_batches
from ckpt_avg.user_code.isolation import seeded
from ckpt_avg.user_code.model import Passes, batch_norm_modules, load_weights, matching_names, move_model


@dataclass(frozen=True, slots=True)
class PreparedRefresh:
    """A model that takes the checkpoints' tensors, and the batches to run it on.

    Attributes:
        model: the model.
        passes: the batches.
        buffers: BatchNorm layer → its buffer (``running_mean``, …) → the output tensors that contain it: several if
            the module has several names.
    """

    model: torch.nn.Module
    passes: Passes
    buffers: Mapping[str, Mapping[str, tuple[str, ...]]]


def prepare_refresh(model: torch.nn.Module, passes: Passes, plan: Plan) -> PreparedRefresh:
    """Finds the output tensors that contain the running statistics of each of the model's BatchNorm layers.

    Raises:
        UserCodeError: a layer's running statistics are not among the checkpoints' tensors.
    """
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    planned = matching_names(model, plan.by_name())
    buffers: dict[str, dict[str, tuple[str, ...]]] = {}
    for layer, module in batch_norm_modules(model).items():
        buffers[layer] = {
            # By identity, because a module may have several names; by name if state_dict() returns copies.
            buffer: tuple(
                planned[name] for name in names.get(id(value), [batch_norm_buffer(layer, buffer)]) if name in planned
            )
            for buffer, value in module.named_buffers(recurse=False)
        }
        if not all(buffers[layer].get(buffer) for buffer in ("running_mean", "running_var")):
            refuse(
                f"layer {quote(layer)}: the checkpoints don't contain its running statistics",
                "Save checkpoints with model.state_dict()",
            )
    return PreparedRefresh(model, passes, buffers)


def refresh_output(
    prepared: PreparedRefresh,
    plan: Plan,
    weights: Mapping[str, torch.Tensor],
    *,
    frozen: Collection[str],
    options: RefreshOptions,
    device: torch.device,
    progress: Progress,
    ranks: Ranks | None = None,
    seed: int = 0,
) -> tuple[BatchNormReport, dict[str, torch.Tensor]]:
    """Loads weights and measures; returns the report, and the statistics as the output's tensors contain them.

    Args:
        prepared, plan, options, progress, ranks: what is refreshed, and how.
        weights: the tensors of the unpublished output, or of a checkpoint.
        frozen: output tensors with statistics that are kept.
        device: where to run the model.
        seed: of the random states, which the loader may use.

    Raises:
        UserCodeError: the loader or the model failed, or the refresh could not be done.
    """
    layers = tuple(
        layer for layer, buffers in prepared.buffers.items() if all(name in frozen for name in buffers["running_mean"])
    )
    load_weights(prepared.model, weights)
    move_model(prepared.model, device)
    batches = prepared.passes.next_pass(seed)
    expected = expected_batches(batches, options.bn_batches)
    progress.step(Phase("refreshing", expected, "batches"))
    known = 0

    def refreshed(seen: int, samples: int) -> None:
        nonlocal known
        progress.advance(seen - known)  # other ranks run batches, too
        known = seen

    with seeded(device, seed):
        report = refresh_batch_norm(
            prepared.model,
            batches,
            estimator=options.bn_estimator,
            max_batches=options.bn_batches,
            frozen=layers,
            device=device,
            amp=options.amp,
            forward_batch=options.forward_batch,
            ranks=ranks,
            progress=refreshed,
        )
    if report.used_twice:
        names = listing(map(quote, report.used_twice))
        progress.notice(f"layers that the model uses more than once, measured over all uses: {names}")
    if report.untracked:
        names = listing(map(quote, report.untracked))
        progress.notice(f"layers without running statistics (track_running_stats=False), not measured: {names}")
    planned = plan.by_name()
    tensors: dict[str, torch.Tensor] = {}
    for layer, statistics in report.statistics.items():
        values = {
            "running_mean": statistics.mean,
            "running_var": statistics.variance,
            "num_batches_tracked": torch.tensor(statistics.batches_tracked),
        }
        for buffer, measured in values.items():
            for name in prepared.buffers[layer].get(buffer, ()):
                dtype = torch_dtype(planned[name].dtype)
                is_count = buffer == "num_batches_tracked"
                value = measured.to(dtype) if is_count else rounded_statistic(layer, buffer, measured, dtype)
                tensors[name] = value.reshape(planned[name].shape)
    return report, tensors
