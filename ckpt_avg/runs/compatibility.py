"""Whether checkpoints have the same architecture, by their headers; every difference at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ckpt_avg.checkpoint.spec import DTYPES, CheckpointSpec, Kind, TensorSpec, is_extra_state
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.results import Result, Rows, counted, notices_counted, paths_counted, plain
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.text import listing, one_line, plural, quote
from ckpt_avg.wording import setting, worded

_CONVERTED: Sequence[Kind] = ("float", "float8")  # the kinds of dtypes that --dtype converts

Aspect = Literal["missing", "unexpected", "shape", "dtype", "tied", "setting"]


@dataclass(frozen=True, slots=True, repr=False)
class Difference(Result):
    """A difference from the reference checkpoint, which is the first.

    Attributes:
        tensor: the tensor's name; for a setting, its key.
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
        subject = "" if self.aspect == "setting" else "tensor "
        return (
            f"{subject}{quote(self.tensor)}: {self.aspect}: expected {self.expected}, got {self.found} "
            f"in {listing(map(one_line, self.checkpoints))}"
        )

    def _title(self) -> str:
        return str(self)


@dataclass(frozen=True, slots=True, repr=False)
class CompatibilityReport(Result):
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

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as ``ckpt-avg check --json`` prints them."""
        return {"compatible": self.compatible, **plain(self), "advice": "" if self.compatible else self.advice}

    def _title(self) -> str:
        if self.compatible:
            return "compatible"
        return f"not compatible: {plural(len(self.differences), 'difference')}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "compatible", str(self.compatible)
        yield "checkpoints", paths_counted([Path(path) for path in self.checkpoints])
        yield "tensors", f"{self.tensors:,} in each"
        yield "differences", counted(self.differences, map(str, self.differences))
        yield "advice", "" if self.compatible else self.advice
        yield "skipped", paths_counted([each.path for each in self.skipped])
        yield "notices", notices_counted(self.notices)

    def _tables(self) -> Iterator[Rows]:
        rows = [(each.tensor, each.aspect, each.expected, each.found) for each in self.differences]
        yield Rows("differences", ("tensor", "aspect", "expected", "found"), rows)


def compare(specs: Sequence[CheckpointSpec], *, dtype: str = "keep") -> CompatibilityReport:
    """Compares names, shapes, dtypes and ties of all checkpoints with the first. The order of tensors may differ.

    With another ``dtype`` than ``keep``, the dtype of floating-point tensors may differ. The size of `is_extra_state`
    tensors always may.
    """
    reference = specs[0]
    is_shared = all(spec.tensors is reference.tensors for spec in specs)  # then all headers have the same bytes
    tied = {} if is_shared else _partners(reference)
    found: dict[tuple[str, Aspect, str, str], list[str]] = {}
    for spec in specs[1:]:
        keys = [*_other_settings(reference, spec)]
        if spec.tensors is not reference.tensors:
            keys += _differences(reference, tied, spec, () if dtype == "keep" else _CONVERTED)
        for key in keys:
            found.setdefault(key, []).append(str(spec.path))
    differences = tuple(
        Difference(tensor, aspect, expected, got, tuple(paths))
        for (tensor, aspect, expected, got), paths in found.items()
    )
    paths = tuple(str(spec.path) for spec in specs)
    return CompatibilityReport(paths, len(reference.tensors), differences, worded(_advice(specs, differences)))


def refuse_differences(specs: Sequence[CheckpointSpec], *, dtype: str = "keep") -> None:
    """Raises IncompatibleError with every difference, if there are any."""
    report = compare(specs, dtype=dtype)
    if not report.compatible:
        raise IncompatibleError(str(report), lines=True)


def _differences(
    reference: CheckpointSpec, tied: dict[str, tuple[str, ...]], spec: CheckpointSpec, converted: Collection[Kind]
) -> Iterator[tuple[str, Aspect, str, str]]:
    for name, expected in reference.tensors.items():
        tensor = spec.tensors.get(name)
        if tensor is None:
            yield name, "missing", _describe(expected), "no such tensor"
            continue
        if tensor.shape != expected.shape and not is_extra_state(name):
            yield name, "shape", str(list(expected.shape)), str(list(tensor.shape))
        if tensor.dtype != expected.dtype and not {tensor.dtype.kind, expected.dtype.kind} <= set(converted):
            yield name, "dtype", expected.dtype.name, tensor.dtype.name
    for name, tensor in spec.tensors.items():
        if name not in reference.tensors:
            yield name, "unexpected", "no such tensor", _describe(tensor)
    found = _partners(spec)
    # All names of a group share one tuple, so that a group of n names is compared once, not n times.
    groups = {id(group): group for group in tied.values()}
    same = {key for key, group in groups.items() if found.get(group[0]) == group}
    for name in dict.fromkeys((*tied, *found)):
        if name in spec.tensors and not (name in tied and id(tied[name]) in same):
            yield name, "tied", _tie(name, tied), _tie(name, found)


def _other_settings(reference: CheckpointSpec, spec: CheckpointSpec) -> Iterator[tuple[str, Aspect, str, str]]:
    if reference.settings and spec.settings:
        for key in {**reference.settings, **spec.settings}:
            expected, found = (each.settings.get(key, "none") for each in (reference, spec))
            if expected != found:
                yield key, "setting", quote(expected)[1:-1], quote(found)[1:-1]


def _partners(spec: CheckpointSpec) -> dict[str, tuple[str, ...]]:
    """Returns, for each tied tensor, the names that share its storage."""
    partners: dict[str, tuple[str, ...]] = {}
    for names in spec.tied():
        partners |= dict.fromkeys(names, tuple(sorted(names)))
    return partners


def _tie(name: str, partners: dict[str, tuple[str, ...]]) -> str:
    group = partners.get(name, ())
    shown = [quote(each) for each in group[:4] if each != name][:3]
    rest = len(group) - 1 - len(shown)
    more = f" and {rest:,} more" if rest > 0 else ""
    return f"tied to {', '.join(shown)}{more}" if shown else "tied to none"


def _describe(tensor: TensorSpec) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def _advice(specs: Sequence[CheckpointSpec], differences: Sequence[Difference]) -> str:
    aspects = {difference.aspect for difference in differences}
    if aspects == {"missing", "unexpected"} and (prefix := _prefix_between(specs)):
        option = setting("--strip-prefix", prefix.removesuffix("."))
        return f"Some names begin with {quote(prefix)}, others don't: add {option}."
    if aspects == {"dtype"}:
        dtypes = {name for difference in differences for name in (difference.expected, difference.found)}
        if all(DTYPES[name].kind in _CONVERTED for name in dtypes):
            return "Add --dtype float32, or another dtype for the output, to average them."
        return "Save all checkpoints in one dtype."
    if "setting" in aspects:
        return "Merge each adapter into its model first, then average the models; skip others with --exclude."
    if aspects == {"tied"}:
        return "Average checkpoints that tie the same weights; skip others with --exclude."
    return "Average checkpoints of one architecture and one run; skip others with --exclude."


def _prefix_between(specs: Sequence[CheckpointSpec]) -> str:
    """Returns the prefix that all names of some checkpoints have, and no name of the others; empty if there is none."""
    bare = set(min(specs, key=lambda spec: sum(map(len, spec.tensors))).tensors)
    first = next((name for spec in specs if set(spec.tensors) != bare for name in spec.tensors), "")
    prefix = min((first.removesuffix(name) for name in bare if first.endswith(f".{name}")), key=len, default="")
    return prefix if all({name.removeprefix(prefix) for name in spec.tensors} == bare for spec in specs) else ""
