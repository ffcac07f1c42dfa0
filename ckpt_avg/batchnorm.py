"""The BatchNorm refresh: running statistics recomputed for weights that have none of their own yet.

Averaged weights produce activations that no checkpoint had, so the running statistics must be measured again over
training data (Izmailov et al. 2018, section 3.2, arXiv 1803.05407). Each BatchNorm layer normalises by the batch,
as in training; everything else stays in evaluation mode. The statistics are pooled over all batches, each weighted
by its count ("precise BN", Wu & Johnson 2021, section 3, arXiv 2105.07576), in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_avg.batches import ForwardBatch, count_samples, fetch, run_batch, to_device
from ckpt_avg.errors import UserCodeError
from ckpt_avg.messages import listing, quote
from ckpt_avg.rounding import round_to

Progress = Callable[[int, int], None]

_CHUNK = 1024 * 1024  # activations widened to float64 at a time: 8 MiB


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """What was measured at the input of one BatchNorm layer.

    Attributes:
        count: values per channel, over all samples and positions.
        mean: float64, (channels,).
        variance: float64, (channels,), unbiased (divided by count − 1), as PyTorch stores it.
        calls_per_batch: how often a batch passed the layer; more than once where a module is used twice.
    """

    count: int
    mean: torch.Tensor
    variance: torch.Tensor
    calls_per_batch: int


@dataclass(frozen=True, slots=True)
class BatchNormReport:
    """What a refresh did.

    Attributes:
        batches, samples: how many passed through the model.
        statistics: layer name → what was measured there.
        frozen: layers that were left as they are.
    """

    batches: int
    samples: int
    statistics: Mapping[str, LayerStatistics]
    frozen: tuple[str, ...] = ()

    @property
    def used_twice(self) -> tuple[str, ...]:
        """The layers that each batch passed more than once; their statistics cover all passes."""
        return tuple(name for name, layer in self.statistics.items() if layer.calls_per_batch > 1)


def batch_norm_modules(model: torch.nn.Module) -> dict[str, _BatchNorm]:
    """Returns the BatchNorm layers that keep running statistics, by their name in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


def refresh_batch_norm(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
    frozen: Collection[str] = (),
    device: torch.device | str | None = None,
    forward_batch: ForwardBatch | None = None,
    progress: Progress = lambda batches, samples: None,
) -> BatchNormReport:
    """Measures the running statistics of a model's BatchNorm layers anew and stores them in the model.

    For each layer, with n_b values per channel in batch b, their mean m_b and centred sum of squares s_b, two sets
    are pooled by Chan, Golub & LeVeque (1979): with d = m_b − m and N = n + n_b, the mean becomes m + d·n_b/N and the
    sum s + s_b + d²·n·n_b/N. Then ``running_mean`` = m, ``running_var`` = s / (n − 1), ``num_batches_tracked`` = the
    number of batches. The first layer's statistics are therefore those of all samples at once, however they are split
    into batches; a later layer's depend on the split as far as the layers before it normalise by the batch.

    Only these buffers change. Modes, every other buffer and torch's random state are as before, and on any error
    the buffers are, too.

    Args:
        model: the model, its weights loaded.
        batches: tensors, tuples or lists (the first element is the input), mappings (passed as keywords), or what
            ``forward_batch`` takes.
        max_batches: stop after this many.
        frozen: names of layers to leave in evaluation mode, as they are.
        device: where the model is; batches are moved there.
        forward_batch: called as ``forward_batch(model, batch)`` instead of the model.
        progress: called after each batch with the batches and samples so far.

    Returns:
        What was measured.

    Raises:
        UserCodeError: the loader or the model raised, there was no batch, a layer was not reached, a batch has one
            value per channel, or an activation is NaN or Inf.
    """
    layers = {name: layer for name, layer in batch_norm_modules(model).items() if name not in frozen}
    pools = {name: _Pool() for name in layers}
    samples = done = 0
    with _measuring(model, layers, pools), torch.no_grad():
        for batch in fetch(batches, max_batches):
            moved = to_device(batch, device)
            for pool in pools.values():
                pool.batch = done + 1
            run_batch(model, moved, forward_batch, done + 1)
            done += 1
            samples += count_samples(moved)
            progress(done, samples)
        if done == 0:
            raise UserCodeError(
                "BatchNorm refresh: expected at least one batch, got an empty dataloader. A generator is used up after "
                "one pass: make a new one in the factory."
            )
        unreached = [name for name, pool in pools.items() if pool.count == 0]
        if unreached:
            raise UserCodeError(
                f"BatchNorm refresh: expected every BatchNorm layer to be used, got no input for "
                f"{listing(map(quote, unreached))}. Let the dataloader or forward_batch(model, batch) reach them."
            )
        statistics = {name: pool.statistics(done) for name, pool in pools.items()}
        # All of them are rounded, which can fail, before the first is stored.
        stored = [
            (layer, buffer, rounded_statistic(name, buffer, values, getattr(layer, buffer).dtype))
            for name, layer in layers.items()
            for buffer, values in (("running_mean", statistics[name].mean), ("running_var", statistics[name].variance))
        ]
    for layer, buffer, values in stored:
        getattr(layer, buffer).copy_(values)
    for layer in layers.values():
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(done)
    return BatchNormReport(done, samples, statistics, tuple(frozen))


def rounded_statistic(layer: str, buffer: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns measured statistics in a buffer's dtype.

    Raises:
        UserCodeError: they are beyond its range.
    """
    rounded = round_to(values, dtype)
    if not rounded.isfinite().all():
        raise UserCodeError(
            f"BatchNorm refresh: layer {quote(layer)}: expected a {buffer} within the range of {dtype}, got "
            f"{values.abs().max().item():g}. Choose a wider dtype."
        )
    return rounded


@dataclass(slots=True)
class _Pool:
    """Count, mean and centred sum of squares of all that has passed one layer."""

    count: int = 0
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    calls: int = 0
    batch: int = 0

    def add(self, values: torch.Tensor) -> None:
        """Pools the values of one call, shaped (samples, channels, …)."""
        self.calls += 1
        flat = values.unsqueeze(2) if values.dim() == 2 else values.flatten(2)
        samples = max(1, _CHUNK // flat[0].numel())
        positions = max(1, _CHUNK // flat.shape[1])
        for part in torch.split(flat, samples):
            for piece in torch.split(part, positions if samples == 1 else part.shape[2], dim=2):
                self._pool(piece.to(torch.float64))

    def _pool(self, values: torch.Tensor) -> None:
        count = values.shape[0] * values.shape[2]
        mean = values.mean((0, 2))
        squares = values.sub(mean.view(1, -1, 1)).square_().sum((0, 2))
        if self.count == 0:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.count = total

    def statistics(self, batches: int) -> LayerStatistics:
        return LayerStatistics(self.count, self.mean, self.squares / (self.count - 1), -(-self.calls // batches))


@contextlib.contextmanager
def _measuring(model: torch.nn.Module, layers: Mapping[str, _BatchNorm], pools: Mapping[str, _Pool]) -> Iterator[None]:
    """Puts the layers, and nothing else, in train mode with a hook each; undoes all of it, the buffers included."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    hooks = []
    cuda = sorted({buffer.device.index for _, _, buffer, _ in buffers if buffer.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        try:
            for module, _ in modes:
                # The attribute, not train(): some models override that method, to keep layers frozen.
                module.training = False
            for name, layer in layers.items():
                layer.training = True
                hooks.append(layer.register_forward_pre_hook(_hook(name, pools[name]), with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    setattr(module, name, buffer)  # a forward may have put another tensor in its place
                    buffer.copy_(before)


def _hook(name: str, pool: _Pool) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def measure(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        values = (arguments[0] if arguments else keywords["input"]).detach()
        if values.dim() < 2 or values.numel() <= values.shape[1]:
            raise UserCodeError(
                f"BatchNorm refresh: layer {quote(name)}, batch {pool.batch}: expected more than one value per "
                f"channel, got an input of shape {list(values.shape)}. Use larger batches, or drop_last=True where the "
                "last batch is a single sample."
            )
        channels = module.running_mean.numel() if isinstance(module.running_mean, torch.Tensor) else values.shape[1]
        if values.shape[1] != channels:
            raise UserCodeError(
                f"BatchNorm refresh: layer {quote(name)}, batch {pool.batch}: expected {channels:,} channels in "
                f"dimension 1, got an input of shape {list(values.shape)}. Channels elsewhere aren't supported."
            )
        pool.add(values)
        if not pool.mean.isfinite().all():
            raise UserCodeError(
                f"BatchNorm refresh: layer {quote(name)}, batch {pool.batch}: expected finite activations, got NaN or "
                "Inf. It is the first layer to see them: check the data and the weights before it."
            )

    return measure
