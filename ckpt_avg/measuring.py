"""What passes each BatchNorm layer while batches run through a model: measured at its input, and handed to it.

Nothing but these layers normalises by the batch, and afterwards everything is as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_avg.errors import UserCodeError
from ckpt_avg.messages import quote
from ckpt_avg.moments import Moments, moments_of
from ckpt_avg.undisturbed import undisturbed


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
    """What has passed one layer so far."""

    def __init__(self, name: str) -> None:
        self.calls = 0
        self.batch = 0
        self._name = name
        self._all: Moments | None = None
        self._sum_of_means: torch.Tensor | float = 0.0
        self._sum_of_variances: torch.Tensor | float = 0.0
        self._unchecked: Moments | None = None

    def add(self, moments: Moments) -> None:
        """Adds what one call saw."""
        self.calls += 1
        self._all = moments if self._all is None else self._all.pooled_with(moments)
        self._sum_of_means = self._sum_of_means + moments.mean
        self._sum_of_variances = self._sum_of_variances + moments.variance
        self._unchecked = self._all
        # On CUDA a look would wait for the device, so there it is taken once the batch is through.
        if moments.mean.device.type == "cpu":
            self.refuse_nonfinite()

    def refuse_nonfinite(self) -> None:
        """Raises UserCodeError if the last batch held NaN or Inf here."""
        if self._unchecked is not None and not self._unchecked.mean.isfinite().all():
            raise UserCodeError(
                f"BatchNorm refresh: layer {quote(self._name)}, batch {self.batch}: expected finite activations, got "
                "NaN or Inf. It is the first layer to see them: check the data and the weights before it."
            )
        self._unchecked = None

    def statistics(self, estimator: str, batches: int) -> LayerStatistics:
        """Returns what was measured over so many batches, by one of the estimators of `refresh_batch_norm`."""
        if self._all is None:
            raise ValueError(f"layer {self._name} was never called")
        per_batch = -(-self.calls // batches)
        if estimator == "pooled":
            return LayerStatistics(self._all.count, self._all.mean, self._all.variance, per_batch, batches)
        mean, variance = (torch.as_tensor(total) / self.calls for total in (self._sum_of_means, self._sum_of_variances))
        return LayerStatistics(self._all.count, mean, variance, per_batch, self.calls)


@contextlib.contextmanager
def measuring(
    model: torch.nn.Module, layers: Mapping[str, _BatchNorm], pools: Mapping[str, Pool]
) -> Iterator[list[Pool]]:
    """Makes the layers, and nothing else, normalise by the batch and measure it; undoes all of it in the end.

    Yields a list to which each layer that is reached adds its pool, in the order of the calls.
    """
    hooks = []
    reached: list[Pool] = []
    with undisturbed(model):
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
        values = (arguments[0] if arguments else keywords["input"]).detach()
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
