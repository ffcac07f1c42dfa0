"""Which part of a torch file is the state dict.

In order: the key that the user names; the key where the file's trainer stores it (`Trainer.layouts`); a key that many
scripts use; the file itself, if its values are tensors; the only other dict of named tensors. If several remain, the
error lists them. A pickled module counts as its state dict. Training state is never weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt_avg.errors import CheckpointFormatError, NoWeightsError, fail
from ckpt_avg.formats.pickles.mappings import Attributes
from ckpt_avg.formats.pickles.nn_modules import is_module, module_tensors
from ckpt_avg.formats.pickles.stand_ins import Foreign, PickledTensor, UnreadableTensor
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.trainers.any_script import EMA_KEYS, RAW_KEYS, RNG_STATE, is_training_state
from ckpt_avg.formats.trainers.ema_pytorch import separate_models
from ckpt_avg.formats.trainers.records import recognise
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.trainer import Contents, Layout, Trainer
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import argument, listing, quote

# Of files without a known layout: keys of any script, and of trainers that keep only their EMA weights there.
_TRAINERS_KEYS = (layout.ema for trainer in TRAINERS for layout in trainer.layouts)
_EMA_KEYS = (*EMA_KEYS, *(key for key in _TRAINERS_KEYS if key and key not in (*EMA_KEYS, *RAW_KEYS)))
_MOST_VALUES = 1000  # of one entry of a state dict that are searched for tensors


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
        CheckpointFormatError: there is none, or several candidates, or it holds tensors without plain elements.
    """
    for value in (root, *(root.values() if isinstance(root, dict) else ())):
        separate_models(value)
    contents = Contents(root)
    trainer, layout = recognise(contents) or (None, None)
    if (key := reading.state_key) is not None:
        is_ema = key == layout.ema if layout else key in _EMA_KEYS
        found = replace(_state_dict(_walk(root, path, key), path, key), ema=is_ema)
    else:
        found = _search(contents, path, reading, trainer, layout)
    return replace(found, trainer=trainer)


def _search(
    contents: Contents, path: Path, reading: Reading, trainer: Trainer | None, layout: Layout | None
) -> StateDict:
    root = contents.root
    if layout is not None:
        raw, ema = (_those_that_hold(contents, [key] if key else []) for key in (layout.raw, layout.ema))
        if raw or ema:
            return _choose(contents, path, reading, raw, ema, trainer, layout)
    if is_module(root) and not reading.ema:
        note = "the file is a pickled module: its tensors have the names of its state_dict()"
        return _with_note(_state_dict(root, path, None), note)
    if isinstance(root, Foreign) and not is_module(root):
        raise NoWeightsError(f"{path}: {_pickled(root.described())}")
    raw, ema = _those_that_hold(contents, RAW_KEYS), _those_that_hold(contents, _EMA_KEYS)
    ema = ema or _those_that_hold(contents, [key for key in _top(root) if "ema" in key.lower().split("_")])
    candidates = _candidates(root)
    if ema and not raw and not reading.ema and candidates[:1] != [()]:
        others = [key for key in map(".".join, candidates) if key not in ema]
        if len(others) > 1 or (others and not _share_names(contents, others[0], ema[0])):
            raise CheckpointFormatError(f"{path}: {_no_choice(contents, [*others, *ema])}")
        raw = others
    if candidates[:1] == [()] and not raw and not reading.ema:
        return _state_dict(root, path, None)
    if len(raw) <= 1 and len(ema) <= 1 and (raw or ema):
        return _choose(contents, path, reading, raw, ema)
    if not raw and not ema:
        if reading.ema:
            raise CheckpointFormatError(f"{path}: {_no_ema(root)}")
        if len(candidates) == 1:
            key = ".".join(candidates[0])
            note = f"the weights are under {quote(key)}, the only dict of named tensors"
            return _with_note(_state_dict(_walk(root, path, key), path, key), note)
    if not raw and not ema and not candidates:
        raise NoWeightsError(f"{path}: {_no_choice(contents, ())}")
    several = ema if reading.ema else raw or ema
    raise CheckpointFormatError(f"{path}: {_no_choice(contents, several or list(map('.'.join, candidates)))}")


def _with_note(found: StateDict, note: str) -> StateDict:
    return replace(found, notes=(note, *found.notes))


def _share_names(contents: Contents, *keys: str) -> bool:
    """Whether two state dicts have a name in common, under wrappers or not."""
    first, second = ({str(name).removeprefix("module.") for name in _names(contents.get(key))} for key in keys)
    return bool(first & second)


def _names(value: object) -> Iterable[object]:
    return module_tensors(value) if isinstance(value, Foreign) else value if isinstance(value, dict) else ()


def _choose(
    contents: Contents,
    path: Path,
    reading: Reading,
    raw: Sequence[str],
    ema: Sequence[str],
    trainer: Trainer | None = None,
    layout: Layout | None = None,
) -> StateDict:
    """Takes the raw weights or their running average, as asked, and notes which, if there are both."""
    if reading.ema and not ema:
        raise CheckpointFormatError(f"{path}: {_no_ema(contents.root)}")
    key = ema[0] if reading.ema or not raw else raw[0]
    found = _state_dict(contents.get(key), path, key)
    tensors = dict(found.tensors)
    also = layout.also if layout else {}
    used = {each.partition(".")[0] for each in (key, *raw, *ema, *also)}
    others = [name for name in _top(contents.root) if name not in used and _holds(contents, name)]
    notes = list(found.notes)
    if raw and ema and reading.ema:
        notes.append(f"read the EMA weights under {quote(key)}; without --ema, the raw weights under {quote(raw[0])}")
    elif raw and ema:
        notes.append(f"read the raw weights under {quote(key)}; with --ema, the EMA weights under {quote(ema[0])}")
    elif not raw:
        notes.append(f"{'read the' if others else 'there are only'} EMA weights, under {quote(key)}")
    for inner, prefix in also.items():
        part = _state_dict(contents.get(inner), path, inner)
        tensors.update({f"{prefix}{name}": tensor for name, tensor in part.tensors.items()})
        notes.append(f"the tensors under {quote(inner)} get the prefix {prefix}, as in the whole model")
    if others:
        notes.append(f"there are other state dicts: {listing(map(quote, others))} (choose one with --state-key)")
    if trainer and trainer.note:
        notes.append(trainer.note)
    return StateDict(key, tensors, found.others, ema=key not in raw, notes=tuple(notes))


def _top(root: object) -> list[str]:
    """Returns the keys at the top that may lead to weights."""
    items = root.items() if isinstance(root, dict) else ()
    return [key for key, value in items if isinstance(key, str) and not is_training_state(key, value)]


def _holds(contents: Contents, key: str) -> bool:
    value = contents.get(key)
    return _is_state_dict(value) or is_module(value)


def _those_that_hold(contents: Contents, keys: Sequence[str]) -> list[str]:
    """Returns the keys with weights; without whole modules, if there is a state dict."""
    found = [key for key in keys if _holds(contents, key)]
    return [key for key in found if _is_state_dict(contents.get(key))] or found


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and any(
        isinstance(name, str) and isinstance(value[name], PickledTensor) for name in value
    )


def _candidates(value: object, seen: set[int] | None = None) -> list[tuple[str, ...]]:
    """Returns the keys that lead to each mapping that holds named tensors directly, the nearest to the top first.

    Each mapping is looked at once, level by level, under the first key that leads to it; those in ``seen`` not at all.
    """
    found: list[tuple[str, ...]] = []
    seen = set() if seen is None else seen
    level: list[tuple[tuple[str, ...], object]] = [((), value)]
    for _ in range(LIMITS.nesting + 1):
        inner: list[tuple[tuple[str, ...], object]] = []
        for keys, item in level:
            if id(item) in seen:
                continue
            seen.add(id(item))
            if _is_state_dict(item) or is_module(item):
                found.append(keys)  # anything deeper belongs to it
            elif isinstance(item, dict):
                inner += [((*keys, key), item[key]) for key in _top(item) if isinstance(item[key], (dict, Foreign))]
        level = inner
    return found


def _walk(root: object, path: Path, state_key: str) -> object:
    value: Any = root
    rest = state_key
    while rest:
        if not isinstance(value, dict):
            break
        # A key may itself hold dots, so the longest that fits goes first.
        key = next((rest[:end] for end in _ends(rest) if rest[:end] in value), None)
        if key is None:
            break
        value, rest = value[key], rest[len(key) + 1 :]
    if rest:
        raise CheckpointFormatError(
            f"{path}: expected the key {quote(state_key)}, got {_contents(root)}. Choose one with --state-key."
        )
    return value


def _ends(text: str) -> list[int]:
    return [len(text), *(position for position in range(len(text) - 1, 0, -1) if text[position] == ".")]


def _state_dict(value: object, path: Path, key: str | None) -> StateDict:
    """Separates a state dict's tensors from its other entries.

    Raises:
        CheckpointFormatError: it is none, or an entry holds tensors that would be lost.
    """
    where = f"{path}: {'the file' if key is None else f'key {quote(key)}'}"
    if isinstance(value, Foreign):
        if not is_module(value):
            raise CheckpointFormatError(f"{where}: {_pickled(value.described())}")
        try:
            value = module_tensors(value)
        except CheckpointFormatError as error:
            raise CheckpointFormatError(f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{where}: expected a state dict, got {_contents(value)}.")
    tensors: dict[str, PickledTensor] = {}
    others: list[str] = []
    looked_at: set[int] = set()
    for name, item in value.items():
        if isinstance(name, str) and _is_skipped(name, item, at_top=key is None):
            others.append(name)
            continue
        if isinstance(item, UnreadableTensor):
            fail(where, f"expected a plain tensor, got {item.kind}", item.advice, tensor=name)
        if isinstance(item, dict) and not isinstance(item, Attributes) and _candidates(item, looked_at):
            raise CheckpointFormatError(
                f"{where}: expected names and tensors, got another dict of tensors under {quote(name)}. "
                f"Choose one part with --state-key {argument(f'{key}.{name}' if key else str(name))}."
            )
        if not isinstance(item, PickledTensor) and (hidden := _hidden_tensor(item)):
            kind = _class_of(item) or type(item).__name__
            what = hidden.kind if isinstance(hidden, UnreadableTensor) else "tensors"
            advice = "Save model.state_dict(), whose values are plain tensors"
            advice = hidden.advice if isinstance(hidden, UnreadableTensor) else advice
            fail(f"{where}: {quote(name)}", f"expected a plain tensor, got {what} inside a {kind}", advice)
        if not isinstance(item, PickledTensor):
            others.append(name if isinstance(name, str) else quote(name))
        elif not isinstance(name, str):
            raise CheckpointFormatError(
                f"{where}: expected tensor names, got the key {quote(name)}. Save a dict of named tensors."
            )
        else:
            tensors[name] = item
    return StateDict(key, tensors, tuple(others))


def _is_skipped(name: str, item: object, *, at_top: bool) -> bool:
    """Whether an entry of a state dict is training state; a tensor only if it can be the state of a generator."""
    if isinstance(item, PickledTensor):
        dtype = getattr(item, "dtype", None)
        return at_top and bool(RNG_STATE.fullmatch(name)) and (dtype is None or dtype.name == "U8")
    return is_training_state(name, item)


def _hidden_tensor(item: object) -> PickledTensor | None:
    """Returns a tensor that a list, a tuple or an object holds near its top."""
    found: list[object] = [item]
    for value in itertools.islice(found, _MOST_VALUES):  # it grows meanwhile
        if isinstance(value, PickledTensor):
            return value
        if isinstance(value, Foreign):
            found += [value.state, *value.arguments[:100]]
        elif isinstance(value, (list, tuple)):
            found += value[:100]
        elif isinstance(value, dict) and (value is not item or isinstance(value, Attributes)):
            found += itertools.islice(value.values(), 100)
    return None


def _pickled(described: str) -> str:
    return (
        f"expected a state dict, got a pickled object of class {described!r}. In a trusted environment, load it and "
        "save model.state_dict() instead."
    )


def _class_of(value: object) -> str:
    """Returns the class of a pickled object, also of one that is read as a dict; empty for other values."""
    return value.described if isinstance(value, Attributes) else value.described() if isinstance(value, Foreign) else ""


def _no_ema(root: object) -> str:
    return f"--ema: expected EMA weights (under {', '.join(EMA_KEYS[:5])}, …), got {_contents(root)}. Omit --ema."


def _no_choice(contents: Contents, candidates: Sequence[str]) -> str:
    if candidates:
        return (
            f"expected one state dict, got several: {listing(map(quote, candidates))}. "
            f"Choose one with --state-key, for example --state-key {argument(candidates[0])}."
        )
    for key in RAW_KEYS:
        if described := _class_of(contents.get(key)):
            return f"key {quote(key)}: {_pickled(described)}"
    if described := _class_of(contents.root):
        return _pickled(described)
    return (
        f"expected a state dict, got {_contents(contents.root)}, which holds no named tensors. Save model.state_dict()."
    )


def _contents(root: object) -> str:
    if isinstance(root, dict):
        return f"a dict with the keys {listing(quote(key) for key in root)}" if root else "an empty dict"
    if isinstance(root, PickledTensor):
        return "a single tensor without a name"
    return f"an object of type {type(root).__name__}"
