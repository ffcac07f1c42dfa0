"""Objects of a pickle that stand for a dict: subclasses of dict, UserDict, Namespace and other plain objects."""

from __future__ import annotations

from typing import Any

from ckpt_avg.formats.pickles.nn_modules import is_module
from ckpt_avg.formats.pickles.stand_ins import Foreign, PlainDict


class Attributes(PlainDict):
    """The attributes of a plain object, such as argparse.Namespace; ``described`` is its class."""

    described = ""


def with_dicts(root: object) -> object:
    """Returns what a pickle describes, with a dict in place of each object that stands for one.

    Only the root and values of dicts are replaced, in place, and each dict is visited once.
    """
    top: dict[Any, Any] = {"": root}
    waiting, seen = [top], {id(top)}
    attributes: dict[int, Attributes] = {}  # many objects may share one dict, which is copied once
    while waiting:
        found = waiting.pop()
        for key, value in found.items():
            if isinstance(value, Foreign) and not is_module(value):
                found[key] = _items(value, attributes)
            inner = found[key]
            if isinstance(inner, dict) and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append(inner)
    return top[""]


def _items(value: Foreign, attributes: dict[int, Attributes]) -> object:
    """Returns the items of an object that stands for a dict; another object as it is."""
    state = value.state
    if value.items is not None:
        return value.items
    if state is None and len(value.arguments) == 1 and isinstance(value.arguments[0], dict):
        return value.arguments[0]  # a class that is called with the items
    if isinstance(state, tuple) and len(state) == 2:  # __dict__ and __slots__
        state = next((each for each in state if isinstance(each, dict)), None)
    if not isinstance(state, dict) or "_parameters" in state:  # not that of a damaged module
        return value
    if state.keys() == {"data"} and isinstance(state["data"], dict):
        return state["data"]  # collections.UserDict
    if id(state) not in attributes:
        attributes[id(state)] = Attributes(state)
        attributes[id(state)].described = value.described()
    return attributes[id(state)]
