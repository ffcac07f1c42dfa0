"""Tensors where a state dict has none: what of them is the training's own, and what would be lost."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from ckpt_avg.formats.pickles.leaves import Leaf
from ckpt_avg.formats.pickles.stand_ins import Foreign
from ckpt_avg.formats.trainers.layouts import TRAINING_STATE

_TRAINING_STATE = re.compile("|".join((*TRAINING_STATE, "_extra_state$")), re.I)
_MOST = 1000  # things that are looked at


def is_training_state(name: object) -> bool:
    """Whether a key says that no weights lie under it: an optimizer's moments, generators, a module's extra state."""
    return isinstance(name, str) and _TRAINING_STATE.search(name) is not None


def hides_tensors(item: object) -> bool:
    """Whether a list, a tuple or an object holds a tensor, near its top."""
    level: list[object] = [item]
    for value in itertools.islice(_grow(level), _MOST):
        if isinstance(value, Leaf):
            return True
        if isinstance(value, Foreign):
            level += [value.state, *value.arguments[:100]]
        elif isinstance(value, (list, tuple)):
            level += value[:100]
        elif isinstance(value, dict) and value is not item:
            level += itertools.islice(value.values(), 100)
    return False


def _grow(level: list[object]) -> Iterator[object]:
    """Yields the items of a list, those that are appended meanwhile too."""
    index = 0
    while index < len(level):
        yield level[index]
        index += 1
