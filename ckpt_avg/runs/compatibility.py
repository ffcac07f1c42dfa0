"""Whether checkpoints have the same architecture, by their headers; every difference at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt_avg.checkpoint.spec import CheckpointSpec, TensorSpec
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.text import listing, one_line, plural, quote

Aspect = Literal["missing", "unexpected", "shape", "dtype", "tied"]


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference from the reference checkpoint, which is the first.

    Attributes:
        tensor: the tensor's name.
        aspect: what differs.
        expected: what the reference checkpoint has.
        found: what the others have.
        checkpoints: the paths of the others.
    """

    tensor: str
    aspect: Aspect
    expected: str
    found: str
    checkpoints: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"tensor {quote(self.tensor)}: {self.aspect}: expected {self.expected}, got {self.found} "
            f"in {listing(map(one_line, self.checkpoints))}"
        )


@dataclass(frozen=True, slots=True)
class CompatibilityReport:
    """Every difference between checkpoints, and what to do about them.

    Attributes:
        checkpoints: their paths in order.
        tensors: the number of tensors in the reference checkpoint.
        differences: every difference from it.
        advice: what to do about them.
        skipped: what is not averaged, and why.
        notices: what the user should know about how the checkpoints are read.
    """

    checkpoints: tuple[str, ...]
    tensors: int
    differences: tuple[Difference, ...]
    advice: str
    skipped: tuple[Skipped, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def compatible(self) -> bool:
        """Whether the checkpoints can be averaged."""
        return not self.differences

    def __str__(self) -> str:
        if self.compatible:
            return (
                f"{plural(len(self.checkpoints), 'checkpoint')} of {plural(self.tensors, 'tensor')} each: names, "
                "shapes and dtypes agree"
            )
        lines = listing((f"  {difference}" for difference in self.differences), separator="\n")
        return (
            f"the checkpoints don't fit together: {plural(len(self.differences), 'difference')} from "
            f"{one_line(self.checkpoints[0])}\n{lines}\n{self.advice}"
        )


def compare(specs: Sequence[CheckpointSpec]) -> CompatibilityReport:
    """Compares names, shapes, dtypes and ties of all checkpoints with the first. The order of tensors may differ."""
    reference = specs[0]
    tied = _partners(reference)
    found: dict[tuple[str, Aspect, str, str], list[str]] = {}
    for spec in specs[1:]:
        if spec.tensors is reference.tensors:
            continue  # the headers have the same bytes
        for key in (*_differences(reference, spec), *_differently_tied(tied, spec)):
            found.setdefault(key, []).append(str(spec.path))
    differences = tuple(
        Difference(tensor, aspect, expected, got, tuple(paths))
        for (tensor, aspect, expected, got), paths in found.items()
    )
    paths = tuple(str(spec.path) for spec in specs)
    return CompatibilityReport(paths, len(reference.tensors), differences, _advice(specs, differences))


def refuse_differences(specs: Sequence[CheckpointSpec]) -> None:
    """Raises IncompatibleError with every difference, if there are any."""
    report = compare(specs)
    if not report.compatible:
        raise IncompatibleError(str(report), lines=True)


def _differences(reference: CheckpointSpec, spec: CheckpointSpec) -> list[tuple[str, Aspect, str, str]]:
    result: list[tuple[str, Aspect, str, str]] = []
    for name, expected in reference.tensors.items():
        tensor = spec.tensors.get(name)
        if tensor is None:
            result.append((name, "missing", _describe(expected), "no such tensor"))
            continue
        if tensor.shape != expected.shape:
            result.append((name, "shape", str(list(expected.shape)), str(list(tensor.shape))))
        if tensor.dtype != expected.dtype:
            result.append((name, "dtype", expected.dtype.name, tensor.dtype.name))
    result += [
        (name, "unexpected", "no such tensor", _describe(tensor))
        for name, tensor in spec.tensors.items()
        if name not in reference.tensors
    ]
    return result


def _partners(spec: CheckpointSpec) -> dict[str, tuple[str, ...]]:
    """Returns, for each tied tensor, the names that share its storage."""
    return {name: tuple(sorted(names)) for names in spec.tied() for name in names}


def _differently_tied(expected: dict[str, tuple[str, ...]], spec: CheckpointSpec) -> list[tuple[str, Aspect, str, str]]:
    """Returns the tensors that are tied to other tensors than in the reference checkpoint."""
    found = _partners(spec)
    names = [name for name in (*expected, *(name for name in found if name not in expected)) if name in spec.tensors]
    return [
        (name, "tied", _tie(name, expected), _tie(name, found))
        for name in names
        if expected.get(name) != found.get(name)
    ]


def _tie(name: str, partners: dict[str, tuple[str, ...]]) -> str:
    others = [quote(each) for each in partners.get(name, ()) if each != name]
    return f"tied to {listing(others)}" if others else "tied to none"


def _describe(tensor: TensorSpec) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def _advice(specs: Sequence[CheckpointSpec], differences: Sequence[Difference]) -> str:
    aspects = {difference.aspect for difference in differences}
    if aspects == {"missing", "unexpected"} and (prefix := _prefix_between(specs)):
        return f"Some names begin with {quote(prefix)}, others don't: add --strip-prefix {prefix}."
    if aspects == {"dtype"}:
        return "Save all checkpoints in one dtype; --dtype only sets the dtype of the output."
    if aspects == {"tied"}:
        return "Average checkpoints that tie the same weights; skip others with --exclude."
    return "Average checkpoints of one architecture and one run; skip others with --exclude."


def _prefix_between(specs: Sequence[CheckpointSpec]) -> str | None:
    """Returns the prefix that all names of some checkpoints have, and no name of the others."""
    shortest = min(specs, key=lambda spec: sum(map(len, spec.tensors)))
    bare = set(shortest.tensors)
    prefixes = set()
    for spec in specs:
        if spec.tensors and set(spec.tensors) != bare:
            first = next(iter(spec.tensors))
            ends = [name for name in bare if first.endswith(f".{name}")]
            prefixes.add(first[: -len(max(ends, key=len))] if ends else "")
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    stripped = ({name.removeprefix(prefix) for name in spec.tensors} for spec in specs)
    return prefix if prefix and all(names == bare for names in stripped) else None
