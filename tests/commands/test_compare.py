"""`compare`: what is far off in real runs, and what is not; one row for each checkpoint; bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_avg import CompareResult, average, compare
from ckpt_avg.errors import CheckpointFormatError, CkptAvgError, IncompatibleError, NonFiniteError, UsageError

State = dict[str, torch.Tensor]
Change = Callable[[State, ModuleType], None]


def state_of(path: Path) -> State:
    state: State = torch.load(path, weights_only=False)["model"]
    return state


def with_one_changed(run_folder: Path, folder: Path, epoch: int, change: Change, train: ModuleType) -> CompareResult:
    """The fixture run with one checkpoint changed."""
    for path in run_folder.glob("*.pt"):
        state = state_of(path)
        if path.name == f"epoch_{epoch}.pt":
            change(state, train)
        torch.save({"epoch": int(path.stem.split("_")[1]), "model": state}, folder / path.name)
    return compare(folder)


def initialised_again(state: State, train: ModuleType) -> None:
    torch.manual_seed(1)
    state.update(train.make_model().state_dict())


def permuted(state: State, train: ModuleType) -> None:
    """The same function: the channels of each layer in another order."""
    generator = torch.Generator().manual_seed(0)
    for layer, norm, following in (("conv1", "bn1", "conv2"), ("conv2", "bn2", "conv3")):
        order = torch.randperm(len(state[f"features.{layer}.weight"]), generator=generator)
        state[f"features.{layer}.weight"] = state[f"features.{layer}.weight"][order]
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"features.{norm}.{name}"] = state[f"features.{norm}.{name}"][order]
        state[f"features.{following}.weight"] = state[f"features.{following}.weight"][:, order]
    order = torch.randperm(len(state["classifier.fc1.weight"]), generator=generator)
    state["classifier.fc1.weight"] = state["classifier.fc1.weight"][order]
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"classifier.bn.{name}"] = state[f"classifier.bn.{name}"][order]
    state["classifier.fc2.weight"] = state["classifier.fc2.weight"][:, order]


def spiked(state: State, train: ModuleType) -> None:
    """Trained on for ten batches at twenty times the learning rate."""
    model = train.make_model()
    model.load_state_dict(state)
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=20 * train.SWA_LEARNING_RATE, momentum=train.MOMENTUM)
    model.train()
    for _, (images, labels) in zip(range(10), train.train_loader(), strict=False):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    state.update(model.state_dict())


def one_layer_again(state: State, train: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = state["features.conv2.weight"]
    state["features.conv2.weight"] = torch.randn(weight.shape, generator=generator) * weight.std()


def test_the_fixture_run_has_nothing_far_off(run_folder: Path) -> None:
    for options in ({}, {"last": 2}, {"last": 3}, {"every": 4}, {"last": 6, "every": 2}):
        assert compare([run_folder], **options).findings == ()


@pytest.mark.parametrize(
    ("change", "epoch", "kind", "words"),
    [
        *(
            (initialised_again, epoch, "unrelated", "another run, or weights initialised again")
            for epoch in (9, 14, 20)
        ),
        *((permuted, epoch, "unrelated", "another run, or permuted weights") for epoch in (9, 14, 20)),
        (spiked, 14, "detour", "times as far from epoch_13.pt and epoch_15.pt as these are from each other"),
        (spiked, 20, "jump", "the step from epoch_19.pt to epoch_20.pt"),
        (one_layer_again, 9, "tensors", "unrelated to the others in 1 tensor: 'features.conv2.weight'"),
        (one_layer_again, 14, "detour", "Most of the distance is in 'features.conv2.weight'"),
        (one_layer_again, 20, "jump", "Most of the distance is in 'features.conv2.weight'"),
    ],
)
def test_a_changed_checkpoint_is_named(
    change: Change, epoch: int, kind: str, words: str, run_folder: Path, tmp_path: Path, train: ModuleType
) -> None:
    """And no other: at the beginning, in the middle and at the end."""
    result = with_one_changed(run_folder, tmp_path, epoch, change, train)
    (finding,) = result.findings
    assert finding.kind == kind
    assert [path.name for path in finding.checkpoints] == [f"epoch_{epoch}.pt"]
    assert finding.text.startswith(f"epoch_{epoch}.pt: ")
    assert words in finding.text


@pytest.mark.slow
def test_checkpoints_of_another_seed(run_folder: Path, tmp_path: Path, train: ModuleType) -> None:
    """Two of a run of nine epochs with another seed, among the twelve."""
    import argparse

    arguments = argparse.Namespace(seed=7, out=str(tmp_path), threads=1)
    first, train.SWA_EPOCHS = train.SWA_EPOCHS, 2  # type: ignore[attr-defined]
    try:
        train.train(arguments)
    finally:
        train.SWA_EPOCHS = first  # type: ignore[attr-defined]
    others = sorted(tmp_path.glob("*.pt"))
    ours = [run_folder / f"epoch_{epoch}.pt" for epoch in range(11, 21)]
    (finding,) = compare([*others, *ours]).findings
    assert (finding.kind, set(finding.checkpoints)) == ("unrelated", set(others))
    assert "permuted weights" in finding.text  # the norm is the same


def test_the_mean_is_that_of_average(run_folder: Path, tmp_path: Path) -> None:
    """The distances to the mean are those to the file that `average` writes, but for its rounding."""
    average([run_folder], tmp_path / "mean.safetensors", last=4, bn="keep")
    mean, result = load_file(tmp_path / "mean.safetensors"), compare([run_folder], last=4)
    weights = [each.name for each in result.tensors if each.group == "weights"]
    statistics = [each.name for each in result.tensors if each.group == "statistics"]
    assert all("running" in name for name in statistics)
    assert not any("running" in name or "tracked" in name for name in weights)
    assert result.not_compared == len(mean) - len(weights) - len(statistics) == 4
    for each in result.checkpoints:
        state = state_of(each.path)
        for names, found in ((weights, each.relative), (statistics, each.statistics_to_mean)):
            apart = torch.cat([(state[name].double() - mean[name].double()).flatten() for name in names]).norm()
            norm = torch.cat([mean[name].double().flatten() for name in names]).norm()
            assert found == pytest.approx((apart / norm).item(), rel=1e-6)
    first = result.tensors[0]
    apart = [(state_of(each.path)[first.name].double() - mean[first.name].double()).norm().item()
             for each in result.checkpoints]  # fmt: skip
    assert first.to_mean == pytest.approx(apart, rel=1e-5)
    assert first.relative == max(each.relative for each in result.tensors)


def test_nan_is_named_and_spoils_nothing_else(run_folder: Path, tmp_path: Path, train: ModuleType) -> None:
    """The other checkpoints are compared as if that one had not been selected."""

    def diverged(state: State, train: ModuleType) -> None:
        state["features.conv1.weight"][0] = math.nan
        state["classifier.fc2.bias"][3] = math.inf

    result = with_one_changed(run_folder, tmp_path, 13, diverged, train)
    (finding,) = result.findings
    assert finding.kind == "nonfinite"
    assert finding.text == (
        "epoch_13.pt: 10 elements with NaN or Inf, in 'classifier.fc2.bias', 'features.conv1.weight'."
    )
    expected = compare(tmp_path, exclude="epoch_13.pt")
    assert result.norm == pytest.approx(expected.norm, rel=1e-12)
    bad = result.checkpoints[4]
    assert (bad.nonfinite, math.isnan(bad.to_mean)) == (10, True)
    kept = [each for each in result.checkpoints if each is not bad]
    for found, other in zip(kept, expected.checkpoints, strict=True):
        assert (found.path, found.to_mean, found.norm) == (
            other.path,
            pytest.approx(other.to_mean, rel=1e-9),
            pytest.approx(other.norm, rel=1e-12),
        )


def test_a_checkpoint_of_nan_alone(tmp_path: Path) -> None:
    for step in range(4):
        save_file({"w": torch.randn(200) + 9 if step != 2 else torch.full((200,), math.nan)}, tmp_path / f"step_{step}")
    paths = [tmp_path / f"step_{step}" for step in range(4)]
    result = compare(paths)
    assert [each.kind for each in result.findings] == ["nonfinite"]
    assert result.norm == pytest.approx(compare([paths[0], paths[1], paths[3]]).norm)
    assert math.isnan(result.cosines[2][0])
    with pytest.raises(NonFiniteError, match="1 checkpoint of 2 with NaN or Inf"):
        compare(paths[1:3])


def test_tied_weights_count_once(tmp_path: Path) -> None:
    for step in range(2):
        shared = torch.randn(10, 10)
        torch.save({"a": shared, "b": shared, "c": torch.ones(1)}, tmp_path / f"step_{step}.pt")
    assert compare(tmp_path).elements == 101


@pytest.mark.parametrize("place", [0, 1])
def test_a_checkpoint_of_zeros(place: int, tmp_path: Path) -> None:
    """It has no direction, and its norm is no divisor."""
    for step in range(3):
        save_file({"w": (step != place) * (1 + 0.1 * torch.randn(20, 30))}, tmp_path / f"step_{step}.safetensors")
    result = compare(tmp_path)
    (finding,) = result.findings
    assert (finding.kind, finding.checkpoints) == ("unrelated", (tmp_path / f"step_{place}.safetensors",))
    other = 1 - place
    assert (result.cosines[place][place], result.cosines[place][other], result.cosines[other][other]) == (1, 0, 1)


def test_checkpoints_of_zeros_are_equal(tmp_path: Path) -> None:
    """Listed, because copies in a run folder are skipped."""
    paths = [tmp_path / f"step_{step}.safetensors" for step in range(4)]
    for path in paths:
        save_file({"w": torch.zeros(20, 30)}, path)
    result = compare(paths)
    assert (result.norm, result.findings, set(sum(result.cosines, ()))) == (0, (), {1})
    with pytest.raises(
        IncompatibleError, match=r"only checkpoint \(step_1.*, step_3.safetensors: skipped, as the weights"
    ):
        compare(tmp_path)


def test_few_weights_tell_nothing(tmp_path: Path) -> None:
    """Three random numbers may be orthogonal to others by chance."""
    for step in range(3):
        save_file({"w": 2 * torch.eye(3)[step]}, tmp_path / f"step_{step}.safetensors")
    result = compare(tmp_path)
    assert result.findings == ()
    assert any("fewer than 100 weights" in text for text in result.notices)


def test_straightness(tmp_path: Path) -> None:
    """1 for a straight line; the hypotenuse by both sides for a right angle."""
    points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]) + 5
    for step, point in enumerate(points):
        save_file({"w": point.clone()}, tmp_path / f"step_{step}.safetensors")
    assert compare(tmp_path).straightness == pytest.approx(5 / 7)
    assert compare(tmp_path, last=2).straightness == pytest.approx(1)


@pytest.mark.parametrize(
    ("states", "kind", "code", "message"),
    [
        ([{"w": torch.ones(3)}], IncompatibleError, 4, "is the only checkpoint"),
        ([{"w": torch.ones(3)}, {"w": torch.zeros(4)}], IncompatibleError, 4, "don't fit together"),
        ([{"w": torch.arange(3)}, {"w": torch.ones(3).long()}], IncompatibleError, 4, "no weights that are averaged"),
        (
            [{"w": torch.full((3,), 1e200, dtype=torch.float64)}, {"w": torch.zeros(3).double()}],
            IncompatibleError,
            4,
            "range",
        ),
    ],
)
def test_what_cannot_be_compared(
    states: list[State], kind: type[CkptAvgError], code: int, message: str, tmp_path: Path
) -> None:
    for step, state in enumerate(states):
        save_file(state, tmp_path / f"step_{step}.safetensors")
    with pytest.raises(kind, match=message) as caught:
        compare(tmp_path)
    assert caught.value.exit_code == code


def test_bad_options(run_folder: Path) -> None:
    with pytest.raises(UsageError, match="--threads"):
        compare(run_folder, threads=0)
    with pytest.raises(CheckpointFormatError):
        compare(run_folder, state_key="nothing")
