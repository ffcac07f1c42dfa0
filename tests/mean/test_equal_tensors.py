"""Which tensors are the same bytes in every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.mean.equal_tensors import Unequal, differing


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[object]:
    """Saves states, by safetensors and torch in turn, and opens them."""
    with ExitStack() as stack:

        def call(*states: dict[str, torch.Tensor]) -> list[Checkpoint]:
            paths = [tmp_path / f"{index}{'.pt' if index % 2 else '.safetensors'}" for index in range(len(states))]
            for path, state in zip(paths, states, strict=True):
                torch.save(state, path) if path.suffix == ".pt" else save_file(state, path)
            return [stack.enter_context(open_checkpoint(path)) for path in paths]

        yield call


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.uint16,
        torch.int32,
        torch.uint32,
        torch.int64,
        torch.uint64,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e8m0fnu,
    ],
    ids=str,
)
def test_the_first_difference_is_found_in_every_dtype(opened, dtype: torch.dtype, tmp_path: Path) -> None:
    itemsize = torch.empty(0, dtype=dtype).element_size()
    raw = torch.zeros(100, itemsize, dtype=torch.uint8)
    other = raw.clone()
    other[37, itemsize - 1] = other[80, 0] = 1
    states = [
        {"w": values.flatten().view(dtype), "same": raw.clone().flatten().view(dtype)} for values in (raw, raw, other)
    ]
    found = differing(opened(*states), ["w", "same"])
    assert found == {"w": Unequal("w", str(tmp_path / "2.safetensors"), 37)}


def test_the_index_counts_from_the_tensors_beginning_past_the_first_window(opened) -> None:
    state = {"w": torch.zeros(2**20 + 1000, dtype=torch.uint8)}
    other = {"w": state["w"].clone()}
    other["w"][2**20 + 123] = 1
    assert differing(opened(state, other), ["w"])["w"].index == 2**20 + 123


def test_bits_are_compared_not_values(opened) -> None:
    """NaN equals itself, and the two zeros differ: only equal bytes may be copied."""
    state = {"nan": torch.tensor([math.nan]), "zero": torch.tensor([0.0])}
    other = {"nan": torch.tensor([math.nan]), "zero": torch.tensor([-0.0])}
    assert list(differing(opened(state, other), state)) == ["zero"]


def test_elements_are_compared_not_the_order_in_which_they_are_stored(opened) -> None:
    values = torch.arange(12).view(3, 4)
    assert not differing(opened({"w": values}, {"w": values.t().contiguous().t()}), ["w"])


def test_the_first_checkpoint_that_differs_is_named(opened, tmp_path: Path) -> None:
    states = [{"w": torch.tensor([value])} for value in (1, 1, 2, 3)]
    found = differing(opened(*states), ["w"])["w"]
    assert found.checkpoint == str(tmp_path / "2.safetensors")
    assert str(found) == f"tensor 'w': first at index 0 in {tmp_path / '2.safetensors'}"


def test_only_the_names_asked_for_are_compared(opened) -> None:
    states = [{"a": torch.tensor(value), "b": torch.tensor(value)} for value in (1, 2)]
    assert list(differing(opened(*states), ["b"])) == ["b"]


def test_scalars_and_empty_tensors_are_compared(opened) -> None:
    states = [{"scalar": torch.tensor(value), "empty": torch.empty(0, 3)} for value in (1, 2)]
    found = differing(opened(*states), ["scalar", "empty"])
    assert {name: place.index for name, place in found.items()} == {"scalar": 0}


def test_one_checkpoint_differs_from_nothing(opened) -> None:
    assert differing(opened({"w": torch.ones(3)}), ["w"]) == {}
