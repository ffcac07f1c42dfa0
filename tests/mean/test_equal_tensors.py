"""Which tensors are the same bytes in every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_avg.checkpoint.spec import DTYPES, Checkpoint
from ckpt_avg.checkpoint.tensor_reads import torch_dtype
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


@pytest.mark.parametrize("dtype", [torch_dtype(dtype) for dtype in DTYPES.values()], ids=str)
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


def test_the_index_counts_from_the_beginning_of_the_tensor(opened) -> None:
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


def test_only_the_given_names_are_compared_scalars_and_empty_tensors_too(opened) -> None:
    states = [{"a": torch.tensor(value), "b": torch.tensor(value), "empty": torch.empty(0, 3)} for value in (1, 2)]
    found = differing(opened(*states), ["b", "empty"])
    assert {name: unequal.index for name, unequal in found.items()} == {"b": 0}
    assert differing(opened(states[0]), ["a"]) == {}  # there is nothing else to compare it with
