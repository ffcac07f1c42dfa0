"""Objects that stand for dicts are read as dicts, as the root of a file and as its state dict; no class is needed."""

from __future__ import annotations

import collections
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from formats.pickles.opcodes import called, mapping, named, proto, text
from formats.reading import assert_same, read, refusal
from formats.torch_bytes import holding, tensor, weights, write
from layouts import save, throwaway

from ckpt_avg.errors import NoWeightsError
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.pickles.mappings import with_dicts
from ckpt_avg.formats.pickles.unpickler import read_pickle


class AttributeDict(dict[str, Any]):
    """As EasyDict: its items are its attributes, too."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        super().__init__(items)
        self.__dict__.update(items)


class OwnState(dict[str, Any]):
    """As addict's Dict, which is its own state."""

    def __getstate__(self) -> OwnState:
        return self

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.update(state)


class Called(dict[str, Any]):
    """As mmengine's ConfigDict, which is pickled as a call with its items."""

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (dict(self),)


class UserMapping(collections.UserDict[str, Any]):
    """A subclass of UserDict."""


class Slots:
    """A class with a slot and a dict."""

    __slots__ = ("__dict__", "slot")

    def __init__(self, items: Mapping[str, Any]) -> None:
        self.__dict__.update(items)
        self.slot = 3


class Ordered(collections.OrderedDict[str, Any]):
    """A subclass of OrderedDict."""


OWN = (AttributeDict, OwnState, Called, UserMapping, Slots, Ordered)
KINDS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    **{kind.__name__: kind for kind in OWN},
    "UserDict": collections.UserDict,
    "Namespace": lambda items: Namespace(**items),
    "SimpleNamespace": lambda items: SimpleNamespace(**items),
}
STATE = {"w": torch.arange(3.0), "b": torch.ones(1)}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_objects_that_stand_for_dicts_are_read(tmp_path: Path, kind: str, stream: bool, protocol: int) -> None:
    """As the root, as the state dict, and as both; what they record counts, too."""
    make = KINDS[kind]
    files = {"root": make({"model": STATE, "epoch": 3}), "inner": {"model": make(STATE), "epoch": 3}}
    files |= {"both": make({"model": make(STATE), "epoch": 3}), "bare": make(STATE)}
    with throwaway("gone", **{each.__name__: each for each in OWN}):
        paths = {name: save(value, tmp_path / name, stream=stream, protocol=protocol) for name, value in files.items()}
    for name, path in paths.items():
        assert_same(read(path), STATE)
        with open_checkpoint(path) as checkpoint:
            found = (checkpoint.spec.state_key, checkpoint.spec.record.epoch)
        assert found == ((None, None) if name == "bare" else ("model", 3))


def test_an_object_without_tensors_is_named_by_its_class(tmp_path: Path) -> None:
    for contents, where in ((Namespace(lr=0.1), ""), ({"model": Namespace(lr=0.1)}, "key 'model': ")):
        message = refusal(save(contents, tmp_path / "a.pt"), NoWeightsError)
        assert f"{where}expected a state dict, got a pickled object of class 'argparse.Namespace'" in message
        assert "save model.state_dict() instead" in message


def test_attributes_of_an_entry_are_not_weights_by_themselves(tmp_path: Path) -> None:
    """An object with tensors inside a state dict: the average would lack them."""
    message = refusal(save({"w": torch.ones(1), "experts": Namespace(w=torch.ones(1))}, tmp_path / "a.pt"))
    assert "'experts': expected a plain tensor, got tensors inside a argparse.Namespace." in message


def test_an_object_inside_itself_ends(tmp_path: Path) -> None:
    itself = Namespace(**STATE)
    root = {"model": itself, "again": {"root": itself}}
    itself.more = [itself]
    itself.__dict__["self"] = {"itself": itself, "root": root}
    with open_checkpoint(save({"model": STATE, "x": itself}, tmp_path / "a.pt")) as checkpoint:
        assert list(checkpoint.spec.tensors) == list(STATE)


@pytest.mark.usefixtures("in_time")
def test_many_objects_that_share_their_attributes_share_the_copy() -> None:
    """Twenty thousand objects with one dict of a thousand attributes."""
    shared = mapping({text(f"a{number}"): b"N" for number in range(1_000)})
    made = b"".join(text(str(number)) + named("m", "C") + b")\x81h\0b" for number in range(20_000))
    root = with_dicts(read_pickle(proto(shared + b"q\x000}(" + made + b"u"), "file.pt"))
    assert isinstance(root, dict)
    assert len({id(value) for value in root.values()}) == 1


@pytest.mark.parametrize("function", [named("os", "system"), named("builtins", "getattr")])
def test_what_builds_a_mapping_is_not_called(tmp_path: Path, function: bytes) -> None:
    contents = called(function, weights(tensor()))
    assert list(read(write(tmp_path, holding(contents)))) == ["w"]
