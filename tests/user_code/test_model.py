"""The user's model and data: built, loaded, used for several passes; every failure is reported as theirs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ckpt_avg import IncompatibleError, UserCodeError
from ckpt_avg.user_code.model import Passes, load_weights, move_model


def drawn() -> list[Tensor]:
    """Batches that depend on the global random states, as those of a random split do."""
    return [torch.randn(3) + random.random() for _ in range(2)]


def test_a_factory_gives_each_pass_the_same() -> None:
    """Else each window of a sweep would be refreshed over other data, and `average` over others again."""
    torch.manual_seed(3)
    passes = Passes(drawn)
    between = torch.random.get_rng_state(), random.getstate()
    first, second, third = (passes.next_pass() for _ in range(3))
    for one, other in ((first, second), (first, third)):
        assert one is not other
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(torch.random.get_rng_state(), between[0])
    assert random.getstate() == between[1]


def test_a_factory_of_generators_starts_each_anew() -> None:
    def generate() -> Iterator[int]:
        yield from (1, 2)

    passes = Passes(generate)
    assert [list(passes.next_pass()) for _ in range(3)] == [[1, 2]] * 3
    assert not passes.is_single


def test_an_iterator_is_good_for_one_pass() -> None:
    assert Passes(iter([1])).is_single
    assert not Passes([1]).is_single


def test_a_factory_that_fails_later_leaves_the_random_states() -> None:
    calls = 0

    def failing() -> list[int]:
        nonlocal calls
        calls += 1
        torch.rand(1)
        if calls > 1:
            raise OSError("disk gone")
        return [1]

    passes = Passes(failing)
    passes.next_pass()
    before = torch.random.get_rng_state()
    with pytest.raises(UserCodeError, match="the data factory raised OSError: disk gone"):
        passes.next_pass()
    assert torch.equal(torch.random.get_rng_state(), before)


class Hooked(nn.Linear):
    """A model whose own code runs while weights are loaded."""

    error: BaseException = KeyError("my key")

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        raise self.error


@pytest.mark.parametrize("error", [KeyError("my key"), RuntimeError("one line"), SystemExit(3)], ids=repr)
def test_an_error_of_the_models_own_code_is_the_users(error: BaseException) -> None:
    """A traceback with exit 1 would say that it is ours; "the checkpoints don't fit" would say that it is theirs."""
    model = Hooked(2, 2)
    model.error = error
    with pytest.raises(UserCodeError, match="loading the weights into the model raised") as caught:
        load_weights(model, nn.Linear(2, 2).state_dict())
    assert str(error) in str(caught.value)


def test_out_of_memory_stays_what_it_is() -> None:
    model = Hooked(2, 2)
    model.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        load_weights(model, nn.Linear(2, 2).state_dict())


def test_other_shapes_are_listed() -> None:
    with pytest.raises(IncompatibleError, match=r"don't fit the model Linear:\n  size mismatch for weight"):
        load_weights(nn.Linear(2, 2), nn.Linear(3, 2).state_dict())


def test_a_model_without_memory_cannot_be_moved() -> None:
    with pytest.raises(UserCodeError, match="moving the model to cpu raised NotImplementedError"):
        move_model(nn.Linear(2, 2, device="meta"), torch.device("cpu"))
