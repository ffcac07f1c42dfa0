"""`Distances`: what follows from the sums of one pass over checkpoints, by checkpoint and by tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.errors import IncompatibleError, NonFiniteError
from ckpt_avg.mean.geometry import Geometry, Matrix, geometry_of
from ckpt_avg.mean.gram import Sums
from ckpt_avg.mean.plan import Plan
from ckpt_avg.results import Result
from ckpt_avg.text import distinct_names, escaped, listing, plural, quote


@dataclass(frozen=True, slots=True, repr=False)
class ComparedCheckpoint(Result):
    """One checkpoint, by its weights. A checkpoint with NaN or Inf has NaN in place of these numbers.

    Attributes:
        path: where it is.
        step, epoch: as recorded.
        norm: the Euclidean norm of its weights.
        to_mean: the distance of its weights from their mean.
        relative: that, divided by the norm of the mean.
        to_previous: the distance from the checkpoint before it; NaN for the first.
        plane: coordinates in the plane of the two main directions; the mean is at (0, 0).
        statistics_to_mean: the distance of its running statistics from their mean, divided by the norm of that mean;
            None if there are none.
        nonfinite: how many of its elements are NaN or Inf.
    """

    path: Path
    step: int | None
    epoch: int | None
    norm: float
    to_mean: float
    relative: float
    to_previous: float
    plane: tuple[float, float]
    statistics_to_mean: float | None
    nonfinite: int

    def _title(self) -> str:
        return f"{escaped(self.path.name)}: {self.relative:.3g} of the norm from the mean"


@dataclass(frozen=True, slots=True, repr=False)
class ComparedTensor(Result):
    """One tensor.

    Attributes:
        name, shape: as in the checkpoints.
        group: ``weights`` or ``statistics``.
        norm: of its mean.
        to_mean: the distance of each checkpoint from the mean; NaN where it has NaN or Inf.
        relative: the root mean square of these distances, divided by the norm.
    """

    name: str
    shape: tuple[int, ...]
    group: Literal["weights", "statistics"]
    norm: float
    to_mean: tuple[float, ...]
    relative: float

    def _title(self) -> str:
        return f"{escaped(self.name)}: moved by {self.relative:.3g} of its norm"


class Distances:
    """What follows from the sums of one pass.

    Attributes:
        specs, names: of all checkpoints.
        plan, groups, sums: the tensors, the group of each, and what was measured.
        finite: the indices of the checkpoints without NaN and Inf. The others are in these two by their place in it:
        weights, matrices: the geometry of all weights, and of the matrices among them.

    Raises:
        NonFiniteError: fewer than two checkpoints are finite.
        IncompatibleError: squares overflow float64.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint], plan: Plan, groups: Mapping[str, str], sums: Sums) -> None:
        self.specs = [checkpoint.spec for checkpoint in checkpoints]
        self.plan, self.groups, self.sums = plan, groups, sums
        self.names = [escaped(name) for name in distinct_names([spec.path for spec in self.specs])]
        self.finite = [index for index in range(len(checkpoints)) if index not in sums.nonfinite]
        if len(self.finite) < 2:
            raise NonFiniteError(
                f"{plural(len(sums.nonfinite), 'checkpoint')} of {len(checkpoints)} with NaN or Inf, so nothing can be "
                "compared:\n  " + listing(map(self.nonfinite_text, sums.nonfinite), separator="\n  "),
                lines=True,
            )
        if not all(products.isfinite().all() for products in sums.products.values()):
            raise IncompatibleError(
                f"{self.specs[0].path}: distances of float64 tensors are out of the range of float64, whose squares "
                "they need. Compare checkpoints with smaller numbers."
            )
        chosen = self.finite if sums.nonfinite else None
        products = dict(sums.products)
        running = products.pop("statistics", None)
        weights = functools.reduce(torch.add, products.values())
        self.weights: Geometry = geometry_of(weights, chosen)
        self.matrices = geometry_of(products.get("matrices", weights), chosen)
        self._statistics = None if running is None else geometry_of(running, chosen)

    def spread(self, matrix: Matrix) -> Matrix:
        """Returns a matrix of the finite checkpoints as one of all, with NaN for the others."""
        places = {index: place for place, index in enumerate(self.finite)}
        every = range(len(self.specs))
        return tuple(
            tuple(
                matrix[places[row]][places[column]] if row in places and column in places else math.nan
                for column in every
            )
            for row in every
        )

    def checkpoints(self) -> tuple[ComparedCheckpoint, ...]:
        """Returns what is known of each checkpoint."""
        distances = self.spread(self.weights.distances)
        found = []
        for index, spec in enumerate(self.specs):
            place = self.finite.index(index) if index in self.finite else None
            running = self._statistics
            moved = None if running is None else math.nan
            if running is not None and place is not None:
                moved = ratio(running.to_mean[place], running.norm)
            found.append(
                ComparedCheckpoint(
                    path=spec.path,
                    step=spec.record.step,
                    epoch=spec.record.epoch,
                    norm=math.nan if place is None else self.weights.norms[place],
                    to_mean=math.nan if place is None else self.weights.to_mean[place],
                    relative=math.nan if place is None else ratio(self.weights.to_mean[place], self.weights.norm),
                    to_previous=distances[index - 1][index] if index else math.nan,
                    plane=(math.nan, math.nan) if place is None else self.weights.plane[place],
                    statistics_to_mean=moved,
                    nonfinite=sum(self.sums.nonfinite.get(index, {}).values()),
                )
            )
        return tuple(found)

    def tensors(self) -> tuple[ComparedTensor, ...]:
        """Returns the tensors, those that move most in relation to their norm first."""
        found = []
        for tensor in self.plan.tensors:
            if tensor.name not in self.sums.tensors:  # it has no elements
                continue
            *squares, mean_square = self.sums.tensors[tensor.name].squares.tolist()
            bad = [index for index in self.sums.nonfinite if tensor.name in self.sums.nonfinite[index]]
            rms = math.sqrt(sum(squares) / max(1, len(squares) - len(bad)))
            found.append(
                ComparedTensor(
                    name=tensor.name,
                    shape=tensor.shape,
                    group="statistics" if self.groups[tensor.name] == "statistics" else "weights",
                    norm=math.sqrt(mean_square),
                    to_mean=tuple(
                        math.nan if index in bad else math.sqrt(max(0.0, square))
                        for index, square in enumerate(squares)
                    ),
                    relative=ratio(rms, math.sqrt(mean_square)),
                )
            )
        return tuple(sorted(found, key=lambda each: each.relative, reverse=True))

    def straightness(self) -> float:
        """Returns the distance from the first to the last, divided by the way through all; NaN if that is zero."""
        distances = self.weights.distances
        way = sum(distances[place][place + 1] for place in range(len(distances) - 1))
        return ratio(distances[0][-1], way)

    def nonfinite_text(self, index: int) -> str:
        """Says in which tensors a checkpoint has NaN or Inf."""
        found = self.sums.nonfinite[index]
        tensors = listing(map(quote, found))
        return f"{self.names[index]}: {plural(sum(found.values()), 'element')} with NaN or Inf, in {tensors}."


def ratio(part: float, whole: float) -> float:
    """Returns ``part / whole``; NaN if the whole is zero."""
    return part / whole if whole else math.nan
