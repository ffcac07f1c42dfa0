"""Which part of a torch file is the state dict.

In order: the key that the user names; the key where the file's trainer stores it (`Trainer.layouts`); a key that many
scripts use; the file itself, if its values are tensors; the only other dict of named tensors. If several remain, the
error lists them. A pickled module counts as its state dict. Training state is never weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt_avg.errors import CheckpointFormatError, NoWeightsError, fail
from ckpt_avg.formats.pickles.mappings import Attributes
from ckpt_avg.formats.pickles.nn_modules import is_module, module_tensors
from ckpt_avg.formats.pickles.stand_ins import Foreign, PickledTensor, UnreadableTensor
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.tensor_dicts import (
    find_tensor_dicts,
    follow,
    hidden_tensor,
    holds_only_numbers,
    is_tensor_dict,
    joined_parts,
    keys_to_weights,
)
from ckpt_avg.formats.trainers.any_script import (
    EMA_KEYS,
    OPTIMIZER_TENSOR,
    RAW_KEYS,
    RNG_STATE,
    describe_training_state,
    is_ema_key,
    is_training_state,
)
from ckpt_avg.formats.trainers.ema_pytorch import separate_models
from ckpt_avg.formats.trainers.lit_ema import averaged_weights
from ckpt_avg.formats.trainers.records import recognise
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.trainer import Contents, Layout, Trainer
from ckpt_avg.text import argument, listing, quote, suggestion
from ckpt_avg.wording import setting

# Of files without a known layout: keys of any script, and of trainers that keep only their EMA weights there.
_TRAINERS_KEYS = (layout.ema for trainer in TRAINERS for layout in trainer.layouts)
_MOST_ITEMS = 1000  # of a list in place of a dict
_EMA_KEYS = (*EMA_KEYS, *(key for key in _TRAINERS_KEYS if key and key not in (*EMA_KEYS, *RAW_KEYS)))


@dataclass(frozen=True, slots=True)
class StateDict:
    """The state dict of a torch file.

    Attributes:
        key: its dotted key; None: the file itself.
        tensors: its tensors by name.
        others: its names without a tensor.
        trainer: the trainer whose layout the file has.
        ema: whether it is a running average of weights.
        notes: how it was chosen, and what was skipped.
    """

    key: str | None
    tensors: Mapping[str, PickledTensor]
    others: tuple[str, ...]
    trainer: Trainer | None = None
    ema: bool = False
    notes: tuple[str, ...] = ()


def find_state_dict(root: object, path: Path, reading: Reading) -> StateDict:
    """Returns the state dict of what a torch file contains.

    Raises:
        CheckpointFormatError: there is none, or several candidates, or it contains tensors without plain elements.
    """
    if isinstance(root, (list, tuple)) and not any(isinstance(item, PickledTensor) for item in root):
        root = {str(index): item for index, item in enumerate(root[:_MOST_ITEMS])}
    for value in (root, *(root.values() if isinstance(root, dict) else ())):
        separate_models(value)
    trainer, layout = recognise(Contents(root)) or (None, None)
    search = _Search(root, path, reading.ema, trainer, layout)
    if (key := reading.state_key) is None:
        return replace(search.choose(), trainer=trainer)
    if follow(root, key, follow) is follow:  # which no file contains
        near = suggestion(key, root) if isinstance(root, dict) else ""
        problem = f"expected the key {quote(key)}, got {_contents(root)}.{near or ' Choose one with --state-key.'}"
        raise CheckpointFormatError(f"{path}: {problem}")
    is_ema = key == layout.ema if layout else key in _EMA_KEYS or is_ema_key(key)
    return replace(search.open(key), trainer=trainer, ema=is_ema)


@dataclass(frozen=True, slots=True)
class _Search:
    """A search for the state dict. The key "" is the file itself."""

    root: object
    path: Path
    ema: bool
    trainer: Trainer | None
    layout: Layout | None

    def choose(self) -> StateDict:
        """Returns the state dict where it is expected, or the only one."""
        root = self.root
        if self.layout is not None:
            raw, ema = (self._holding([key] if key else []) for key in (self.layout.raw, self.layout.ema))
            if not self.layout.ema:
                ema = [key for key in self._usual()[1] if key not in raw]
            if raw or ema:
                return self._choose(raw, ema)
        if is_module(root) and not self.ema:
            found = self.open("")
            note = "the file is a pickled module: its tensors have the names of its state_dict()"
            return replace(found, notes=(note, *found.notes))
        if isinstance(root, Foreign) and not is_module(root):
            raise NoWeightsError(f"{self.path}: {_pickled(root.described())}")
        if state := describe_training_state(root):
            raise NoWeightsError(f"{self.path}: expected a state dict, got {state}. Save model.state_dict().")
        everywhere = [".".join(keys) for keys in find_tensor_dicts(root)]
        raw, ema = self._usual()
        if not raw and not ema and len(everywhere) > 1:
            inside = [pair for key in keys_to_weights(root) if any(pair := self._usual(f"{key}."))]
            raw, ema = inside[0] if len(inside) == 1 else (raw, ema)
        if not raw and everywhere[:1] == [""]:
            raw = [""]
        if ema and not raw and not self.ema:
            raw = [key for key in everywhere if not any(f"{each}.".startswith(f"{key}.") for each in ema)]
            if len(raw) > 1 or (raw and not self._share_names(raw[0], ema[0])):
                raise CheckpointFormatError(f"{self.path}: {_several([*raw, *ema])}")
        if len(raw) <= 1 and len(ema) <= 1 and (raw or ema):
            return self._choose(raw, ema)
        if not raw and not ema:
            return self._only(everywhere)
        raise CheckpointFormatError(f"{self.path}: {_several(ema if self.ema else raw or ema)}")

    def _only(self, keys: Sequence[str]) -> StateDict:
        """Returns the only dict of tensors in the file."""
        if self.ema:
            raise CheckpointFormatError(f"{self.path}: {_no_ema(self.root)}")
        if not keys:
            raise NoWeightsError(f"{self.path}: {self._nothing()}")
        if len(keys) > 1:
            raise CheckpointFormatError(f"{self.path}: {_several(keys)}")
        found = self.open(keys[0])
        note = f"the weights are under {quote(keys[0])}, the only dict of named tensors"
        return replace(found, notes=(note, *found.notes))

    def _usual(self, inside: str = "") -> tuple[list[str], list[str]]:
        """Returns the keys of raw and of EMA weights that scripts use, in the file or in one dict of it."""
        raw = self._holding([f"{inside}{key}" for key in RAW_KEYS])
        keys = [f"{inside}{key}" for key in _EMA_KEYS]
        ema = self._holding_ema(keys)
        value = follow(self.root, inside.removesuffix("."))
        return raw, ema or self._holding_ema([f"{inside}{key}" for key in keys_to_weights(value) if is_ema_key(key)])

    def _holding(self, keys: Sequence[str]) -> list[str]:
        """Returns the keys with weights; without whole modules, if there is a state dict."""
        values = {key: self._value(key) for key in keys}
        found = [key for key, value in values.items() if is_tensor_dict(value) or joined_parts(value) is not None]
        return found or [key for key, value in values.items() if is_module(value)]

    def _holding_ema(self, keys: Sequence[str]) -> list[str]:
        """As `_holding`, also if an EMA has its weights under a key of its own, next to its decay."""
        found = []
        for key in keys:
            separated = f"{key}.ema_model"  # next to counters
            inner = find_tensor_dicts(self._value(key))
            nested = ".".join([key, *inner[0]]) if len(inner) == 1 else key
            found.append(separated if is_tensor_dict(self._value(separated)) else nested)
        return self._holding(list(dict.fromkeys(found)))

    def _value(self, key: str) -> object:
        found = follow(self.root, key)
        return Contents(self.root).get(key) if found is None else found

    def _share_names(self, *keys: str) -> bool:
        """Whether two state dicts have a name in common, under wrappers or not."""
        first, second = ({str(name).removeprefix("module.") for name in _names(self._value(key))} for key in keys)
        return bool(first & second)

    def _choose(self, raw: Sequence[str], ema: Sequence[str]) -> StateDict:
        """Takes the raw weights or their running average, as asked, and notes which, if there are both."""
        inside = [key for key in raw if averaged_weights(self._value(key))]
        if self.ema and not ema and not inside:
            raise CheckpointFormatError(f"{self.path}: {_no_ema(self.root)}")
        key = ema[0] if ema and (self.ema or not raw) else raw[0]
        found = self.open(key, skip={each.partition(".")[0] for each in ema} if not key else ())
        tensors = dict(found.tensors)
        also = self.layout.also if self.layout else {}
        used = [f"{each}." for each in (key, *raw, *ema, *also)]
        tops = dict.fromkeys(keys[0] for keys in find_tensor_dicts(self.root) if keys)
        others = [top for top in tops if not any(each.startswith(f"{top}.") for each in used)]
        notes = list(found.notes)
        weights = f"under {quote(raw[0])}" if raw and raw[0] else "of the file itself"
        if raw and ema and self.ema:
            notes.append(f"read the EMA weights under {quote(key)}; without --ema, the raw weights {weights}")
        elif raw and ema:
            notes.append(f"read the raw weights {weights}; with --ema, the EMA weights under {quote(ema[0])}")
        elif inside:
            other = "without --ema, the raw ones" if self.ema else "--ema reads them"
            notes.append(f"EMA weights are under {quote(key)} as well, as model_ema.* ({other})")
        elif not raw:
            notes.append(f"{'read the' if others else 'there are only'} EMA weights, under {quote(key)}")
        for inner, prefix in also.items():
            part = self.open(inner)
            tensors.update({f"{prefix}{name}": tensor for name, tensor in part.tensors.items()})
            notes.append(f"the tensors under {quote(inner)} get the prefix {prefix}, as in the whole model")
        if others:
            notes.append(f"there are other state dicts: {listing(map(quote, others))} (choose one with --state-key)")
        if self.trainer and self.trainer.note:
            notes.append(self.trainer.note)
        return replace(found, tensors=tensors, ema=self.ema or key not in raw, notes=tuple(notes))

    def open(self, key: str, skip: Collection[str] = ()) -> StateDict:
        """Returns the state dict under a key, without some of its entries."""
        where = f"{self.path}: {f'key {quote(key)}' if key else 'the file'}"
        value = self._value(key)
        if self.ema:
            value = averaged_weights(value) or value
        notes: tuple[str, ...] = ()
        if isinstance(value, Foreign):
            if not is_module(value):
                raise CheckpointFormatError(f"{where}: {_pickled(value.described())}")
            try:
                value = module_tensors(value)
            except CheckpointFormatError as error:
                raise CheckpointFormatError(f"{where}: {error}") from None
        if key and (joined := joined_parts(value)) is not None:
            tops = dict.fromkeys(keys[0] for keys in find_tensor_dicts(value))
            notes = (
                f"the parts {listing(map(quote, tops))} are read as one model, with their keys in front of the names",
            )
            value = joined
        if not isinstance(value, dict):
            raise CheckpointFormatError(f"{where}: expected a state dict, got {_contents(value)}.")
        entries = {name: item for name, item in value.items() if name not in skip}
        tensors, others = _separate(entries, where, key)
        return StateDict(key or None, tensors, others, notes=notes)

    def _nothing(self) -> str:
        for key in RAW_KEYS:
            if described := _class_of(self._value(key)):
                return f"key {quote(key)}: {_pickled(described)}"
        if described := _class_of(self.root):
            return _pickled(described)
        got = f"{_contents(self.root)}, which contains no named tensors"
        return f"expected a state dict, got {got}. Save model.state_dict()."


def _names(value: object) -> Iterable[object]:
    try:
        return module_tensors(value) if isinstance(value, Foreign) else value if isinstance(value, dict) else ()
    except CheckpointFormatError:
        return ()  # it is refused when it is chosen


def _separate(entries: Mapping[Any, object], where: str, key: str) -> tuple[dict[str, PickledTensor], tuple[str, ...]]:
    """Returns the tensors of a state dict, and the names of its other entries.

    Raises:
        CheckpointFormatError: an entry contains tensors that would be lost.
    """
    tensors: dict[str, PickledTensor] = {}
    others: list[str] = []
    looked_at: set[int] = set()
    for name, item in entries.items():
        if isinstance(name, str) and _is_skipped(name, item, at_top=not key):
            others.append(name)
        elif isinstance(item, UnreadableTensor):
            fail(where, f"expected a plain tensor, got {item.kind}", item.advice, tensor=name)
        elif isinstance(item, PickledTensor) and isinstance(name, str):
            tensors[name] = item
        elif isinstance(item, PickledTensor):
            fail(where, f"expected tensor names, got the key {quote(name)}", "Save a dict of named tensors")
        elif isinstance(item, dict) and not isinstance(item, Attributes) and find_tensor_dicts(item, looked_at):
            problem = f"expected names and tensors, got another dict of tensors under {quote(name)}"
            inner = argument(f"{key}.{name}" if key else str(name))
            fail(where, problem, f"Choose one part with {setting('--state-key', inner)}")
        elif hidden := hidden_tensor(item):
            _refuse_hidden(f"{where}: {quote(name)}", item, hidden)
        else:
            others.append(name if isinstance(name, str) else quote(name))
    return tensors, tuple(others)


def _refuse_hidden(where: str, item: object, hidden: PickledTensor) -> None:
    what, advice = "tensors", "Save model.state_dict(), whose values are plain tensors"
    if isinstance(hidden, UnreadableTensor):
        what, advice = hidden.kind, hidden.advice
    fail(where, f"expected a plain tensor, got {what} inside a {_class_of(item) or type(item).__name__}", advice)


def _is_skipped(name: str, item: object, *, at_top: bool) -> bool:
    """Whether an entry of a state dict is training state or metrics; a tensor only by the names of such tensors."""
    if isinstance(item, PickledTensor):
        dtype = getattr(item, "dtype", None)
        is_random = bool(RNG_STATE.fullmatch(name)) and (dtype is None or dtype.name == "U8")
        return at_top and (is_random or bool(OPTIMIZER_TENSOR.fullmatch(name)))
    return is_training_state(name, item) or (at_top and holds_only_numbers(item))


def _pickled(described: str) -> str:
    return (
        f"expected a state dict, got a pickled object of class {described!r}. In a trusted environment, load it and "
        "save model.state_dict() instead."
    )


def _class_of(value: object) -> str:
    """Returns the class of a pickled object, also of one that is read as a dict; empty for other values."""
    return value.described if isinstance(value, Attributes) else value.described() if isinstance(value, Foreign) else ""


def _no_ema(root: object) -> str:
    items = root.items() if isinstance(root, dict) else ()
    for key, value in items:
        inner = list(value.values()) if isinstance(value, dict) else value
        if isinstance(key, str) and is_ema_key(key) and hidden_tensor(inner):
            return (
                f"--ema: the EMA under {quote(key)} has no names, only the order of a model's parameters. Load it with "
                "the code that wrote it and save a state dict."
            )
    return f"--ema: expected EMA weights (under {', '.join(EMA_KEYS[:5])}, …), got {_contents(root)}. Omit --ema."


def _several(keys: Sequence[str]) -> str:
    return (
        f"expected one state dict, got several: {listing(map(quote, keys))}. "
        f"Choose one with --state-key, for example {setting('--state-key', keys[0])}."
    )


def _contents(root: object) -> str:
    if isinstance(root, dict):
        return f"a dict with the keys {listing(quote(key) for key in root)}" if root else "an empty dict"
    if isinstance(root, PickledTensor):
        return "a single tensor without a name"
    return f"an object of type {_class_of(root) or type(root).__name__}"
