"""The weights that users list: which are refused, with what to do, and which checkpoint each belongs to."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt_avg.errors import UsageError
from ckpt_avg.mean.weight_formulas import normalized
from ckpt_avg.mean.weighting import Weighting, choose_weights

PATHS = [Path("run/a.pt"), Path("run/b.pt"), Path("run/c.pt")]


def weights(given: Any, *, normalize: bool = False, notices: list[str] | None = None, **how: Any) -> list[float] | None:
    options = Weighting(weights=given, normalize=normalize)
    notices = [] if notices is None else notices
    found = choose_weights(options, how.pop("paths", PATHS), None, notice=notices.append, **how)
    return None if found is None else list(found.values)


@pytest.mark.parametrize(
    "given",
    [
        "0.2,0.3,0.5",
        " 0.2, 0.3 ,5e-1",
        [0.2, 0.3, 0.5],
        (0.2, 0.3, 0.5),
        np.array([0.2, 0.3, 0.5]),
        torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
        (weight for weight in (0.2, 0.3, 0.5)),
        {"a.pt": 0.2, "c.pt": 0.5, "b.pt": 0.3},
        {"run/a.pt": 0.2, "b.pt": 0.3, "./run/c.pt": 0.5},
    ],
    ids=lambda given: type(given).__name__,
)
def test_ways_to_list_the_same_weights(given: Any) -> None:
    assert weights(given) == [0.2, 0.3, 0.5]


def test_a_file_of_names_and_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text('{"c.pt": 0.5, "a.pt": 0.2, "b.pt": 0.3}')
    assert weights(str(path)) == weights(path) == [0.2, 0.3, 0.5]
    path.write_text('{"c.pt": 3, "a.pt": 0, "b.pt": 1}')
    assert weights(path, normalize=True) == [0.0, 0.25, 0.75]


def test_weights_in_order_belong_to_the_checkpoints_as_they_were_listed() -> None:
    """If they were put in the order of the steps, ``new.pt old.pt --weights 0.9,0.1`` would do the opposite."""
    notices: list[str] = []
    assert weights("0.7,0.2,0.1", listed=[2, 0, 1], notices=notices) == [0.2, 0.1, 0.7]
    assert notices == [
        "the weights are in the order in which the checkpoints were listed: c.pt 0.7, a.pt 0.2, b.pt 0.1"
    ]


# -- Sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [[0.3333333, 0.3333333, 0.3333332], [0.2, 0.3, 0.5 + 9e-7], [2.0, -0.5, -0.5 - 9e-7]])
def test_a_sum_that_is_nearly_1_is_made_1_and_this_is_said(given: list[float]) -> None:
    notices: list[str] = []
    total = sum(map(Fraction, given))
    assert weights(given, notices=notices) == [float(Fraction(each) / total) for each in given]
    assert notices[0] == f"the weights sum to {float(total):.9g}, and were divided by it"


@pytest.mark.parametrize("given", [[0.1] * 9 + [0.1000001 - 1e-7], [0.1, 0.2, 0.7], [1e6 + 1, -1e6, 1e-320]])
def test_a_sum_that_is_1_to_rounding_is_left_alone(given: list[float]) -> None:
    """So that weights that were printed give the same file again."""
    paths = [Path(f"{index}.pt") for index in range(len(given))]
    for repeated in (given, normalized(given)):
        notices: list[str] = []
        found = weights(repeated, paths=paths, notices=notices)
        assert found == repeated
        assert not any("divided" in notice for notice in notices)


@pytest.mark.parametrize("given", [[2, 3, 5], [1e308, 1.5e308, 1e307], [1e-320, 2e-320, 3e-320]])
def test_any_positive_sum_can_be_divided_by(given: list[float]) -> None:
    """However large or small, though the sum of floats overflows."""
    found = weights(given, normalize=True)
    assert found is not None
    assert math.fsum(found) == pytest.approx(1, abs=1e-15)
    assert found[1] / found[0] == pytest.approx(given[1] / given[0])


@pytest.mark.parametrize(("given", "normalize"), [([1, 1, 1], True), ([1 / 3, 1 / 3, 1 / 3], False)])
def test_weights_that_are_all_equal_are_the_mean(given: list[float], normalize: bool) -> None:
    assert weights(given, normalize=normalize) is None


def test_negative_weights_are_pointed_out() -> None:
    notices: list[str] = []
    assert weights([-1.5, 0.0, 2.5], notices=notices) == [-1.5, 0.0, 2.5]
    assert notices == ["negative weights, so values may be outside the range of the checkpoints: a.pt -1.5"]


# -- What cannot be used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "normalize", "message"),
    [
        ("0.5,0.5", False, "--weights: expected 3 weights, one for each of a.pt, b.pt, c.pt, got 2. Select as many"),
        ([0.25] * 4, False, "--weights: expected 3 weights, one for each of a.pt, b.pt, c.pt, got 4."),
        ("0.5,0.5,0.5", False, "--weights: 3 weights with the sum 1.5, not 1. Add --normalize to divide by it."),
        ([0.2, 0.3, 0.5 + 1.1e-6], False, "--weights: 3 weights with the sum 1.0000011, not 1."),
        ([0, 0, 0], False, "--weights: all weights are 0. Give at least one above 0."),
        ([0, 0.0, -0.0], True, "--weights: all weights are 0."),
        ([], True, "--weights: no weights."),
        ("", True, "--weights: '' is not a number."),
        ([1, -1, 0], True, "--weights: the sum 0 cannot be made 1. Use weights of a sum above 0."),
        ([-1, -2, 0], True, "--weights: the sum -3 cannot be made 1."),
        ("0.5,nan,0.5", False, "--weights: nan is no weight. Give a finite number."),
        ([0.5, math.inf, 0.5], True, "--weights: inf is no weight."),
        ([10**400, 1, 1], True, "--weights: inf is no weight."),
        ("0.5;0.5", False, "--weights: '0.5;0.5' is not a number. Write for example 0.2,0.3,0.5 or FILE.json."),
        ("weights.txt", False, "--weights: 'weights.txt' is not a number."),
        (["0.5", 0.5], False, "--weights: expected a number, got a str."),
        (torch.eye(3), False, "--weights: expected a number, got a Tensor."),
        (np.eye(3), False, "--weights: expected a number, got a ndarray."),
        ([1j, 0, 0], False, "--weights: expected a number, got a complex."),
        ([True, False, False], False, "--weights: expected a number, got a bool."),
        (0.5, False, "--weights: got a float. Give numbers, or a mapping of names to numbers."),
        ({"a.pt": 0.5, "b.pt": None, "c.pt": 0.5}, False, "--weights: 'b.pt': expected a number, got None."),
        ({"a.pt": 0.5, "b.pt": 0.5}, False, "--weights: no weight for 'c.pt'. Add it; 0 leaves a checkpoint out of"),
        ({"a.pt": 0.5, "b.pt": 0.25, "c.pt": 0.25, "d.pt": 0.0}, False, "--weights: 'd.pt' is none of the checkpoints"),
        ({"a.pt": 0.5, "b.pt": 0.25, "c.ptt": 0.25}, False, "Did you mean 'c.pt'?"),
        ({"a.pt": 0.5, "run/a.pt": 0.25, "b.pt": 0.25}, False, "each weight must be of one checkpoint"),
        ({0.25, 0.75}, False, "--weights: got a set. Give numbers, or a mapping of names to numbers."),
        (b"ab", False, "--weights: got a bytes."),
        (Path("none.json"), False, "--weights 'none.json': cannot be read: No such file or directory. Check the path."),
    ],
    ids=str,
)  # fmt: skip
def test_weights_that_cannot_be_used(given: Any, normalize: bool, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        weights(given, normalize=normalize)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[0.2, 0.3, 0.5]", "expected an object of names and weights, got a list."),
        ('{"a.pt": 0.5, "b.pt": 0.25, "c.pt": 0.25, "a.pt": 0.5}', "'a.pt' has several weights. Keep one."),
        ('{"a.pt": NaN, "b.pt": 0.5, "c.pt": 0.5}', "'a.pt': nan is no weight."),
        ('{"a.pt": "0.5", "b.pt": 0.25, "c.pt": 0.25}', "'a.pt': expected a number, got a str."),
        ("[" * 100_000, "cannot be read as JSON"),
        ("\xff", "cannot be read as JSON"),
    ],
    ids=lambda text: text[:20],
)
def test_files_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as caught:
        weights(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_name_that_two_checkpoints_have() -> None:
    paths = [Path("one/model.pt"), Path("two/model.pt")]
    with pytest.raises(
        UsageError, match=r"'model\.pt': each weight must be of one checkpoint, got 'one/model\.pt', 'tw"
    ):
        weights({"model.pt": 1.0}, paths=paths)
    assert weights({"one/model.pt": 0.25, "two/model.pt": 0.75}, paths=paths) == [0.25, 0.75]
