"""`evaluate_weights`: what a metric may return, how it is called, and what it must not do."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from commands.user_modules import make, of, score
from torch import Tensor, nn

from ckpt_avg import UsageError, UserCodeError
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.user_code.evaluate import evaluate_weights

CPU = torch.device("cpu")


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return make().state_dict()


def evaluated(function: Callable[[nn.Module], Any], model: nn.Module | None = None) -> dict[str, float]:
    return evaluate_weights(function, model or make(), weights(), name="step_7.pt", device=CPU)


# ---------------------------------------------------------------------------------------------------------------------
# What a function may return


def named(model: nn.Module) -> Any:
    return 0.25


class Meter:
    def __call__(self, model: nn.Module) -> float:
        return 0.25


@pytest.mark.parametrize(
    ("function", "name"),
    [(named, "named"), (lambda model: 0.25, "<lambda>"), (Meter(), "Meter"), (functools.partial(named), "partial")],
)
def test_a_lone_number_is_named_after_the_function(function: Callable[[nn.Module], Any], name: str) -> None:
    assert evaluated(function) == {name: 0.25}


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (0.25, 0.25),
        (3, 3.0),
        (True, 1.0),
        (Fraction(1, 4), 0.25),
        (torch.tensor(0.25), 0.25),
        (torch.tensor(0.25, dtype=torch.bfloat16), 0.25),
        (torch.tensor([0.25]), 0.25),
        (torch.tensor(3), 3.0),
        (torch.tensor(True), 1.0),
        (nn.Parameter(torch.tensor(0.25)), 0.25),
        (numpy.float32(0.25), 0.25),
        (numpy.float64(0.25), 0.25),
        (numpy.float16(0.25), 0.25),
        (numpy.int64(3), 3.0),
        (numpy.bool_(True), 1.0),
        (numpy.array(0.25), 0.25),
        (numpy.array([0.25]), 0.25),
        (math.inf, math.inf),
        (torch.tensor(-math.inf), -math.inf),
    ],
    ids=lambda value: f"{type(value).__name__} {value}",
)
def test_numbers_of_all_kinds(value: Any, number: float) -> None:
    """Alone, and in a dict; they come out as plain floats, which --json can print."""
    for returned in (value, {"named": value}):
        found = evaluated(lambda model, returned=returned: returned)
        assert list(found.values()) == [number]
        assert all(type(each) is float for each in found.values())


@pytest.mark.parametrize(
    "value", [math.nan, torch.tensor(math.nan), numpy.float32("nan")], ids=lambda v: type(v).__name__
)
def test_nan_is_a_number_here(value: Any) -> None:
    assert math.isnan(evaluated(lambda model: {"loss": value})["loss"])


def test_a_tensor_with_a_gradient_is_a_number() -> None:
    assert evaluated(lambda model: torch.tensor(0.25, requires_grad=True)) == {"<lambda>": 0.25}


def test_names_that_are_no_strings() -> None:
    """A function may report by class: ``{0: …, 1: …}``."""
    assert evaluated(lambda model: {0: 0.5, 1: 0.25}) == {"0": 0.5, "1": 0.25}


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("0.93", "a str"),
        (None, "None"),
        ({}, "an empty dict"),
        ({"a": "x"}, "'a' is a str"),
        ({"a": 1.0, "b": None, "c": [1]}, "'b' is None, 'c' is a list"),
        ({"a": {"b": 1.0}}, "'a' is a dict"),
        ((0.5, 0.6), "a tuple"),
        ([0.5], "a list"),
        (1j, "a complex"),
        (torch.tensor(1j), "a Tensor"),
        (torch.tensor([0.5, 0.6]), "a Tensor of shape [2]"),
        (torch.tensor([[0.5]]), "a Tensor of shape [1, 1]"),
        (numpy.array([0.5, 0.6]), "a ndarray of shape [2]"),
        (numpy.str_("0.5"), "a str_"),
        ({"a": b"1"}, "'a' is a bytes"),
    ],
    ids=repr,
)
def test_what_is_no_number_is_named(value: Any, got: str) -> None:
    def bad(model: nn.Module) -> Any:
        return value

    with pytest.raises(UserCodeError) as caught:
        evaluated(bad)
    message = str(caught.value)
    start = f"the --eval function bad: expected it to return a number or a dict of names to numbers, got {got}. "
    assert message.startswith(start)
    assert message.endswith(" Return for example {'accuracy': 0.93}.")
    assert ("Is there a return?" in message) == (value is None)
    assert ("with .mean()" in message) == ("of shape" in got)


@pytest.mark.parametrize("value", [10**400, {"count": 10**400}], ids=["alone", "in a dict"])
def test_an_integer_beyond_float_is_the_function_s_fault(value: Any) -> None:
    with pytest.raises(UserCodeError):
        evaluated(lambda model: value)


def test_a_tensor_without_a_value_is_the_function_s_fault() -> None:
    """A tensor without data, or one whose computation on the GPU failed: ``item()`` raises."""
    with pytest.raises(UserCodeError):
        evaluated(lambda model: torch.empty((), device="meta"))


# ---------------------------------------------------------------------------------------------------------------------
# How the function is called


def test_in_evaluation_mode_without_gradients_with_these_weights() -> None:
    seen: list[Any] = []

    def look(model: nn.Module) -> float:
        seen.append((any(module.training for module in model.modules()), torch.is_grad_enabled()))
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return 0.0

    evaluated(look, make().train())
    assert seen[0] == (False, False)
    assert all(torch.equal(seen[1][name], tensor) for name, tensor in weights().items())
    assert torch.is_grad_enabled()


def test_is_what_the_function_says_when_called_by_hand() -> None:
    assert evaluated(score) == of(weights())


def test_weights_are_copied_and_the_source_stays() -> None:
    """The source may be a mapped checkpoint: writing to it would change the user's file, or crash."""
    source = weights()
    before = {name: tensor.clone() for name, tensor in source.items()}

    def destroy(model: nn.Module) -> float:
        for tensor in model.state_dict().values():
            tensor.zero_()
        return 0.0

    evaluate_weights(destroy, make(), source, name="x", device=CPU)
    assert all(torch.equal(source[name], tensor) for name, tensor in before.items())


def test_modes_and_gradients_are_as_before() -> None:
    """Also where the function changes them, and where it fails."""
    model = make()
    model[1].eval()
    before = [module.training for module in model.modules()]

    def disturb(model: nn.Module) -> float:
        model.train()
        torch.set_grad_enabled(True)
        raise ValueError

    with torch.no_grad():
        with pytest.raises(UserCodeError):
            evaluated(disturb, model)
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no such file"), "ValueError: no such file"),
        (SystemExit(0), "SystemExit: 0"),
        (SystemExit("bye"), "SystemExit: bye"),
        (StopIteration(), "StopIteration"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_what_it_raises_names_the_weights(error: BaseException, text: str) -> None:
    """Also sys.exit(0), which would end the command with success and without an output."""

    def fail(model: nn.Module) -> float:
        raise error

    with pytest.raises(UserCodeError) as caught:
        evaluated(fail)
    place = rf"See {re.escape(os.path.relpath(__file__))}, line \d+\."
    assert re.fullmatch(rf"the --eval function raised for step_7\.pt: {text}\. {place}", str(caught.value))
    assert caught.value.__cause__ is error, "the traceback is what helps"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), UsageError("x")])
def test_what_is_not_its_fault_passes(error: BaseException) -> None:
    def fail(model: nn.Module) -> float:
        raise error

    with pytest.raises(type(error)):
        evaluated(fail)


def test_weights_that_do_not_fit_the_model() -> None:
    with pytest.raises(IncompatibleError):
        evaluate_weights(score, nn.Linear(2, 2), weights(), name="x", device=CPU)
