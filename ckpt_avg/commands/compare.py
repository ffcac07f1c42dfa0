"""`compare`: how far checkpoints are from their mean and from each other, and which are far off."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.commands.check import notice_what_is_read
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.requests import CompareRequest, takes
from ckpt_avg.errors import IncompatibleError, NonFiniteError
from ckpt_avg.machine import choose_threads, gc_paused
from ckpt_avg.mean.buffers import STATISTICS
from ckpt_avg.mean.far_off import LEAST_WEIGHTS, RELATED, UNRELATED, Detour, Jump, detours, jump, related_groups
from ckpt_avg.mean.plan import OutputTensor, Plan
from ckpt_avg.mean.value_kinds import plan_of
from ckpt_avg.runs.compatibility import refuse_differences
from ckpt_avg.runs.discover import discover
from ckpt_avg.runs.order import position, unit_of
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.runs.select import open_selected
from ckpt_avg.text import distinct_names, ends, escaped, listing, plural, quote

if TYPE_CHECKING:
    from ckpt_avg.mean.geometry import Geometry, Matrix
    from ckpt_avg.mean.gram import Sums

FindingKind = Literal["nonfinite", "unrelated", "detour", "jump", "tensors"]
_RUNNING = (STATISTICS.name, "other running statistics", "codebooks")  # kinds of averaged tensors that are no weights
_SIMILAR = 0.1  # norms that differ by less are called the same
_MOST_REASONS = 3  # tensors that are named


@dataclass(frozen=True, slots=True)
class ComparedCheckpoint:
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


@dataclass(frozen=True, slots=True)
class ComparedTensor:
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


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is far off.

    Attributes:
        kind: ``nonfinite``: NaN or Inf; ``unrelated``: nearly orthogonal to the others; ``detour``: far from the ones
            before and after it, which are close to each other; ``jump``: one step is far longer than all others;
            ``tensors``: some of its tensors are unrelated to the others'.
        checkpoints: those that are far off.
        text: what it is, and why.
    """

    kind: FindingKind
    checkpoints: tuple[Path, ...]
    text: str


@dataclass(frozen=True, slots=True)
class CompareResult:
    """How far checkpoints are from their mean and from each other.

    Distances and cosines are those of all averaged weights; running statistics are apart. Checkpoints with NaN or Inf
    are left out of the mean, and have NaN in the matrices.

    Attributes:
        checkpoints: in the order of their steps.
        skipped: files of run folders that were skipped, with reasons.
        elements: how many weights there are.
        norm: of the mean.
        distances: between each two.
        cosines: of each two, seen from zero.
        centred_cosines: of each two, seen from the mean.
        shares: the parts of the sum of squared distances from the mean that the two main directions explain.
        straightness: the distance from the first to the last, divided by the length of the path through all.
        tensors: every compared tensor, those that move most in relation to their norm first.
        not_compared: how many tensors are not averaged, such as integers, and so not compared.
        findings: what is far off.
        notices: what the user should know.
    """

    checkpoints: tuple[ComparedCheckpoint, ...]
    skipped: tuple[Skipped, ...]
    elements: int
    norm: float
    distances: Matrix
    cosines: Matrix
    centred_cosines: Matrix
    shares: tuple[float, float]
    straightness: float
    tensors: tuple[ComparedTensor, ...]
    not_compared: int
    findings: tuple[Finding, ...]
    notices: tuple[str, ...]


@takes(CompareRequest)
def compare(request: CompareRequest) -> CompareResult:
    """Measures how far checkpoints are from their mean and from each other, in one pass, and names what is far off.

    Args:
        The fields of `CompareRequest`.

    Raises:
        CkptAvgError: a checkpoint cannot be read, they don't fit together, or fewer than two can be compared.

    Example:
        >>> compare(["fixtures/mnist_cnn"], last=4).findings
        ()
    """
    from ckpt_avg.mean.gram import measure  # torch, before the inputs take the files that may be open

    with Context(progress=request.progress) as context:
        with gc_paused():
            found = discover(request.sources, request.include)
            selected = open_selected(found, request, request, context.files, context.notice)
            checkpoints = selected.checkpoints
            if len(checkpoints) < 2:
                raise IncompatibleError(
                    f"{checkpoints[0].spec.path}: is the only checkpoint, with nothing to compare it with. Select more."
                )
            refuse_differences([checkpoint.spec for checkpoint in checkpoints], dtype="float64")
            whole = plan_of(checkpoints, dtype="keep", non_float="last")
            plan, groups = _compared(checkpoints, whole)
            notice_what_is_read(checkpoints, context.notice, kinds=whole.kinds)
        context.progress.start(len(checkpoints) * plan.source_nbytes)
        sums = measure(
            checkpoints,
            plan,
            groups,
            threads=choose_threads(request.threads),
            readers=request.readers,
            progress=context.progress.read,
        )
        comparison = _Comparison(checkpoints, plan, groups, sums)
        elements = sum(each.numel for each in plan.tensors if groups[each.name] != "statistics")
        if elements < LEAST_WEIGHTS:
            context.notice(f"fewer than {LEAST_WEIGHTS} weights: too few to tell by distances what is far off")
        return CompareResult(
            checkpoints=comparison.checkpoints(),
            skipped=selected.skipped,
            elements=elements,
            norm=comparison.weights.norm,
            distances=comparison.spread(comparison.weights.distances),
            cosines=comparison.spread(comparison.weights.cosines),
            centred_cosines=comparison.spread(comparison.weights.centred_cosines),
            shares=comparison.weights.shares,
            straightness=comparison.straightness(),
            tensors=comparison.tensors(),
            not_compared=len(whole.tensors) - len(plan.tensors),
            findings=tuple(comparison.findings(by_distance=elements >= LEAST_WEIGHTS)),
            notices=tuple(context.notices),
        )


def _compared(checkpoints: Sequence[Checkpoint], plan: Plan) -> tuple[Plan, dict[str, str]]:
    """Returns the tensors that are averaged, tied ones once, and the group of each: matrices, vectors, statistics."""
    repeated = {name for names in checkpoints[0].spec.tied() for name in names[1:]}
    tensors = [each for each in plan.tensors if each.rule == "mean" and each.name not in repeated]

    def group(tensor: OutputTensor) -> str:
        kind = plan.kinds.get(tensor.name)
        if kind is not None and kind.name in _RUNNING:
            return "statistics"
        return "matrices" if sum(extent > 1 for extent in tensor.shape) > 1 else "vectors"

    groups = {each.name: group(each) for each in tensors}
    if not any(each != "statistics" for each in groups.values()):
        raise IncompatibleError(
            f"{checkpoints[0].spec.path}: has no weights that are averaged, so nothing can be compared. Choose the "
            "weights with --state-key."
        )
    return replace(plan, tensors=tuple(tensors)), groups


class _Comparison:
    """What follows from the sums of one pass."""

    def __init__(self, checkpoints: Sequence[Checkpoint], plan: Plan, groups: dict[str, str], sums: Sums) -> None:
        import torch

        from ckpt_avg.mean.geometry import geometry_of

        self._specs = [checkpoint.spec for checkpoint in checkpoints]
        self._plan, self._groups, self._sums = plan, groups, sums
        self._names = [escaped(name) for name in distinct_names([spec.path for spec in self._specs])]
        self._finite = [index for index in range(len(checkpoints)) if index not in sums.nonfinite]
        if len(self._finite) < 2:
            raise NonFiniteError(
                f"{plural(len(sums.nonfinite), 'checkpoint')} of {len(checkpoints)} with NaN or Inf, so nothing can be "
                "compared:\n  " + listing(map(self._nonfinite_text, sums.nonfinite), separator="\n  "),
                lines=True,
            )
        if not all(products.isfinite().all() for products in sums.products.values()):
            raise IncompatibleError(
                f"{self._specs[0].path}: distances of float64 tensors are out of the range of float64, whose squares "
                "they need. Compare checkpoints with smaller numbers."
            )
        chosen = self._finite if sums.nonfinite else None
        products = dict(sums.products)
        running = products.pop("statistics", None)
        weights = functools.reduce(torch.add, products.values())
        self.weights: Geometry = geometry_of(weights, chosen)
        self._matrices = geometry_of(products.get("matrices", weights), chosen)
        self._statistics = None if running is None else geometry_of(running, chosen)

    def spread(self, matrix: Matrix) -> Matrix:
        """Returns a matrix of the finite checkpoints as one of all, with NaN for the others."""
        places = {index: place for place, index in enumerate(self._finite)}
        every = range(len(self._specs))
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
        for index, spec in enumerate(self._specs):
            place = self._finite.index(index) if index in self._finite else None
            running = self._statistics
            moved = None if running is None else math.nan
            if running is not None and place is not None:
                moved = _ratio(running.to_mean[place], running.norm)
            found.append(
                ComparedCheckpoint(
                    path=spec.path,
                    step=spec.record.step,
                    epoch=spec.record.epoch,
                    norm=math.nan if place is None else self.weights.norms[place],
                    to_mean=math.nan if place is None else self.weights.to_mean[place],
                    relative=math.nan if place is None else _ratio(self.weights.to_mean[place], self.weights.norm),
                    to_previous=distances[index - 1][index] if index else math.nan,
                    plane=(math.nan, math.nan) if place is None else self.weights.plane[place],
                    statistics_to_mean=moved,
                    nonfinite=sum(self._sums.nonfinite.get(index, {}).values()),
                )
            )
        return tuple(found)

    def tensors(self) -> tuple[ComparedTensor, ...]:
        """Returns the tensors, those that move most in relation to their norm first."""
        found = []
        for tensor in self._plan.tensors:
            if tensor.name not in self._sums.tensors:  # it has no elements
                continue
            *squares, mean_square = self._sums.tensors[tensor.name].squares.tolist()
            bad = [index for index in self._sums.nonfinite if tensor.name in self._sums.nonfinite[index]]
            rms = math.sqrt(sum(squares) / max(1, len(squares) - len(bad)))
            found.append(
                ComparedTensor(
                    name=tensor.name,
                    shape=tensor.shape,
                    group="statistics" if self._groups[tensor.name] == "statistics" else "weights",
                    norm=math.sqrt(mean_square),
                    to_mean=tuple(
                        math.nan if index in bad else math.sqrt(max(0.0, square))
                        for index, square in enumerate(squares)
                    ),
                    relative=_ratio(rms, math.sqrt(mean_square)),
                )
            )
        return tuple(sorted(found, key=lambda each: each.relative, reverse=True))

    def straightness(self) -> float:
        """Returns the distance from the first to the last, divided by the way through all; NaN if that is zero."""
        distances = self.weights.distances
        way = sum(distances[place][place + 1] for place in range(len(distances) - 1))
        return _ratio(distances[0][-1], way)

    def findings(self, *, by_distance: bool) -> list[Finding]:
        """Returns what is far off; only checkpoints with NaN or Inf unless ``by_distance``."""
        found = [
            Finding("nonfinite", (self._specs[index].path,), self._nonfinite_text(index))
            for index in sorted(self._sums.nonfinite)
        ]
        if not by_distance:
            return found
        groups = related_groups(self._matrices.cosines, range(len(self._finite)))
        found += [self._unrelated(group, groups) for group in groups[1:]]
        left = groups[0]
        for detour in detours(self.weights.distances, self.weights.norm, left):
            found.append(self._detour(detour))
            left = [place for place in left if place not in detour.members]
        if step := jump(self.weights.distances, self.weights.norm, left, self._positions()):
            side = left.index(step.after)
            members = left[:side] if side <= len(left) - side else left[side:]
            found.append(self._jump(step, members))
            left = [place for place in left if place not in members]
        return found + [each for place in left if (each := self._with_unrelated_tensors(place, left))]

    def _unrelated(self, group: list[int], groups: list[list[int]]) -> Finding:
        cosines, norms = self._matrices.cosines, self._matrices.norms
        nearest = max(
            cosines[place][other] for place in group for each in groups if each is not group for other in each
        )
        is_similar = all(abs(_ratio(norms[place], norms[groups[0][-1]]) - 1) < _SIMILAR for place in group)
        what = "permuted weights" if is_similar else "weights initialised again"
        cosine = f"cosine of the matrices at most {nearest + 0.0:.2f}"
        return self._finding(
            "unrelated",
            group,
            f"nothing in common with the others ({cosine}): another run, or {what}. The mean of unrelated weights is "
            "of no use",
        )

    def _detour(self, detour: Detour) -> Finding:
        return self._finding(
            "detour",
            detour.members,
            f"{detour.factor:.2g} times as far from {self._named([detour.before, detour.after])} as these are from "
            f"each other: as after a loss spike, or at a higher learning rate. {self._reasons(detour.members)}",
        )

    def _jump(self, step: Jump, members: Sequence[int]) -> Finding:
        return self._finding(
            "jump",
            members,
            f"apart from the others: the step from {self._named([step.before])} to {self._named([step.after])} is at "
            f"least {step.factor:.2g} times as long as every other, as after a loss spike or between two runs. "
            f"{self._reasons(members)}",
        )

    def _with_unrelated_tensors(self, place: int, others: Sequence[int]) -> Finding | None:
        """Returns the finding that some tensors of a checkpoint, and of no other, are unrelated to their mean."""
        names = []
        for tensor in self._plan.tensors if len(others) > 2 else ():
            if self._groups[tensor.name] == "matrices" and tensor.numel >= LEAST_WEIGHTS:
                cosines = self._cosines_to_mean(tensor)
                if cosines[place] <= UNRELATED and all(cosines[each] > RELATED for each in others if each != place):
                    names.append(tensor.name)
        if not names:
            return None
        what = f"unrelated to the others in {plural(len(names), 'tensor')}: {listing(map(quote, names))}"
        return self._finding("tensors", [place], f"{what}. They are untrained, permuted, or of another run")

    def _cosines_to_mean(self, tensor: OutputTensor) -> list[float]:
        """Returns the cosines of a tensor in each finite checkpoint to its mean."""
        sums = self._sums.tensors[tensor.name]
        *squares, mean_square = sums.squares.tolist()
        products = sums.with_mean.tolist()
        lengths = [squares[index] + 2 * products[index] + mean_square for index in self._finite]
        return [
            _ratio(products[index] + mean_square, math.sqrt(max(0.0, length) * mean_square))
            for index, length in zip(self._finite, lengths, strict=True)
        ]

    def _reasons(self, members: Sequence[int]) -> str:
        """Says where far checkpoints differ: the tensors with most of the squared distance, and their norm."""
        parts: dict[str, float] = {}
        for name, sums in self._sums.tensors.items():
            if self._groups[name] != "statistics":
                parts[name] = sum(sums.squares[self._finite[place]].item() for place in members)
        total = sum(parts.values())
        largest = sorted(parts, key=parts.__getitem__, reverse=True)[:_MOST_REASONS]
        shown = listing(f"{quote(name)} ({_ratio(parts[name], total):.0%})" for name in largest)
        norms = self.weights.norms
        others = [norms[place] for place in range(len(norms)) if place not in members]
        ratio = _ratio(sum(norms[place] for place in members) / len(members), statistics.median(others))
        norm = f"; the norm is {ratio:.2g} times that of the others" if abs(ratio - 1) > _SIMILAR else ""
        return f"Most of the distance is in {shown}{norm}"

    def _finding(self, kind: FindingKind, members: Sequence[int], text: str) -> Finding:
        paths = tuple(self._specs[self._finite[place]].path for place in members)
        return Finding(kind, paths, f"{self._named(members)}: {text}.")

    def _named(self, places: Sequence[int]) -> str:
        names = [self._names[self._finite[place]] for place in places]
        return " and ".join(names) if len(names) < 3 else ends(names)

    def _nonfinite_text(self, index: int) -> str:
        found = self._sums.nonfinite[index]
        tensors = listing(map(quote, found))
        return f"{self._names[index]}: {plural(sum(found.values()), 'element')} with NaN or Inf, in {tensors}."

    def _positions(self) -> list[int]:
        """Returns when the finite checkpoints were saved, in steps or epochs, or else their places in the order."""
        records = [self._specs[index].record for index in self._finite]
        unit = unit_of(records)
        return list(range(len(records))) if unit is None else [position(each, unit) for each in records]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
