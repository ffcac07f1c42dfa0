"""What `compare` calls far off, and why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ckpt_avg.commands.distances import Distances, ratio
from ckpt_avg.mean.far_off import LEAST_WEIGHTS, RELATED, UNRELATED, Detour, Jump, detours, jump, related_groups
from ckpt_avg.mean.plan import OutputTensor
from ckpt_avg.results import Result
from ckpt_avg.runs.order import position, unit_of
from ckpt_avg.text import ends, listing, plural, quote

FindingKind = Literal["nonfinite", "unrelated", "detour", "jump", "tensors"]
_SIMILAR = 0.1  # norms that differ by less are called the same
_MOST_REASONS = 3  # tensors that are named


@dataclass(frozen=True, slots=True, repr=False)
class Finding(Result):
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

    def _title(self) -> str:
        return f"{self.kind}: {self.text}"


def find_far_off(measured: Distances, *, by_distance: bool) -> tuple[Finding, ...]:
    """Returns what is far off; only checkpoints with NaN or Inf unless ``by_distance``."""
    return tuple(_Search(measured).find(by_distance=by_distance))


class _Search:
    def __init__(self, measured: Distances) -> None:
        self._measured = measured

    def find(self, *, by_distance: bool) -> list[Finding]:
        found = [
            Finding("nonfinite", (self._measured.specs[index].path,), self._measured.nonfinite_text(index))
            for index in sorted(self._measured.sums.nonfinite)
        ]
        if not by_distance:
            return found
        groups = related_groups(self._measured.matrices.cosines, range(len(self._measured.finite)))
        found += [self._unrelated(group, groups) for group in groups[1:]]
        left = groups[0]
        for detour in detours(self._measured.weights.distances, self._measured.weights.norm, left):
            found.append(self._detour(detour))
            left = [place for place in left if place not in detour.members]
        if step := jump(self._measured.weights.distances, self._measured.weights.norm, left, self._positions()):
            side = left.index(step.after)
            members = left[:side] if side <= len(left) - side else left[side:]
            found.append(self._jump(step, members))
            left = [place for place in left if place not in members]
        return found + (self._with_unrelated_tensors(left) if len(left) > 2 else [])

    def _unrelated(self, group: list[int], groups: list[list[int]]) -> Finding:
        cosines, norms = self._measured.matrices.cosines, self._measured.matrices.norms
        nearest = max(
            cosines[place][other] for place in group for each in groups if each is not group for other in each
        )
        is_similar = all(abs(ratio(norms[place], norms[groups[0][-1]]) - 1) < _SIMILAR for place in group)
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

    def _with_unrelated_tensors(self, chosen: Sequence[int]) -> list[Finding]:
        """Returns a finding for each checkpoint that alone has tensors that are unrelated to their mean."""
        found: dict[int, list[str]] = {}
        for tensor in self._measured.plan.tensors:
            if self._measured.groups[tensor.name] == "matrices" and tensor.numel >= LEAST_WEIGHTS:
                cosines = self._cosines_to_mean(tensor)
                lowest, *others = sorted(chosen, key=cosines.__getitem__)
                if cosines[lowest] <= UNRELATED and cosines[others[0]] > RELATED:
                    found.setdefault(lowest, []).append(tensor.name)
        return [
            self._finding(
                "tensors",
                [place],
                f"unrelated to the others in {plural(len(names), 'tensor')}: {listing(map(quote, names))}. They are "
                "untrained, permuted, or of another run",
            )
            for place, names in sorted(found.items())
        ]

    def _cosines_to_mean(self, tensor: OutputTensor) -> list[float]:
        """Returns the cosines of a tensor in each finite checkpoint to its mean."""
        sums = self._measured.sums.tensors[tensor.name]
        *squares, mean_square = sums.squares.tolist()
        products = sums.with_mean.tolist()
        lengths = [squares[index] + 2 * products[index] + mean_square for index in self._measured.finite]
        return [
            ratio(products[index] + mean_square, math.sqrt(max(0.0, length) * mean_square))
            for index, length in zip(self._measured.finite, lengths, strict=True)
        ]

    def _reasons(self, members: Sequence[int]) -> str:
        """Says where far checkpoints differ: the tensors with most of the squared distance, and their norm."""
        parts: dict[str, float] = {}
        for name, sums in self._measured.sums.tensors.items():
            if self._measured.groups[name] != "statistics":
                parts[name] = sum(sums.squares[self._measured.finite[place]].item() for place in members)
        total = sum(parts.values())
        largest = sorted(parts, key=parts.__getitem__, reverse=True)[:_MOST_REASONS]
        shown = listing(f"{quote(name)} ({ratio(parts[name], total):.0%})" for name in largest)
        norms = self._measured.weights.norms
        others = [norms[place] for place in range(len(norms)) if place not in members]
        factor = ratio(sum(norms[place] for place in members) / len(members), statistics.median(others))
        norm = f"; the norm is {factor:.2g} times that of the others" if abs(factor - 1) > _SIMILAR else ""
        return f"Most of the distance is in {shown}{norm}"

    def _finding(self, kind: FindingKind, members: Sequence[int], text: str) -> Finding:
        paths = tuple(self._measured.specs[self._measured.finite[place]].path for place in members)
        return Finding(kind, paths, f"{self._named(members)}: {text}.")

    def _named(self, places: Sequence[int]) -> str:
        names = [self._measured.names[self._measured.finite[place]] for place in places]
        return " and ".join(names) if len(names) < 3 else ends(names)

    def _positions(self) -> list[int]:
        """Returns when the finite checkpoints were saved, in steps or epochs, or else their places in the order."""
        records = [self._measured.specs[index].record for index in self._measured.finite]
        unit = unit_of(records)
        return list(range(len(records))) if unit is None else [position(each, unit) for each in records]
