"""A BatchNorm refresh through the command, with data and models that misbehave: all of it happens, or nothing."""

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
from safetensors.torch import load_file, save_file
from torch import nn
from user_code.everything import CHILDREN, Everything, batches, changed, everything, shuffled, snapshot

from ckpt_avg import UserCodeError, refresh_batch_norm

InProcess = Callable[..., tuple[int, str, str]]

_numbers = itertools.count()

USER = """
import itertools, math
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=5, spare=False, untracked=False):
        super().__init__()
        self.inner = nn.Linear(4, width)
        self.first = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.plain = nn.BatchNorm1d(width, affine=False, track_running_stats=False) if untracked else nn.Identity()
        self.outer = nn.Linear(width, 3)
        self.second = nn.BatchNorm1d(3)
        self.register_buffer("codes", torch.arange(3.0))
        if spare:
            self.spare = nn.BatchNorm1d(3)

    def forward(self, values):
        if self.training:
            self.codes.add_(1)
        return self.second(self.outer(self.drop(self.plain(self.first(self.inner(values))))))

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, values):
        return self.norm(5 * self.norm(values) + 1)

def make(): return Net()
def make_with_spare(): return Net(spare=True)
def make_untracked(): return Net(untracked=True)
def make_wider(): return Net(width=6)
def make_plain(): return nn.Sequential(nn.Linear(4, 3))
def make_broken(): raise FileNotFoundError("config.yaml")

def make_failing():
    model = Net()
    model.outer.register_forward_pre_hook(lambda module, arguments: 1 / 0 if len(arguments[0]) == 3 else None)
    return model

def samples():
    return torch.randn(17, 4, generator=torch.Generator().manual_seed(1)) + torch.arange(4.0)

def good(): return list(samples().split([7, 7, 3]))
def one_batch(): return [samples()]
def tuples(): return [(batch, "label") for batch in good()]
def lists(): return [[batch, None] for batch in good()]
def mappings(): return [{"values": batch} for batch in good()]
def endless(): return itertools.cycle(good())
def far_away(): return [batch * 1e-3 + 1e6 for batch in good()]
def constant(): return [torch.full((6, 4), 1e6)] * 3

def raising():
    yield from good()[:2]
    raise OSError("disk gone")

def out_of_memory():
    yield good()[0]
    raise MemoryError

def empty(): return []
def used_up(): return iter(())
def one_value(): return [*good(), samples()[:1]]
def not_a_number(): return [good()[0], good()[1] * math.nan]
def strings(): return [good()[0], "a string"]
def too_wide(): return [torch.ones(5, 9)]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The user's module, in the folder `app`, under a name of its own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "app").mkdir()
    name = f"faulty_{os.getpid()}_{next(_numbers)}"
    (tmp_path / "app" / f"{name}.py").write_text(USER)
    return name


@pytest.fixture
def refresh(tmp_path: Path, module: str, in_process: InProcess) -> Callable[..., tuple[int, str, str]]:
    """Averages two checkpoints of a model of the module, refreshed, into `out/mean.safetensors`."""
    (tmp_path / "out").mkdir()

    def call(model: str, data: str, *options: object, trained: str = "", frozen: str = "") -> tuple[int, str, str]:
        sys.path.insert(0, str(tmp_path / "app"))
        factory = getattr(__import__(module), trained or model)
        for seed in range(2):
            torch.manual_seed(seed)
            made = factory()
            for name, buffer in made.named_buffers():
                if buffer.is_floating_point() and not (frozen and name.startswith(frozen)):
                    buffer.add_(seed + 0.5)
            save_file(made.state_dict(), tmp_path / f"{seed}.safetensors")
        user = ["--model", f"{module}:{model}", "--data", f"{module}:{data}", "--app-dir", tmp_path / "app"]
        sources = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
        return in_process("average", *sources, "-o", tmp_path / "out" / "mean.safetensors", *user, "--device", "cpu",
                          "--overwrite", *options)  # fmt: skip

    return call


# -- Refused --------------------------------------------------------------------------------------------------------

REFUSED = {
    "a loader that raises": ("make", "raising", 7, "the dataloader raised at batch 3: OSError: disk gone"),
    "a loader without memory": ("make", "out_of_memory", 6, "out of memory: "),
    "an empty loader": ("make", "empty", 7, "expected at least one batch, got an empty dataloader"),
    "a used-up generator": ("make", "used_up", 7, "make a new one in the factory"),
    "one value per channel": ("make", "one_value", 7, "layer 'first', batch 4: expected more than one value"),
    "NaN in a batch": ("make", "not_a_number", 7, "layer 'first', batch 2: expected finite activations"),
    "a layer out of reach": ("make_with_spare", "good", 7, "got no input for 'spare'"),
    "a batch of another kind": ("make", "strings", 7, "batch 2: got a str. Accepted batches: a tensor"),
    "a batch of another shape": ("make", "too_wide", 7, "the model raised at batch 1 (a tensor of shape [5, 9])"),
    "a model that raises": ("make_failing", "good", 7, "the model raised at batch 3"),
    "a model that cannot be made": ("make_broken", "good", 7, "the model factory raised FileNotFoundError"),
    "another model": ("make_wider", "good", 4, "don't fit the model Net"),
}  # fmt: skip


@pytest.mark.guarantee("batch-kinds", "out-of-memory", "refresh-fails")
@pytest.mark.parametrize("case", REFUSED)
def test_a_refresh_that_cannot_be_done_leaves_the_old_output_and_says_why(
    refresh: Any, tmp_path: Path, case: str
) -> None:
    """If it failed, weights with statistics of some batches, or of another model, would be published."""
    model, data, expected, says = REFUSED[case]
    output = tmp_path / "out" / "mean.safetensors"
    output.write_bytes(b"the old one")
    trained = "make" if model in ("make_wider", "make_broken") else model
    code, out, err = refresh(model, data, trained=trained)
    assert (code, out) == (expected, "")
    assert says in f"\n{err}".rpartition("\nError: ")[2]
    assert ("Traceback" in err) == ("raise" in says)  # the user's own line is what the user needs to see
    assert os.listdir(output.parent) == [output.name]
    assert output.read_bytes() == b"the old one"


# -- Done -----------------------------------------------------------------------------------------------------------


def published(tmp_path: Path) -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "out" / "mean.safetensors")


def activations(tmp_path: Path, module: str, data: str = "one_batch") -> torch.Tensor:
    """What the first layer of the averaged model sees of all samples, in float64."""
    tensors = published(tmp_path)
    samples = torch.cat(getattr(sys.modules[module], data)())
    return nn.functional.linear(samples, tensors["inner.weight"], tensors["inner.bias"]).double()


@pytest.mark.guarantee("endless-loader")
def test_an_endless_loader_ends_where_bn_batches_says(refresh: Any, tmp_path: Path) -> None:
    code, out, _ = refresh("make", "endless", "--bn-batches", 4)
    assert code == 0
    assert "over 24 samples in 4 batches" in out
    assert published(tmp_path)["first.num_batches_tracked"].item() == 4


@pytest.mark.guarantee("small-last-batch")
def test_a_small_last_batch_counts_by_its_samples(refresh: Any, tmp_path: Path, module: str) -> None:
    """If it failed, 3 samples would weigh as much as 7."""
    assert refresh("make", "good")[0] == 0
    seen = activations(tmp_path, module)
    tensors = published(tmp_path)
    torch.testing.assert_close(tensors["first.running_mean"].double(), seen.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tensors["first.running_var"].double(), seen.var(0), rtol=1e-6, atol=1e-6)
    assert refresh("make", "good", "--bn-estimator", "batch-mean")[0] == 0
    assert not torch.allclose(published(tmp_path)["first.running_mean"].double(), seen.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.guarantee("no-negative-variance")
@pytest.mark.parametrize("data", ["far_away", "constant"])
def test_no_variance_is_negative(refresh: Any, tmp_path: Path, module: str, data: str) -> None:
    """If it failed, the layer would give NaN: E[x²] − E[x]² is negative for such activations."""
    assert refresh("make", data)[0] == 0
    variance = published(tmp_path)["first.running_var"]
    assert (variance >= 0).all()
    seen = activations(tmp_path, module, data)
    torch.testing.assert_close(variance.double(), seen.var(0), rtol=1e-6, atol=1e-30)
    narrow = seen.float()
    assert data == "constant" or ((narrow.square().mean(0) - narrow.mean(0).square()) < 0).any()  # the control


@pytest.mark.guarantee("no-batchnorm")
def test_a_model_without_batch_norm_is_a_notice(refresh: Any, tmp_path: Path) -> None:
    code, out, err = refresh("make_plain", "good")
    assert code == 0
    assert err.startswith("Notice: ")
    assert "BatchNorm" in err
    assert "recomputed" not in out


@pytest.mark.guarantee("layer-used-twice")
def test_a_layer_that_is_used_twice_is_said(refresh: Any, tmp_path: Path) -> None:
    code, out, err = refresh("Twice", "good")
    assert code == 0
    assert "'norm'" in out + err
    assert "more than once" in out + err or "twice" in out + err


@pytest.mark.guarantee("frozen-layers")
def test_untracked_and_frozen_layers_are_said_and_left(refresh: Any, tmp_path: Path) -> None:
    code, out, err = refresh("make_untracked", "good", "-v", frozen="first")
    assert code == 0
    assert "'plain'" in out + err
    assert "'first'" in out + err
    assert published(tmp_path)["first.running_mean"].equal(load_file(tmp_path / "0.safetensors")["first.running_mean"])
    assert not published(tmp_path)["second.running_mean"].equal(torch.ones(3))


@pytest.mark.guarantee("refresh-only")
def test_everything_but_the_statistics_is_the_plain_mean(refresh: Any, tmp_path: Path) -> None:
    """If it failed, dropout or a buffer that learns in train mode would leave a trace in the published weights."""
    assert refresh("make", "good")[0] == 0
    refreshed = published(tmp_path)
    assert refresh("make", "good", "--bn", "keep")[0] == 0
    kept = published(tmp_path)
    changed = {name for name in kept if not kept[name].equal(refreshed[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{layer}.{kind}" for layer in ("first", "second") for kind in kinds}


@pytest.mark.guarantee("batch-kinds")
def test_each_kind_of_batch_gives_the_same_output(refresh: Any, tmp_path: Path, module: str) -> None:
    """If it failed, a loader of (input, label) pairs would be refused, or the label be taken for the input."""
    outputs = set()
    for data in ("good", "tuples", "lists", "mappings"):
        code, _, err = refresh("make", data)
        assert (code, err) == (0, "")
        tensors = published(tmp_path)
        outputs.add(tuple(tensors[name].numpy().tobytes() for name in sorted(tensors)))
    assert len(outputs) == 1


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
    """A control: each thing that must be put back is seen where it is not."""
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
def test_whatever_is_raised_wherever_nothing_has_moved() -> None:
    """1,000 models in random modes, each broken by some error of some layer or of the loader at some batch."""
    rng = random.Random(0)
    errors = [OSError, ValueError, MemoryError, KeyboardInterrupt, SystemExit, RuntimeError]
    for number in range(1000):
        model = everything()
        for module in model.modules():
            module.training = rng.random() < 0.5
        error, at, place = rng.choice(errors), rng.randint(1, 3), rng.choice(["loader", "before", "behind"])
        calls = itertools.count(1)

        def fail(*_: object, error: type[BaseException] = error, at: int = at, calls: Any = calls) -> None:
            if next(calls) == at:
                raise error("broken")

        child = getattr(model, rng.choice(CHILDREN))
        if place == "before":
            child.register_forward_pre_hook(fail)
        elif place == "behind":
            child.register_forward_hook(fail)
        before = snapshot(model)
        loader = shuffled(at, error("broken")) if place == "loader" else iter(batches())
        with pytest.raises((UserCodeError, error)):
            refresh_batch_norm(model, loader, estimator=rng.choice(["pooled", "batch-mean"]), frozen=["frozen"])
        assert changed(before, snapshot(model)) == set(), (number, error, at, place)
