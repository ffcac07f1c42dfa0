"""What a torch file holds → its `CheckpointSpec`: the state dict is chosen, its names stripped, its tensors placed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_avg.checkpoint.spec import Checkpoint, CheckpointSpec, TensorSpec
from ckpt_avg.checkpoint.training_record import measure
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.in_memory import MemoryFile
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.names import check_name
from ckpt_avg.formats.pickles.leaves import Leaf, StoredTensor
from ckpt_avg.formats.pickles.numpy_arrays import StoredArray
from ckpt_avg.formats.place import FileContents, Place, place
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.state_dict import StateDict, find_state_dict
from ckpt_avg.formats.tensor_names import Stripped, strip_prefixes
from ckpt_avg.formats.trainers.records import element, plain_values, record_of
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.trainer import Contents, Trainer
from ckpt_avg.text import listing, plural, quote, size

RUNNING_AVERAGE = "a running average of weights"


@dataclass(frozen=True, slots=True)
class Names:
    """What is known of a checkpoint once its names are."""

    stripped: Stripped
    kind: str | None
    averaged: str
    notes: tuple[str, ...]


def settle_names(
    tensors: Mapping[str, bool], reading: Reading, path: Path, trainer: Trainer | None = None, *, strip: bool = True
) -> Names:
    """Strips the names of a state dict and says what they tell.

    Args:
        tensors: name → whether the tensor has one element without dimensions.
        reading: may name one more prefix.
        path: what to name in errors.
        trainer: the trainer of the file, if it is known.
        strip: whether to take prefixes off.

    Raises:
        CheckpointFormatError: a name cannot be written, or two become one.
    """
    scalars = {name for name, scalar in tensors.items() if scalar}
    stripped = Stripped({name: name for name in tensors})
    if strip:
        stripped = strip_prefixes(tensors, scalars, reading.strip_prefix, str(path))
    for name in stripped.names.values():
        check_name(name, path)
    kind, averaged, notes = trainer.name if trainer else None, "", stripped.notes
    for each in TRAINERS:
        if each.counter in stripped.counters and each is not trainer:
            averaged = f"it holds {each.counter}, the counter of {each.name}"
            kind = kind or each.name
        if each.tensor_names and any(map(re.compile(each.tensor_names).search, stripped.names.values())):
            kind = kind or each.name
            notes += (each.note,)
    return Names(stripped, kind, averaged, notes)


def assemble(
    file: InputFile,
    form: str,
    held: FileContents,
    reading: Reading,
    *,
    strip: bool = True,
) -> Checkpoint:
    """Returns the open checkpoint of a torch file.

    Args:
        file: the file.
        form: the name of its format.
        held: what its pickle holds.
        reading: how to read it.
        strip: whether to take wrappers' prefixes off.

    Raises:
        CheckpointFormatError: there is no one state dict, or a tensor is damaged.
    """
    contents, place_of = held.objects, held.place_of
    found = find_state_dict(contents, file.path, reading)
    names = settle_names(
        {
            name: isinstance(leaf, (StoredTensor, StoredArray)) and leaf.shape == ()
            for name, leaf in found.tensors.items()
        },
        reading,
        file.path,
        found.trainer,
        strip=strip,
    )
    memory = MemoryFile(file.path)
    tensors = {
        new: _spec(file.path, new, found.tensors[old], place_of, memory) for old, new in names.stripped.names.items()
    }

    def scalar(leaf: object) -> float | None:
        if isinstance(leaf, StoredTensor) and leaf.shape in ((), (1,)):
            try:
                spec = place(file.path, "(recorded)", leaf, place_of(leaf.storage.key))
            except CheckpointFormatError:
                return None  # a damaged number beside the weights does them no harm
            return element(spec.dtype, file.read(spec.offset, spec.dtype.itemsize))
        if isinstance(leaf, StoredArray) and leaf.dtype is not None and leaf.shape in ((), (1,)):
            return element(leaf.dtype, bytes(leaf.contents))
        return measure(leaf)

    notes = (*found.notes, *names.notes)
    if memory.size:
        notes += (f"numpy arrays, which the pickle holds itself, are in memory: {size(memory.size)}",)
    notes += without_tensor(found.others)
    averaged = names.averaged or average_mark(found.ema, found.key)
    spec = CheckpointSpec(
        file.path,
        form,
        tensors,
        kind=names.kind,
        keys=keys_of(contents, found.key),
        state_key=found.key,
        prefix=names.stripped.prefix,
        lacks_prefix=names.stripped.lacking,
        record=record_of(Contents(_beside(contents, found), scalar), found.trainer),
        averaged=averaged,
        metadata=plain_values(contents),
        notes=notes,
        digest=held.digest,
    )
    return Checkpoint(spec, (file, memory) if memory.size else (file,))


def without_tensor(names: Sequence[str]) -> tuple[str, ...]:
    """Returns a note on entries of a state dict that are no tensors, if there are any."""
    if not names:
        return ()
    return (f"{plural(len(names), 'entry')} without a tensor left out: {listing(map(quote, names))}",)


def _beside(contents: object, found: StateDict) -> object:
    """Returns what a file holds beside the weights: in a bare state dict a scalar is a weight, not a metric."""
    if found.key is None and isinstance(contents, dict):
        return {key: value for key, value in contents.items() if key not in found.tensors}
    return contents


def keys_of(contents: object, state_key: str | None) -> tuple[str, ...]:
    """Returns the keys at the top of a torch file that is no bare state dict."""
    if not isinstance(contents, dict) or state_key is None:
        return ()
    return tuple(key if isinstance(key, str) else quote(key) for key in contents)


def average_mark(ema: bool, key: str | None) -> str:
    """Returns what is said of weights that are an EMA; nothing of others."""
    return f"{RUNNING_AVERAGE}, under {quote(key)}" if ema else ""


def _spec(path: Path, name: str, leaf: Leaf, place_of: Callable[[str], Place | None], memory: MemoryFile) -> TensorSpec:
    if isinstance(leaf, StoredTensor):
        return place(path, name, leaf, place_of(leaf.storage.key))
    if isinstance(leaf, StoredArray) and leaf.dtype is not None:
        begin = memory.add(leaf.contents)
        return TensorSpec(name, leaf.dtype, leaf.shape, leaf.stride, 1, begin, (begin, len(leaf.contents)))
    problem = leaf.problem if isinstance(leaf, StoredArray) else type(leaf).__name__
    raise CheckpointFormatError(
        f"{path}: tensor {quote(name)}: expected a plain tensor, got {problem}. Save it as a plain tensor."
    )


def rename(tensors: Iterable[TensorSpec], names: Mapping[str, str]) -> dict[str, TensorSpec]:
    """Returns the tensors under their new names; those without one are left out."""
    return {
        names[tensor.name]: tensor if names[tensor.name] == tensor.name else replace(tensor, name=names[tensor.name])
        for tensor in tensors
        if tensor.name in names
    }
