"""The BatchNorm refresh as a step of `average`: what is published, and every way in which it can fail."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batchnorm.oracles import model_of
from batchnorm.small_runs import Small, batches, fail, measure, metadata, raw, refuse, save, trained
from recorded import Recorded
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from ckpt_avg import AverageResult, IncompatibleError, NonFiniteError, UserCodeError, average

LAYERS = ("features.bn1", "features.bn2", "features.bn3", "classifier.bn")
BUFFERS = {f"{layer}.{kind}" for layer in LAYERS for kind in ("running_mean", "running_var", "num_batches_tracked")}


# -- The real run -----------------------------------------------------------------------------------------------------


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
    refreshed: tuple[AverageResult, dict[str, Tensor]], train: Any
) -> None:
    """Measured by hooks of our own, over the same images, on the output, whose weights are those of torch's average."""
    result, tensors = refreshed
    model = train.make_model()
    model.load_state_dict(tensors, strict=True)
    measured = measure(model, train.train_loader())
    assert tuple(measured) == LAYERS
    for name, (mean, variance) in measured.items():
        torch.testing.assert_close(tensors[f"{name}.running_mean"].double(), mean, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(tensors[f"{name}.running_var"].double(), variance, rtol=1e-6, atol=1e-8)
        assert tensors[f"{name}.num_batches_tracked"].item() == 32
    assert result.statistics == "refreshed"
    assert result.batch_norm is not None
    assert (result.batch_norm.batches, result.batch_norm.samples) == (32, 4000)
    assert result.notices == ()


@pytest.mark.guarantee("refresh-only")
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


def test_bn_batches_ends_the_refresh_early(folder: Path, run_folder: Path, train: Any) -> None:
    path = folder / "two_batches.safetensors"
    result = average(
        [run_folder], path, last=2, model=train.make_model, data=train.train_loader, bn_batches=2, device="cpu"
    )
    assert result.batch_norm is not None
    assert (result.batch_norm.batches, result.batch_norm.samples) == (2, 256)
    recorded = json.loads(metadata(path)["ckpt_avg.batch_norm"])
    assert (recorded["batches"], recorded["samples"]) == (2, 256)
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


# -- Small made-up models, for what the run does not have -------------------------------------------------------------


def measure_small(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance at the first layer of a `Small`, over all batches."""
    model = Small()
    model.load_state_dict(tensors)
    return measure(model, batches())["first"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return save(trained(Small), tmp_path / "run")


@pytest.mark.parametrize("shuffles", [False, True])
def test_two_runs_give_the_same_bytes(small: Path, tmp_path: Path, shuffles: bool) -> None:
    """Whatever the number of threads and the random states: training loaders shuffle."""
    data = DataLoader(TensorDataset(torch.cat(batches())), batch_size=6, shuffle=shuffles)
    outputs = []
    for number in (1, 2):
        torch.manual_seed(number)
        torch.rand(number)
        path = tmp_path / f"twice_{number}.safetensors"
        average([small], path, model=Small, data=data, threads=number, device="cpu")
        outputs.append(path.read_bytes())
    assert outputs[0] == outputs[1]


@pytest.mark.guarantee("layer-used-twice")
def test_a_layer_under_two_names_is_refreshed_under_both(tmp_path: Path) -> None:
    def shared() -> Any:
        norm = nn.BatchNorm1d(3)
        return model_of(
            lambda model, values: model.norm(model.inner(values)) + model.again(3 * model.inner(values)),
            inner=nn.Linear(4, 3),
            norm=norm,
            again=norm,
        )

    run = save(trained(shared), tmp_path / "run")
    result = average([run], tmp_path / "swa.safetensors", model=shared, data=batches, device="cpu")
    tensors = load_file(tmp_path / "swa.safetensors")
    model = shared()
    model.load_state_dict(tensors)
    with torch.no_grad():
        inner = model.inner(torch.cat(batches()))
    samples = torch.cat([inner, 3 * inner]).double()
    for name in ("norm", "again"):
        torch.testing.assert_close(tensors[f"{name}.running_mean"].double(), samples.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tensors[f"{name}.running_var"].double(), samples.var(0), rtol=1e-5, atol=1e-6)
        assert tensors[f"{name}.num_batches_tracked"].item() == 3
    assert result.notices[1:] == ("layers that the model uses more than once, measured over all uses: 'norm'",)


def test_a_model_that_is_one_layer_has_names_without_prefix(tmp_path: Path) -> None:
    run = save(trained(lambda: nn.BatchNorm1d(4)), tmp_path / "run")
    average([run], tmp_path / "swa.safetensors", model=lambda: nn.BatchNorm1d(4), data=batches)
    tensors = load_file(tmp_path / "swa.safetensors")
    samples = torch.cat(batches()).double()
    assert torch.equal(tensors["running_mean"], samples.mean(0).float())
    torch.testing.assert_close(tensors["running_var"], samples.var(0).float(), rtol=1e-6, atol=0)
    assert tensors["num_batches_tracked"].item() == 3


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
    """Checkpoints of very old versions of torch have no num_batches_tracked, and still load."""
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
    assert "layer 'second': the checkpoints don't contain its running statistics" in message
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
    recorded = Recorded()
    average(
        [small],
        tmp_path / "swa.safetensors",
        model=Small,
        data=batches,
        progress=recorded.progress,
    )
    assert recorded.passes("batches") == [3]


# -- What is refused ------------------------------------------------------------------------------------------------


class Renamed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        del self.outer


class Wider(Small):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 6)


def raising(name: str) -> Callable[[], Any]:
    def make() -> Any:
        raise FileNotFoundError(name)

    return make


def returning(value: Any) -> Callable[[], Any]:
    return lambda: value


@pytest.mark.guarantee("refresh-fails")
@pytest.mark.parametrize(
    ("error", "options", "says"),
    [
        (UserCodeError, {"model": raising("config.yaml")}, "the model factory raised FileNotFoundError: config.yaml"),
        (UserCodeError, {"data": raising("train.tar")}, "the data factory raised FileNotFoundError: train.tar"),
        (
            UserCodeError,
            {"model": returning(None)},
            "expected it to return a torch.nn.Module, got None. Is there a return?",
        ),
        (
            UserCodeError,
            {"model": returning({"inner.weight": 1})},
            "expected it to return a torch.nn.Module, got a dict",
        ),
        (UserCodeError, {"model": returning(Small)}, "expected it to return a torch.nn.Module, got a type"),
        (
            UserCodeError,
            {"data": returning(None)},
            "expected it to return an iterable of batches, got None. Is there a return?",
        ),
        (UserCodeError, {"data": returning(3)}, "expected it to return an iterable of batches, got an int"),
        (
            UserCodeError,
            {"data": torch.utils.data.TensorDataset(torch.zeros(2, 4))},
            "batches, got a TensorDataset. Give a DataLoader of it.",
        ),
        (IncompatibleError, {"model": Wider}, "size mismatch for inner.weight"),
        (IncompatibleError, {"model": Wider}, "torch.Size([6, 4])"),
        (IncompatibleError, {"model": Wider}, "torch.Size([6, 5])"),
    ],
)
def test_a_model_or_data_that_cannot_be_used_is_refused_before_averaging(
    small: Path, error: type[Exception], options: dict[str, Any], says: str
) -> None:
    assert says in refuse(error, small, **{"model": Small, "data": batches, **options})


@pytest.mark.guarantee("refresh-fails")
def test_a_model_with_other_names_is_refused_before_averaging(small: Path) -> None:
    message = refuse(IncompatibleError, small, model=Renamed, data=batches)
    assert "don't fit the model Renamed" in message
    missing, unexpected = message.index("Missing key(s)"), message.index("Unexpected key(s)")
    for name in ("head.weight", "head.bias"):
        assert missing < message.index(f'"{name}"') < unexpected
    for name in ("outer.weight", "outer.bias"):
        assert unexpected < message.index(f'"{name}"')
    assert "Use the --model that was trained" in message


class Interrupted:
    """Batches that end in an exception."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error = at, error

    def __iter__(self) -> Iterator[Tensor]:
        yield from batches(self.at - 1)
        raise self.error


@pytest.mark.guarantee("refresh-fails")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (Interrupted(1, ValueError("bad row")), "the dataloader raised at batch 1: ValueError: bad row"),
        (Interrupted(3, ValueError("bad row")), "the dataloader raised at batch 3: ValueError: bad row"),
        (Interrupted(2, KeyboardInterrupt()), ""),
        ([], "the dataloader is empty"),
        ([torch.full((4, 4), math.nan)], "layer 'first', batch 1: the activations contain NaN or Inf"),
        ([torch.ones(1, 4)], "layer 'first', batch 1: expected more than one value per channel"),
        ([torch.ones(4, 9)], "the model raised at batch 1 (a tensor of shape [4, 9])"),
        (["text"], "Accepted batches"),
    ],
    ids=["raises at 1", "raises at 3", "interrupt", "empty", "NaN", "one value", "shape", "kind"],
)
def test_a_refresh_that_fails_publishes_nothing_and_keeps_the_old_output(
    small: Path, data: Any, says: str, overwrite: bool
) -> None:
    error = UserCodeError if says else KeyboardInterrupt
    assert says in fail(error, small, model=Small, data=data, overwrite=overwrite)


def test_statistics_beyond_the_output_dtype_are_refused(small: Path) -> None:
    """float16 ends at 65,504; an infinite variance would silence the layer."""
    loud = [batch * 1e4 for batch in batches()]
    message = fail(UserCodeError, small, model=Small, data=loud, dtype="float16")
    assert "layer 'first'" in message
    assert "exceeds the range of torch.float16" in message


@pytest.mark.parametrize("case", ["published", "dry run", "NaN in a checkpoint", "tensors are missing"])
def test_a_model_that_is_passed_in_is_copied_and_not_changed(small: Path, tmp_path: Path, case: str) -> None:
    """The weights that somebody is training must not be overwritten, least of all by a run that is refused."""
    torch.manual_seed(99)
    model = Small()
    model.second.eval()
    modes = [module.training for module in model.modules()]
    before = {name: raw(value) for name, value in model.state_dict().items()}
    state = torch.load(small / "step_1.pt", weights_only=True)
    if case in ("published", "dry run"):
        result = average([small], tmp_path / "swa.safetensors", model=model, data=batches, dry_run=case == "dry run")
        assert (result.statistics, result.written) == ("refreshed", case == "published")
    elif case == "NaN in a checkpoint":
        state["inner.weight"][0, 0] = math.nan
        torch.save(state, small / "step_1.pt")
        fail(NonFiniteError, small, model=model, data=batches)
    else:
        del state["outer.bias"]
        fail(IncompatibleError, save([state] * 2, tmp_path / "other"), model=model, data=batches)
    assert {name: raw(value) for name, value in model.state_dict().items()} == before
    assert [module.training for module in model.modules()] == modes
