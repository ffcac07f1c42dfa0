"""A pickled module: what its state_dict() would hold, asked of no class, in bounded time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.reading import refusal
from layouts import save, throwaway
from torch import nn

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.open import open_checkpoint


@pytest.fixture
def made() -> Iterator[Any]:
    """Makes objects with any state, of a class that exists only while they are saved."""

    class Thing:
        pass

    def make(**state: Any) -> Thing:
        thing = Thing()
        thing.__dict__.update({"_parameters": {}, "_buffers": {}, "_modules": {}} | state)
        return thing

    with throwaway("somewhere_else", Thing=Thing):
        yield make


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_buffers_that_are_not_persistent_are_skipped(tmp_path: Path, protocol: int) -> None:
    """As ``state_dict()`` does: their names are in a set, for which each protocol has a form of its own."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Module())
    net[1].register_buffer("kept", torch.ones(1))
    net[1].register_buffer("passing", torch.ones(1), persistent=False)
    with open_checkpoint(save(net, tmp_path / "a.pt", protocol=protocol)) as checkpoint:
        assert list(checkpoint.spec.tensors) == list(net.state_dict()) == ["0.weight", "0.bias", "1.kept"]


def test_parameters_before_buffers_before_modules_and_nothing_for_none(tmp_path: Path) -> None:
    net = nn.Module()
    net.inner = nn.BatchNorm1d(2)
    net.register_buffer("buffer", torch.ones(1))
    net.register_buffer("nothing", None)
    net.weight = nn.Parameter(torch.ones(2))
    net.register_parameter("neither", None)
    net.gone = None
    with open_checkpoint(save(net, tmp_path / "a.pt")) as checkpoint:
        assert list(checkpoint.spec.tensors) == list(net.state_dict())


def test_a_module_used_twice_has_both_names(tmp_path: Path) -> None:
    shared = nn.Linear(2, 2, bias=False)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    with open_checkpoint(save(net, tmp_path / "a.pt")) as checkpoint:
        assert list(checkpoint.spec.tensors) == list(net.state_dict())
        assert checkpoint.spec.tied() == [("0.weight", "2.weight")]


def test_prefixes_of_real_wrappers_are_stripped(tmp_path: Path) -> None:
    for wrapped in (nn.DataParallel(nn.Linear(2, 2)), torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))):
        with open_checkpoint(save({"model": wrapped}, tmp_path / "a.pt")) as checkpoint:
            assert list(checkpoint.spec.tensors) == ["weight", "bias"]
            assert checkpoint.spec.prefix == "module."


def test_a_state_dict_is_preferred_to_a_module(tmp_path: Path) -> None:
    contents = {"model": nn.Linear(2, 2), "state_dict": {"w": torch.ones(3)}}
    with open_checkpoint(save(contents, tmp_path / "a.pt")) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["w"]
        assert checkpoint.spec.state_key == "state_dict"


def test_a_class_that_is_no_module_is_none(tmp_path: Path, made: Any) -> None:
    for state in ({"_parameters": [torch.ones(1)]}, {"_buffers": None}, {"_modules": 3}):
        path = save({"model": made(**state)}, tmp_path / "a.pt")
        with pytest.raises(CheckpointFormatError, match=r"class 'somewhere_else\.Thing'"):
            open_checkpoint(path)


def test_modules_of_classes_that_are_not_there(tmp_path: Path, made: Any) -> None:
    inner = made(_buffers={"n": torch.tensor(3)})
    path = save(made(_parameters={"w": torch.ones(2)}, _modules={"in": inner, "odd": 3}), tmp_path / "a.pt")
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["w", "in.n"]


@pytest.mark.usefixtures("in_time")
def test_a_module_inside_itself_is_refused(tmp_path: Path, made: Any) -> None:
    for tensors in ({}, {"w": torch.ones(1)}):
        thing = made(_parameters=tensors)
        thing._modules["again"] = thing
        with pytest.raises(CheckpointFormatError):
            open_checkpoint(save(thing, tmp_path / "a.pt"))


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("tensors", [{}, {"w": torch.ones(1)}])
def test_modules_that_share_modules_without_end_are_refused(tmp_path: Path, made: Any, tensors: Any) -> None:
    """Forty levels of two names for one module are 2⁴⁰ modules by name, with tensors in them or without."""
    thing = made(_parameters=tensors)
    for _ in range(40):
        thing = made(_modules={"a": thing, "b": thing})
    thing._parameters = {"w": torch.ones(1)}
    with pytest.raises(CheckpointFormatError):
        open_checkpoint(save(thing, tmp_path / "a.pt"))


@pytest.mark.guarantee("pickled-modules")
@pytest.mark.parametrize("state", [{"_parameters": [torch.ones(1)]}, {"_buffers": None}, {"_modules": 3}])
@pytest.mark.parametrize("key", [None, "model"])
def test_a_submodule_whose_state_is_no_modules_is_refused(
    tmp_path: Path, made: Any, state: dict[str, Any], key: str | None
) -> None:
    """Passed over, its weights would be missing from the average."""
    thing = made(_parameters={"w": torch.ones(2)}, _modules={"in": made(**state)})
    path = save(thing if key is None else {key: thing}, tmp_path / "a.pt")
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: {'the file' if key is None else repr('model').join(('key ', ''))}: ")
    assert "expected modules in a pickled module, got somewhere_else.Thing as 'in'" in str(caught.value)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("part", ["_parameters", "_buffers", "_non_persistent_buffers_set"])
def test_an_empty_module_under_many_names_is_refused(tmp_path: Path, made: Any, part: str) -> None:
    """Ten thousand names without a tensor, in twenty thousand modules, are looked at two hundred million times."""
    nothing: dict[str, None] = dict.fromkeys(map(str, range(10_000)))
    inner = made(**{part: set(nothing) if part.endswith("set") else nothing})
    outer = made(_parameters={"w": torch.ones(1)}, _modules=dict.fromkeys(map(str, range(20_000)), inner))
    with pytest.raises(CheckpointFormatError, match="modules and tensors"):
        open_checkpoint(save(outer, tmp_path / "a.pt"))


@pytest.mark.guarantee("pickle-bombs")
def test_modules_nested_too_deeply_are_refused(tmp_path: Path, made: Any) -> None:
    """A hundred, one in the other, are a module like any other."""
    thing = made(_parameters={"w": torch.ones(1)})
    for _ in range(99):
        thing = made(_modules={"m": thing})
    with open_checkpoint(save(thing, tmp_path / "a.pt")) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["m." * 99 + "w"]
    with pytest.raises(CheckpointFormatError, match="modules and tensors, 100 deep, got more"):
        open_checkpoint(save(made(_modules={"m": made(_modules={"m": thing})}), tmp_path / "b.pt"))


@pytest.mark.guarantee("pickled-modules")
@pytest.mark.parametrize("name", [1, "x" * 4097])
def test_names_that_no_module_has_are_refused(tmp_path: Path, made: Any, name: object) -> None:
    path = save(made(_parameters={name: torch.ones(1)}), tmp_path / "a.pt")
    with pytest.raises(CheckpointFormatError, match="expected names of at most 4,096 characters in a pickled module"):
        open_checkpoint(path)


@pytest.mark.parametrize("key", [None, "model"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_quantized_modules_are_refused(tmp_path: Path, kind: str, key: str | None) -> None:
    """Their weights are in no parameter: a model of which some layers are quantized would lose these."""
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
    quantization = torch.ao.quantization
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "dynamic":
            quantized = quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
        else:
            net.qconfig = quantization.default_qconfig
            prepared = quantization.prepare(net)
            prepared(torch.ones(1, 2))
            quantized = quantization.convert(prepared)
        path = save(quantized if key is None else {key: quantized}, tmp_path / "a.pt")
    message = refusal(path)
    assert "expected a module with plain weights, got the quantized torch.ao.nn.quantized." in message
    assert message.endswith("Linear as '0'. Average the checkpoints before quantisation.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(quantized.state_dict() if key is None else {key: quantized.state_dict()}, path)
    assert "got a quantized tensor inside a tuple. Average the checkpoints before quantisation." in refusal(path)


def test_a_quantized_layer_alone_is_refused(tmp_path: Path) -> None:
    """It is a module without parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.ao.nn.quantized.dynamic.Linear(2, 2)
        path = save(layer, tmp_path / "a.pt")
    assert "got the quantized torch.ao.nn.quantized.dynamic.modules.linear.Linear. Average the" in refusal(path)
