"""What the BatchNorm layers have measured, pooled over all batches.

On CUDA each operation costs a launch, and each look at a value waits for the device. So the moments of a batch's calls
are joined and pooled together, are looked at once for each batch, and stay on the device until the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from ckpt_avg.batchnorm.moments import Moments
from ckpt_avg.errors import UserCodeError
from ckpt_avg.results import Result, attributes, plain
from ckpt_avg.text import plural, quote


@dataclass(frozen=True, slots=True, repr=False)
class LayerStatistics(Result):
    """What was measured at the input of one BatchNorm layer.

    Attributes:
        count: values per channel, over all samples and positions.
        mean: float64, (channels,), on the CPU.
        variance: float64, (channels,), unbiased (divided by count − 1), as PyTorch stores it; on the CPU.
        calls_per_batch: how often a batch passes the layer; more than once if the model uses it twice.
        batches_tracked: the new ``num_batches_tracked``.
    """

    count: int
    mean: torch.Tensor
    variance: torch.Tensor
    calls_per_batch: int
    batches_tracked: int

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, LayerStatistics)
            and (self.count, self.calls_per_batch) == (other.count, other.calls_per_batch)
            and self.batches_tracked == other.batches_tracked
            and torch.equal(self.mean, other.mean)
            and torch.equal(self.variance, other.variance)
        )

    def __hash__(self) -> int:
        return hash((self.count, self.calls_per_batch, self.batches_tracked))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values: the statistics are lists of numbers."""
        values = {"mean": self.mean.tolist(), "variance": self.variance.tolist()}
        return {**attributes(self, ("count", "calls_per_batch", "batches_tracked")), **plain(values)}

    def _title(self) -> str:
        return f"{plural(len(self.mean), 'channel')}, {plural(self.count, 'value')} each"


class Pool:
    """Collects the moments of one layer over all calls, or of several layers whose channels are joined.

    Args:
        estimator: ``pooled`` or ``batch-mean``, as for `refresh_batch_norm`.

    Attributes:
        calls: how often the layer was called.
    """

    def __init__(self, estimator: str) -> None:
        self.calls = 0
        self._is_pooled = estimator == "pooled"
        self._count: int | torch.Tensor = 0
        # pooled: mean and sum of squares of all values; batch-mean: sums of the calls' means and variances.
        self._totals: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, moments: Moments) -> None:
        """Adds the moments of one call."""
        self._add(1, moments.count, moments.mean, moments.squares if self._is_pooled else moments.variance)

    def _add(self, calls: int, count: int | torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
        if self._totals is None:
            self._totals = first, second
        elif self._is_pooled:
            both = Moments(self._count, *self._totals).pooled_with(Moments(count, first, second))
            self._totals = both.mean, both.squares
        else:
            self._totals = self._totals[0] + first, self._totals[1] + second
        self.calls += calls
        self._count = self._count + count

    def add_parts_to(self, pools: Sequence[Pool], channels: Sequence[int]) -> None:
        """Adds the totals of layers whose channels are joined here to a pool on the CPU for each of them."""
        if self._totals is None:
            return
        # One copy waits for the device once.
        joined = torch.stack([torch.as_tensor(self._count), *self._totals]).cpu()
        for pool, (count, first, second) in zip(pools, joined.split(list(channels), dim=1), strict=True):
            pool._add(self.calls, int(count[0]), first, second)

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
            raise ValueError("the layer was never called")
        per_batch = -(-self.calls // batches)
        count = int(self._count)
        if self._is_pooled:
            moments = Moments(count, *self._totals)
            return LayerStatistics(count, moments.mean, moments.variance, per_batch, batches)
        mean, variance = (total / self.calls for total in self._totals)
        return LayerStatistics(count, mean, variance, per_batch, self.calls)


class Measurements:
    """Collects the moments that layers measure, batch by batch.

    Args:
        layers: the layers' names.
        estimator: as for `Pool`.

    Attributes:
        batch: the number of the current batch, for messages.
    """

    def __init__(self, layers: Iterable[str], estimator: str) -> None:
        self.batch = 0
        self._estimator = estimator
        self._pools = {name: Pool(estimator) for name in layers}
        self._calls: list[tuple[str, Moments]] = []  # of the current batch
        # The calls of batches that passed the same layers in the same order, with their channels joined.
        self._joined = Pool(estimator)
        self._layers: list[tuple[str, int]] = []  # the name and the channels of each of these calls
        self._device = torch.device("cpu")  # of what is joined; the layers may be on several
        self._counts: tuple[list[int], torch.Tensor] | None = None  # of the batch before: of each call, and channel

    def add(self, layer: str, moments: Moments) -> None:
        """Adds what a call of a layer has measured."""
        self._calls.append((layer, moments))

    def end_batch(self) -> None:
        """Pools what the calls of a batch have measured.

        Raises:
            UserCodeError: the input of a layer contained NaN or Inf.
        """
        calls, self._calls = self._calls, []
        if not calls:
            return
        layers = [(name, moments.mean.numel()) for name, moments in calls]
        if layers != self._layers:
            self._separate()
            self._layers, self._device = layers, calls[0][1].mean.device
        joined = Moments(
            self._counts_of(calls),
            torch.cat([moments.mean.to(self._device) for _, moments in calls]),
            torch.cat([moments.squares.to(self._device) for _, moments in calls]),
        )
        # The sum shows NaN and Inf, except that a sum of finite numbers may overflow.
        if not math.isfinite(joined.mean.sum().item()):
            self._refuse_nonfinite(calls)
        self._joined.add(joined)

    def pools(self) -> dict[str, Pool]:
        """Returns the pool of each layer, over all batches, on the CPU."""
        self._separate()
        return self._pools

    def _separate(self) -> None:
        pools, channels = [self._pools[name] for name, _ in self._layers], [channels for _, channels in self._layers]
        self._joined.add_parts_to(pools, channels)
        self._joined, self._layers, self._counts = Pool(self._estimator), [], None

    def _counts_of(self, calls: Sequence[tuple[str, Moments]]) -> torch.Tensor:
        """Returns the count of each channel. Batches mostly have the same, which are copied to the device once."""
        counts = [int(moments.count) for _, moments in calls]
        if self._counts is None or self._counts[0] != counts:
            channels = torch.tensor([moments.mean.numel() for _, moments in calls])
            of_channels = torch.tensor(counts, dtype=torch.float64).repeat_interleave(channels)
            self._counts = counts, of_channels.to(self._device)
        return self._counts[1]

    def _refuse_nonfinite(self, calls: Sequence[tuple[str, Moments]]) -> None:
        for name, moments in calls:
            if not moments.mean.isfinite().all():
                refuse(
                    f"layer {quote(name)}, batch {self.batch}: the activations contain NaN or Inf",
                    "It is the first such layer: check the data and the weights before it",
                )


def refuse(problem: str, advice: str) -> NoReturn:
    """Raises UserCodeError: the refresh cannot be done."""
    raise UserCodeError(f"BatchNorm refresh: {problem}. {advice}.")
