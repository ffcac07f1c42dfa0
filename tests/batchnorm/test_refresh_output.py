"""The BatchNorm refresh as a step of `average`: the fixture run, and every way in which it can be refused."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from ckpt_avg import AverageResult, IncompatibleError, NonFiniteError, UsageError, UserCodeError, average
from ckpt_avg.progress import Progress

LAYERS = ("features.bn1", "features.bn2", "features.bn3", "classifier.bn")
BUFFERS = {f"{layer}.{kind}" for layer in LAYERS for kind in ("running_mean", "running_var", "num_batches_tracked")}


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as reader:
        return reader.metadata()


def measure(model: nn.Module, batches: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The oracle: count-weighted mean and unbiased variance by sums shifted by the first batch's mean."""
    sums: dict[str, list[Any]] = {}
    model.eval()
    hooks = []

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            values = arguments[0].double().transpose(0, 1).flatten(1)
            if name not in sums:
                sums[name] = [values.mean(1), 0, 0.0, 0.0]
            shifted = values - sums[name][0].unsqueeze(1)
            sums[name][1] += values.shape[1]
            sums[name][2] += shifted.sum(1)
            sums[name][3] += shifted.square().sum(1)

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.train()
            hooks.append(module.register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        for batch in batches:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    for handle in hooks:
        handle.remove()
    return {
        name: (shift + first / count, (second - first.square() / count) / (count - 1))
        for name, (shift, count, first, second) in sums.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# The real run


@pytest.fixture(scope="module")
def few(train: Any) -> list[Any]:
    """Three batches of the training data, the last one smaller."""
    batches = [list(batch) for batch in itertools.islice(train.train_loader(), 3)]
    batches[-1] = [part[:40] for part in batches[-1]]
    return batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("averages")


@pytest.fixture(scope="module")
def kept(folder: Path, run_folder: Path) -> dict[str, Tensor]:
    """The average of the last 8 checkpoints, running statistics averaged like weights."""
    average([run_folder], folder / "kept.safetensors", last=8, bn="keep", device="cpu")
    return load_file(folder / "kept.safetensors")


@pytest.fixture(scope="module")
def refreshed(folder: Path, run_folder: Path, train: Any) -> tuple[AverageResult, dict[str, Tensor]]:
    """The average of the last 8 checkpoints, refreshed over all training data."""
    result = average(
        [run_folder],
        folder / "refreshed.safetensors",
        last=8,
        model=train.make_model,
        data=train.train_loader,
        device="cpu",
    )
    return result, load_file(folder / "refreshed.safetensors")


@pytest.fixture(scope="module")
def averaged_model(run_folder: Path, train: Any) -> nn.Module:
    """torch's own average of the same checkpoints."""
    paths = [run_folder / f"epoch_{epoch}.pt" for epoch in range(13, 21)]
    averaged = AveragedModel(train.make_model())
    for path in paths:
        model = train.make_model()
        model.load_state_dict(torch.load(path, weights_only=False)["model"])
        averaged.update_parameters(model)
    return averaged.module


def test_weights_are_those_of_torch_averaged_model(
    refreshed: tuple[AverageResult, dict[str, Tensor]], averaged_model: nn.Module
) -> None:
    """AveragedModel averages incrementally in float32, so it may be some roundings away."""
    _, tensors = refreshed
    for name, parameter in averaged_model.named_parameters():
        torch.testing.assert_close(tensors[name], parameter.detach(), rtol=1e-6, atol=1e-7)
    assert set(tensors) == set(averaged_model.state_dict())


def test_statistics_are_those_of_the_averaged_weights(
    refreshed: tuple[AverageResult, dict[str, Tensor]], averaged_model: nn.Module, train: Any
) -> None:
    """Measured by hooks of our own, over the same images, on the output and on torch's average."""
    result, tensors = refreshed
    model = train.make_model()
    model.load_state_dict(tensors, strict=True)
    measured = measure(model, train.train_loader())
    assert tuple(measured) == LAYERS
    for name, (mean, variance) in measured.items():
        torch.testing.assert_close(tensors[f"{name}.running_mean"].double(), mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(tensors[f"{name}.running_var"].double(), variance, rtol=1e-6, atol=1e-8)
        assert tensors[f"{name}.num_batches_tracked"].item() == 32
    theirs = measure(averaged_model, train.train_loader())
    for name, (mean, variance) in theirs.items():
        torch.testing.assert_close(tensors[f"{name}.running_mean"].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tensors[f"{name}.running_var"].double(), variance, rtol=1e-4, atol=1e-5)
    assert result.statistics == "refreshed"
    assert result.batch_norm is not None
    assert (result.batch_norm.batches, result.batch_norm.samples) == (32, 4000)
    assert result.notices == ()


def test_nothing_but_the_statistics_differs_from_an_average_without_refresh(
    refreshed: tuple[AverageResult, dict[str, Tensor]], kept: dict[str, Tensor]
) -> None:
    _, tensors = refreshed
    assert list(tensors) == list(kept)
    assert {name for name in kept if raw(tensors[name]) != raw(kept[name])} == BUFFERS


def test_the_refresh_helps_this_run(
    refreshed: tuple[AverageResult, dict[str, Tensor]], kept: dict[str, Tensor], train: Any
) -> None:
    """Without it the held-out loss of this very run is higher; with stale statistics it would be, too."""
    scores = []
    for tensors in (refreshed[1], kept):
        model = train.make_model()
        model.load_state_dict(tensors)
        scores.append(train.evaluate(model))
    assert scores[0]["loss"] < scores[1]["loss"]
    assert scores[0]["accuracy"] >= 0.985


def test_kept_statistics_are_means_and_the_last_counter(kept: dict[str, Tensor], run_folder: Path) -> None:
    states = [torch.load(run_folder / f"epoch_{epoch}.pt", weights_only=False)["model"] for epoch in range(13, 21)]
    for layer in LAYERS:
        for kind in ("running_mean", "running_var"):
            name = f"{layer}.{kind}"
            exact = torch.stack([state[name].double() for state in states]).sum(0) / 8
            assert torch.equal(kept[name], exact.float())
        counter = f"{layer}.num_batches_tracked"
        assert kept[counter].item() == states[-1][counter].item() != states[0][counter].item()


def test_metadata_says_how_the_statistics_came_about(
    refreshed: tuple[AverageResult, dict[str, Tensor]], kept: dict[str, Tensor], folder: Path
) -> None:
    assert json.loads(metadata(folder / "refreshed.safetensors")["ckpt_avg.batch_norm"]) == {
        "statistics": "refreshed",
        "estimator": "pooled",
        "amp": "off",
        "batches": 32,
        "samples": 4000,
        "data": "train_loader",
    }
    assert json.loads(metadata(folder / "kept.safetensors")["ckpt_avg.batch_norm"]) == {"statistics": "mean"}


def test_two_runs_give_the_same_bytes(folder: Path, run_folder: Path, train: Any, few: list[Any]) -> None:
    """Whatever the number of threads and the state of torch's random generator."""
    outputs = []
    for number, threads in enumerate((1, 2)):
        torch.manual_seed(number)
        path = folder / f"twice_{number}.safetensors"
        average([run_folder], path, last=3, model=train.make_model, data=few, threads=threads, device="cpu")
        outputs.append(path.read_bytes())
    assert outputs[0] == outputs[1]


def test_bn_batches_ends_the_refresh_early(folder: Path, run_folder: Path, train: Any) -> None:
    path = folder / "two_batches.safetensors"
    result = average(
        [run_folder], path, last=2, model=train.make_model, data=train.train_loader, bn_batches=2, device="cpu"
    )
    assert result.batch_norm is not None
    assert (result.batch_norm.batches, result.batch_norm.samples) == (2, 256)
    tensors = load_file(path)
    model = train.make_model()
    model.load_state_dict(tensors)
    mean, variance = measure(model, itertools.islice(train.train_loader(), 2))["features.bn1"]
    torch.testing.assert_close(tensors["features.bn1.running_mean"].double(), mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(tensors["features.bn1.running_var"].double(), variance, rtol=1e-6, atol=1e-8)
    assert tensors["features.bn1.num_batches_tracked"].item() == 2


def test_the_refresh_sees_the_rounded_weights(
    folder: Path, run_folder: Path, train: Any, few: list[Any], kept: dict[str, Tensor]
) -> None:
    """A bfloat16 output is used with bfloat16 weights: statistics of the unrounded ones would not fit them."""
    path = folder / "bfloat16.safetensors"
    average([run_folder], path, last=8, dtype="bfloat16", model=train.make_model, data=few, device="cpu")
    tensors = load_file(path)
    assert {tensor.dtype for name, tensor in tensors.items() if "num_batches" not in name} == {torch.bfloat16}

    rounded, unrounded = train.make_model(), train.make_model()
    rounded.load_state_dict(tensors)
    unrounded.load_state_dict(kept)
    on_rounded, on_unrounded = measure(rounded, few), measure(unrounded, few)
    told_apart = 0
    for layer in LAYERS:
        for kind, exact, other in zip(
            ("running_mean", "running_var"), on_rounded[layer], on_unrounded[layer], strict=True
        ):
            found = tensors[f"{layer}.{kind}"].double()
            half_a_step = 2.0 ** (torch.frexp(exact).exponent.double() - 9)
            assert (found - exact).abs().le(half_a_step * (1 + 1e-6)).all()
            told_apart += int((found - other).abs().gt(half_a_step * (1 + 1e-6)).sum())
    assert told_apart > 10


def test_a_model_that_is_passed_in_is_copied_and_left_as_it_is(
    folder: Path, run_folder: Path, train: Any, few: list[Any]
) -> None:
    model = train.make_model()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = folder / "model.safetensors"
    average([run_folder], path, last=2, model=model, data=few, device="cpu")
    assert load_file(path).keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in model.modules())


# ---------------------------------------------------------------------------------------------------------------------
# Small made-up models, for what the run does not have


class Small(nn.Module):
    """Two BatchNorm layers between linear ones; `norm` makes each."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.first = norm(6)
        self.outer = nn.Linear(6, 3)
        self.second = norm(3)

    def forward(self, values: Tensor) -> Tensor:
        return self.second(self.outer(self.first(self.inner(values)).relu()))


def batches(count: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8 - number, 4, generator=generator) for number in range(count)]


def trained(make: Callable[[], nn.Module], count: int = 3) -> list[dict[str, Tensor]]:
    """State dicts of models with different weights, each after a few steps in train mode."""
    states = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = make()
        model.train()
        with torch.no_grad():
            for batch in batches(2 + seed, seed=seed):
                model(batch)
        states.append(model.state_dict())
    return states


def save(states: list[dict[str, Tensor]], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for number, state in enumerate(states):
        torch.save(state, folder / f"step_{number}.pt")
    return folder


def measure_small(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance at the first layer of a `Small`, over all batches."""
    model = Small()
    model.load_state_dict(tensors)
    return measure(model, batches())["first"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return save(trained(Small), tmp_path / "run")


def refuse(error: type[Exception], small: Path, **options: Any) -> str:
    """Averages, expects an error, and that the output's folder is as it was."""
    out = small.parent / "out"
    out.mkdir()
    with pytest.raises(error) as caught:
        average([small], out / "swa.safetensors", device="cpu", **options)
    assert list(out.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "missing", "given"),
    [
        ({}, "--model MODULE:FACTORY and --data MODULE:FACTORY", None),
        ({"bn": "refresh"}, "--model MODULE:FACTORY and --data MODULE:FACTORY", None),
        ({"model": Small}, "Add --data MODULE:FACTORY,", "--model"),
        ({"data": batches}, "Add --model MODULE:FACTORY,", "--data"),
    ],
    ids=["nothing", "only asked for", "only a model", "only data"],
)
def test_without_model_and_data_it_says_what_to_add(
    small: Path, options: dict[str, Any], missing: str, given: str | None
) -> None:
    started: list[int] = []
    message = refuse(UsageError, small, progress=Progress(start=started.append), **options)
    assert "running statistics of 2 BatchNorm layers ('first', 'second')" in message
    assert missing in message
    assert "--bn keep" in message
    assert given is None or given not in message
    assert UsageError.exit_code == 2
    assert started == []


def test_bn_keep_needs_no_model_and_says_what_it_did(small: Path, tmp_path: Path) -> None:
    result = average([small], tmp_path / "swa.safetensors", bn="keep")
    assert result.statistics == "mean"
    assert result.batch_norm is None
    (notice,) = result.notices
    assert "running statistics of 2 BatchNorm layers are the mean of the checkpoints'" in notice
    assert "--model and --data" in notice


def test_bn_keep_wins_over_a_model(small: Path, tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError

    result = average([small], tmp_path / "swa.safetensors", bn="keep", model=never, data=never)
    assert result.statistics == "mean"


@pytest.mark.parametrize("options", [{"model": nn.Linear, "data": batches}, {"bn": "refresh"}])
def test_without_batch_norm_a_refresh_is_a_notice(tmp_path: Path, options: dict[str, Any]) -> None:
    run = save(trained(lambda: nn.Linear(4, 2)), tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", **options)
    assert result.statistics == "none"
    assert result.written
    assert result.notices == ("the checkpoints hold no BatchNorm statistics, so there is nothing to refresh",)
    assert "ckpt_avg.batch_norm" not in metadata(tmp_path / "swa.safetensors")


def freeze(states: list[dict[str, Tensor]], layer: str) -> list[dict[str, Tensor]]:
    statistics = {f"{layer}.running_mean", f"{layer}.running_var"}
    return [
        {name: states[0][name] if name in statistics else value for name, value in state.items()} for state in states
    ]


@pytest.mark.guarantee("frozen-layers")
def test_frozen_layers_keep_their_bytes_and_are_named(tmp_path: Path) -> None:
    states = freeze(trained(Small), "first")
    run = save(states, tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=Small, data=batches, device="cpu")
    tensors = load_file(tmp_path / "swa.safetensors")

    assert result.batch_norm is not None
    assert result.batch_norm.frozen == ("first",)
    assert list(result.batch_norm.statistics) == ["second"]
    assert any("1 frozen BatchNorm layer left as found" in notice and "'first'" in notice for notice in result.notices)
    for kind in ("running_mean", "running_var"):
        assert raw(tensors[f"first.{kind}"]) == raw(states[0][f"first.{kind}"])

    # The second layer sees the first as it will be in use: normalised by the frozen statistics.
    model = Small()
    model.load_state_dict(tensors)
    model.eval()
    with torch.no_grad():
        samples = model.outer(model.first(model.inner(torch.cat(batches()))).relu()).double()
    torch.testing.assert_close(tensors["second.running_mean"].double(), samples.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tensors["second.running_var"].double(), samples.var(0), rtol=1e-5, atol=1e-6)


def test_where_all_layers_are_frozen_no_data_is_needed(tmp_path: Path) -> None:
    states = freeze(freeze(trained(Small), "first"), "second")
    run = save(states, tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors")
    tensors = load_file(tmp_path / "swa.safetensors")
    assert result.statistics == "frozen"
    assert any("2 frozen BatchNorm layers" in notice for notice in result.notices)
    assert json.loads(metadata(tmp_path / "swa.safetensors")["ckpt_avg.batch_norm"]) == {"statistics": "frozen"}
    for layer, kind in itertools.product(("first", "second"), ("running_mean", "running_var")):
        assert raw(tensors[f"{layer}.{kind}"]) == raw(states[0][f"{layer}.{kind}"])


def test_a_layer_is_not_frozen_when_one_of_its_statistics_moves(tmp_path: Path) -> None:
    states = freeze(trained(Small), "first")
    states[2]["first.running_var"] = states[2]["first.running_var"] * 2
    run = save(states, tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=Small, data=batches)
    assert result.batch_norm is not None
    assert sorted(result.batch_norm.statistics) == ["first", "second"]


def test_one_checkpoint_alone_is_refreshed(tmp_path: Path) -> None:
    """That its statistics equal themselves does not make them frozen."""
    run = save(trained(Small, count=1), tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=Small, data=batches)
    assert result.statistics == "refreshed"


@pytest.mark.guarantee("refresh-fails")
def test_a_model_with_other_names_is_refused_before_averaging(small: Path) -> None:
    class Other(Small):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)
            del self.outer

    started: list[int] = []
    message = refuse(IncompatibleError, small, model=Other, data=batches, progress=Progress(start=started.append))
    assert IncompatibleError.exit_code == 4
    assert "don't fit the model Other" in message
    missing, unexpected = message.index("Missing key(s)"), message.index("Unexpected key(s)")
    for name in ("head.weight", "head.bias"):
        assert missing < message.index(f'"{name}"') < unexpected
    for name in ("outer.weight", "outer.bias"):
        assert unexpected < message.index(f'"{name}"')
    assert "Use the --model that was trained" in message
    assert started == []


def test_a_model_with_other_shapes_is_refused_before_averaging(small: Path) -> None:
    class Wider(Small):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 6)

    started: list[int] = []
    message = refuse(IncompatibleError, small, model=Wider, data=batches, progress=Progress(start=started.append))
    assert "size mismatch for inner.weight" in message
    assert "torch.Size([6, 4])" in message
    assert "torch.Size([6, 5])" in message
    assert started == []


def test_a_model_factory_that_raises_is_named(small: Path) -> None:
    def make_model() -> nn.Module:
        raise FileNotFoundError("config.yaml")

    message = refuse(UserCodeError, small, model=make_model, data=batches)
    assert "the model factory raised FileNotFoundError: config.yaml" in message
    assert UserCodeError.exit_code == 7


def test_a_data_factory_that_raises_is_named(small: Path) -> None:
    def make_data() -> Any:
        raise FileNotFoundError("train.tar")

    started: list[int] = []
    message = refuse(UserCodeError, small, model=Small, data=make_data, progress=Progress(start=started.append))
    assert "the data factory raised FileNotFoundError: train.tar" in message
    assert started == []


@pytest.mark.parametrize("returned", [None, {"inner.weight": 1}, Small], ids=["None", "dict", "class"])
def test_a_model_factory_that_returns_no_module_is_refused(small: Path, returned: Any) -> None:
    message = refuse(UserCodeError, small, model=lambda: returned, data=batches)
    assert "the model factory: expected it to return a torch.nn.Module" in message
    assert f"got {type(returned).__name__}" in message


@pytest.mark.parametrize("returned", [None, 3])
def test_a_data_factory_that_returns_no_batches_is_refused(small: Path, returned: Any) -> None:
    message = refuse(UserCodeError, small, model=Small, data=lambda: returned)
    assert "the data factory: expected it to return an iterable of batches" in message
    assert f"got {type(returned).__name__}" in message


class Interrupted:
    """Batches that end in an exception."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error = at, error

    def __iter__(self) -> Iterator[Tensor]:
        yield from batches(self.at - 1)
        raise self.error


@pytest.mark.parametrize("at", [1, 3])
def test_a_loader_that_raises_midway_publishes_nothing(small: Path, at: int) -> None:
    message = refuse(UserCodeError, small, model=Small, data=Interrupted(at, ValueError("bad row")))
    assert f"the dataloader raised at batch {at}: ValueError: bad row" in message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "empty dataloader"),
        ([torch.full((4, 4), math.nan)], "layer 'first', batch 1: expected finite activations"),
        ([torch.ones(1, 4)], "layer 'first', batch 1: expected more than one value per channel"),
        ([torch.ones(4, 9)], "the model raised at batch 1 (a tensor of shape [4, 9])"),
        (["text"], "Accepted batches"),
    ],
    ids=["empty", "NaN", "one value", "shape", "kind"],
)
def test_a_refresh_that_cannot_be_done_publishes_nothing(small: Path, data: Any, says: str) -> None:
    assert says in refuse(UserCodeError, small, model=Small, data=data)


@pytest.mark.parametrize("error", [ValueError("bad row"), KeyboardInterrupt()])
def test_a_failed_refresh_leaves_the_old_output(small: Path, tmp_path: Path, error: BaseException) -> None:
    output = tmp_path / "swa.safetensors"
    output.write_bytes(b"the old one")
    before = sorted(tmp_path.iterdir())
    with pytest.raises((UserCodeError, KeyboardInterrupt)):
        average([small], output, model=Small, data=Interrupted(2, error), overwrite=True)
    assert output.read_bytes() == b"the old one"
    assert sorted(tmp_path.iterdir()) == before


def test_statistics_beyond_the_output_dtype_are_refused(small: Path) -> None:
    """float16 ends at 65,504; an infinite variance would silence the layer."""
    loud = [batch * 1e4 for batch in batches()]
    message = refuse((UserCodeError, NonFiniteError), small, model=Small, data=loud, dtype="float16")
    assert "'first" in message
    assert "float16" in message.lower() or "F16" in message


@pytest.fixture
def own_model() -> tuple[nn.Module, dict[str, bytes]]:
    torch.manual_seed(99)
    model = Small()
    return model, {name: raw(value) for name, value in model.state_dict().items()}


def test_a_dry_run_leaves_the_users_model(
    small: Path, tmp_path: Path, own_model: tuple[nn.Module, dict[str, bytes]]
) -> None:
    model, before = own_model
    result = average([small], tmp_path / "swa.safetensors", model=model, data=batches, dry_run=True)
    assert result.statistics == "refreshed"
    assert not result.written
    assert {name: raw(value) for name, value in model.state_dict().items()} == before


def test_a_refused_run_leaves_the_users_model(small: Path, own_model: tuple[nn.Module, dict[str, bytes]]) -> None:
    """The weights that somebody is training must not be wiped by checkpoints that turn out to hold NaN."""
    model, before = own_model
    state = torch.load(small / "step_1.pt", weights_only=True)
    state["inner.weight"][0, 0] = math.nan
    torch.save(state, small / "step_1.pt")
    refuse(NonFiniteError, small, model=model, data=batches)
    assert {name: raw(value) for name, value in model.state_dict().items()} == before


def test_checkpoints_that_do_not_fit_leave_the_users_model(
    tmp_path: Path, own_model: tuple[nn.Module, dict[str, bytes]]
) -> None:
    model, before = own_model
    states = [{name: value for name, value in state.items() if name != "outer.bias"} for state in trained(Small)]
    refuse(IncompatibleError, save(states, tmp_path / "run"), model=model, data=batches)
    assert {name: raw(value) for name, value in model.state_dict().items()} == before


def test_a_layer_under_two_names_is_refreshed_under_both(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)
            self.norm = nn.BatchNorm1d(3)
            self.again = self.norm

        def forward(self, values: Tensor) -> Tensor:
            values = self.inner(values)
            return self.norm(values) + self.again(3 * values)

    run = save(trained(Shared), tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=Shared, data=batches, device="cpu")
    tensors = load_file(tmp_path / "swa.safetensors")
    model = Shared()
    model.load_state_dict(tensors)
    with torch.no_grad():
        inner = model.inner(torch.cat(batches()))
    samples = torch.cat([inner, 3 * inner]).double()
    for name in ("norm", "again"):
        torch.testing.assert_close(tensors[f"{name}.running_mean"].double(), samples.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tensors[f"{name}.running_var"].double(), samples.var(0), rtol=1e-5, atol=1e-6)
        assert tensors[f"{name}.num_batches_tracked"].item() == 3
    assert any("layers used more than once in a pass" in notice and "'norm'" in notice for notice in result.notices)


def test_a_model_that_is_one_layer_has_names_without_prefix(tmp_path: Path) -> None:
    run = save(trained(lambda: nn.BatchNorm1d(4)), tmp_path / "run")
    average([run], tmp_path / "swa.safetensors", model=lambda: nn.BatchNorm1d(4), data=batches)
    tensors = load_file(tmp_path / "swa.safetensors")
    samples = torch.cat(batches()).double()
    assert torch.equal(tensors["running_mean"], samples.mean(0).float())
    torch.testing.assert_close(tensors["running_var"], samples.var(0).float(), rtol=1e-6, atol=0)
    assert tensors["num_batches_tracked"].item() == 3


def tracked_instance_norm(channels: int) -> nn.Module:
    class Unfolded(nn.InstanceNorm1d):
        def forward(self, values: Tensor) -> Tensor:
            return super().forward(torch.stack([values, -values + 1], dim=2)).mean(2)

    return Unfolded(channels, affine=True, track_running_stats=True)


def test_tracked_statistics_of_instance_norm_are_averaged_and_named(tmp_path: Path) -> None:
    """InstanceNorm is no BatchNorm: its statistics in train mode would be those of single samples."""

    class Mixed(Small):
        def __init__(self) -> None:
            super().__init__()
            self.second = tracked_instance_norm(3)

    states = trained(Mixed)
    run = save(states, tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=Mixed, data=batches)
    tensors = load_file(tmp_path / "swa.safetensors")
    assert result.batch_norm is not None
    assert list(result.batch_norm.statistics) == ["first"]
    assert any("'second'" in notice and "the mean of the checkpoints'" in notice for notice in result.notices)
    for kind in ("running_mean", "running_var"):
        exact = torch.stack([state[f"second.{kind}"].double() for state in states]).sum(0) / 3
        assert torch.equal(tensors[f"second.{kind}"], exact.float())
    assert tensors["second.num_batches_tracked"].item() == states[-1]["second.num_batches_tracked"].item()


def test_instance_norm_alone_gives_a_notice_and_the_mean(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return Small(tracked_instance_norm)

    run = save(trained(make), tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=make, data=batches)
    assert result.statistics == "mean"
    assert result.batch_norm is None
    assert any(
        "no BatchNorm layers of the model" in notice and "'first', 'second'" in notice for notice in result.notices
    )


def test_a_subclass_with_a_buffer_of_its_own_is_refreshed(tmp_path: Path) -> None:
    """The other buffer is averaged, or kept, as any tensor; only the three of BatchNorm are replaced."""

    class Gated(nn.BatchNorm1d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.register_buffer("gate", torch.rand(channels))

    def make() -> nn.Module:
        return Small(Gated)

    states = trained(make)
    run = save(states, tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=make, data=batches)
    assert result.batch_norm is not None
    assert list(result.batch_norm.statistics) == ["first", "second"]
    exact = torch.stack([state["first.gate"].double() for state in states]).sum(0) / 3
    assert torch.equal(load_file(tmp_path / "swa.safetensors")["first.gate"], exact.float())


def test_layers_without_a_counter_are_refreshed(tmp_path: Path) -> None:
    """Checkpoints of very old versions of torch have no num_batches_tracked, and load all the same."""
    states = [{name: value for name, value in state.items() if "num_batches" not in name} for state in trained(Small)]
    result = average([save(states, tmp_path / "run")], tmp_path / "swa.safetensors", model=Small, data=batches)
    tensors = load_file(tmp_path / "swa.safetensors")
    assert result.statistics == "refreshed"
    assert list(tensors) == sorted(states[0])
    mean, _ = measure_small(tensors)
    torch.testing.assert_close(tensors["first.running_mean"].double(), mean, rtol=1e-6, atol=1e-7)


def test_a_model_whose_statistics_the_checkpoints_lack_is_refused(tmp_path: Path) -> None:
    """A model that loads without its running statistics would hide that they are missing."""

    class Forgetful(Small):
        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state_dict, strict=False, assign=assign)

    states = [
        {name: value for name, value in state.items() if not name.startswith("second.r")} for state in trained(Small)
    ]
    message = refuse(UserCodeError, save(states, tmp_path / "run"), model=Forgetful, data=batches)
    assert "layer 'second'" in message
    assert "model.state_dict()" in message


@pytest.mark.guarantee("batch-kinds")
def test_forward_batch_reaches_the_model_during_averaging(small: Path, tmp_path: Path) -> None:
    def forward_batch(model: nn.Module, batch: dict[str, Any]) -> None:
        model(batch["inputs"]["x"])

    plain, hooked = tmp_path / "plain.safetensors", tmp_path / "hooked.safetensors"
    average([small], plain, model=Small, data=batches)
    average(
        [small],
        hooked,
        model=Small,
        data=lambda: [{"inputs": {"x": batch}} for batch in batches()],
        forward_batch=forward_batch,
    )
    first, second = load_file(plain), load_file(hooked)
    assert {name: raw(value) for name, value in first.items()} == {name: raw(value) for name, value in second.items()}


def test_progress_reports_the_refresh(small: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    average(
        [small],
        tmp_path / "swa.safetensors",
        model=Small,
        data=batches,
        progress=Progress(refreshed=lambda count, samples: calls.append((count, samples))),
    )
    assert calls == [(1, 8), (2, 15), (3, 21)]


def test_the_modes_of_the_users_model_survive(small: Path, tmp_path: Path) -> None:
    model = Small()
    model.train()
    model.second.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    average([small], tmp_path / "swa.safetensors", model=model, data=batches)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_loader_that_shuffles_gives_the_same_bytes_again(folder: Path, run_folder: Path, train: Any) -> None:
    """Training loaders shuffle; whatever was drawn before, each refresh sees the same order."""
    outputs = []
    for number in range(2):
        torch.manual_seed(number)
        torch.rand(number + 1)
        path = folder / f"shuffled_{number}.safetensors"
        data = DataLoader(train.train_loader().dataset, batch_size=500, shuffle=True)
        average([run_folder], path, last=2, model=train.make_model, data=data, bn_batches=2)
        outputs.append(path.read_bytes())
    assert outputs[0] == outputs[1]
