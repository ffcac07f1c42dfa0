"""Do the checkpoints describe the same architecture? Answered from headers, every difference at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt_avg.discover import Sources, discover
from ckpt_avg.messages import listing, plural, quote
from ckpt_avg.readers import open_checkpoint
from ckpt_avg.select import Selection, patterns, select
from ckpt_avg.spec import CheckpointSpec, TensorSpec

Aspect = Literal["missing", "unexpected", "shape", "dtype"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which checkpoints differ from the reference checkpoint, which is the first.

    Attributes:
        tensor: the tensor's name.
        aspect: what differs.
        expected: what the reference holds.
        found: what the others hold.
        checkpoints: the paths of those others.
    """

    tensor: str
    aspect: Aspect
    expected: str
    found: str
    checkpoints: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"tensor {quote(self.tensor)}: {self.aspect}: expected {self.expected}, got {self.found} "
            f"in {listing(self.checkpoints)}"
        )


@dataclass(frozen=True, slots=True)
class CompatibilityReport:
    """Every difference between the checkpoints, and advice where its cause is plain."""

    checkpoints: tuple[str, ...]
    tensors: int
    differences: tuple[Difference, ...]
    advice: str

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
            f"{self.checkpoints[0]}\n{lines}\n{self.advice}"
        )


def check(
    sources: Sources,
    *,
    last: int | None = None,
    every: int | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    state_key: str | None = None,
) -> CompatibilityReport:
    """Says whether checkpoints can be averaged, from their headers alone.

    Args:
        sources: checkpoint files and run folders.
        last, every, include, exclude: which of them, as for `average`.
        state_key: the dotted key of the state dict inside torch files.

    Returns:
        The report; ``report.compatible`` is the answer.

    Raises:
        CkptAvgError: a checkpoint cannot be opened, or there is none.

    Example:
        >>> check(["fixtures/mnist_cnn"]).compatible
        True
    """
    specs = []
    for path in select(discover(sources).paths, Selection(patterns(include), patterns(exclude), every, last)):
        with open_checkpoint(path, state_key=state_key) as checkpoint:
            specs.append(checkpoint.spec)
    return compare(specs)


def compare(specs: Sequence[CheckpointSpec]) -> CompatibilityReport:
    """Compares names, shapes and dtypes of all checkpoints with those of the first.

    The order of tensors in a file does not matter.
    """
    reference = specs[0]
    found: dict[tuple[str, Aspect, str, str], list[str]] = {}
    for spec in specs[1:]:
        for key in _differences(reference, spec):
            found.setdefault(key, []).append(str(spec.path))
    differences = tuple(
        Difference(tensor, aspect, expected, got, tuple(paths))
        for (tensor, aspect, expected, got), paths in found.items()
    )
    paths = tuple(str(spec.path) for spec in specs)
    return CompatibilityReport(paths, len(reference.tensors), differences, _advice(specs, differences))


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


def _describe(tensor: TensorSpec) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def _advice(specs: Sequence[CheckpointSpec], differences: Sequence[Difference]) -> str:
    aspects = {difference.aspect for difference in differences}
    if aspects == {"missing", "unexpected"}:
        names = [{name.removeprefix("module.") for name in spec.tensors} for spec in specs]
        if all(other == names[0] for other in names):
            return "Some were saved from a wrapped model (prefix 'module.'): save them alike, without the wrapper."
    if aspects == {"dtype"}:
        return "Save all of them in one dtype; --dtype sets the dtype of the output alone."
    return "Average checkpoints of one architecture and one run; leave others out with --exclude."
