"""Where dicts of named tensors are in what a torch file contains."""

from __future__ import annotations

import itertools
from typing import Any

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.pickles.mappings import Attributes
from ckpt_avg.formats.pickles.nn_modules import is_module, module_tensors
from ckpt_avg.formats.pickles.stand_ins import Foreign, PickledTensor
from ckpt_avg.formats.trainers.any_script import is_ema_key, is_training_state
from ckpt_avg.limits import LIMITS

_MOST_VALUES = 1000  # of one entry of a state dict that are searched for tensors


def keys_to_weights(value: object) -> list[str]:
    """Returns the keys of a dict whose values are dicts or objects that may lead to weights."""
    items = value.items() if isinstance(value, dict) else ()
    inner = [(key, item) for key, item in items if isinstance(item, (dict, Foreign)) and isinstance(key, str)]
    return [key for key, item in inner if not is_training_state(key, item)]


def is_tensor_dict(value: object) -> bool:
    """Whether a value is a dict with named tensors."""
    return isinstance(value, dict) and any(
        isinstance(name, str) and isinstance(value[name], PickledTensor) for name in value
    )


def find_tensor_dicts(value: object, seen: set[int] | None = None) -> list[tuple[str, ...]]:
    """Returns the keys that lead to each dict that contains named tensors directly, the nearest to the top first.

    Dicts of numbers, such as metrics, count only if there is nothing else.
    """
    found = _search(value, set() if seen is None else seen)
    return [keys for keys, item in found if not _is_numbers(item)] or [keys for keys, _ in found]


def holds_only_numbers(value: object) -> bool:
    """Whether all tensors in dicts are numbers, and there are some."""
    found = _search(value, set())
    return bool(found) and all(_is_numbers(item) for _, item in found)


def _is_numbers(value: object) -> bool:
    tensors = (
        (item for item in value.values() if isinstance(item, PickledTensor)) if isinstance(value, dict) else [None]
    )
    return all(getattr(tensor, "shape", None) == () for tensor in tensors)


def _search(value: object, seen: set[int]) -> list[tuple[tuple[str, ...], object]]:
    """Returns dicts of tensors and modules with the keys that lead to them.

    Each dict is looked at once, level by level, under the first key that leads to it; those in ``seen`` not at all.
    """
    found: list[tuple[tuple[str, ...], object]] = []
    level: list[tuple[tuple[str, ...], object]] = [((), value)]
    for _ in range(LIMITS.nesting + 1):
        inner: list[tuple[tuple[str, ...], object]] = []
        for keys, item in level:
            if id(item) in seen:
                continue
            seen.add(id(item))
            has_tensors = is_tensor_dict(item) or is_module(item)
            if has_tensors:
                found.append((keys, item))
            if isinstance(item, dict) and (not has_tensors or _is_numbers(item)):  # else what is inside belongs to it
                inner += [((*keys, key), item[key]) for key in keys_to_weights(item)]
        level = inner
    return found


def joined_parts(value: object) -> dict[object, object] | None:
    """Returns one dict of several dicts of tensors that are parts of a model, with their keys in front of the names.

    None if the value is not such a dict, an EMA is among the parts, or two names would become equal.
    """
    parts = _search(value, set())
    if len(parts) < 2 or is_tensor_dict(value) or any(is_ema_key(key) for keys, _ in parts for key in keys):
        return None
    to_tensors: dict[int, Any] = {}  # what is on the ways to tensors, by identity: one dict may be at several places
    for keys, _ in parts:
        item: Any = value
        for key in keys:
            item = item[key]
            to_tensors[id(item)] = item
    try:
        to_tensors.update({key: module_tensors(item) for key, item in to_tensors.items() if isinstance(item, Foreign)})
    except CheckpointFormatError:
        return None  # a damaged module
    joined: dict[object, object] = {}
    most = 10_000 + 4 * sum(map(len, to_tensors.values()))  # a few dicts that are shared can expand to very many
    waiting: list[tuple[str, Any]] = [("", value)]
    for prefix, item in waiting:  # it grows meanwhile
        if len(joined) + len(waiting) > most:
            return None
        for key, inner in item.items():
            name = f"{prefix}{key}" if isinstance(key, str) else key
            if id(inner) in to_tensors:
                waiting.append((f"{name}.", to_tensors[id(inner)]))
            elif name in joined:
                return None
            else:
                joined[name] = inner
    return joined


def follow(root: object, key: str, default: object = None) -> Any:
    """Returns what a dotted key leads to through dicts; ``default`` if nothing."""
    value: Any = root
    while key:
        # A key may itself contain dots, so the longest that fits goes first.
        first = next((key[:end] for end in _ends(key) if isinstance(value, dict) and key[:end] in value), None)
        if first is None:
            return default
        value, key = value[first], key[len(first) + 1 :]
    return value


def _ends(text: str) -> list[int]:
    return [len(text), *(position for position in range(len(text) - 1, 0, -1) if text[position] == ".")]


def hidden_tensor(item: object) -> PickledTensor | None:
    """Returns a tensor that a list, a tuple or an object contains near its top."""
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
