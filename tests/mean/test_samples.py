"""What `average` notices of checkpoints that are far off, by a sample of their weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from mean.inputs import State, save

from ckpt_avg import average
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.mean.samples import far_off_by_sample
from ckpt_avg.mean.value_kinds import plan_of


def noticed(paths: Sequence[Path]) -> dict[int, str]:
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path)) for path in paths]
        return dict(far_off_by_sample(checkpoints, plan_of(checkpoints, dtype="keep", non_float="last")))


def run(number: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    """Checkpoints of two matrices that differ by a tenth of their norm."""
    generator = torch.Generator().manual_seed(0)
    base = {"a": torch.randn(70, 50, generator=generator), "b": torch.randn(40, 30, generator=generator)}
    return [
        {name: (each + 0.1 * torch.randn(each.shape, generator=generator)).to(dtype) for name, each in base.items()}
        for _ in range(number)
    ]


def another(state: State) -> State:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(each.shape, generator=generator).to(each.dtype) for name, each in state.items()}


def scaled(factor: float) -> Callable[[State], State]:
    return lambda state: {name: factor * each for name, each in state.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [2, 3, 12])
def test_nothing_in_an_ordinary_run(dtype: torch.dtype, number: int, tmp_path: Path) -> None:
    assert noticed(save(tmp_path, run(number, dtype))) == {}


def test_nothing_in_the_fixture_run(run_folder: Path) -> None:
    """The first and the last of it included."""
    assert noticed(sorted(run_folder.glob("*.pt"))) == {}
    assert noticed([run_folder / "epoch_9.pt", run_folder / "epoch_20.pt"]) == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another, "nothing in common"),
        (scaled(5), r"norm of its weights is about [45]\.?\d* times that"),
        (scaled(0.1), r"norm of its weights is about 0\.\d+ times that"),
        (scaled(0), "norm of its weights is about 0 times that"),
    ],
    ids=["another run", "exploded", "shrunk", "zeroed"],
)
def test_a_checkpoint_that_is_far_off(
    change: Callable[[State], State], words: str, suffix: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Wherever it is; and no other."""
    for number, place in ((3, 0), (3, 2), (8, 4)):
        states = run(number, dtype)
        folder = tmp_path / f"{number}-{place}"
        folder.mkdir()
        found = noticed(save(folder, [*states[:place], dict(change(states[place])), *states[place + 1 :]], suffix))
        assert list(found) == [place]
        assert re.search(words, found[place])


def test_two_runs_are_noticed_once(tmp_path: Path) -> None:
    (state,) = run(1)
    assert list(noticed(save(tmp_path, [state, another(state)]))) == [1]


def test_weights_of_zeros_alone(tmp_path: Path) -> None:
    """They have no direction."""
    states = [scaled(0)(state) for state in run(3)]
    assert noticed(save(tmp_path, states)) == {}


@pytest.mark.parametrize("spoil", [math.nan, math.inf])
def test_nan_is_left_to_the_mean_which_names_it(spoil: float, tmp_path: Path) -> None:
    states = run(3)
    states[1]["a"][:] = spoil
    assert noticed(save(tmp_path, states)) == {}


def test_few_weights_and_statistics_tell_nothing(tmp_path: Path) -> None:
    """Statistics differ by much within a run, and a few weights by chance."""
    states = [
        {"w": torch.randn(30, 30), "bn.running_mean": torch.randn(9000), "bn.running_var": torch.rand(9000)}
        for _ in range(3)
    ]
    assert noticed(save(tmp_path, states)) == {}


def test_average_and_its_dry_run_say_so(tmp_path: Path) -> None:
    """Before the work, and they go on: the user decides."""
    states = run(3)
    paths = save(tmp_path, [states[0], another(states[1]), states[2]])
    for dry_run in (True, False):
        notices = average(paths, tmp_path / "out.safetensors", dry_run=dry_run).notices
        assert any("1.safetensors: by a sample, its weights have nothing in common" in text for text in notices)
