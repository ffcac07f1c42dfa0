"""Averages in memory, measured: what `sweep` and `soup` choose from. Nothing is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ckpt_avg.batchnorm.policy import frozen_buffers, moving_layers
from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.commands.context import Context, reading
from ckpt_avg.commands.evaluations import Meter
from ckpt_avg.commands.options import ChoiceOptions
from ckpt_avg.commands.prepare import Prepared
from ckpt_avg.commands.requests import MeanRequest
from ckpt_avg.errors import UsageError
from ckpt_avg.mean.memory_output import MemoryOutput, write_tensors
from ckpt_avg.mean.spectral_norm import leading_vectors
from ckpt_avg.mean.stream import Mean, write_means
from ckpt_avg.mean.weighting import summed
from ckpt_avg.progress import Phase
from ckpt_avg.text import listing, quote, suggestion
from ckpt_avg.user_code.comparison import Evaluation
from ckpt_avg.user_code.model import weights_of
from ckpt_avg.wording import setting


class Averages:
    """Averages of some of the checkpoints each: bit for bit what `average` writes of these.

    Attributes:
        meter: what measures them.
    """

    def __init__(self, request: MeanRequest, prepared: Prepared, context: Context) -> None:
        prepared.selected.refuse_single()
        self._request, self._prepared, self._context = request, prepared, context
        self.meter = Meter(request, prepared, context)

    def measure_last(self, choice: ChoiceOptions) -> Evaluation:
        """Measures the last checkpoint as it was saved. Raises UsageError if that has no such metric."""
        last = self._prepared.last
        self._context.phase(Phase(f"measuring {last.spec.name}"))
        measured = self.meter.measure(last.spec.name, last.spec.path, weights_of(last))
        option, metric = choice.target
        if metric not in measured.metrics:
            raise UsageError(
                f"{setting(option, metric)}: the --eval function returns no such metric. Use one of "
                f"{listing(map(quote, measured.metrics))}.{suggestion(metric, measured.metrics)}"
            )
        return measured

    def compute(
        self, subsets: Sequence[Collection[int]], weights: Sequence[Mapping[int, float] | None] = ()
    ) -> list[MemoryOutput]:
        """Averages checkpoints in one pass over those that are needed, each average summed alone.

        Args:
            subsets: the checkpoints of each average, by their indices.
            weights: for each average the weights by index, None if all are equal; by default they are.
        """
        if not subsets:
            return []
        prepared = self._prepared
        orders = [self.order(subset) for subset in subsets]
        chosen = [summed(order, each) for order, each in zip(orders, weights or [None] * len(orders), strict=True)]
        read = {index for indices, _ in chosen for index in indices}
        # The last of the plan has some tensors for all, and two show whether a tensor with infinities is a constant.
        needed = sorted(read | {0, len(prepared.checkpoints) - 1})
        places = {index: place for place, index in enumerate(needed)}
        outputs = [MemoryOutput(prepared.plan) for _ in subsets]
        means = [
            Mean([places[index] for index in indices], output.write, unequal)
            for (indices, unequal), output in zip(chosen, outputs, strict=True)
        ]
        self._context.progress.step(reading("averaging", len(read), prepared.plan.source_nbytes))
        write_means(
            [prepared.checkpoints[index] for index in needed],
            prepared.plan,
            means,
            device=prepared.mean_device,
            threads=prepared.threads,
            memory=self._request.memory,
            readers=self._request.readers,
            allow_nonfinite=self._request.allow_nonfinite,
            progress=self._context.progress.advance,
        )
        return outputs

    def measure(self, name: str, subset: Collection[int], output: MemoryOutput) -> Evaluation:
        """Refreshes what `compute` returned for these checkpoints, and measures it."""
        checkpoints = [self._prepared.checkpoints[index] for index in sorted(subset)]
        if len(checkpoints) > 1:
            plan = self._prepared.plan
            vectors = leading_vectors(plan, checkpoints[-1], output.tensors(), self._context.notice)
            write_tensors(vectors, plan, output.write)
        return self.meter.measure(name, None, output.tensors(), frozen=self.frozen(checkpoints))

    def frozen(self, checkpoints: Sequence[Checkpoint]) -> Collection[str] | None:
        """Returns the statistics of these checkpoints that a refresh keeps; None if there is nothing to refresh."""
        if self._prepared.refresh is None:
            return None
        frozen = frozen_buffers(checkpoints, self._prepared.plan, self._request.bn)
        return frozen if moving_layers(self._prepared.plan, frozen) else None

    def paths(self, subset: Collection[int]) -> tuple[Path, ...]:
        """Returns the paths of checkpoints, in the order of the sum."""
        return tuple(self._prepared.specs[index].path for index in self.order(subset))

    def order(self, subset: Collection[int]) -> list[int]:
        """Returns the indices of checkpoints, in the order of the sum."""
        return [index for index in self._prepared.selected.sum_order if index in subset]


def at_once(hold: int, prepared: Prepared) -> int:
    """Returns how many averages ``hold`` bytes of memory contain, at least one."""
    return max(1, hold // max(1, prepared.plan.nbytes))
