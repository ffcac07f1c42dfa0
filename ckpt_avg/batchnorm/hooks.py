"""Measures the input of each BatchNorm layer while batches run through a model, and makes it normalise by the batch."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

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
        calls_per_batch: how often a batch passes the layer; more than once if the model uses it twice.
        batches_tracked: the new ``num_batches_tracked``.
    """

    count: int
    mean: torch.Tensor
    variance: torch.Tensor
    calls_per_batch: int
    batches_tracked: int


class Pool:
    """Collects the moments of one layer over all calls.

    Args:
        name: the layer's name.
        estimator: ``pooled`` or ``batch-mean``, as for `refresh_batch_norm`.

    Attributes:
        batch: the number of the current batch, for messages.
        calls: how often the layer was called.
    """

    def __init__(self, name: str, estimator: str) -> None:
        self.batch = 0
        self.calls = 0
        self._name = name
        self._is_pooled = estimator == "pooled"
        self._count = 0
        # pooled: mean and sum of squares of all values; batch-mean: sums of the calls' means and variances.
        self._totals: tuple[torch.Tensor, torch.Tensor] | None = None
        self._is_unchecked = False

    def add(self, moments: Moments) -> None:
        """Adds the moments of one call."""
        self._add(1, moments.count, moments.mean, moments.squares if self._is_pooled else moments.variance)
        self._is_unchecked = True
        # On CUDA checking waits for the device, so it is done once per batch.
        if not moments.mean.is_cuda:
            self.refuse_nonfinite()

    def _add(self, calls: int, count: int, first: torch.Tensor, second: torch.Tensor) -> None:
        if self._totals is None:
            self._totals = first, second
        elif self._is_pooled:
            both = Moments(self._count, *self._totals).pooled_with(Moments(count, first, second))
            self._totals = both.mean, both.squares
        else:
            self._totals = self._totals[0] + first, self._totals[1] + second
        self.calls += calls
        self._count += count

    def refuse_nonfinite(self) -> None:
        """Raises UserCodeError if the last batch contained NaN or Inf here."""
        if self._totals is None or not self._is_unchecked:
            return
        self._is_unchecked = False
        mean = self._totals[0]
        # The sum shows it, except that a sum of finite numbers may overflow.
        if not math.isfinite(mean.sum().item()) and not mean.isfinite().all():
            refuse(
                f"layer {quote(self._name)}, batch {self.batch}: the activations contain NaN or Inf",
                "It is the first such layer: check the data and the weights before it",
            )

    def state(self) -> list[Any] | None:
        """Returns what was measured, exactly, as JSON can contain it; None before the first call."""
        return None if self._totals is None else [self.calls, self._count, *(each.tolist() for each in self._totals)]

    def add_state(self, state: list[Any] | None) -> None:
        """Adds the `state` of another pool for the same layer."""
        if state is not None:
            calls, count, *totals = state
            self._add(calls, count, *(torch.tensor(each, dtype=torch.float64) for each in totals))

    def statistics(self, batches: int) -> LayerStatistics:
        """Returns what was measured over so many batches."""
        if self._totals is None:
            raise ValueError(f"layer {self._name} was never called")
        per_batch = -(-self.calls // batches)
        if self._is_pooled:
            moments = Moments(self._count, *self._totals)
            return LayerStatistics(self._count, moments.mean, moments.variance, per_batch, batches)
        mean, variance = (total / self.calls for total in self._totals)
        return LayerStatistics(self._count, mean, variance, per_batch, self.calls)


@contextlib.contextmanager
def measuring(
    model: torch.nn.Module, layers: Mapping[str, _BatchNorm], pools: Mapping[str, Pool]
) -> Iterator[list[Pool]]:
    """Makes only these layers normalise by the batch, and measures their inputs. Everything is restored in the end.

    Yields a list to which each call of a layer appends the layer's pool.
    """
    reached: list[Pool] = []
    # Code that torch.compile has compiled before would run without the hooks.
    compiler = sys.modules.get("torch._dynamo")
    eager = torch.compiler.set_stance("force_eager") if compiler else contextlib.nullcontext()
    with undisturbed(model), eager, contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hook = _hook(name, pools[name], reached)
            hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
            layer.training = not _can_use_statistics(layer)
        yield reached


def _can_use_statistics(layer: _BatchNorm) -> bool:
    """Whether a layer may run in evaluation mode with the batch's statistics in its buffers, instead of in train mode.

    So it need not measure the batch again. torch's own layers in evaluation mode compute
    (x − running_mean) / √(running_var + ε); with the batch's mean and biased variance that equals train mode. The
    user's own forward may do anything, and a buffer of half precision would round the statistics.
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
        where, got = f"layer {quote(name)}, batch {pool.batch}", f"got an input of shape {list(values.shape)}"
        if values.dim() < 2 or values.numel() <= values.shape[1]:
            refuse(
                f"{where}: expected more than one value per channel, {got}",
                "Use larger batches, or drop_last=True if only the last batch is so small",
            )
        mean, variance = module.running_mean, module.running_var
        channels = mean.numel() if isinstance(mean, torch.Tensor) else values.shape[1]
        if values.shape[1] != channels:
            refuse(f"{where}: expected {channels:,} channels in dimension 1, {got}", "Other layouts aren't supported")
        moments = moments_of(values)
        reached.append(pool)
        pool.add(moments)
        if not module.training and isinstance(mean, torch.Tensor) and isinstance(variance, torch.Tensor):
            mean.copy_(moments.mean)
            variance.copy_(moments.biased_variance)

    return measure


def refuse(problem: str, advice: str) -> NoReturn:
    """Raises UserCodeError: the refresh cannot be done."""
    raise UserCodeError(f"BatchNorm refresh: {problem}. {advice}.")
