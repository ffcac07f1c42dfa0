"""``--eval``, ``--require``, ``--report``: what is measured, of which weights, and what it must not do."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from commands.user_modules import NET, App, InProcess, data, make, names, of, of_file, score, trained
from recorded import Recorded
from safetensors.torch import load_file, save_file
from torch import nn

from ckpt_avg import RequirementError, UsageError, UserCodeError, average, refresh_batch_norm
from ckpt_avg.errors import CkptAvgError
from ckpt_avg.output.paths import MARK, json_bytes


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    (tmp_path / "run").mkdir()
    paths = [tmp_path / "run" / f"step_{number}.pt" for number in range(3)]
    for number, path in enumerate(paths):
        torch.save(trained(number), path)
    return paths


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """In a folder of its own, whose listing shows all that is left there."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "swa.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Random states


def draws(model: nn.Module) -> dict[str, float]:
    """What the random generators give now."""
    return {"torch": torch.rand(1).item(), "python": random.random(), "numpy": float(numpy.random.rand())}


def test_the_same_random_state_at_each_call(run: list[Path], out: Path) -> None:
    """A metric that draws samples must not differ between two measurements for that alone.

    Between them is a refresh over a loader that shuffles.
    """
    loader = torch.utils.data.DataLoader(torch.cat(data()), batch_size=5, shuffle=True)
    result = average(run, out, model=make, data=loader, evaluate=draws, evaluate_all=True, device="cpu")
    assert len(result.evaluations) == 6
    assert len({tuple(each.metrics.items()) for each in result.evaluations}) == 1


def test_random_states_are_as_before(run: list[Path], out: Path) -> None:
    """`average` in the middle of a training script changes nothing of what comes after."""
    model = make()
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(5)
    expected = draws(model)
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(5)
    average(run, out, model=model, data=data(), evaluate=draws, device="cpu")
    assert draws(model) == expected


# ---------------------------------------------------------------------------------------------------------------------
# What is measured on the way of `average`


def test_of_the_last_checkpoint_and_of_the_published_file(run: list[Path], out: Path, tmp_path: Path) -> None:
    """Equal to loading the files by hand: the last checkpoint as saved and refreshed, and both averages."""
    result = average(run, out, model=make, data=data, evaluate=score, device="cpu")
    average(run, tmp_path / "kept.safetensors", bn="keep", device="cpu")
    average(run[2], tmp_path / "last.safetensors", model=make, data=data, device="cpu")
    assert [(each.name, each.path, each.refreshed) for each in result.evaluations] == [
        ("step_2.pt", run[2], False),
        ("step_2.pt, statistics refreshed", run[2], True),
        ("average, statistics averaged", None, False),
        ("average, statistics refreshed", None, True),
    ]
    expected = [*map(of_file, (run[2], *(tmp_path / f"{name}.safetensors" for name in ("last", "kept")), out))]
    assert [each.metrics for each in result.evaluations] == expected
    assert len({each["loss"] for each in expected}) == 4, "the test would notice a mix-up"
    saved, last, _, output = (each["loss"] for each in expected)
    assert result.comparison is not None
    averaging, refresh = (changes[1] for changes in (result.comparison.averaging, result.comparison.refresh))
    assert (averaging.difference, refresh.difference) == (output - last, last - saved)


@pytest.mark.parametrize("dtype", ["keep", "bfloat16", "float16", "float64"])
def test_all_checkpoints_as_average_would_refresh_each(
    run: list[Path], out: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it failed, the average would be compared with checkpoints that differ in more than the averaging."""
    monkeypatch.setattr("ckpt_avg.commands.evaluations._CHUNK", 7)
    options: dict[str, Any] = {"model": make, "data": data, "dtype": dtype, "device": "cpu"}
    result = average(run, out, evaluate=score, evaluate_all=True, **options)
    for number, path in enumerate(run):
        average(path, tmp_path / f"{number}.safetensors", **options)
    expected = [of_file(tmp_path / f"{number}.safetensors") for number in range(3)]
    assert [each.metrics for each in result.evaluations[1:4]] == expected
    assert [each.path for each in result.evaluations] == [run[2], *run, None, None]
    notice = "3 checkpoints will be measured with refreshed statistics, as the average is: 4 refreshes in all"
    assert notice in result.notices


@pytest.mark.parametrize(("bn", "source"), [("auto", "frozen"), ("refresh", "refreshed")])
def test_equal_statistics_are_refreshed_if_asked_for(run: list[Path], out: Path, bn: str, source: str) -> None:
    statistics = {name: tensor for name, tensor in torch.load(run[0]).items() if "running" in name or "num_b" in name}
    for path in run:
        torch.save({**torch.load(path), **statistics}, path)
    result = average(run, out, model=make, data=data, bn=bn, device="cpu")
    assert result.statistics == source
    assert torch.equal(load_file(out)["1.running_mean"], statistics["1.running_mean"]) == (bn == "auto")
    assert any("frozen" in notice for notice in result.notices) == (bn == "auto")


@pytest.mark.parametrize("keep_order", [False, True])
def test_last_is_the_latest_step_in_whatever_order_checkpoints_are_summed(
    run: list[Path], out: Path, keep_order: bool
) -> None:
    """If it failed, a gate would compare with whichever file a shell happened to list last."""
    result = average([run[2], run[0], run[1]], out, model=make, data=data, evaluate=score, keep_order=keep_order)
    assert [each.path for each in result.evaluations if each.path] == [run[2]] * 2


def test_layers_that_are_frozen_in_all_checkpoints_are_not_refreshed_in_the_last(run: list[Path], out: Path) -> None:
    """If it failed, the average would be compared with a model that was never trained so."""
    frozen = {name: tensor for name, tensor in torch.load(run[0]).items() if name.startswith("1.")}
    for path in run:
        torch.save({**torch.load(path), **frozen}, path)
    seen: list[tuple[float, float]] = []

    def look(model: nn.Module) -> float:
        seen.append((model[1].running_mean.sum().item(), model[6].running_mean.sum().item()))
        return 1.0

    average(run, out, model=make, data=data, evaluate=look, device="cpu")
    assert len({first for first, _ in seen}) == 1
    assert len({second for _, second in seen}) == 4


def test_of_all_checkpoints_in_the_order_of_their_steps(run: list[Path], out: Path) -> None:
    result = average([run[2], run[0], run[1]], out, model=make, bn="keep", evaluate=score, evaluate_all=True)
    assert [(each.name, each.metrics) for each in result.evaluations] == [
        ("step_0.pt", of_file(run[0])),
        ("step_1.pt", of_file(run[1])),
        ("step_2.pt", of_file(run[2])),
        ("average, statistics averaged", of_file(out)),
    ]


def test_checkpoints_of_the_same_name_are_shown_with_their_folders(run: list[Path], out: Path, tmp_path: Path) -> None:
    """Checkpoint folders often hold files of one name each, which may be named by hand."""
    paths = []
    for number, path in enumerate(run):
        paths.append(tmp_path / f"checkpoint-{number}" / "weights.pt")
        paths[-1].parent.mkdir()
        path.rename(paths[-1])
    result = average(paths, out, model=make, bn="keep", evaluate=score, evaluate_all=True)
    assert [each.name for each in result.evaluations[:3]] == [f"checkpoint-{number}/weights.pt" for number in range(3)]


@pytest.mark.parametrize("bn", ["auto", "keep"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_of_the_output_in_its_own_dtype(run: list[Path], out: Path, dtype: str, bn: str) -> None:
    """What is rounded to half precision is measured so, and not as it was before."""
    result = average(run, out, dtype=dtype, bn=bn, model=make, data=data, evaluate=score, device="cpu")
    assert load_file(out)["0.weight"].dtype is getattr(torch, dtype)
    assert result.evaluations[-1].metrics == of_file(out)


def test_without_batch_norm(tmp_path: Path, out: Path) -> None:
    paths = [tmp_path / f"step_{number}.safetensors" for number in range(2)]
    for number, path in enumerate(paths):
        save_file({"weight": torch.full((2, 6), float(number)), "bias": torch.ones(2)}, path)
    function = functools.partial(lambda model: model(torch.ones(6)).sum())
    result = average(paths, out, model=lambda: nn.Linear(6, 2), evaluate=function)
    assert [(each.name, dict(each.metrics)) for each in result.evaluations] == [
        ("step_1.safetensors", {"partial": 14.0}),
        ("average", {"partial": 8.0}),
    ]


def test_of_one_checkpoint_as_it_is(run: list[Path], out: Path) -> None:
    """A copy: its numbers are those of the checkpoint."""
    result = average(run, out, last=1, model=make, evaluate=score)
    assert [each.name for each in result.evaluations] == ["step_2.pt", "these weights"]
    assert [each.metrics for each in result.evaluations] == [of_file(run[2])] * 2


def test_of_one_checkpoint_before_and_after_its_refresh(run: list[Path], out: Path) -> None:
    result = average(run, out, last=1, model=make, data=data, evaluate=score, device="cpu")
    assert [each.name for each in result.evaluations] == ["step_2.pt", "these weights, statistics refreshed"]
    assert [each.metrics for each in result.evaluations] == [of_file(run[2]), of_file(out)]


def test_frozen_statistics_are_measured_once(run: list[Path], out: Path) -> None:
    """Where nothing is refreshed there are no statistics that would be averaged."""
    statistics = {name: tensor for name, tensor in torch.load(run[0]).items() if "running" in name or "num_b" in name}
    for path in run:
        torch.save({**torch.load(path), **statistics}, path)
    result = average(run, out, model=make, data=data, evaluate=score)
    assert [each.name for each in result.evaluations] == ["step_2.pt", "average"]
    assert result.evaluations[-1].metrics == of_file(out)


def test_under_another_key_and_with_a_prefix(run: list[Path], out: Path, tmp_path: Path) -> None:
    """Checkpoints are measured as they are read, not as they are stored."""
    wrapped = [tmp_path / f"step_{number}.pt" for number in range(3)]
    for plain, path in zip(run, wrapped, strict=True):
        torch.save({"net": {"deep": {f"model.{name}": value for name, value in torch.load(plain).items()}}}, path)
    result = average(
        wrapped, out, state_key="net.deep", strip_prefix="model.", model=make, bn="keep", evaluate=score,
        evaluate_all=True,
    )  # fmt: skip
    assert [each.metrics for each in result.evaluations] == [*map(of_file, run), of_file(out)]


def test_a_dry_run_does_not_call_it(run: list[Path], out: Path) -> None:
    def never(model: nn.Module) -> float:
        pytest.fail("called")

    result = average(run, out, model=make, data=data, evaluate=never, require="never>=last", dry_run=True)
    assert (result.evaluations, result.outcomes, result.written) == ((), (), False)
    assert names(out.parent) == []
    assert any("--require are not tried" in text for text in result.notices), "or the gate would look passed"


def test_the_model_that_is_passed_in_stays_as_it_is(run: list[Path], out: Path) -> None:
    torch.manual_seed(9)
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average(run, out, model=model, bn="keep", evaluate=score)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert model.training


def test_progress_says_what_is_measured(run: list[Path], out: Path) -> None:
    recorded = Recorded()
    average(
        run,
        out,
        model=make,
        data=data,
        evaluate=score,
        evaluate_all=True,
        progress=recorded.progress,
    )
    assert recorded.measured == [
        "step_2.pt",
        "average, statistics averaged",
        "average, statistics refreshed",
        *(f"step_{number}.pt, statistics refreshed" for number in range(3)),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What a function does to the model, or to the process, stays without effect


DISTURBING: dict[str, Callable[[nn.Module], object]] = {
    "trains": lambda model: model.train()(data()[0] * 100),
    "changes buffers": lambda model: [buffer.fill_(77) for buffer in model.buffers()],
    "replaces buffers": lambda model: [
        setattr(module, name, torch.full_like(buffer, 5))
        for module in model.modules()
        for name, buffer in list(module.named_buffers(recurse=False))
    ],
    "changes weights": lambda model: [parameter.fill_(3.0) for parameter in model.parameters()],
    "draws random numbers": draws,
    "changes the folder": lambda model: os.chdir("/"),
    "prints": lambda model: print("epoch 1: 0.93"),
    "freezes": lambda model: model.requires_grad_(False),
    "swaps parameters": lambda model: [
        setattr(parameter, "data", torch.zeros_like(parameter)) for parameter in model.parameters()
    ],
}


SHUFFLING = torch.utils.data.DataLoader(torch.cat(data()), batch_size=5, shuffle=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Any]]:
    """The average of the run without --eval, and the metrics of each checkpoint, refreshed, and of the average."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = [folder / f"step_{number}.pt" for number in range(3)]
    for number, path in enumerate(run):
        torch.save(trained(number), path)
    outputs = [folder / f"{number}.safetensors" for number in range(4)]
    for sources, out in zip((*run, run), outputs, strict=True):
        average(sources, out, model=make, data=SHUFFLING, device="cpu")
    return outputs[-1].read_bytes(), [of_file(run[-1]), *map(of_file, outputs)]


@pytest.mark.parametrize("disturb", DISTURBING)
def test_a_function_that_disturbs(
    disturb: str, run: list[Path], undisturbed: tuple[bytes, list[Any]], monkeypatch: pytest.MonkeyPatch, out: Path
) -> None:
    """The published bytes are those of a run without --eval, and each measurement is that of undisturbed weights."""

    def disturbing(model: nn.Module) -> dict[str, float]:
        found = score(model)
        DISTURBING[disturb](model)
        return found

    monkeypatch.chdir(out.parent)
    options: dict[str, Any] = {"evaluate": disturbing, "evaluate_all": True, "device": "cpu"}
    found = average(run, out.name, model=make, data=SHUFFLING, **options)
    assert out.read_bytes() == undisturbed[0]
    saved, *refreshed, _, output = (each.metrics for each in found.evaluations)
    assert [saved, *refreshed, output] == undisturbed[1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model: model.half(), "parameter '0.weight'"),
        (lambda model: model.double(), "parameter '7.bias'"),
        (lambda model: setattr(model, "2", nn.GELU()), "module '2'"),
        (lambda model: model.append(nn.ReLU()), "module '8'"),
        (lambda model: model[5].register_forward_hook(lambda *_: None), "module '5'"),
        (lambda model: setattr(model, "forward", lambda values: values), "module ''"),
    ],
    ids=["half", "double", "swaps a module", "adds a module", "leaves a hook", "replaces forward"],
)
def test_a_function_that_changes_the_model_itself_is_refused(
    change: Callable[[nn.Module], Any], named: str, run: list[Path], out: Path
) -> None:
    """The refresh and the next measurement would run through another model than the user's."""

    def changing(model: nn.Module) -> float:
        change(model)
        return 1.0

    with pytest.raises(UserCodeError, match=r"copy\.deepcopy\(model\)") as caught:
        average(run, out, model=make, data=data, evaluate=changing, device="cpu")
    assert named in str(caught.value)
    assert names(out.parent) == []


@pytest.mark.parametrize("value", [True, 2, "all"])
def test_an_attribute_of_the_user_s_that_ends_in_hooks_is_no_hook(run: list[Path], out: Path, value: object) -> None:
    def build() -> nn.Module:
        model = make()
        model.use_hooks = value
        return model

    assert average(run, out, model=build, bn="keep", evaluate=score).written


def test_hooks_that_are_removed_again_are_no_change(run: list[Path], out: Path) -> None:
    """A function may look at activations; and work on a copy, as the message advises."""

    def looks(model: nn.Module) -> dict[str, float]:
        handle = model[1].register_forward_hook(lambda *_: None)
        score(copy.deepcopy(model).double().half().float())
        found = score(model)
        handle.remove()
        return found

    result = average(run, out, model=make, data=data, evaluate=looks, device="cpu")
    assert result.evaluations[-1].metrics == of_file(out)


@pytest.mark.parametrize("at", [1, 2, 3], ids=["the last checkpoint", "before the refresh", "after the refresh"])
@pytest.mark.parametrize("kind", ["raises", "exits", "interrupt", "no number"])
@pytest.mark.parametrize("old", [None, b"old"], ids=["absent", "old"])
def test_nothing_is_published_where_it_fails(run: list[Path], out: Path, at: int, kind: str, old: bytes | None) -> None:
    """Whichever call fails, the path is absent or what it was, and nothing is left next to it."""
    if old is not None:
        out.write_bytes(old)
    calls = itertools.count(1)

    def fails(model: nn.Module) -> Any:
        if next(calls) < at:
            return 0.5
        if kind == "no number":
            return "0.5"
        raise {"raises": ValueError, "exits": SystemExit, "interrupt": KeyboardInterrupt}[kind]

    with pytest.raises(KeyboardInterrupt if kind == "interrupt" else UserCodeError) as caught:
        average(run, out, model=make, data=data, evaluate=fails, overwrite=True, device="cpu")
    if kind in ("raises", "exits"):
        where = ["step_2.pt", "average, statistics averaged", "average, statistics refreshed"][at - 1]
        assert f"raised for {where}:" in str(caught.value)
    assert names(out.parent) == ([] if old is None else [out.name])
    assert old is None or out.read_bytes() == old


def test_other_metrics_at_another_call_name_the_weights(run: list[Path], out: Path) -> None:
    replies = iter([{"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0}])
    with pytest.raises(UserCodeError) as caught:
        average(run, out, model=make, bn="keep", evaluate=lambda model: next(replies))
    assert str(caught.value) == (
        "the --eval function: expected the metrics 'a', 'b' each time, got 'a', 'c' for average, statistics averaged."
    )
    assert names(out.parent) == []


def test_another_order_of_metrics_is_the_same(run: list[Path], out: Path) -> None:
    replies = iter([{"a": 1.0, "b": 1.0}, {"b": 1.0, "a": 1.0}])
    assert average(run, out, model=make, bn="keep", evaluate=lambda model: next(replies)).written


# ---------------------------------------------------------------------------------------------------------------------
# The gate


def replies(*values: float) -> Callable[[nn.Module], dict[str, float]]:
    """Returns a function that measures these, one after the other."""
    each = iter(values)
    return lambda model: {"m": next(each)}


@pytest.mark.parametrize(
    ("require", "values", "met"),
    [
        # the average before and after its refresh, the last checkpoint as saved and refreshed
        ("m>=last", (0.0, 1.0, 9.0, 1.0), True),
        ("m>=last", (5.0, 0.9, 0.0, 1.0), False),
        ("m>last", (0.0, 1.0, 0.0, 1.0), False),
        ("m>=last-saved", (0.0, 1.0, 1.0, 9.0), True),
        ("m>=last-saved", (5.0, 0.9, 1.0, 0.0), False),
        ("m<=0.5", (9.0, 0.5, 9.0, 9.0), True),
        ("m>=last-0.25", (0.0, 0.75, 9.0, 1.0), True),
        ("m>=last", (1.0, math.nan, 1.0, 1.0), False),
        ("m<=last", (1.0, 1.0, 1.0, math.nan), False),
        # and all three refreshed
        ("m>=best", (0.0, 3.0, 9.0, 3.0, 1.0, 2.0), True),
        ("m>=best", (9.0, 2.0, 0.0, 3.0, 1.0, 2.0), False),
        ("m<=best", (9.0, 1.0, 0.0, 3.0, 1.0, 2.0), True),
        ("m<best", (9.0, 1.0, 9.0, 3.0, 1.0, 2.0), False),
        ("m>=mean", (0.0, 2.0, 9.0, 3.0, 1.0, 2.0), True),
        ("m>mean", (0.0, 2.0, 0.0, 3.0, 1.0, 2.0), False),
    ],
)
def test_the_gate_is_held_against_the_output(
    run: list[Path], out: Path, require: str, values: tuple[float, ...], met: bool
) -> None:
    """The average after its refresh, with checkpoints after theirs; ``best`` and ``mean`` measure all unasked."""
    averaged, output, saved, *refreshed = values
    function = replies(saved, averaged, output, *refreshed)
    if met:
        result = average(run, out, model=make, data=data, evaluate=function, require=require, device="cpu")
        assert (result.written, names(out.parent)) == (True, [out.name])
    else:
        with pytest.raises(RequirementError) as caught:
            average(run, out, model=make, data=data, evaluate=function, require=require, device="cpu")
        result = caught.value.result
        assert (result.written, names(out.parent)) == (False, [])
    expected = [saved, *refreshed, averaged, output]
    assert [each.metrics["m"] for each in result.evaluations] == pytest.approx(expected, nan_ok=True)
    assert [(each.requirement.text, each.met) for each in result.outcomes] == [(require, met)]


def test_all_must_hold(run: list[Path], out: Path) -> None:
    out.write_bytes(b"old")
    with pytest.raises(RequirementError) as caught:
        average(
            run, out, model=make, bn="keep", evaluate=replies(1.0, 0.5), require=["m<=last", "m>=last", "m>0.75"],
            overwrite=True,
        )  # fmt: skip
    assert str(caught.value) == (
        f"{out}: not published, because 2 of 3 requirements failed: m>=last: expected >= 1, got 0.5; m>0.75: "
        "expected > 0.75, got 0.5. Average other checkpoints (ckpt-avg sweep shows which are best together), or relax "
        "the requirement."
    )
    assert [each.met for each in caught.value.result.outcomes] == [True, False, False]
    assert (out.read_bytes(), names(out.parent)) == (b"old", [out.name])


@pytest.fixture
def no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where an output is begun: it has no name yet, so that no listing would show it."""
    monkeypatch.setattr("ckpt_avg.commands.publish.unpublished_weights", lambda *_: pytest.fail("an output was begun"))


@pytest.mark.usefixtures("no_output")
def test_an_unknown_metric_is_found_before_anything_is_made(run: list[Path], out: Path) -> None:
    """After the first measurement, even if all are to be measured."""
    calls: list[int] = []

    def function(model: nn.Module) -> dict[str, float]:
        calls.append(1)
        return {"accuracy": 1.0}

    with pytest.raises(UsageError, match="returns no 'acuracy'"):
        average(run, out, model=make, bn="keep", evaluate=function, require=["accuracy>=best", "acuracy>=best"])
    assert (len(calls), names(out.parent)) == (1, [])


@pytest.mark.usefixtures("no_output")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"require": "m>=last"}, "--require needs a metric. Add --eval MODULE:FUNCTION."),
        ({"evaluate_all": True}, "--eval-all needs a metric. Add --eval MODULE:FUNCTION."),
        ({"evaluate": score}, "--eval needs a model. Add --model MODULE:FACTORY."),
        ({"evaluate": score, "model": make, "require": "loss"}, "--require 'loss': expected a metric, then"),
        ({"require": ["m>=last", ""]}, "--require '': expected a metric, then"),
    ],
)
def test_invalid_options_are_refused_first(out: Path, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before the sources are even looked at."""
    with pytest.raises(UsageError) as caught:
        average(tmp_path / "no such run", out, bn="keep", **options)
    assert str(caught.value).startswith(message)
    assert CkptAvgError.exit_code != caught.value.exit_code == 2


# ---------------------------------------------------------------------------------------------------------------------
# Repeats: how much is chance


def shuffled() -> Any:
    """Batches of other samples for each seed."""
    return torch.utils.data.DataLoader(torch.cat(data()), batch_size=5, shuffle=True, drop_last=True)


def test_repeats_measure_the_same_seeds_on_both_sides(run: list[Path], out: Path, tmp_path: Path) -> None:
    """Differences are paired, so chance that both sides share does not hide what averaging changed."""
    result = average(run, out, model=make, data=shuffled, bn_batches=2, evaluate=score, eval_repeats=3, device="cpu")
    average(run, tmp_path / "once.safetensors", model=make, data=shuffled, bn_batches=2, device="cpu")
    assert out.read_bytes() == (tmp_path / "once.safetensors").read_bytes(), "the output is that of the first seed"
    saved, last, _, output = result.evaluations
    assert output.samples["loss"][0] == of_file(out)["loss"]
    assert [len(set(each.samples["loss"])) for each in result.evaluations] == [1, 3, 1, 3]
    differences = [b - a for a, b in zip(last.samples["loss"], output.samples["loss"], strict=True)]
    assert result.comparison is not None
    change = result.comparison.averaging[1]
    assert change.difference == pytest.approx(statistics.mean(differences))
    assert change.spread == pytest.approx(statistics.stdev(differences))
    assert last.metrics["loss"] == pytest.approx(statistics.mean(last.samples["loss"]))
    assert saved.metrics == of_file(run[2])
    # By hand: the last checkpoint over the batches of the second seed.
    model = make()
    model.load_state_dict(torch.load(run[2]))
    torch.manual_seed(1)
    refresh_batch_norm(model, list(itertools.islice(shuffled(), 2)))
    assert of(model.state_dict())["loss"] == pytest.approx(last.samples["loss"][1], rel=1e-6)


def test_a_loader_with_its_own_generator_gives_the_same_output_with_and_without_eval(
    run: list[Path], out: Path
) -> None:
    """Such a loader continues where it stopped, so the output's refresh must come before those of checkpoints."""

    def average_with(**options: Any) -> bytes:
        generator = torch.Generator().manual_seed(3)
        loader = torch.utils.data.DataLoader(torch.cat(data()), batch_size=5, shuffle=True, generator=generator)
        average(run, out, model=make, data=loader, bn_batches=2, overwrite=True, device="cpu", **options)
        return out.read_bytes()

    assert average_with(evaluate=score, evaluate_all=True, eval_repeats=2) == average_with()


def test_several_functions_that_measure_the_same(run: list[Path], out: Path) -> None:
    """Each of several test sets is a sample; a metric that only one of them measures has no spread."""

    def other(model: nn.Module) -> dict[str, float]:
        return {"loss": 2 * score(model)["loss"], "more": 1.0}

    result = average(run, out, model=make, bn="keep", evaluate=[score, other])
    loss = of_file(out)["loss"]
    assert result.evaluations[-1].samples == {"loss": (loss, 2 * loss)}
    assert result.evaluations[-1].metrics == {"accuracy": of_file(out)["accuracy"], "loss": 1.5 * loss, "more": 1.0}


def test_repeats_that_cannot_differ_are_reported(run: list[Path], out: Path) -> None:
    """If it failed, a spread of 0 would look as if chance had been measured."""
    result = average(run, out, model=make, data=data, evaluate=score, eval_repeats=2, device="cpu")
    assert "all repeats gave the same numbers" in "".join(result.notices)
    result = average(run, out, model=make, bn="keep", evaluate=draws, eval_repeats=2, overwrite=True)
    assert "all repeats gave the same numbers" not in "".join(result.notices)


def test_batches_for_one_pass_only_are_refused(run: list[Path], out: Path) -> None:
    """Both the average and the last checkpoint are refreshed. Without --eval one pass is enough."""
    with pytest.raises(UsageError, match="got an iterator, which is used up after one pass"):
        average(run, out, model=make, data=iter(data()), evaluate=lambda model: pytest.fail("measured"))
    assert average(run, out, model=make, data=iter(data()), device="cpu").written


# ---------------------------------------------------------------------------------------------------------------------
# The command

APP = f"""{NET}
def noisy(model):
    print("printed by the function")
    return score(model)

calls = 0

def falls(model):
    global calls
    calls += 1
    return {{"m": 1.0 / calls}}

def text(model):
    return "0.93"

def exits(model):
    sys.exit(0)

def interrupts(model):
    raise KeyboardInterrupt

def signs(model):
    return {{"a\\x1b[31m": 1.0}}
"""


class AverageApp(App):
    """With a run of its model."""

    def __init__(self, folder: Path, run: list[Path], out: Path) -> None:
        super().__init__(folder, APP)
        self.run, self.out = run[0].parent.rename(folder / "a run"), out

    def arguments(self, function: str, *more: object, data: bool = False) -> list[object]:
        return ["average", self.run, "-o", self.out, *self.options(function, data=data), *more]


@pytest.fixture
def app(tmp_path: Path, run: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch) -> AverageApp:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return AverageApp(tmp_path, run, out)


def test_the_table(app: AverageApp, in_process: InProcess) -> None:
    """On stdout, with what the function prints on stderr; the numbers are those of the files."""
    code, stdout, stderr = in_process(*app.arguments("noisy", "--require", "loss<=last+1e9", data=True))
    assert code == 0, stderr
    saved, published = of_file(app.run / "step_2.pt"), of_file(app.out)
    average(app.run / "step_2.pt", app.run / "last.safetensors", model=make, data=data, device="cpu")
    last = of_file(app.run / "last.safetensors")
    lines = stdout.splitlines()
    header = next(number for number, line in enumerate(lines) if line.split() == ["accuracy", "loss"])
    shown = [re.split("  +", line) for line in lines[header + 1 : header + 5]]
    assert [row[0] for row in shown] == [
        "step_2.pt (last)",
        "last, statistics refreshed",
        "average, statistics averaged",
        "average, statistics refreshed",
    ]
    assert shown[1][1:] == [f"{last['accuracy']:.6g}", f"{last['loss']:.6g}"]
    for row, loss in ((shown[0], saved["loss"]), (shown[3], published["loss"])):
        assert row[2] == f"{loss:.6g} ({loss - last['loss']:+.3g})"
    assert re.match(r"averaging.*: accuracy .*, loss .*; the refresh.*: accuracy .*, loss ", lines[header + 5])
    assert lines[header + 6].startswith("met: loss<=last+1e9: expected <= ")
    assert "printed by" not in stdout
    assert stderr.count("printed by the function") == 4


def test_json_and_report_say_the_same(app: AverageApp, in_process: InProcess) -> None:
    report = app.out.parent / "swa.json"
    code, stdout, _ = in_process(*app.arguments("score", "--eval-all", "--json", "--report", report, data=True))
    assert code == 0
    document = json.loads(stdout)
    assert document.items() <= json.loads(report.read_text()).items()
    assert document["evaluations"][0]["metrics"] == of_file(app.run / "step_2.pt")
    assert [each["refreshed"] for each in document["evaluations"]] == [False, True, True, True, False, True]
    assert document["evaluations"][-1] == {
        "name": "average, statistics refreshed",
        "path": None,
        "metrics": of_file(app.out),
        "refreshed": True,
        "samples": {},
    }
    assert [each["metric"] for each in document["comparison"]["averaging"]] == ["accuracy", "loss"]
    assert (document["written"], document["requirements"]) == (True, [])


@pytest.mark.parametrize("old", [False, True], ids=["absent", "old"])
def test_an_unmet_requirement(app: AverageApp, in_process: InProcess, old: bool) -> None:
    """Exit 9, nothing published, the table on stdout, the reason on stderr, the report written."""
    report = app.out.parent / "swa.json"
    if old:
        app.out.write_bytes(b"old")
        report.write_bytes(json_bytes({MARK: "0.0.1"}))
    code, stdout, stderr = in_process(
        *app.arguments("falls", "--require", "m>=last", "--require", "m>=0", "--report", report, "--overwrite")
    )
    assert code == 9
    assert app.out.read_bytes() == b"old" if old else not app.out.exists()
    lines = stdout.splitlines()
    assert "step_2.pt (last)              1" in lines
    assert "average, statistics averaged  0.5 (-0.5)" in lines
    assert "NOT MET: m>=last: expected >= 1, got 0.5" in lines
    assert "met: m>=0: expected >= 0, got 0.5" in lines
    assert f"did not write {app.out}" in lines
    assert [line for line in lines if line.startswith(("wrote", "would"))] == [f"wrote {report}"]
    assert stderr.splitlines()[-1].startswith(f"Error: {app.out}: not published, because 1 of 2 requirements failed")
    assert "Traceback" not in stderr
    document = json.loads(report.read_text())
    assert (document["written"], [each["met"] for each in document["requirements"]]) == (False, [False, True])


def test_an_unmet_requirement_in_json(app: AverageApp, in_process: InProcess) -> None:
    """One document, which has both what was measured and why nothing was published; the report has it, too."""
    report = app.out.parent / "swa.json"
    code, stdout, stderr = in_process(
        *app.arguments("falls", "--require", "m>=best", "--json", "--report", report, "-q")
    )
    document = json.loads(stdout)
    assert code == 9
    assert document["error"] == {
        "kind": "RequirementError",
        "message": stderr.strip().removeprefix("Error: "),
        "exit_code": 9,
    }
    assert document["requirements"] == [{"requirement": "m>=best", "value": 0.25, "threshold": 1.0, "met": False}]
    assert [each["metrics"]["m"] for each in document["evaluations"]] == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert document["written"] is False
    assert names(app.out.parent) == ["swa.json"]
    assert document.items() <= json.loads(report.read_text()).items()


@pytest.mark.parametrize(
    ("function", "exit_code", "message"),
    [
        ("raises", 7, "the --eval function raised for step_2.pt: LookupError: no test set"),
        ("exits", 7, "the --eval function raised for step_2.pt: SystemExit: 0"),
        (
            "text",
            7,
            "the --eval function text: expected it to return a number or a dict of names to numbers, got a ",
        ),
        ("interrupts", 130, "interrupted: "),
        ("missing", 2, "has no 'missing'"),
    ],
)
def test_exit_codes(app: AverageApp, in_process: InProcess, function: str, exit_code: int, message: str) -> None:
    """And in JSON, of which there is one document, whatever fails."""
    code, stdout, stderr = in_process(*app.arguments(function, "--json"))
    assert code == exit_code
    assert message in stderr
    assert ("LookupError" in stderr and "Traceback" in stderr) or function != "raises"
    assert json.loads(stdout)["error"]["exit_code"] == exit_code
    assert names(app.out.parent) == []


def test_a_dry_run_with_everything(app: AverageApp, in_process: InProcess) -> None:
    """The function fails if it is called; requirements are checked as far as words go."""
    code, stdout, stderr = in_process(*app.arguments("raises", "--require", "m>=best", "--eval-all", "--dry-run"))
    assert (code, names(app.out.parent)) == (0, []), stderr
    assert "would write" in stdout
    code, _, _ = in_process(*app.arguments("raises", "--require", "m>=", "--dry-run"))
    assert code == 2


def test_a_report_that_cannot_be_written_is_found_before_the_work(app: AverageApp, in_process: InProcess) -> None:
    report = app.out.parent / "old.json"
    report.write_text("old")
    code, _, stderr = in_process(*app.arguments("raises", "--report", report))
    assert code == 5
    assert str(report) in stderr
    assert "no test set" not in stderr, "the function was called"
    assert (names(app.out.parent), report.read_text()) == (["old.json"], "old")


def test_control_characters_of_a_metric_do_not_reach_the_terminal(app: AverageApp, in_process: InProcess) -> None:
    code, stdout, _ = in_process(*app.arguments("signs"))
    assert code == 0
    assert "\x1b" not in stdout


# ---------------------------------------------------------------------------------------------------------------------
# The real run


@pytest.mark.slow
def test_the_real_run(run_folder: Path, train: Any, in_process: InProcess, tmp_path: Path) -> None:
    """Digits: averaging the last four helps, the numbers are those of the file, and the gate lets it through."""
    out, report = tmp_path / "swa.safetensors", tmp_path / "swa.json"
    code, stdout, stderr = in_process(
        "average", run_folder, "--last", "4", "-o", out, "--model", "train:make_model", "--data", "train:train_loader",
        "--bn-batches", "6", "--app-dir", run_folder, "--device", "cpu", "--eval", "train:evaluate",
        "--require", "loss<last", "--require", "accuracy>=mean", "--report", report,
    )  # fmt: skip
    assert code == 0, stderr
    model = train.make_model()
    last, *_, averaged = json.loads(report.read_text())["evaluations"]
    model.load_state_dict(torch.load(run_folder / "epoch_20.pt", weights_only=False)["model"])
    assert last["metrics"] == train.evaluate(model)
    model.load_state_dict(load_file(out))
    assert averaged["metrics"] == train.evaluate(model)
    assert stdout.count("\nmet: ") == 2


def test_batch_norm_in_train_mode_gives_a_notice(run: list[Path], out: Path) -> None:
    """The numbers would be the same whatever the statistics, and look like an answer."""

    def forgetful(model: nn.Module) -> float:
        model.train()
        model(torch.randn(8, 1, 6))
        return 1.0

    def careful(model: nn.Module) -> float:
        model(torch.randn(8, 1, 6))
        model.train()
        return 1.0

    notices = [
        [
            text
            for text in average(run, out, model=make, bn="keep", evaluate=function, overwrite=True).notices
            if "train mode" in text
        ]
        for function in (forgetful, careful)
    ]
    assert "Remove model.train()" in notices[0][0]
    assert notices[1] == []


def test_what_is_no_function_is_refused_at_once(run: list[Path], out: Path) -> None:
    with pytest.raises(UsageError, match="--eval: got a Tensor"):
        average(run, out, model=make, bn="keep", evaluate=torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(UserCodeError, match="a function that returns one, got a str"):
        average(run, out, model="train:make", bn="keep", evaluate=lambda model: 1.0)  # type: ignore[arg-type]
