"""What passes each BatchNorm layer while batches run through a model: measured at its input, and handed to it.

Nothing but these layers normalises by the batch, and afterwards everything is as it was.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_avg.batchnorm.moments import Moments, moments_of
from ckpt_avg.errors import UserCodeError
from ckpt_avg.text import quote
from ckpt_avg.user_code.isolation import undisturbed


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """What was measured at the input of one BatchNorm layer.

    Attributes:
        count: values per channel, over all samples and positions.
        mean: float64, (channels,).
        variance: float64, (channels,), unbiased (divided by count − 1), as PyTorch stores it.
        calls_per_batch: how often a batch passed the layer; more than once where a module is used twice.
        batches_tracked: what ``num_batches_tracked`` is set to.
    """

    count: int
    mean: torch.Tensor
    variance: torch.Tensor
    calls_per_batch: int
    batches_tracked: int


class Pool:
    """What has passed one layer so far.

    Args:
        name: the layer's.
        estimator: ``pooled`` or ``batch-mean``, as for `refresh_batch_norm`.
    """

    def __init__(self, name: str, estimator: str) -> None:
        self.batch = 0
        self.calls = 0
        self._name = name
        self._is_pooled = estimator == "pooled"
        self._count = 0
        # Of all values together, or sums over the calls.
        self._pooled: Moments | None = None
        self._means: torch.Tensor | None = None
        self._variances: torch.Tensor | None = None
        self._unchecked: torch.Tensor | None = None

    def add(self, moments: Moments) -> None:
        """Adds what one call saw."""
        self.calls += 1
        self._count += moments.count
        if self._is_pooled:
            self._pooled = moments if self._pooled is None else self._pooled.pooled_with(moments)
            self._unchecked = self._pooled.mean
        else:
            self._means = moments.mean if self._means is None else self._means + moments.mean
            variance = moments.variance
            self._variances = variance if self._variances is None else self._variances + variance
            self._unchecked = self._means
        # On CUDA a look would wait for the device, so there it is taken once the batch is through.
        if not moments.mean.is_cuda:
            self.refuse_nonfinite()

    def refuse_nonfinite(self) -> None:
        """Raises UserCodeError if the last batch held NaN or Inf here."""
        unchecked, self._unchecked = self._unchecked, None
        # One number tells, but for a sum that overflows by itself.
        if unchecked is not None and not math.isfinite(unchecked.sum().item()) and not unchecked.isfinite().all():
            raise UserCodeError(
                f"BatchNorm refresh: layer {quote(self._name)}, batch {self.batch}: expected finite activations, got "
                "NaN or Inf. It is the first layer to see them: check the data and the weights before it."
            )

    def state(self) -> list[Any] | None:
        """Returns what was measured as JSON holds it, every bit of it; None before the first call."""
        if self._pooled is not None:
            return [self.calls, self._count, self._pooled.mean.tolist(), self._pooled.squares.tolist()]
        if self._means is not None and self._variances is not None:
            return [self.calls, self._count, self._means.tolist(), self._variances.tolist()]
        return None

    def add_state(self, state: list[Any] | None) -> None:
        """Adds what another pool of the same layer has measured."""
        if state is None:
            return
        calls, count, *values = state
        first, second = (torch.tensor(each, dtype=torch.float64) for each in values)
        self.calls += calls
        self._count += count
        if self._is_pooled:
            moments = Moments(count, first, second)
            self._pooled = moments if self._pooled is None else self._pooled.pooled_with(moments)
        else:
            self._means = first if self._means is None else self._means + first
            self._variances = second if self._variances is None else self._variances + second

    def statistics(self, batches: int) -> LayerStatistics:
        """Returns what was measured over so many batches."""
        per_batch = -(-self.calls // batches)
        if self._pooled is not None:
            return LayerStatistics(self._count, self._pooled.mean, self._pooled.variance, per_batch, batches)
        if self._means is None or self._variances is None:
            raise ValueError(f"layer {self._name} was never called")
        mean, variance = self._means / self.calls, self._variances / self.calls
        return LayerStatistics(self._count, mean, variance, per_batch, self.calls)


@contextlib.contextmanager
def measuring(
    model: torch.nn.Module, layers: Mapping[str, _BatchNorm], pools: Mapping[str, Pool]
) -> Iterator[list[Pool]]:
    """Makes the layers, and nothing else, normalise by the batch and measure it; undoes all of it in the end.

    Yields a list to which each layer that is reached adds its pool, in the order of the calls.
    """
    hooks = []
    reached: list[Pool] = []
    # What torch.compile has made before would run without the hooks.
    compiler = sys.modules.get("torch._dynamo")
    eager = torch.compiler.set_stance("force_eager") if compiler else contextlib.nullcontext()
    with undisturbed(model), eager:
        try:
            for name, layer in layers.items():
                hooks.append(layer.register_forward_pre_hook(_hook(name, pools[name], reached), with_kwargs=True))
                layer.training = not _takes_statistics(layer)
            yield reached
        finally:
            for hook in hooks:
                hook.remove()


def _takes_statistics(layer: _BatchNorm) -> bool:
    """Whether a layer can be handed the batch's statistics as its running ones, which spares it measuring them again.

    torch's own layers in evaluation mode compute (x − running_mean) / √(running_var + ε), and with the batch's mean and
    biased variance in these places that is what they do in training mode. A user's own forward may do anything, and a
    buffer of half precision would round the statistics.
    """
    own = "forward" not in vars(layer) and type(layer).forward in (_BatchNorm.forward, torch.nn.SyncBatchNorm.forward)
    wide = (torch.float32, torch.float64)
    return own and all(
        buffer is not None and buffer.dtype in wide for buffer in (layer.running_mean, layer.running_var)
    )


def _hook(
    name: str, pool: Pool, reached: list[Pool]
) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def measure(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        values = next(iter((*arguments, *keywords.values()))).detach()
        if values.dim() < 2 or values.numel() <= values.shape[1]:
            raise UserCodeError(
                f"BatchNorm refresh: layer {quote(name)}, batch {pool.batch}: expected more than one value per "
                f"channel, got an input of shape {list(values.shape)}. Use larger batches, or drop_last=True where the "
                "last batch is a single sample."
            )
        mean, variance = module.running_mean, module.running_var
        channels = mean.numel() if isinstance(mean, torch.Tensor) else values.shape[1]
        if values.shape[1] != channels:
            raise UserCodeError(
                f"BatchNorm refresh: layer {quote(name)}, batch {pool.batch}: expected {channels:,} channels in "
                f"dimension 1, got an input of shape {list(values.shape)}. Channels elsewhere aren't supported."
            )
        moments = moments_of(values)
        reached.append(pool)
        pool.add(moments)
        if not module.training and isinstance(mean, torch.Tensor) and isinstance(variance, torch.Tensor):
            mean.copy_(moments.mean)
            variance.copy_(moments.biased_variance)

    return measure
