"""`soup`: the decisions are those of the recipe, and the file is what `average` writes of the checkpoints kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands.user_modules import NET, App, InProcess, data, make, names, of_file, score, trained
from recorded import Recorded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ckpt_avg import IncompatibleError, RequirementError, UsageError, UserCodeError, average, soup, sweep, verify
from ckpt_avg.commands.soup import SoupResult

Value = Callable[[frozenset[int]], float]


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    """Five checkpoints of a network with BatchNorm."""
    folder = tmp_path / "a run"
    folder.mkdir()
    paths = []
    for number in range(1, 6):
        paths.append(folder / f"step_{number}.pt")
        torch.save({"model": trained(number), "step": number}, paths[-1])
    return paths


def made(run: Any, output: Path, **options: Any) -> SoupResult:
    """A soup by the loss, with a refresh; what is None is not given."""
    given = {"model": make, "data": data, "evaluate": score, "minimize": "loss", "device": "cpu", **options}
    return soup(run, output, **{name: value for name, value in given.items() if value is not None})


def decided(result: SoupResult) -> list[tuple[str, bool]]:
    return [(decision.checkpoint.name, decision.kept) for decision in result.decisions]


# ---------------------------------------------------------------------------------------------------------------------
# The decisions, against the recipe written in plain Python and torch


def recipe(
    alone: Sequence[float], value: Value, *, highest: bool, tolerance: float = 0
) -> list[tuple[int, float, bool]]:
    """The oracle: recipe 1 of arXiv 2203.05482, as (checkpoint, the soup's value with it, kept)."""
    sign = 1 if highest else -1
    order = sorted(range(len(alone)), key=lambda index: (sign * alone[index], index), reverse=True)
    ingredients = {order[0]}
    best = alone[order[0]]
    found = [(order[0], best, True)]
    for index in order[1:]:
        tried = value(frozenset(ingredients | {index}))
        kept = sign * tried >= sign * best - tolerance
        found.append((index, tried, kept))
        if kept:
            ingredients.add(index)
            best = max(best, tried) if highest else min(best, tried)
    return found


class Marked(nn.Module):
    """One weight for each checkpoint. In that of checkpoint i only the i-th is not 0, so a mean shows what is in it."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count))


@pytest.fixture
def marked(tmp_path: Path) -> Callable[..., tuple[SoupResult, list[frozenset[int]]]]:
    """Returns a soup of checkpoints whose metric is any function of the set that is averaged, and what was measured."""

    def call(count: int, value: Value, **options: Any) -> tuple[SoupResult, list[frozenset[int]]]:
        paths = [tmp_path / f"step_{index}.safetensors" for index in range(count)]
        for index, path in enumerate(paths):
            save_file({"weight": 2 * torch.eye(count)[index]}, path)
        measured = []

        def evaluate(model: nn.Module) -> dict[str, float]:
            measured.append(frozenset(model.weight.nonzero().flatten().tolist()))  # type: ignore[operator,union-attr]
            return {"m": value(measured[-1])}

        out = tmp_path / "soup.safetensors"
        options = {"maximize": "m"} | options
        return soup(paths, out, model=lambda: Marked(count), evaluate=evaluate, overwrite=True, **options), measured

    return call


@pytest.mark.parametrize("seed", range(12))
def test_any_metric_with_ties(marked: Any, seed: int) -> None:
    """Metrics that are drawn for each set of checkpoints, from so few numbers that many are equal."""
    numbers = random.Random(seed)
    count = numbers.randint(2, 7)
    sets = [frozenset(each) for size in range(1, count + 1) for each in itertools.combinations(range(count), size)]
    table = {each: float(numbers.randint(0, 6)) for each in sets}
    highest, tolerance = numbers.random() < 0.5, numbers.choice([0, 0, 1, 2.5])
    alone = [table[frozenset([index])] for index in range(count)]
    expected = recipe(alone, table.__getitem__, highest=highest, tolerance=tolerance)
    hold = numbers.choice([0, 4 * count, 3 * 4 * count, 7 * 4 * count, 10**6])
    target = {"maximize": "m"} if highest else {"maximize": None, "minimize": "m"}
    result, measured = marked(count, table.__getitem__, tolerance=tolerance, hold=hold, **target)
    assert [(int(each.checkpoint.stem[5:]), each.soup_metrics["m"], each.kept) for each in result.decisions] == expected
    assert [each.metrics["m"] for each in result.decisions] == [alone[index] for index, _, _ in expected]
    kept = sorted(index for index, _, is_kept in expected if is_kept)
    assert [int(path.stem[5:]) for path in result.kept] == kept
    last, singles, soups, published = measured[0], measured[1 : count + 1], measured[count + 1 : -1], measured[-1]
    assert (last, singles) == (frozenset([count - 1]), [frozenset([index]) for index in range(count)])
    assert (len(soups), published) == (count - 1, frozenset(kept)), "each soup is measured once, and the output"


@pytest.mark.parametrize(
    ("tolerance", "kept"), [(0, [3, 2]), (0.5, [3, 2]), (1, [3, 2, 1]), (1.5, [3, 2, 1]), (2, [3, 2, 1, 0])]
)
def test_the_tolerance_is_for_all_steps_together(marked: Any, tolerance: float, kept: list[int]) -> None:
    """Otherwise many small losses would add up: the soup falls by 1 with each of the last two."""
    values = {1: 5.0, 2: 6.0, 3: 5.0, 4: 4.0}

    def value(chosen: frozenset[int]) -> float:
        return values[len(chosen)] + (0.01 * max(chosen) if len(chosen) == 1 else 0)

    result, _ = marked(4, value, tolerance=tolerance)
    assert [int(each.checkpoint.stem[5:]) for each in result.decisions if each.kept] == kept


def test_a_soup_that_measures_nan_is_not_kept(marked: Any) -> None:
    """Nor is anything compared with it afterwards."""
    result, _ = marked(3, lambda chosen: math.nan if chosen >= {1, 2} else float(len(chosen) + max(chosen)))
    assert decided(result) == [
        ("step_2.safetensors", True),
        ("step_1.safetensors", False),
        ("step_0.safetensors", True),
    ]


def test_infinite_metrics_have_an_order(marked: Any) -> None:
    result, _ = marked(3, lambda chosen: [math.inf, -math.inf, 0.0][min(chosen)] if len(chosen) == 1 else math.inf)
    assert decided(result) == [("step_0.safetensors", True), ("step_2.safetensors", True), ("step_1.safetensors", True)]


def torch_mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean in plain torch: float64 sums in the order of the steps, one division."""
    found = {}
    for name, last in states[-1].items():
        if last.is_floating_point():
            total = torch.zeros_like(last, dtype=torch.float64)
            for state in states:
                total = total + state[name].double()
            found[name] = (total / torch.tensor(float(len(states)), dtype=torch.float64)).to(last.dtype)
        else:
            found[name] = last
    return found


def torch_soup(
    paths: Sequence[Path],
    build: Callable[[], nn.Module],
    evaluate: Callable[[nn.Module], dict[str, float]],
    metric: str,
    batches: Sequence[Tensor] = (),
    *,
    highest: bool,
) -> list[tuple[int, float, bool]]:
    """The recipe in plain torch; with batches, the statistics of each model are the mean of those of its batches."""
    states = [torch.load(path, weights_only=False)["model"] for path in paths]

    def value(chosen: frozenset[int]) -> float:
        model = build()
        model.load_state_dict(torch_mean([states[index] for index in sorted(chosen)]))
        layers = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        with torch.no_grad():
            model.eval()
            for layer in layers if batches else ():
                layer.reset_running_stats()
                layer.momentum = None  # the mean over the batches
                layer.train()
            for batch in batches:
                model(batch)
            return float(evaluate(model.eval())[metric])

    return recipe([value(frozenset([index])) for index in range(len(paths))], value, highest=highest)


def assert_same_decisions(result: SoupResult, expected: list[tuple[int, float, bool]], accuracy: float) -> None:
    places = {path: index for index, path in enumerate(result.candidates)}
    assert [(places[each.checkpoint], each.kept) for each in result.decisions] == [(i, kept) for i, _, kept in expected]
    found = [each.soup_metrics[result.metric] for each in result.decisions]
    assert found == pytest.approx([value for _, value, _ in expected], rel=accuracy)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("refreshed", [False, True], ids=["statistics averaged", "statistics refreshed"])
def test_small_runs(tmp_path: Path, seed: int, refreshed: bool) -> None:
    """Networks with BatchNorm; their statistics are those of a loader that is the same each time."""
    paths = [tmp_path / f"step_{index}.pt" for index in range(6)]
    for index, path in enumerate(paths):
        torch.save({"model": trained(10 * seed + index), "step": index}, path)
    options: dict[str, Any] = {"bn_estimator": "batch-mean"} if refreshed else {"data": None, "bn": "keep"}
    result = made(paths, tmp_path / "out.safetensors", **options)
    expected = torch_soup(paths, make, score, "loss", data() if refreshed else (), highest=False)
    assert_same_decisions(result, expected, 1e-5 if refreshed else 1e-12)
    assert len(result.average.checkpoints) > 1, "the test would notice what is added"


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "refreshed"), [("accuracy", True), ("loss", False)])
def test_the_real_run(run_folder: Path, train: Any, tmp_path: Path, metric: str, refreshed: bool) -> None:
    paths = [run_folder / f"epoch_{number}.pt" for number in range(9, 21)]
    batches = list(itertools.islice(train.train_loader(), 3))
    target = {"maximize": "accuracy"} if metric == "accuracy" else {"minimize": "loss"}
    statistics: dict[str, Any] = {"data": batches, "bn_estimator": "batch-mean"} if refreshed else {"bn": "keep"}
    result = soup(
        run_folder, tmp_path / "out.safetensors", model=train.make_model, evaluate=train.evaluate, device="cpu",
        **target, **statistics,
    )  # fmt: skip
    assert list(result.candidates) == paths
    expected = torch_soup(
        paths, train.make_model, train.evaluate, metric, [batch[0] for batch in batches] if refreshed else (),
        highest=metric == "accuracy",
    )  # fmt: skip
    assert_same_decisions(result, expected, 1e-4 if refreshed else 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The file


def test_each_number_is_that_of_what_average_writes(run: list[Path], tmp_path: Path) -> None:
    """Of each checkpoint alone, and of each soup; bit for bit, each with its own refresh."""
    result = made(run, tmp_path / "soup.safetensors")
    kept: list[Path] = []
    for number, decision in enumerate(result.decisions):
        for suffix, chosen, metrics in (
            ("alone", [decision.checkpoint], decision.metrics),
            ("soup", [*kept, decision.checkpoint], decision.soup_metrics),
        ):
            out = tmp_path / f"{number}-{suffix}.safetensors"
            average(chosen, out, model=make, data=data, device="cpu")
            assert metrics == of_file(out), out.name
        kept += [decision.checkpoint] if decision.kept else []
    assert of_file(tmp_path / "soup.safetensors") == result.average.evaluations[-1].metrics
    assert sorted(result.average.checkpoints) == sorted(kept)


def test_the_order_of_the_sum(run: list[Path], tmp_path: Path) -> None:
    """That of the steps, or with --keep-order that of the sources; neither is that of the metric."""
    given = [run[4], run[0], run[2]]
    options: dict[str, Any] = {"tolerance": 1e9, "data": None, "bn": "keep"}
    result = made(given, tmp_path / "a.safetensors", keep_order=True, **options)
    assert result.kept == tuple(given)
    by_step = made(given, tmp_path / "b.safetensors", **options)
    assert by_step.kept == (run[0], run[2], run[4])
    assert [each.checkpoint for each in by_step.decisions] not in (given, sorted(given)), "the test would notice"


def test_frozen_layers_are_those_of_each_soup(run: list[Path], tmp_path: Path) -> None:
    """Two checkpoints have the same statistics: of these two alone they are kept, as `average` does."""
    states = [torch.load(path) for path in run]
    for name, tensor in states[1]["model"].items():
        if "running" in name or "tracked" in name:
            states[3]["model"][name] = tensor
    torch.save(states[3], run[3])
    test_each_number_is_that_of_what_average_writes([run[1], run[3]], tmp_path)


def test_it_is_the_mean_of_what_it_records(run: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "soup.safetensors"
    result = made(run, out)
    assert verify(out, sources=run[0].parent).checkpoints == result.average.checkpoints


@pytest.mark.parametrize("held", [0, 1, 2, 3, 6, 7, 100])
def test_what_is_held_changes_no_decision(run: list[Path], tmp_path: Path, held: int) -> None:
    """With memory for 1, 3 or 7 averages, a pass prepares 1, 2 or 3 decisions; ``passes`` and the bytes read tell."""
    one = sum(tensor.nbytes for tensor in torch.load(run[0])["model"].values())
    recorded = Recorded()
    result = made(run, tmp_path / "out.safetensors", hold=held * one, data=None, bn="keep", progress=recorded.progress)
    decisions = {0: 1, 1: 1, 2: 1, 3: 2, 6: 2}.get(held, 3)
    alone = [1] * 5
    kept = list(itertools.accumulate(each.kept for each in result.decisions))
    soups = [kept[at - 1] + min(decisions, 5 - at) for at in range(1, 5, decisions)]
    assert [nbytes // one for nbytes in recorded.passes()] == [*alone, *soups, kept[-1]], "the last one writes the file"
    assert result.passes == 1 + len(soups)
    reference = made(run, tmp_path / "reference.safetensors", data=None, bn="keep")
    assert result.decisions == reference.decisions
    assert result.average.data_digest == reference.average.data_digest


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what this process reads, as Linux does")
@pytest.mark.parametrize(("hold", "decisions"), [(0, 1), (3, 2), (10, 3)])
def test_the_bytes_that_are_read(tmp_path: Path, hold: int, decisions: int) -> None:
    """Each checkpoint once to measure it alone, then what each pass needs; nothing is read twice in one pass."""
    paths = [tmp_path / f"step_{index}.safetensors" for index in range(5)]
    one = 4 * 2**20
    for index, path in enumerate(paths):
        save_file({"weight": torch.full((one // 4,), float(index))}, path)

    def build() -> nn.Module:
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(one // 4))
        return model

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read()
    result = soup(
        paths, tmp_path / "soup.safetensors", model=build, evaluate=lambda model: {"m": model.weight.mean()},
        maximize="m", tolerance=1.4, hold=hold * one, io="pread",
    )  # fmt: skip
    kept = list(itertools.accumulate(each.kept for each in result.decisions))
    assert kept[-1] == 3
    passes = [5, *(kept[at - 1] + min(decisions, 5 - at) for at in range(1, 5, decisions)), kept[-1]]
    to_measure = 2  # the last checkpoint as it was saved, and the output
    assert read() - before == pytest.approx((sum(passes) + to_measure) * one, abs=0.2 * one)


def test_the_split_is_recorded(run: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "soup.safetensors"
    result = made(run, out, split="validation \udcff")
    assert (result.split, result.average.split) == ("validation \udcff", "validation \udcff")
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["ckpt_avg.split"] == "validation \\udcff"


# ---------------------------------------------------------------------------------------------------------------------
# Gates


def test_a_gate_compares_with_the_last_candidate(marked: Any, tmp_path: Path) -> None:
    """Also if that is not in the soup."""
    values = {frozenset([0]): 3.0, frozenset([1]): 2.0, frozenset([2]): 9.0, frozenset([0, 1]): 3.5}
    options = {"maximize": None, "minimize": "m", "require": ["m<=last-5", "m<=best+0.6"]}
    result, _ = marked(3, lambda chosen: values.get(chosen, 1.5 if 2 not in chosen else 8.0), **options)
    assert decided(result) == [
        ("step_1.safetensors", True),
        ("step_0.safetensors", False),
        ("step_2.safetensors", False),
    ]
    assert [(each.threshold, each.value, each.met) for each in result.average.outcomes] == [
        (4, 2, True),
        (2.6, 2, True),
    ]
    assert result.average.comparison is not None
    (change,) = result.average.comparison.averaging
    assert change.difference == -7.0


def test_the_target_tells_whether_averaging_helped(marked: Any) -> None:
    """The name of the metric does not."""
    for option, verdict in (("minimize", "better"), ("maximize", "worse")):
        wanted = {"maximize": None, "minimize": None, option: "m"}
        result, _ = marked(2, lambda chosen: 1.0 if len(chosen) == 2 else 2.0, tolerance=1.0, **wanted)
        assert result.average.comparison is not None
        assert [each.verdict for each in result.average.comparison.averaging] == [verdict]


def test_a_gate_that_is_not_met(run: list[Path], tmp_path: Path) -> None:
    """Nothing is published, and the error has what was measured."""
    out = tmp_path / "soup.safetensors"
    with pytest.raises(RequirementError) as caught:
        made(run, out, require="loss<0")
    assert not out.exists()
    assert len(caught.value.result.decisions) == 5
    assert [each.met for each in caught.value.result.average.outcomes] == [False]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what the user is told


def test_checkpoints_without_a_number(marked: Any) -> None:
    """They have no place in the order. The advice leaves the others."""
    with pytest.raises(IncompatibleError) as caught:
        marked(4, lambda chosen: math.nan if chosen <= {0, 2} else 1.0)
    assert str(caught.value) == (
        "step_0.safetensors, step_2.safetensors: the --eval function returns NaN for 'm'. Add --exclude "
        "step_0.safetensors --exclude step_2.safetensors, or return a number."
    )
    result, _ = marked(
        4, lambda chosen: math.nan if chosen <= {0, 2} else 1.0, exclude=["step_0.safetensors", "step_2.safetensors"]
    )
    assert len(result.candidates) == 2
    with pytest.raises(UserCodeError, match="'m' is NaN for every checkpoint"):
        marked(4, lambda chosen: math.nan)


def test_the_advice_does_not_skip_others(run: list[Path], tmp_path: Path) -> None:
    """A pattern goes by the last part of the path, which is the same here; brackets are none of a pattern."""
    paths = []
    for index, path in enumerate(run[:3]):
        (tmp_path / str(index)).mkdir()
        paths.append(path.rename(tmp_path / str(index) / "model.pt"))
    answers = itertools.cycle([1.0, math.nan, 1.0, 1.0])  # the last one as it was saved, then each
    options: dict[str, Any] = {"evaluate": lambda model: {"loss": next(answers)}}
    with pytest.raises(IncompatibleError, match=r"^0/model.pt: .*Name the other checkpoints, or return a number"):
        made(paths, tmp_path / "soup.safetensors", **options)
    run[4].rename(run[4].with_name("step_0 [a].pt"))
    with pytest.raises(IncompatibleError, match=r"Add --exclude 'step_0 \[\[\]a\].pt', or"):
        made(run[0].parent, tmp_path / "soup.safetensors", exclude="step_1.pt", **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"evaluate": None}, UsageError, "--eval is missing. Add --eval MODULE:FUNCTION to measure each checkpoint."),
        ({"minimize": None}, UsageError, "--maximize, --minimize: got neither. Add one: "),
        ({"minimize": "los"}, UsageError, "--minimize los: the --eval function returns no such metric. Use one of "),
        ({"require": "los<1"}, UsageError, "--require 'los<1': the --eval function returns no 'los'. "),
        ({"tolerance": -0.1}, UsageError, "--tolerance: -0.1 is out of range. Use 0 or more."),
        ({"tolerance": math.nan}, UsageError, "--tolerance: nan is out of range. Use 0 or more."),
        ({"tolerance": math.inf}, UsageError, "--tolerance: inf is out of range. Use a finite number."),
        ({"last": 1}, IncompatibleError, ""),
        ({"data": None}, UsageError, "running statistics of 2 BatchNorm layers"),
    ],
)
def test_options_that_are_refused(
    run: list[Path], tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        made(run, tmp_path / "soup.safetensors", **options)
    assert str(caught.value).startswith(message)


def test_an_output_that_exists_is_found_before_anything_is_measured(run: list[Path], tmp_path: Path) -> None:
    (tmp_path / "soup.safetensors").write_bytes(b"old")
    with pytest.raises(Exception, match="exists already"):
        made(run, tmp_path / "soup.safetensors", evaluate=lambda model: pytest.fail("measured"))


def test_a_metric_that_changes_by_chance(run: list[Path], tmp_path: Path) -> None:
    """The output does not measure what the soup did: said, because the choice may be chance as well."""
    calls = itertools.count()
    result = made(run, tmp_path / "soup.safetensors", evaluate=lambda model: {"loss": next(calls)})
    assert any("gives other numbers each time. --eval-repeats" in notice for notice in result.notices)
    steady = made(run, tmp_path / "steady.safetensors")
    assert not any("other numbers" in notice for notice in steady.notices)


def test_progress_says_what_is_measured(run: list[Path], tmp_path: Path) -> None:
    recorded = Recorded()
    result = made(run, tmp_path / "soup.safetensors", progress=recorded.progress)
    tried = [decision.checkpoint.name for decision in result.decisions[1:]]
    assert recorded.measured == [
        "step_5.pt",
        *(f"step_{number}.pt" for number in range(1, 6)),
        *(f"the soup with {name}" for name in tried),
        "average, statistics refreshed",
    ]


def test_repeats_show_the_spread_of_the_decisions(run: list[Path], tmp_path: Path) -> None:
    shuffled = torch.utils.data.DataLoader(torch.cat(data()), batch_size=5, shuffle=True, drop_last=True)
    result = made(run, tmp_path / "s.safetensors", data=lambda: shuffled, bn_batches=2, eval_repeats=3)
    for decision in result.decisions:
        assert len(set(decision.samples["loss"])) == len(set(decision.soup_samples["loss"])) == 3
    assert result.notices == ()


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> App:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return App(tmp_path, NET)


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("sources", "options"),
    [
        (["a run"], []),
        (["a run"], ["--split", "validation set"]),
        (["a run"], ["--sha256", "--dtype", "bfloat16"]),
        (["a run"], ["--last", "3", "--exclude", "step_4.pt"]),
        (["a run"], ["--bn-estimator", "batch-mean", "--bn-batches", "2", "--hold", "1"]),
        (["a run/step_5.pt", "a run/step_1.pt", "a run/step_3.pt"], ["--keep-order", "--tolerance", "1e9"]),
        (["a run"], ["--tolerance", "1e9", "--non-float", "last", "--threads", "2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("run")
def test_the_command_makes_the_same_file(
    app: App, in_process: InProcess, sources: list[str], options: list[str]
) -> None:
    words = [*app.options("score"), "--minimize", "loss", *options]
    code, stdout, stderr = in_process("soup", *sources, "-o", "the soup.safetensors", "--json", *words)
    assert code == 0, stderr
    document = json.loads(stdout)
    command = document["command"]
    assert not {"--eval", "--minimize", "--tolerance", "--hold", "--last"} & set(command)
    code, _, stderr = in_process(*command[1:])
    assert code == 0, stderr
    other = command[command.index("-o") + 1]
    assert other == "the soup-2.safetensors"
    assert sha256(other) == sha256("the soup.safetensors")


@pytest.mark.usefixtures("run")
def test_the_command_makes_the_same_folder(app: App, in_process: InProcess) -> None:
    """If it failed, it would write a file, or into the folder that is there."""
    words = [*app.options("score"), "--minimize", "loss", "--max-shard-size", "1KB"]
    code, stdout, stderr = in_process("soup", "a run", *words, "-o", "release/", "--json")
    assert code == 0, stderr
    command = json.loads(stdout)["command"]
    assert command[command.index("-o") + 1] == "release-2/"
    code, _, stderr = in_process(*command[1:])
    assert code == 0, stderr
    for path in Path("release").glob("model*"):
        assert (Path("release-2") / path.name).read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("run")
def test_what_is_printed(app: App, in_process: InProcess) -> None:
    """A row for each decision, the output's numbers, and the command of --json, for a shell."""
    words = [*app.options("score"), "--minimize", "loss", "--split", "validation", "-o", "soup.safetensors"]
    code, stdout, stderr = in_process("soup", "a run", *words, "--report", "soup.json")
    assert code == 0, stderr
    document = json.loads(Path("soup.json").read_text())
    lines = stdout.splitlines()
    assert lines[0].split() == ["checkpoint", "loss", "soup", "with", "it"]
    assert [line.split()[0] for line in lines[1:6]] == [Path(each["checkpoint"]).name for each in document["decisions"]]
    assert [not line.endswith("not kept") for line in lines[1:6]] == [each["kept"] for each in document["decisions"]]
    kept = sum(each["kept"] for each in document["decisions"])
    assert lines[7].startswith(f"soup of {kept} of 5 checkpoints: loss ")
    assert [line.split("  ")[0] for line in lines if "(last)" in line or "refreshed  " in line] == [
        "step_5.pt (last)", "last, statistics refreshed", "average, statistics refreshed"
    ]  # fmt: skip
    assert "chosen on the split 'validation': report the numbers of another one" in lines
    assert shlex.split(lines[-2].removeprefix("the same output: ")) == document["command"]
    assert lines[-1] == "wrote soup.json"
    assert (document["written"], document["split"]) == (True, "validation")


@pytest.mark.usefixtures("run")
def test_an_unmet_gate_prints_the_decisions(app: App, in_process: InProcess) -> None:
    words = [*app.options("score"), "--minimize", "loss", "--require", "loss<0", "-o", "soup.safetensors"]
    code, stdout, stderr = in_process("soup", "a run", *words, "--report", "soup.json")
    assert code == 9
    assert "NOT MET: loss<0" in stdout
    assert "did not write soup.safetensors" in stdout
    assert "not published" in stderr
    document = json.loads(Path("soup.json").read_text())
    assert (len(document["decisions"]), document["written"], document["error"]["exit_code"]) == (5, False, 9)


@pytest.mark.usefixtures("run")
def test_a_dry_run_measures_and_writes_nothing(app: App, in_process: InProcess) -> None:
    before = names(Path())
    words = [*app.options("raises"), "--minimize", "loss", "-o", "soup.safetensors", "--dry-run"]
    code, stdout, stderr = in_process("soup", "a run", *words)
    assert code == 0, stderr
    assert stdout.splitlines() == [
        "would measure 5 checkpoints, then 4 soups, in 3 passes over checkpoints: step_1.pt, step_2.pt, …, step_5.pt",
        "would write soup.safetensors",
    ]
    assert "a dry run measures nothing" in stderr
    code, stdout, stderr = in_process("soup", "a run", *words, "--json")
    assert (json.loads(stdout)["command"], json.loads(stdout)["passes"]) == ([], 3)
    assert names(Path()) == before


def test_sources_that_can_be_listed_once(run: list[Path], tmp_path: Path) -> None:
    for dry_run in (True, False):
        assert made(iter(run), tmp_path / "soup.safetensors", dry_run=dry_run).candidates == tuple(run)


@pytest.mark.usefixtures("run")
def test_several_ranks_are_refused(app: App, in_process: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    code, _, stderr = in_process("soup", "a run", *app.options("score"), "--minimize", "loss", "-o", "s.safetensors")
    assert code == 2
    assert "soup: runs in one process only. Start it without torchrun." in stderr


def test_the_split_of_an_average(run: list[Path], tmp_path: Path) -> None:
    """The printed command gives it, so that the file is the same; other averages don't record one."""
    average(run, tmp_path / "a.safetensors", bn="keep", split="validation")
    average(run, tmp_path / "b.safetensors", bn="keep")
    for name, expected in (("a", "validation"), ("b", None)):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as opened:
            assert opened.metadata().get("ckpt_avg.split") == expected
    assert load_file(tmp_path / "a.safetensors").keys() == load_file(tmp_path / "b.safetensors").keys()


class Masked(nn.Module):
    """A layer, and the mask of a causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))


def test_a_mask_with_infinities_is_no_error(tmp_path: Path) -> None:
    """`average` takes it, since it is the same in all checkpoints; each candidate alone would not show that."""
    paths = [tmp_path / f"step_{step}.pt" for step in range(1, 5)]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        torch.save(Masked().state_dict(), path)
    code: dict[str, Any] = {"model": Masked, "evaluate": lambda model: {"size": model.layer.weight.norm().item()}}
    made = soup(paths, tmp_path / "soup.safetensors", minimize="size", **code)
    assert len(made.kept) > 1
    assert torch.equal(load_file(tmp_path / "soup.safetensors")["mask"], Masked().mask)
    assert len(sweep(paths, minimize="size", hold=1, **code).windows) == 7
