"""Which part of a torch file is the state dict.

In order: the key that the user names; one of the wrapper keys that trainers use; the file itself, if its values
are tensors; the only other mapping of names to tensors. Where several remain, they are listed and none is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.limits import LIMITS
from ckpt_avg.messages import listing, quote
from ckpt_avg.readers.stand_ins import Foreign, StoredTensor, UnreadableTensor

WRAPPER_KEYS = ("state_dict", "model", "model_state_dict")

_TENSORS = (StoredTensor, UnreadableTensor)


@dataclass(frozen=True, slots=True)
class Found:
    """The state dict: its dotted key (None: the file itself), its tensors, and the names that are none."""

    key: str | None
    tensors: Mapping[str, StoredTensor]
    others: tuple[str, ...]
    notes: tuple[str, ...]


def find_state_dict(root: object, path: Path, state_key: str | None) -> Found:
    """Picks the state dict out of what a torch file holds.

    Raises:
        CheckpointFormatError: there is none, or several candidates, or it holds tensors without plain elements.
    """
    if state_key is not None:
        return _found(_walk(root, path, state_key), path, state_key, ())
    if isinstance(root, Foreign):
        raise CheckpointFormatError(f"{path}: {_pickled(root)}")
    wrappers = [key for key in WRAPPER_KEYS if isinstance(root, dict) and _is_state_dict(root.get(key))]
    candidates = _candidates(root)
    if len(wrappers) == 1:
        return _found(root[wrappers[0]], path, wrappers[0], ())  # type: ignore[index]  # a wrapper implies a dict
    if not wrappers and candidates[:1] == [()]:
        return _found(root, path, None, ())
    if not wrappers and len(candidates) == 1:
        key = ".".join(candidates[0])
        note = f"the weights were found under {quote(key)}, the only mapping of names to tensors"
        return _found(_walk(root, path, key), path, key, (note,))
    raise CheckpointFormatError(f"{path}: {_no_choice(root, [(key,) for key in wrappers] or candidates)}")


def plain_values(root: object) -> dict[str, str | int | float | bool | None]:
    """Returns the plain values at the top of a torch file: epoch, step, metric, version and the like."""
    if not isinstance(root, dict):
        return {}
    return {
        key: value
        for key, value in root.items()
        if isinstance(key, str)
        # What JSON cannot hold tells nothing: NaN, Inf, integers of thousands of digits.
        and (isinstance(value, (str, bool, type(None))) or (isinstance(value, (int, float)) and abs(value) < 2.0**1000))
    }


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and any(
        isinstance(name, str) and isinstance(value[name], _TENSORS) for name in value
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
            if not isinstance(item, dict) or id(item) in seen:
                continue
            seen.add(id(item))
            if _is_state_dict(item):
                found.append(keys)  # what lies deeper belongs to it
                continue
            inner += [
                ((*keys, key), each) for key, each in item.items() if isinstance(key, str) and isinstance(each, dict)
            ]
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


def _found(value: object, path: Path, key: str | None, notes: tuple[str, ...]) -> Found:
    where = f"{path}: {'the file' if key is None else f'key {quote(key)}'}"
    if isinstance(value, Foreign):
        raise CheckpointFormatError(f"{where}: {_pickled(value)}")
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{where}: expected a state dict, got {_contents(value)}.")
    tensors: dict[str, StoredTensor] = {}
    others: list[str] = []
    looked_at: set[int] = set()
    for name, item in value.items():
        if isinstance(item, UnreadableTensor):
            raise CheckpointFormatError(
                f"{where}: tensor {quote(name)}: expected a plain tensor, got {item.kind}. Save it as a plain "
                "tensor (for example tensor.to_dense() or tensor.dequantize()) and run again."
            )
        if isinstance(item, dict) and _candidates(item, looked_at):
            raise CheckpointFormatError(
                f"{where}: expected names and tensors, got another dict of tensors under {quote(name)}. "
                f"Choose one part with --state-key {_as_argument(f'{key}.{name}' if key else str(name))}."
            )
        if not isinstance(item, StoredTensor):
            others.append(name if isinstance(name, str) else quote(name))
        elif not isinstance(name, str):
            raise CheckpointFormatError(f"{where}: expected tensor names, got the key {quote(name)}.")
        else:
            tensors[name] = item
    return Found(key, tensors, tuple(others), notes)


def _as_argument(key: str) -> str:
    return key if key.isprintable() and len(key) <= 120 else quote(key)


def _pickled(value: Foreign) -> str:
    return (
        f"expected a state dict, got a pickled object of class {value.described()!r}. In a trusted environment, "
        "load it and save model.state_dict() instead."
    )


def _no_choice(root: object, candidates: Sequence[tuple[str, ...]]) -> str:
    if candidates:
        return (
            f"expected one state dict, got several: {listing(quote('.'.join(keys)) for keys in candidates)}. "
            f"Choose one with --state-key, for example --state-key {_as_argument('.'.join(candidates[0]))}."
        )
    for key in WRAPPER_KEYS:
        if isinstance(root, dict) and isinstance(inner := root.get(key), Foreign):
            return f"key {quote(key)}: {_pickled(inner)}"
    return f"expected a state dict, got {_contents(root)}, which holds no named tensors."


def _contents(root: object) -> str:
    if isinstance(root, dict):
        return f"a dict with the keys {listing(quote(key) for key in root)}" if root else "an empty dict"
    if isinstance(root, (StoredTensor, UnreadableTensor)):
        return "a single tensor without a name"
    return f"a {type(root).__name__}"
