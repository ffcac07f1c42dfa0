"""What wrappers put in front of every name: ``module.`` of DataParallel, ``_orig_mod.`` of torch.compile, and others.

They are taken off, again and again, where *all* names carry them, so that the average loads into the bare model. A
counter that averaging models keep beside the weights is set aside first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.text import listing, plural, quote

PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_forward_module.")
# torch's own clean_tensor_name takes these out of the middle of names too (torch/distributed/fsdp/_common_utils.py).
_ANYWHERE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_COUNTERS = tuple(trainer.counter for trainer in TRAINERS if trainer.counter)


@dataclass(frozen=True, slots=True)
class Stripped:
    """The names of a state dict without their wrappers.

    Attributes:
        names: name in the file → name without the wrappers, counters left out.
        prefix: what was taken off the front of every name.
        counters: the counters that were left out.
        notes: what the user should know.
        lacking: whether no name carries the prefix that the user named.
    """

    names: Mapping[str, str]
    prefix: str = ""
    counters: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lacking: bool = False


def strip_prefixes(names: Collection[str], scalars: Collection[str], prefix: str | None, where: str) -> Stripped:
    """Takes wrappers' prefixes off.

    Args:
        names: the names in the file.
        scalars: those that name a tensor of one element.
        prefix: one more prefix, which the user names; taken off the names that carry it.
        where: what to name in errors.

    Raises:
        CheckpointFormatError: two names become one.
    """
    counters = tuple(name for name in _COUNTERS if name in scalars)
    weights = [name for name in names if name not in counters]
    if not counters or not weights or not all(name.startswith("module.") for name in weights):
        counters, weights = (), list(names)
    taken, stripped = _take_off(weights)
    notes: list[str] = []
    lacking = False
    if prefix:
        prefix = prefix if prefix.endswith(".") else f"{prefix}."
        carrying = sum(name.startswith(prefix) and name != prefix for name in stripped)
        if carrying:
            again, stripped = _take_off([name.removeprefix(prefix) or name for name in stripped])
            if carrying == len(stripped):
                taken += prefix + again
            else:
                notes.append(f"{quote(prefix)} stripped from {carrying:,} of {plural(len(stripped), 'name')}")
        elif f".{prefix}" not in f".{taken}":
            lacking = True
    inner = [_clean(name) for name in stripped]
    if inner != stripped and len(set(inner)) == len(inner):
        changed = sum(a != b for a, b in zip(inner, stripped, strict=True))
        notes.append(f"the names of wrappers taken out of {plural(changed, 'name')}")
        stripped = inner
    if any("._orig_mod." in name for name in stripped):
        notes.append("names hold torch.compile's '_orig_mod' inside, and load into a model compiled in the same places")
    result = dict(zip(weights, stripped, strict=True))
    if len(set(stripped)) < len(result):
        twice = sorted(name for name, times in Counter(stripped).items() if times > 1)
        raise CheckpointFormatError(
            f"{where}: without their prefix two tensors would have one name: {listing(map(quote, twice))}. "
            "Choose another --strip-prefix."
        )
    if taken:
        notes.insert(0, f"{quote(taken)} stripped from every name")
    return Stripped(result, taken, counters, tuple(notes), lacking)


def _take_off(names: Iterable[str]) -> tuple[str, list[str]]:
    """Returns what was taken off every name, and the names without it."""
    taken, rest = "", list(names)
    while rest:
        found = next((each for each in PREFIXES if all(name.startswith(each) and name != each for name in rest)), None)
        if found is None:
            break
        taken += found
        rest = [name[len(found) :] for name in rest]
    return taken, rest


def _clean(name: str) -> str:
    whole = name
    for wrapper in _ANYWHERE:
        if wrapper in name:
            parts = name.split(".")
            name = ".".join(part for part in parts[:-1] if f"{part}." != wrapper) + "." + parts[-1]
            name = name.removeprefix(".")
    return name if name else whole
