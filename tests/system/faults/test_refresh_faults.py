"""A BatchNorm refresh with data and models that misbehave: all of it happens, or nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from user_code.everything import CHILDREN, Everything, batches, changed, everything, shuffled, snapshot

from ckpt_avg import UserCodeError, refresh_batch_norm

InProcess = Callable[..., tuple[int, str, str]]

_numbers = itertools.count()

USER = """
import math
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=5):
        super().__init__()
        self.inner = nn.Linear(4, width)
        self.first = nn.BatchNorm1d(width)

    def forward(self, values):
        return self.first(self.inner(values))

def make(): return Net()
def make_wider(): return Net(width=6)
def make_broken(): raise FileNotFoundError("config.yaml")

def good(): return list(torch.randn(17, 4, generator=torch.Generator().manual_seed(1)).split([7, 7, 3]))
def not_a_number(): return [good()[0], good()[1] * math.nan]

def raising():
    yield from good()[:2]
    raise OSError("disk gone")

def out_of_memory():
    yield good()[0]
    raise MemoryError
"""

# -- Refused --------------------------------------------------------------------------------------------------------

REFUSED = {
    "a loader that raises": ("make", "raising", 7, "the dataloader raised at batch 3: OSError: disk gone"),
    "a loader without memory": ("make", "out_of_memory", 6, "out of memory: "),
    "NaN in a batch": ("make", "not_a_number", 7, "layer 'first', batch 2: the activations contain NaN or Inf"),
    "a model that cannot be made": ("make_broken", "good", 7, "the model factory raised FileNotFoundError"),
    "another model": ("make_wider", "good", 4, "don't fit the model Net"),
}


@pytest.mark.guarantee("out-of-memory", "refresh-fails")
@pytest.mark.parametrize("case", REFUSED)
def test_a_refresh_that_cannot_be_done_leaves_the_old_output_and_says_why(
    tmp_path: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Each kind of error has its exit code, the last line says why, and the old output stays."""
    model, data, expected, says = REFUSED[case]
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = f"faulty_{os.getpid()}_{next(_numbers)}"
    (tmp_path / f"{module}.py").write_text(USER)
    sources = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, source in enumerate(sources):
        torch.manual_seed(seed)
        weights = nn.Linear(4, 5).state_dict(prefix="inner.")
        statistics = nn.BatchNorm1d(5).state_dict(prefix="first.")
        statistics["first.running_mean"] += seed
        save_file({**weights, **statistics}, source)
    output = tmp_path / "out" / "mean.safetensors"
    output.parent.mkdir()
    output.write_bytes(b"the old one")
    user = ["--model", f"{module}:{model}", "--data", f"{module}:{data}", "--app-dir", tmp_path]
    code, out, err = in_process("average", *sources, "-o", output, "--overwrite", "--device", "cpu", *user)
    assert (code, out) == (expected, "")
    assert says in f"\n{err}".rpartition("\nError: ")[2]
    assert ("Traceback" in err) == ("raise" in says)  # the user's own line is what the user needs to see
    assert os.listdir(output.parent) == [output.name]
    assert output.read_bytes() == b"the old one"


# -- All or nothing, and what would not be ---------------------------------------------------------------------------


def fail_after(number: int, measure: Callable[..., object] = refresh_batch_norm, **options: Any) -> set[str]:
    """Refreshes an awkward model with a loader that raises; returns what had changed afterwards."""
    model = everything()
    before = snapshot(model)
    with pytest.raises((UserCodeError, OSError)):
        measure(model, shuffled(number, OSError("no route")), **options)
    return changed(before, snapshot(model))


@pytest.mark.guarantee("refresh-undisturbed")
@pytest.mark.parametrize("forgets", ["a hook", "modes and buffers", "the random states", "momenta"])
def test_the_snapshot_catches_a_refresh_that_forgets(forgets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: the snapshot shows each thing that a refresh does not put back."""
    if forgets == "a hook":
        monkeypatch.setattr("torch.utils.hooks.RemovableHandle.remove", lambda handle: None)
        assert any("hooks" in name for name in fail_after(2))
    elif forgets == "modes and buffers":
        monkeypatch.setattr("ckpt_avg.batchnorm.hooks.undisturbed", contextlib.nullcontext)
        left = fail_after(2)
        assert any(name.endswith("running_mean bytes") for name in left)
        assert any(name.endswith("mode") for name in left)
    elif forgets == "the random states":
        monkeypatch.setattr(
            "ckpt_avg.user_code.isolation._random_states_restored", lambda cuda: contextlib.nullcontext()
        )
        assert fail_after(2) == {"random states"}
    else:  # torch's own function, which restores nothing when a loader raises
        monkeypatch.setattr(Everything, "train", nn.Module.train)
        left = fail_after(2, lambda model, data: torch.optim.swa_utils.update_bn(data, model))
        assert any(name.endswith("momentum") for name in left)
    monkeypatch.undo()
    assert fail_after(2) == set()


def spread(splits: int, seed: int, estimator: str) -> float:
    """Returns how far the first layer's statistics differ, relatively, over random splits of the samples."""
    rng = random.Random(seed)
    samples = torch.randn(120, 3, 4, generator=torch.Generator().manual_seed(seed)) * 7 - 30
    flat = samples.double().transpose(0, 1).flatten(1)
    mean, variance = flat.mean(1), flat.var(1)
    worst = 0.0
    for _ in range(splits):
        cuts = sorted(rng.sample(range(1, 120), rng.randrange(0, 40)))
        sizes = [end - begin for begin, end in itertools.pairwise([0, *cuts, 120])]
        model = nn.Sequential(nn.BatchNorm1d(3))
        found = refresh_batch_norm(model, samples.split(sizes), estimator=estimator).statistics["0"]
        for value, exact in ((found.mean, mean), (found.variance, variance)):
            worst = max(worst, ((value - exact).abs() / exact.abs()).max().item())
    return worst


def test_the_split_of_the_samples_does_not_matter() -> None:
    """And the control: averaging per-batch statistics, as update_bn does, depends on it."""
    assert spread(20, 0, "pooled") <= 1e-12
    assert spread(20, 0, "batch-mean") > 1e-3


@pytest.mark.guarantee("refresh-undisturbed")
@pytest.mark.campaign
def test_many_splits_of_the_samples() -> None:
    worst = max(spread(100, seed, "pooled") for seed in range(20))
    print("largest relative difference over 2,000 splits:", worst)
    assert worst <= 1e-12


@pytest.mark.guarantee("refresh-undisturbed")
@pytest.mark.campaign
def test_whatever_is_raised_wherever_nothing_has_changed() -> None:
    """1,000 models in random modes, each broken by some error of some layer or of the loader at some batch."""
    rng = random.Random(0)
    errors = [OSError, ValueError, MemoryError, KeyboardInterrupt, SystemExit, RuntimeError]
    for number in range(1000):
        model = everything()
        for module in model.modules():
            module.training = rng.random() < 0.5
        error, at, where = rng.choice(errors), rng.randint(1, 3), rng.choice(["loader", "before", "after"])
        calls = itertools.count(1)

        def fail(*_: object, error: type[BaseException] = error, at: int = at, calls: Any = calls) -> None:
            if next(calls) == at:
                raise error("broken")

        child = getattr(model, rng.choice(CHILDREN))
        if where == "before":
            child.register_forward_pre_hook(fail)
        elif where == "after":
            child.register_forward_hook(fail)
        before = snapshot(model)
        loader = shuffled(at, error("broken")) if where == "loader" else iter(batches())
        with pytest.raises((UserCodeError, error)):
            refresh_batch_norm(model, loader, estimator=rng.choice(["pooled", "batch-mean"]), frozen=["frozen"])
        assert changed(before, snapshot(model)) == set(), (number, error, at, where)
