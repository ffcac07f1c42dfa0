"""The user's model and data: built, loaded, used for several passes; every failure is reported as theirs."""

from __future__ import annotations

import random
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ckpt_avg import IncompatibleError, UserCodeError, average, verify
from ckpt_avg.user_code.model import Passes, build_model, load_weights, matching_names


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


def test_a_model_without_memory_is_refused_with_the_reason() -> None:
    with pytest.raises(
        UserCodeError, match="tensors on the device meta have no memory for the weights: 'weight', 'bias'"
    ):
        build_model(lambda: nn.Linear(2, 2, device="meta"), {})


# -- Names that differ by a prefix ------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """As a LightningModule: the network is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    ("outer", "given", "advice"),
    [
        ("", None, "--strip-prefix model"),
        ("net.", None, "--strip-prefix net.model"),
        ("net.", "net", "--strip-prefix net.model"),
        ("net.", "net.", "--strip-prefix net.model"),
        ("a b.", None, "--strip-prefix 'a b.model'"),
    ],
)
def test_the_advice_on_a_prefix_works_when_pasted(tmp_path: Path, outer: str, given: str | None, advice: str) -> None:
    state = {f"{outer}{name}": value for name, value in Wrapped().state_dict().items()}
    for step in (1, 2):
        torch.save({"state_dict": state, "global_step": step}, tmp_path / f"{step}.ckpt")

    def run(strip_prefix: str | None) -> bool:
        options: dict[str, Any] = {"bn": "keep", "evaluate": lambda model: 1.0, "dry_run": True}
        average(tmp_path, "out.safetensors", model=lambda: Wrapped().model, strip_prefix=strip_prefix, **options)
        return True

    with pytest.raises(IncompatibleError) as caught:
        run(given)
    assert str(caught.value).splitlines()[-1].endswith(f". Use {advice}")
    assert run(shlex.split(advice)[1])


def test_a_model_with_a_prefix_that_the_checkpoints_lack() -> None:
    with pytest.raises(IncompatibleError, match=r"All names of the model begin with 'model\.'\. Let --model return"):
        load_weights(Wrapped(), Wrapped().model.state_dict())


def test_other_tensors_next_to_those_with_the_prefix_are_named() -> None:
    """Without them a strict load would fail, so --strip-prefix is no help."""
    state = {**Wrapped().state_dict(), "loss.weight": torch.ones(1)}
    with pytest.raises(
        IncompatibleError, match=r"names are under 'model\.', next to 'loss\.weight'\. Let --model return"
    ):
        load_weights(Wrapped().model, state)


def test_other_names_are_no_prefix() -> None:
    with pytest.raises(IncompatibleError, match="Use the --model that was trained"):
        load_weights(Wrapped().model, nn.Linear(2, 3).state_dict())


def test_names_that_any_layer_has_are_no_prefix_if_no_shape_agrees() -> None:
    """Otherwise the advice for a wrong model is to return a part of the right one."""
    with pytest.raises(IncompatibleError, match="Use the --model that was trained"):
        load_weights(nn.Linear(2, 3), nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).state_dict())


# -- Lightning's data module ------------------------------------------------------------------------------------------


class Digits:
    """What a LightningDataModule has."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")
        self.batches = drawn()

    def train_dataloader(self) -> list[Tensor]:
        self.calls.append("train_dataloader")
        return self.batches


def make_digits() -> Digits:
    return Digits()


@pytest.mark.parametrize("data", [Digits, Digits(), make_digits], ids=["class", "instance", "function"])
def test_a_data_module_gives_its_training_batches(data: Any) -> None:
    """As its trainer would call it, for any number of passes."""
    before = torch.random.get_rng_state()
    passes = Passes(data)
    first, second = (passes.next_pass() for _ in range(2))
    assert not passes.is_single
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_data_module_is_prepared_once() -> None:
    module = Digits()
    passes = Passes(module)
    passes.next_pass()
    assert module.calls == ["prepare_data", "setup fit", "train_dataloader"]


def test_a_data_module_that_fails_is_named() -> None:
    class Failing(Digits):
        def setup(self, stage: str) -> None:
            raise OSError("no such file")

    with pytest.raises(UserCodeError, match="the LightningDataModule raised OSError: no such file"):
        Passes(Failing)


# -- Names that differ by wrappers ------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A model with a part that is called as DataParallel calls the model that it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def forward(self, values: Tensor) -> Tensor:
        return self.module(values)


def plain() -> nn.Module:
    return Holder().module


def compiled() -> nn.Module:
    return torch.compile(plain(), backend="eager")


WRAPPED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "compiled": (plain, compiled),
    "DataParallel": (plain, lambda: nn.DataParallel(plain())),
    "compiled before and after": (compiled, compiled),
    "compiled in DataParallel": (plain, lambda: nn.DataParallel(compiled())),
    "a part called module": (Holder, Holder),
    "a part called module, wrapped": (lambda: nn.DataParallel(Holder()), Holder),
}


def save_trained(make: Callable[[], nn.Module], folder: Path) -> None:
    for step in range(2):
        model = make()
        model(torch.rand(8, 3))  # for running statistics
        torch.save(model.state_dict(), folder / f"step_{step}.pt")


@pytest.mark.filterwarnings("default")  # of torch's own about itself
@pytest.mark.parametrize("case", WRAPPED)
def test_a_model_whose_names_differ_by_wrappers_is_refreshed(tmp_path: Path, case: str) -> None:
    """The factory of a training script returns what the script trains, wrappers and all."""
    saved, built = WRAPPED[case]
    torch.manual_seed(0)
    save_trained(saved, tmp_path)
    data = [torch.rand(8, 3), torch.rand(8, 3)]

    def first_sum(model: nn.Module) -> float:
        return float(model(data[0]).sum())

    paths = [tmp_path / "step_0.pt", tmp_path / "step_1.pt"]
    outputs = {}
    for name, model in (("built", built), ("plain", plain)):
        result = average(paths, tmp_path / name, model=model, data=data, evaluate=first_sum)
        assert result.statistics == "refreshed"
        outputs[name] = load_file(tmp_path / name), result.evaluations[-1].metrics
    assert outputs["built"][1] == outputs["plain"][1]
    assert {name: value.tolist() for name, value in outputs["built"][0].items()} == {
        name: value.tolist() for name, value in outputs["plain"][0].items()
    }
    assert set(outputs["built"][0]) == set(plain().state_dict())


def test_the_prefix_of_a_part_called_module_can_be_kept(tmp_path: Path) -> None:
    """Otherwise the output loads into no model that the user has; a notice gives the option."""
    save_trained(Holder, tmp_path)
    options: dict[str, Any] = {"model": Holder, "data": [torch.rand(8, 3)]}
    result = average(tmp_path, tmp_path / "out", **options)
    assert any("Add --strip-prefix ''" in notice for notice in result.notices)
    result = average(tmp_path, tmp_path / "out", **options, strip_prefix="", overwrite=True)
    assert not any("--strip-prefix" in notice for notice in result.notices)
    Holder().load_state_dict(load_file(tmp_path / "out"))
    assert verify(tmp_path / "out", sources=tmp_path).checkpoints is not None


def test_names_that_wrappers_do_not_explain_are_refused(tmp_path: Path) -> None:
    """Two tensors that would have one name are matched to none."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.weight = nn.Parameter(torch.ones(2, 2))

    model = Twice()
    assert matching_names(model, ["weight", "bias"]) == {"weight": "weight"}
    with pytest.raises(IncompatibleError, match=r"module\.bias"):
        load_weights(model, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
