"""Tensor names, without the prefixes of wrappers; and tables of the named tensors, shared by equal headers.

Wrappers such as DataParallel (``module.``) or torch.compile (``_orig_mod.``) put a prefix in front of every name. Such
a prefix is stripped, repeatedly, if *all* names have it, so that the average loads into the bare model. A counter that
averaging models store next to the weights is removed first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

from ckpt_avg.checkpoint.spec import CheckpointSpec, TensorSpec
from ckpt_avg.errors import fail
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.trainer import Trainer
from ckpt_avg.limits import LIMITS
from ckpt_avg.machine import gc_paused
from ckpt_avg.text import listing, plural, quote

PREFIXES = (
    "module.",
    "_module.",  # Opacus
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_forward_module.",
)
# torch's clean_tensor_name removes these from the middle of names too (torch/distributed/fsdp/_common_utils.py).
_ANYWHERE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_COUNTERS = tuple(trainer.counter for trainer in TRAINERS if trainer.counter)


class HasShape(Protocol):
    """A tensor in any form."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions."""


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a checkpoint's tensors, and what they say about the checkpoint.

    Attributes:
        renamed: name in the file → name without prefixes; counters are not in it.
        prefix: what was stripped from every name.
        counters: the skipped counters.
        notes: what the user should know.
        lacks_prefix: whether no name has the prefix that the user gave.
        kind: the trainer or library, if known.
        averaged: what shows that the weights are already an average; empty if nothing does.
        forms: of the names without prefixes, as `forms_of` returns them.
    """

    renamed: Mapping[str, str]
    prefix: str = ""
    counters: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lacks_prefix: bool = False
    kind: str | None = None
    averaged: str = ""
    forms: Set[str] = frozenset()

    def make_spec(
        self,
        path: Path,
        form: str,
        tensors: Mapping[str, TensorSpec],
        *,
        kind: str | None = None,
        averaged: str = "",
        notes: tuple[str, ...] = (),
        **more: Any,
    ) -> CheckpointSpec:
        """Returns the spec of a checkpoint with these names; ``kind`` is the default, and ``more`` its other fields."""
        return CheckpointSpec(
            path,
            form,
            tensors,
            kind=self.kind or kind,
            prefix=self.prefix,
            lacks_prefix=self.lacks_prefix,
            averaged=averaged or self.averaged,
            notes=(*notes, *self.notes),
            **more,
        )


def settle_names(
    tensors: Mapping[str, HasShape],
    prefix: str | None,
    path: Path,
    trainer: Trainer | None = None,
    *,
    strip: bool = True,
) -> Names:
    """Strips and checks the names of a state dict's tensors; ``prefix`` is one more prefix to strip, or empty for none.

    Raises:
        CheckpointFormatError: a name cannot be written, two names become equal, or they are FSDP's flat parameters.
    """
    if strip and prefix != "":
        scalars = {name for name in _COUNTERS if name in tensors and tensors[name].shape == ()}
        names = strip_prefixes(tensors, scalars, prefix, str(path))
    else:
        names = Names({name: name for name in tensors})
    check_names(names.renamed.values(), path)
    _refuse_flat_parameters(names.renamed.values(), path)
    forms = forms_of(names.renamed.values())
    kind, averaged, notes = trainer.name if trainer else None, "", names.notes
    for each in TRAINERS:
        if each.counter in names.counters and each is not trainer:
            averaged = f"it contains {each.counter}, the counter of {each.name}"
            kind = kind or each.name
        if each.tensor_names and any(map(re.compile(each.tensor_names).search, forms)):
            kind = kind or each.name
            notes += (each.note,) if each.note else ()
    return replace(names, kind=kind, averaged=averaged, notes=notes, forms=forms)


def strip_prefixes(names: Collection[str], scalars: Collection[str], prefix: str | None, where: str) -> Names:
    """Strips the prefixes of wrappers, then ``prefix`` from the names that have it; ``scalars`` have no dimensions.

    Raises:
        CheckpointFormatError: two names become equal.
    """
    counters = tuple(name for name in _COUNTERS if name in scalars)
    weights = [name for name in names if name not in counters]
    if not counters or not weights or not all(name.startswith("module.") for name in weights):
        counters, weights = (), list(names)
    common, stripped = _strip_common(weights)
    notes: list[str] = []
    lacks_prefix = False
    if prefix:
        prefix = prefix if prefix.endswith(".") else f"{prefix}."
        count = sum(name.startswith(prefix) and name != prefix for name in stripped)
        if count:
            more, stripped = _strip_common([name.removeprefix(prefix) or name for name in stripped])
            if count == len(stripped):
                common += prefix + more
            else:
                notes.append(f"{quote(prefix)} stripped from {count:,} of {plural(len(stripped), 'name')}")
        elif f".{prefix}" not in f".{common}":
            lacks_prefix = True
    text = "\n".join(stripped)  # to search this is much faster than to search each name
    if any(wrapper in text for wrapper in _ANYWHERE):
        clean = [_without_wrappers(name) for name in stripped]
        if clean != stripped and len(set(clean)) == len(clean):
            changed = sum(a != b for a, b in zip(clean, stripped, strict=True))
            notes.append(f"wrapper names removed from the middle of {plural(changed, 'name')}")
            stripped = clean
    if "._orig_mod." in text and any("._orig_mod." in name for name in stripped):
        notes.append("names contain torch.compile's '_orig_mod': they load into a model compiled in the same places")
    result = dict(zip(weights, stripped, strict=True))
    if stripped != weights and len(set(stripped)) < len(result):
        twice = sorted(name for name, times in Counter(stripped).items() if times > 1)
        problem = f"without the prefix two tensors would have the same name: {listing(map(quote, twice))}"
        fail(where, problem, "Choose another --strip-prefix")
    if common:
        notes.insert(0, f"{quote(common)} stripped from every name")
    return Names(result, common, counters, tuple(notes), lacks_prefix)


def _strip_common(names: Iterable[str]) -> tuple[str, list[str]]:
    """Returns the wrappers' prefixes that all names have, and the names without them."""
    common, rest = "", list(names)
    while rest:
        found = next((each for each in PREFIXES if all(name.startswith(each) and name != each for name in rest)), None)
        if found is None:
            break
        common += found
        rest = [name[len(found) :] for name in rest]
    return common, rest


def _without_wrappers(name: str) -> str:
    whole = name
    for wrapper in _ANYWHERE:
        if wrapper in name:
            parts = name.split(".")
            name = ".".join(part for part in parts[:-1] if f"{part}." != wrapper) + "." + parts[-1]
            name = name.removeprefix(".")
    return name if name else whole


def without_wrappers(name: str) -> str:
    """Returns a name without any part that a wrapper adds: ``module._orig_mod.layer.weight`` → ``layer.weight``."""
    *parts, last = name.split(".")
    return ".".join((*(part for part in parts if f"{part}." not in PREFIXES), last))


def _refuse_flat_parameters(names: Collection[str], path: Path) -> None:
    """Raises CheckpointFormatError for FSDP's flat parameters, of which each rank has a part."""
    if "flat_param" not in "\n".join(names):  # nearly always
        return
    if flat := [name for name in names if re.fullmatch(r"_?flat_param(_\d+)?", name.rpartition(".")[2])]:
        problem = f"it has flat parameters of FSDP ({listing(map(quote, flat))}), of which each rank has a part"
        fail(path, problem, "Save with StateDictType.FULL_STATE_DICT or torch.distributed.checkpoint instead")


_ZEROS = str.maketrans("123456789", "000000000")


def forms_of(names: Iterable[str]) -> Set[str]:
    """Returns names with each digit as 0: those of many layers become a few, which are searched instead."""
    if isinstance(names, TensorTable):
        return names.names.forms
    return set("\n".join(names).translate(_ZEROS).split("\n"))


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8: it cannot with a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_names(names: Collection[str], path: Path) -> None:
    """Does what `check_name` does for each of many names."""
    text = "\n".join(names)
    if not text.isascii() or "\0" in text or "__metadata__" in text or max(map(len, names), default=0) > LIMITS.name:
        for name in names:
            check_name(name, path)


def check_name(name: str, path: Path) -> None:
    """Raises CheckpointFormatError for a name that no safetensors file can hold."""
    if name.isascii() and len(name) <= LIMITS.name and "\0" not in name and name != "__metadata__":
        return
    advice = "Rename the tensor"
    if not is_text(name):
        fail(path, "its name has a lone surrogate, so it is not text", advice, tensor=name)
    if name == "__metadata__":
        fail(path, "safetensors reserves this name for its metadata", advice, tensor=name)
    if "\0" in name:
        fail(path, "its name has a NUL character", advice, tensor=name)
    if (length := len(name.encode("utf-8"))) > LIMITS.name:
        fail(path, f"expected a name of at most {LIMITS.name:,} bytes, got {length:,}", advice, tensor=name)


class TensorTable(dict[str, TensorSpec]):
    """The tensors of a checkpoint by stripped name. Open checkpoints share it, so it is never changed.

    Args:
        tensors: by the names in the file.
        names: the names.
        metadata: of a safetensors file.
        digest: of its header, as `CheckpointSpec.digest`.
        parts: the tables of the shards, kept for the next checkpoint.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorSpec],
        names: Names,
        metadata: Mapping[str, str] | None = None,
        digest: str = "",
        parts: Collection[Mapping[str, TensorSpec]] = (),
    ) -> None:
        renamed = names.renamed
        is_same = list(tensors) == list(renamed.values())
        super().__init__(tensors if is_same else {new: replace(tensors[old], name=new) for old, new in renamed.items()})
        self.names, self.metadata, self.digest, self.parts = names, metadata or {}, digest, parts


_TABLES: WeakValueDictionary[object, TensorTable] = WeakValueDictionary()


def shared_table(key: tuple[object, ...], make: Callable[[], TensorTable]) -> TensorTable:
    """Returns the table of a key, made once while any checkpoint with it is open.

    Checkpoints of one run mostly have the same header, byte for byte. Everything that the table depends on must be in
    the key.
    """
    table = _TABLES.get(key)
    if table is None:
        with gc_paused():
            table = _TABLES[key] = make()
    return table
