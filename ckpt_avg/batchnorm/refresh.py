"""The BatchNorm refresh of a model in memory.

Averaged weights produce activations that no checkpoint had, so the running statistics must be measured again over
training data (Izmailov et al. 2018, section 3.2, arXiv 1803.05407).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ckpt_avg.batchnorm.batch_share import BatchShare, refuse_other_counts
from ckpt_avg.batchnorm.changes import LayerChange, change_of
from ckpt_avg.batchnorm.hooks import measuring
from ckpt_avg.batchnorm.options import RefreshOptions
from ckpt_avg.batchnorm.pools import LayerStatistics, Measurements, Pool, refuse
from ckpt_avg.choices import AMP, Estimator
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import UsageError, UserCodeError
from ckpt_avg.mean.arithmetic import round_to
from ckpt_avg.results import Result, attributes, counted
from ckpt_avg.text import listing, plural, quote, type_of
from ckpt_avg.user_code.batches import ForwardBatch, count_samples, run_batch, to_device
from ckpt_avg.user_code.load import user_errors
from ckpt_avg.user_code.model import batch_norm_modules

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, repr=False)
class BatchNormReport(Result):
    """What a refresh did.

    Attributes:
        batches, samples: how many the model ran on.
        statistics: layer name → what was measured.
        frozen: layers that were not changed.
        untracked: layers without running statistics (``track_running_stats=False``).
        estimator: ``pooled`` or ``batch-mean``.
        amp: the dtype of automatic mixed precision, or ``off``.
        changes: layer name → how its statistics changed.
    """

    batches: int
    samples: int
    statistics: Mapping[str, LayerStatistics]
    frozen: tuple[str, ...] = ()
    untracked: tuple[str, ...] = ()
    estimator: Estimator = "pooled"
    amp: AMP = "off"
    changes: Mapping[str, LayerChange] = field(default_factory=dict)

    @property
    def used_twice(self) -> tuple[str, ...]:
        """The layers that the model uses more than once per batch; their statistics cover all uses."""
        return tuple(name for name, layer in self.statistics.items() if layer.calls_per_batch > 1)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, without the statistics themselves: ``layers`` has their names."""
        names = ("batches", "samples", "frozen", "untracked", "estimator", "amp", "changes")
        return {"layers": sorted(self.statistics), **attributes(self, names)}

    def _title(self) -> str:
        layers = plural(len(self.statistics), "layer")
        return f"{layers} measured over {plural(self.batches, 'batch')}, {plural(self.samples, 'sample')}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "statistics", counted(list(self.statistics))
        yield "frozen", counted(self.frozen)
        yield "untracked", counted(self.untracked)
        yield "estimator", self.estimator
        yield "amp", "" if self.amp == "off" else self.amp


def refresh_batch_norm(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Estimator = "pooled",
    max_batches: int | None = None,
    frozen: Collection[str] = (),
    device: torch.device | str | None = None,
    amp: AMP = "off",
    forward_batch: ForwardBatch | None = None,
    ranks: Ranks | None = None,
    progress: Progress = lambda batches, samples: None,
) -> BatchNormReport:
    """Recomputes the running statistics of a model's BatchNorm layers and stores them in the model.

    With n_b values per channel in batch b, their mean m_b and centred sum of squares s_b, in float64:

    - ``pooled``: ``running_mean`` = Σ n_b·m_b / n and ``running_var`` = s / (n − 1), for n = Σ n_b and the sum of
      squares s around the mean of all, pooled as by Chan, Golub & LeVeque (1979) (`Moments.pooled_with`). So the first
      layer's statistics don't depend on the split into batches. A later layer's do, because the layers before it
      normalise by the batch. ``num_batches_tracked`` = the number of batches. (Precise BN: Wu & Johnson 2021,
      section 3, arXiv 2105.07576.)
    - ``batch-mean``: over the B calls of a layer ``running_mean`` = Σ m_b / B, ``running_var`` = Σ s_b/(n_b − 1) / B
      and ``num_batches_tracked`` = B, as `torch.optim.swa_utils.update_bn` does (Izmailov et al. 2018, arXiv
      1803.05407), except that dropout is off.

    Only these buffers change. Modes, other buffers and random states are restored, and on any error these buffers, too.

    Args:
        model: the model, with its weights loaded.
        batches: tensors, tuples or lists (the first element is the input), mappings (passed as keywords), or what
            ``forward_batch`` takes.
        estimator: ``pooled`` or ``batch-mean``.
        max_batches: stop after this many.
        frozen: names of layers that stay in evaluation mode and are not changed.
        device: where the model is; batches are moved there.
        amp: ``off``, ``bfloat16`` or ``float16``: automatic mixed precision of the forward passes.
        forward_batch: called as ``forward_batch(model, batch)`` instead of the model.
        ranks: from `join_ranks`, where several processes share the batches; each calls this function. Where the loader
            gives all of them the same batches, each runs its part of them; where it gives each its own, all of those.
            The statistics are pooled over all ranks, and stored on each.
        progress: called after each batch with the batches seen and the samples run so far, on this rank.

    Returns:
        What was measured.

    Raises:
        UsageError: an option has no such value, or ``frozen`` names no such layer.
        UserCodeError: the loader or the model raised, there was no batch, a layer was not reached, a batch has one
            value per channel, or an activation is NaN or Inf; or the ranks were given different batches.
        RankError: another rank failed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> report = refresh_batch_norm(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]])])
        >>> model[0].running_mean, model[0].running_var
        (tensor([3.]), tensor([4.6667]))
    """
    where = _checked_device(model, estimator, max_batches, device, amp)
    layers = _refreshed_layers(model, frozen)
    _refuse_unusable(model)
    ranks = ranks or Ranks()
    measurements = Measurements(layers, estimator)
    samples = done = 0
    autocast = torch.autocast(where.type, getattr(torch, amp)) if amp != "off" else contextlib.nullcontext()
    with ranks.share_errors(), measuring(model, layers, measurements), torch.no_grad(), autocast:
        share = BatchShare(batches, ranks, max_batches)
        for batch in share:
            with user_errors(f"moving batch {share.seen} to {device} raised:"):
                moved = to_device(batch, device)
            measurements.batch = share.seen
            try:
                run_batch(model, moved, forward_batch, share.seen)
            except UserCodeError:
                with contextlib.suppress(RuntimeError):  # from CUDA, after an error of the model there
                    measurements.end_batch()  # NaN may be the cause
                raise
            with user_errors(f"the model raised at batch {share.seen}:"):  # CUDA tells its errors when it is waited for
                measurements.end_batch()
            done += 1
            samples += count_samples(moved)
            progress(share.seen, samples)
            ranks.check()
        done, samples, pools = _pooled(ranks, share, done, samples, measurements.pools(), estimator)
        if done == 0:
            refuse("the dataloader is empty", "A generator is used up after one pass: make a new one in the factory")
        if unreached := [name for name, pool in pools.items() if pool.calls == 0]:
            refuse(
                f"no batch reaches the BatchNorm layers {listing(map(quote, unreached))}",
                "If only training uses them, write a forward_batch(model, batch) that uses them. Call layers as "
                "layer(x): layer.forward(x) is not measured",
            )
        statistics = {name: pool.statistics(done) for name, pool in pools.items()}
        # Rounding can fail, so all statistics are rounded before the first is stored.
        stored = [
            (layer, buffer, rounded_statistic(name, buffer, values, getattr(layer, buffer).dtype))
            for name, layer in layers.items()
            for buffer, values in (("running_mean", statistics[name].mean), ("running_var", statistics[name].variance))
        ]
    changes = {name: change_of(layer, statistics[name]) for name, layer in layers.items()}
    for layer, buffer, values in stored:
        getattr(layer, buffer).copy_(values)
    for name, layer in layers.items():
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(statistics[name].batches_tracked)
    untracked = tuple(
        name for name, layer in model.named_modules() if isinstance(layer, _BatchNorm) and layer.running_mean is None
    )
    return BatchNormReport(done, samples, statistics, tuple(frozen), untracked, estimator, amp, changes)


def rounded_statistic(layer: str, buffer: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns measured statistics in a buffer's dtype. Raises UserCodeError if they exceed its range."""
    rounded = round_to(values, dtype)
    if not rounded.isfinite().all():
        largest = values.abs().max().item()
        refuse(f"layer {quote(layer)}: a {buffer} of {largest:g} exceeds the range of {dtype}", "Choose a wider dtype")
    return rounded


def _pooled(
    ranks: Ranks, share: BatchShare, batches: int, samples: int, pools: Mapping[str, Pool], estimator: str
) -> tuple[int, int, Mapping[str, Pool]]:
    """Returns the batches, samples and pools of all ranks together, on each of them."""
    if ranks.size == 1:
        return batches, samples, pools

    def pool_all(states: Iterable[Mapping[str, list[Any] | None]]) -> dict[str, Pool]:
        pooled = {name: Pool(estimator) for name in pools}
        for each in states:
            for name, pool in pooled.items():
                pool.add_state(each[name])
        return pooled

    def combine(values: list[list[Any]]) -> list[Any]:
        counts, batches, samples, states = zip(*values, strict=True)
        return [counts, sum(batches), sum(samples), {name: pool.state() for name, pool in pool_all(states).items()}]

    mine = [share.count_to_compare, batches, samples, {name: pool.state() for name, pool in pools.items()}]
    counts, batches, samples, states = ranks.exchange("statistics", mine, combine)
    refuse_other_counts(counts)
    return batches, samples, pool_all([states])


def _checked_device(
    model: torch.nn.Module,
    estimator: Estimator,
    max_batches: int | None,
    device: torch.device | str | None,
    amp: AMP,
) -> torch.device:
    """Returns the device of the refresh. Raises UsageError if an argument cannot be used."""
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"model: got {type_of(model)}. Give a torch.nn.Module.")
    try:
        RefreshOptions(bn_estimator=estimator, amp=amp, bn_batches=max_batches)
    except UsageError as error:  # the keywords of this function are its own
        text = str(error).replace("bn_estimator", "estimator").replace("bn_batches", "max_batches")
        raise UsageError(text) from None
    try:
        return torch.device(device or next((tensor.device for tensor in model.parameters()), "cpu"))
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device: {quote(device)} cannot be used. Use cpu, cuda or cuda:N.") from error


def _refreshed_layers(model: torch.nn.Module, frozen: Collection[str]) -> dict[str, _BatchNorm]:
    layers = batch_norm_modules(model)
    unknown = [name for name in frozen if name not in layers]
    if isinstance(frozen, str) or unknown:
        raise UsageError(
            f"frozen: expected names of BatchNorm layers with running statistics, got "
            f"{quote(frozen) if isinstance(frozen, str) else listing(map(quote, unknown))}. The model has "
            f"{listing(map(quote, layers))}."
        )
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        other = owners.setdefault(id(layer.running_mean), name)
        if other != name:
            refuse(
                f"the layers {quote(other)} and {quote(name)} share their running statistics",
                "Use the same module in both places, or separate buffers",
            )
    return {name: layer for name, layer in layers.items() if name not in frozen}


def _refuse_unusable(model: torch.nn.Module) -> None:
    """Raises UserCodeError if a model's layers cannot be measured with any data."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if lazy := [name for name, tensor in tensors if is_lazy(tensor)]:
        refuse(f"the model has lazy tensors without a shape: {listing(map(quote, lazy))}", "Load the weights first")
    if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for _, tensor in tensors):
        refuse(
            "the model was made in inference mode, so its buffers cannot be written",
            "Make it outside torch.inference_mode()",
        )
    scripted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule)
        and "BatchNorm" in module.original_name
        and getattr(module, "running_mean", None) is not None
    ]
    if scripted:
        refuse(
            f"the layers {listing(map(quote, scripted))} are TorchScript, which cannot be measured",
            "Make the model without torch.jit.script and torch.jit.trace",
        )
