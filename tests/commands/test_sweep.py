"""`sweep`: each window's numbers are those of the file that `average` writes for these checkpoints, bit for bit."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands.user_modules import NET, App, InProcess, data, make, of_file, score, trained
from recorded import Recorded
from safetensors.torch import load_file, save_file
from torch import nn

from ckpt_avg import IncompatibleError, UsageError, UserCodeError, average, sweep
from ckpt_avg.commands.sweep import SweepResult, windows_of

MODULE = f"""{NET}
calls = itertools.count()

def picked(model):
    # The first call is for the last checkpoint as it is, then come the windows: one of them is the best.
    return {{**score(model), "picked": next(calls) == int(os.environ["PICKED"])}}

def prints(model):
    print("printed by the function")
    return score(model)
"""


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    """Four checkpoints; the losses that they record are 4, 1, 3, 2."""
    folder = tmp_path / "a run"
    folder.mkdir()
    paths = []
    for number, loss in enumerate((4.0, 1.0, 3.0, 2.0), start=1):
        paths.append(folder / f"step_{number}.pt")
        torch.save({"model": trained(number), "step": number, "loss": loss}, paths[-1])
    return paths


def assert_as_average_writes(result: SweepResult, folder: Path, **options: Any) -> None:
    """The oracle: really averages the checkpoints of each window, and measures the files."""
    for number, window in enumerate(result.windows):
        out = folder / f"{number}-{window.side}-{len(window.checkpoints)}.safetensors"
        average(window.checkpoints, out, model=make, device="cpu", **options)
        assert window.metrics == of_file(out), (window.side, len(window.checkpoints))


def swept(run: Any, **options: Any) -> SweepResult:
    """A sweep by the loss, with a refresh; what is None is not given."""
    given = {"model": make, "data": data, "evaluate": score, "minimize": "loss", "device": "cpu", **options}
    return sweep(run, **{name: value for name, value in given.items() if value is not None})


def sizes(result: SweepResult) -> list[tuple[str, int]]:
    return [(window.side, len(window.checkpoints)) for window in result.windows]


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


# ---------------------------------------------------------------------------------------------------------------------
# The windows


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ("last", [("last", 3, 4), ("last", 2, 4), ("last", 1, 4), ("last", 0, 4)]),
        ("first", [("first", 0, 1), ("first", 0, 2), ("first", 0, 3), ("first", 0, 4)]),
        (
            "both",
            [("last", 3, 4), ("last", 2, 4), ("last", 1, 4), ("last", 0, 4), ("first", 0, 1), ("first", 0, 2),
             ("first", 0, 3)],
        ),
    ],
)  # fmt: skip
def test_which_windows_there_are(sides: str, expected: list[tuple[str, int, int]]) -> None:
    """The average of all is measured once."""
    assert [(each.side, each.indices.start, each.indices.stop) for each in windows_of(4, sides)] == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float64"},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"bn": "keep"},
        {"bn": "keep", "dtype": "bfloat16"},
        {"bn_estimator": "batch-mean", "bn_batches": 2},
        {"amp": "bfloat16"},
        {"threads": 1},
        {"non_float": "last"},
    ],
    ids=lambda options: ", ".join(map(str, options.values())) or "defaults",
)
def test_each_window_is_what_average_writes(run: list[Path], tmp_path: Path, options: dict[str, Any]) -> None:
    """All of them, each with its own refresh; that of a single checkpoint too."""
    given = options if "bn" in options else {**options, "data": data}
    result = swept(run, **{"data": None, **given})
    assert sizes(result) == [*(("last", size) for size in (1, 2, 3, 4)), *(("first", size) for size in (1, 2, 3))]
    assert [window.checkpoints for window in result.windows[:4]] == [tuple(run[-size:]) for size in (1, 2, 3, 4)]
    assert [window.checkpoints for window in result.windows[4:]] == [tuple(run[:size]) for size in (1, 2, 3)]
    assert len({window.metrics["loss"] for window in result.windows}) == 7, "the test would notice a mix-up"
    assert_as_average_writes(result, tmp_path, **given)
    assert result.refreshed is ("bn" not in options)
    assert result.best.metrics["loss"] == min(window.metrics["loss"] for window in result.windows)


def test_the_last_checkpoint_as_it_is(run: list[Path]) -> None:
    """And the same with refreshed statistics, which is what the averages are compared with."""
    result = swept(run)
    assert (result.last.name, result.last.path, result.last.metrics) == ("step_4.pt", run[-1], of_file(run[-1]))
    assert (result.reference.path, result.reference.metrics) == (run[-1], result.windows[0].metrics)
    assert result.last.metrics != result.reference.metrics
    difference = result.best.metrics["loss"] - result.reference.metrics["loss"]
    assert (result.change.metric, result.change.difference, result.change.spread) == ("loss", difference, None)
    kept = swept(run, data=None, bn="keep")
    assert kept.reference is kept.last


def test_windows_list_their_checkpoints_in_the_order_of_the_sum(run: list[Path]) -> None:
    """With --keep-order that is the order given, also in the command for the first k; which they are, steps decide."""
    result = swept([run[2], run[0], run[3]], data=None, bn="keep", keep_order=True)
    assert result.last.path == run[3]
    assert [window.checkpoints for window in result.windows[1:]] == [
        (run[2], run[3]),
        (run[2], run[0], run[3]),
        (run[0],),
        (run[2], run[0]),
    ]


def test_repeats_give_each_window_a_spread(run: list[Path]) -> None:
    shuffled = torch.utils.data.DataLoader(torch.cat(data()), batch_size=5, shuffle=True, drop_last=True)
    result = swept(run, data=lambda: shuffled, bn_batches=2, eval_repeats=3)
    for measured in (result.reference, *result.windows):
        assert len(set(measured.samples["loss"])) == 3
    assert result.change.spread is not None


def test_tensors_that_are_averaged_in_many_pieces(tmp_path: Path) -> None:
    """Tasks are cut, shared by threads, and written at their place in each window's memory."""
    paths = [tmp_path / f"step_{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        torch.manual_seed(number)
        save_file({"weight": torch.randn(7, 30_011), "bias": torch.randn(7), "empty": torch.zeros(0)}, path)

    def build() -> nn.Module:
        model = nn.Linear(30_011, 7)
        model.register_buffer("empty", torch.zeros(0))
        return model

    def digest(model: nn.Module) -> dict[str, float]:
        """Of every bit of the weights."""
        found = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in model.state_dict().values()))
        return {"digest": float(int(found.hexdigest()[:13], 16))}

    results = [
        sweep(paths, model=build, evaluate=digest, minimize="digest", device="cpu", **options)  # type: ignore[arg-type]
        for options in ({"threads": 3, "memory": 2**20}, {"threads": 1, "hold": 1}, {})
    ]
    assert results[0].windows == results[1].windows == results[2].windows
    for number, window in enumerate(results[0].windows):
        out = tmp_path / f"{number}.out.safetensors"
        average(window.checkpoints, out, device="cpu")
        model = build()
        model.load_state_dict(load_file(out))
        assert window.metrics == digest(model)


def test_non_float_tensors_are_those_of_each_window_s_last(tmp_path: Path) -> None:
    """With --non-float last; the first k do not take those of the run's last checkpoint."""
    paths = [tmp_path / f"step_{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        save_file(
            {"weight": torch.full((1, 2), float(number)), "bias": torch.ones(1), "seen": torch.tensor(number)}, path
        )

    def build() -> nn.Module:
        model = nn.Linear(2, 1)
        model.register_buffer("seen", torch.tensor(0))
        return model

    def read(model: nn.Module) -> dict[str, float]:
        return {"seen": model.seen, "weight": model.weight[0, 0]}  # type: ignore[dict-item]

    result = sweep(paths, model=build, evaluate=read, maximize="seen", non_float="last")
    assert [tuple(window.metrics.values()) for window in result.windows] == [(2, 2), (2, 1.5), (2, 1), (0, 0), (1, 0.5)]
    with pytest.raises(IncompatibleError):
        sweep(paths, model=build, evaluate=read, maximize="seen")


@pytest.mark.parametrize("sides", ["last", "first"])
def test_one_side_alone(run: list[Path], sides: str) -> None:
    both, one = swept(run), swept(run, windows=sides)
    assert sizes(one) == [(sides, size) for size in (1, 2, 3, 4)]
    known = {window.checkpoints: window.metrics for window in both.windows}
    assert [window.metrics for window in one.windows] == [known[window.checkpoints] for window in one.windows]


# ---------------------------------------------------------------------------------------------------------------------
# Rules for weights

RULES = {
    "mean": {},
    "minus-sqrt": {"weighting": "minus-sqrt"},
    "linear": {"weighting": "linear"},
    "ema:2": {"weighting": "ema", "half_life": 2},
    "ema:30%": {"weighting": "ema", "half_life": "30%"},
    "power:0.2": {"weighting": "power", "width": 0.2},
}


@pytest.fixture
def uneven(run: list[Path]) -> list[Path]:
    """The same run with steps 1, 2, 5, 6: with even ones some rules would be equal, or the same as by position."""
    for path, step in zip(run, (1, 2, 5, 6), strict=True):
        torch.save({**torch.load(path), "step": step}, path)
    return run


@pytest.mark.parametrize("hold", [10**9, 0])
def test_each_rule_in_each_window_is_what_average_writes(uneven: list[Path], tmp_path: Path, hold: int) -> None:
    """Bit for bit, each with its own refresh; in a run folder, so that power knows what is before the last k."""
    result = swept(uneven[0].parent, weightings=",".join(RULES), hold=hold)
    assert result.weightings == tuple(RULES)
    assert sizes(result) == [
        (side, size) for side, most in (("last", 4), ("first", 3)) for size in range(1, most + 1) for _ in RULES
    ]
    for window in result.windows:
        size, out = len(window.checkpoints), tmp_path / "out.safetensors"
        chosen: dict[str, Any] = {"last": size} if window.side == "last" else {"to_step": (1, 2, 5)[size - 1]}
        written = average(
            uneven[0].parent,
            out,
            model=make,
            data=data,
            device="cpu",
            overwrite=True,
            **chosen,
            **RULES[window.weighting],
        )
        assert window.metrics == of_file(out), (window.side, size, window.weighting)
        assert (window.checkpoints, window.weights) == (written.checkpoints, written.weights)
    # Alone all rules are the same, and of two checkpoints linear is the mean.
    assert len({window.metrics["loss"] for window in result.windows}) == 7 + 5 * (len(RULES) - 1) - 2


@pytest.mark.parametrize(("held", "expected"), [(100, 1), (7, 4), (1, 27)])
def test_rules_share_the_passes(uneven: list[Path], held: int, expected: int) -> None:
    """Of 4 + 3 windows and five rules, what has equal weights is averaged once: 7 means and 4 · 5 others."""
    recorded = Recorded()
    result = swept(
        uneven,
        weightings=list(RULES)[:2] + list(RULES)[3:],
        hold=held * bytes_of_one(uneven),
        progress=recorded.progress,
    )
    started = recorded.passes()
    assert len(result.windows) == 35
    assert (result.passes, len(started)) == (expected, expected)
    if expected == 1:
        assert started == [4 * bytes_of_one(uneven)]


def test_ties_go_to_the_rule_that_is_listed_first(run: list[Path]) -> None:
    result = swept(run, weightings=["ema:1", "mean"], evaluate=lambda model: {"loss": 1.0})
    assert (result.best.side, len(result.best.checkpoints), result.best.weighting) == ("last", 1, "ema:1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weightings": "mean,ema"}, "--weightings: 'ema': ema takes a number. Write ema:1000 (steps), or ema:10%."),
        ({"weightings": "mean:1"}, "--weightings: 'mean:1': mean takes no number. Write mean."),
        (
            {"weightings": "minus-sqr"},
            "--weightings: 'minus-sqr' is not one of mean, linear, minus-sqrt, cosine, ema, ",
        ),
        ({"weightings": "mean,,linear"}, "--weightings: '' is not one of mean, "),
        ({"weightings": "power:x"}, "--weightings: 'power:x': expected a width, for example power:0.1."),
        ({"weightings": "power:0.3"}, "--width 0.3: no power has this width. "),
        ({"weightings": ["ema:5", "ema:5.0"]}, "--weightings: ema:5 is listed twice. List it once."),
        ({"weightings": "mean", "weighting": "linear"}, "--weightings, --weighting linear: both choose rules. "),
        ({"weighting_by": "index"}, "--weighting-by index needs another --weighting than mean. "),
    ],
)
def test_rules_that_are_refused(run: list[Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        swept(run, **options)
    assert str(caught.value).startswith(message)


def test_a_rule_that_the_run_does_not_allow_is_refused_before_anything_is_measured(run: list[Path]) -> None:
    """Two checkpoints record the same step, so there is no distance between them."""
    torch.save({**torch.load(run[3]), "step": 3}, run[3])
    with pytest.raises(IncompatibleError, match="expected steps that increase"):
        swept(run, weightings="mean,ema:2", evaluate=lambda model: pytest.fail("measured"))


def test_a_notice_says_how_many_averages_measure_nan(run: list[Path]) -> None:
    result = listed(run, *(math.nan, math.nan, 1, 2, 3, 4, 5))
    assert [notice for notice in result.notices if "NaN" in notice] == [
        "'m' is NaN for 2 of 7 averages, so none of these is the best. ckpt-avg compare names checkpoints that are far "
        "off; skip them with --exclude"
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Frozen layers: which they are depends on the window


def with_statistics(paths: Sequence[Path], statistics_of: Sequence[int], layers: Sequence[str]) -> None:
    """Gives each checkpoint the running statistics of these layers of another one."""
    states = [torch.load(path) for path in paths]
    for path, state, index in zip(paths, states, statistics_of, strict=True):
        taken = {
            name: tensor
            for name, tensor in states[index]["model"].items()
            if name.rpartition(".")[0] in layers and ("running" in name or "tracked" in name)
        }
        torch.save({**state, "model": {**state["model"], **taken}}, path)


@pytest.mark.parametrize("layers", [["1", "6"], ["1"]], ids=["all layers", "one layer"])
@pytest.mark.parametrize("statistics_of", [[0, 0, 2, 3], [0, 1, 2, 2], [0, 0, 0, 3], [0, 0, 0, 0]], ids=str)
def test_frozen_in_some_windows(run: list[Path], tmp_path: Path, statistics_of: list[int], layers: list[str]) -> None:
    """Where a window's checkpoints have the same statistics, `average` leaves them, and so does the sweep.

    Also where all have them, and the window is a single checkpoint.
    """
    with_statistics(run, statistics_of, layers)
    assert_as_average_writes(swept(run), tmp_path, data=data)


def test_frozen_in_all_needs_no_data(run: list[Path], tmp_path: Path) -> None:
    with_statistics(run, [0, 0, 0, 0], ["1", "6"])
    assert_as_average_writes(swept(run, data=None), tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Passes


def bytes_of_one(run: list[Path]) -> int:
    return sum(tensor.nbytes for tensor in torch.load(run[0])["model"].values())


@pytest.mark.parametrize(
    ("held", "expected"),
    [(0, 7), (1, 7), (1.0, 7), (1.99, 7), (2.0, 4), (3.0, 3), (4.0, 2), (6.0, 2), (7.0, 1), (100.0, 1)],
    ids=str,
)
def test_the_same_in_any_number_of_passes(run: list[Path], held: float, expected: int) -> None:
    """How many averages wait in memory changes no number; ``passes`` says how often the checkpoints were read."""
    hold = int(held * bytes_of_one(run)) if isinstance(held, float) else held
    recorded = Recorded()
    result = swept(run, hold=hold, progress=recorded.progress)
    assert (result.passes, len(recorded.passes())) == (expected, expected)
    reference = swept(run, hold=10**9)
    assert result.windows == reference.windows
    assert result.best == reference.best


def test_a_pass_reads_only_what_its_windows_need(run: list[Path]) -> None:
    """With one window at a time, the last 1 reads one checkpoint; what is announced is what is read."""
    recorded = Recorded()
    swept(run, data=None, bn="keep", hold=1, progress=recorded.progress)
    one = bytes_of_one(run)
    assert recorded.passes() == [one * size for size in (1, 2, 3, 4, 1, 2, 3)]


# ---------------------------------------------------------------------------------------------------------------------
# Chance


def shuffled() -> Any:
    """Batches in an order that is drawn when they are asked for."""
    batches = data()
    return iter([batches[index] for index in torch.randperm(3)])


@pytest.mark.parametrize(
    "batches",
    [torch.utils.data.DataLoader(torch.cat(data()), batch_size=5, shuffle=True), shuffled],
    ids=["a loader that shuffles", "a factory that draws"],
)
def test_the_same_random_state_at_each_call(run: list[Path], batches: Any) -> None:
    """Each refresh sees the same order, and each metric draws the same numbers (docs/choosing-a-window.md)."""
    result = swept(run, data=batches, minimize=None, evaluate=lambda model: {"r": torch.rand(1).item()}, maximize="r")
    assert {window.metrics["r"] for window in result.windows} == {result.last.metrics["r"]}


def test_a_loader_with_a_generator_of_its_own(run: list[Path], tmp_path: Path) -> None:
    """A factory that seeds its shuffling: `average` sees the first order, and so must each window of the sweep."""

    def seeded() -> Any:
        generator = torch.Generator().manual_seed(3)
        return torch.utils.data.DataLoader(torch.cat(data()), batch_size=5, shuffle=True, generator=generator)

    assert_as_average_writes(swept(run, data=seeded), tmp_path, data=seeded)


# ---------------------------------------------------------------------------------------------------------------------
# The best


def listed(run: list[Path], *values: float, mode: str = "max", last: float = 0.0) -> SweepResult:
    """A sweep whose windows measure these numbers."""
    replies = iter([last, *values])
    options = {"maximize" if mode == "max" else "minimize": "m"}
    return sweep(run, model=make, bn="keep", evaluate=lambda model: {"m": next(replies)}, device="cpu", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ((1, 2, 3, 4, 5, 6, 7), "max", ("first", 3)),
        ((1, 2, 3, 4, 5, 6, 7), "min", ("last", 1)),
        ((1, 1, 1, 1, 1, 1, 1), "max", ("last", 1)),
        ((1, 1, 1, 1, 1, 1, 1), "min", ("last", 1)),
        ((0, 5, 5, 5, 0, 5, 5), "max", ("last", 2)),
        ((0, 0, 5, 5, 0, 5, 0), "max", ("first", 2)),
        ((0, 0, 0, 5, 0, 0, 5), "max", ("first", 3)),
        ((0, 0, 5, 0, 5, 0, 5), "max", ("first", 1)),
        ((math.nan, 2, math.nan, 3, 1, math.nan, math.nan), "max", ("last", 4)),
        ((math.nan, 2, math.nan, 3, 1, math.nan, math.nan), "min", ("first", 1)),
        ((math.nan,) * 6 + (-math.inf,), "max", ("first", 3)),
        ((1, math.inf, 2, 3, 4, 5, 6), "max", ("last", 2)),
        ((1, -math.inf, 2, 3, 4, 5, 6), "max", ("first", 3)),
        ((1, -math.inf, 2, 3, 4, 5, 6), "min", ("last", 2)),
    ],
)
def test_which_is_best(run: list[Path], values: tuple[float, ...], mode: str, best: tuple[str, int]) -> None:
    """Of equals the one with the fewest checkpoints, and of these the last ones; NaN is never the best."""
    result = listed(run, *values, mode=mode)
    assert (result.best.side, len(result.best.checkpoints)) == best
    assert (result.metric, result.mode) == ("m", mode)
    assert any(window is result.best for window in result.windows)


def test_nan_everywhere(run: list[Path]) -> None:
    with pytest.raises(UserCodeError) as caught:
        listed(run, *[math.nan] * 7)
    assert str(caught.value) == "the --eval function: 'm' is NaN for every average. Return a number."


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_one_checkpoint(run: list[Path]) -> None:
    with pytest.raises(IncompatibleError, match="is the only checkpoint"):
        swept(run[0])
    with pytest.raises(IncompatibleError, match="is the only checkpoint"):
        swept(run, last=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minimize": None}, "--maximize, --minimize: got neither. Add one: "),
        ({"maximize": "a"}, "--maximize, --minimize: got both. Add one: "),
        ({"windows": "middle"}, "--windows: 'middle' is not one of last, first, both."),
        ({"minimize": "los"}, "--minimize los: the --eval function returns no such metric. Use one of 'accuracy', "),
        ({"dtype": "int8"}, "--dtype"),
        ({"bn": "no"}, "--bn: 'no' is not one of auto, refresh, keep."),
        ({"memory": 1}, "--memory"),
        ({"bn_estimator": "x"}, "--bn-estimator"),
        ({"bn_batches": 0}, "--bn-batches"),
        ({"last": 0}, "--last: 0 is out of range. Use 1 or more."),
        ({"data": None}, "running statistics of 2 BatchNorm layers"),
    ],
)
def test_options_that_are_refused(run: list[Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        swept(run, **options)
    assert str(caught.value).startswith(message)


def test_batches_for_one_pass_only(run: list[Path]) -> None:
    """They would be used up after the first window. Found before anything is measured."""
    with pytest.raises(UsageError, match="used up after one"):
        swept(run, data=(batch for batch in data()), evaluate=lambda model: pytest.fail("measured"))


def test_batches_for_one_pass_where_none_is_needed(run: list[Path]) -> None:
    assert swept(run, data=iter(data()), bn="keep").refreshed is False


@pytest.mark.parametrize("kind", ["a generator function", "a factory of iterators", "a list", "a loader"])
def test_batches_for_many_passes(run: list[Path], tmp_path: Path, kind: str) -> None:
    def generate() -> Any:
        yield from data()

    batches: Any = {
        "a generator function": generate,
        "a factory of iterators": lambda: iter(data()),
        "a list": data(),
        "a loader": torch.utils.data.DataLoader(data(), batch_size=None),
    }[kind]
    assert_as_average_writes(swept(run, data=batches), tmp_path, data=data)


@pytest.mark.parametrize("at", [0, 1, 2, 7])
def test_a_function_that_fails_names_the_window(run: list[Path], at: int) -> None:
    calls = itertools.count()

    def fails(model: nn.Module) -> float:
        if next(calls) == at:
            raise LookupError("no test set")
        return 1.0

    name = {0: "step_4.pt", 1: "the last 1", 2: "the last 2", 7: "the first 3"}[at]
    with pytest.raises(UserCodeError, match=f"raised for {name}: LookupError: no test set"):
        swept(run, evaluate=fails, minimize="fails")


def test_progress_says_what_is_measured(run: list[Path]) -> None:
    recorded = Recorded()
    result = swept(run, progress=recorded.progress)
    assert recorded.measured == [
        "step_4.pt", "the last 1", "the last 2", "the last 3", "the last 4", "the first 1", "the first 2",
        "the first 3", "step_4.pt, statistics refreshed",
    ]  # fmt: skip
    assert tuple(recorded.notices) == result.notices
    assert len(set(recorded.notices)) == len(recorded.notices)


# ---------------------------------------------------------------------------------------------------------------------
# The command


class SweepApp(App):
    """The command line of a sweep."""

    def words(
        self, *more: object, function: str = "score", direction: str = "--minimize", data: bool = True
    ) -> list[object]:
        """The command's options, without the sources."""
        metric = "picked" if function == "picked" else "loss"
        return [*self.options(function, data=data), direction, metric, *more]

    def document(self, in_process: InProcess, *more: object, sources: Sequence[object] = ("a run",), **of: Any) -> Any:
        """What ``sweep --json`` prints."""
        code, stdout, stderr = in_process("sweep", *self.words("--json", *more, **of), "--", *sources)
        assert code == 0, stderr
        return json.loads(stdout)


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SweepApp:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return SweepApp(tmp_path, MODULE)


def made_by(in_process: InProcess, command: Sequence[str]) -> dict[str, float]:
    """Runs the command that a sweep printed, and measures its output, which is a new file."""
    out = Path(command[list(command).index("-o") + 1])
    assert not out.exists()
    assert command[0] == "ckpt-avg"
    code, _, stderr = in_process(*command[1:])
    assert code == 0, stderr
    return of_file(out)


@pytest.mark.parametrize(
    ("sources", "options", "picks"),
    [
        (["a run"], [], {1: ("last", 1), 2: ("last", 2), 4: ("last", 4), 5: ("first", 1), 7: ("first", 3)}),
        (["a run"], ["--windows", "first"], {1: ("first", 1), 3: ("first", 3), 4: ("first", 4)}),
        (["a run"], ["--last", "3"], {1: ("last", 1), 3: ("last", 3), 5: ("first", 2)}),
        (["a run"], ["--every", "2"], {1: ("last", 1), 2: ("last", 2), 3: ("first", 1)}),
        (["a run"], ["--every", "2", "--last", "2", "--windows", "first"], {1: ("first", 1), 2: ("first", 2)}),
        (["a run"], ["--include", "step_[134].pt"], {2: ("last", 2), 3: ("last", 3), 5: ("first", 2)}),
        (["a run"], ["--exclude", "step_3.pt", "--exclude", "step_9*"], {2: ("last", 2), 5: ("first", 2)}),
        (["a run"], ["--from-step", "2", "--to-step", "3"], {1: ("last", 1), 2: ("last", 2), 3: ("first", 1)}),
        (
            ["a run"],
            ["--best", "3", "--metric", "loss", "--mode", "min"],
            {1: ("last", 1), 2: ("last", 2), 3: ("last", 3), 5: ("first", 2)},
        ),
        (
            ["a run/step_3.pt", "a run/step_1.pt", "a run/step_4.pt"],
            [],
            {1: ("last", 1), 2: ("last", 2), 5: ("first", 2)},
        ),
        (["./a run/../a run"], ["--dtype", "bfloat16"], {2: ("last", 2), 6: ("first", 2)}),
        (["a run"], ["--state-key", "model", "--threads", "1", "--memory", "2MiB"], {2: ("last", 2), 6: ("first", 2)}),
        (
            ["a run"],
            ["--bn-estimator", "batch-mean", "--bn-batches", "2", "--amp", "bfloat16"],
            {1: ("last", 1), 6: ("first", 2)},
        ),
        (["a run"], ["--hold", "1", "-q", "--overwrite", "--non-float", "last"], {2: ("last", 2), 6: ("first", 2)}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_the_command_makes_what_was_measured(
    app: SweepApp,
    run: list[Path],
    in_process: InProcess,
    monkeypatch: pytest.MonkeyPatch,
    sources: list[str],
    options: list[str],
    picks: dict[int, tuple[str, int]],
) -> None:
    """Whichever window is the best: the file's number is the sweep's, to the last bit."""
    for pick, (side, size) in picks.items():
        monkeypatch.setenv("PICKED", str(pick))
        sys.modules.pop(app.module, None)
        document = app.document(in_process, *options, sources=sources, function="picked", direction="--maximize")
        best = document["best"]
        assert (best["side"], best["size"]) == (side, size)
        assert made_by(in_process, document["command"])["loss"] == best["metrics"]["loss"], document["command"]


@pytest.mark.usefixtures("uneven")
@pytest.mark.parametrize(
    ("options", "pick", "given"),
    [
        (["--weightings", "mean,power:0.2"], 3, ["--width", "0.2", "--last", "2"]),
        (["--weightings", "mean,ema:50%", "--weighting-by", "index"], 5, ["--weighting-by", "index"]),
        (["--weightings", "mean,power:0.2", "--from-step", "2", "--windows", "first"], 3, ["--weights"]),
        (["--weightings", "minus-sqrt,mean", "--windows", "first"], 4, ["--weighting", "minus-sqrt"]),
        (["--weightings", "mean,ema:3", "--best", "3", "--metric", "loss", "--mode", "min"], 3, ["--half-life", "3"]),
        (["--weightings", "mean,power:0.2", "--exclude", "step_1.pt", "--keep-order"], 5, ["--last", "3"]),
        (["--weighting", "ema", "--half-life", "3", "--every", "2"], 2, ["--half-life", "3", "--every", "2"]),
    ],
)  # fmt: skip
def test_the_command_makes_what_was_measured_with_a_rule(
    app: SweepApp,
    in_process: InProcess,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    pick: int,
    given: list[str],
) -> None:
    """Power with --weights where a list of checkpoints does not show what was before them."""
    monkeypatch.setenv("PICKED", str(pick))
    sys.modules.pop(app.module, None)
    document = app.document(in_process, *options, function="picked", direction="--maximize")
    assert document["best"]["weights"] is not None
    assert set(given) <= set(document["command"])
    assert made_by(in_process, document["command"])["loss"] == document["best"]["metrics"]["loss"]


def test_the_command_without_a_refresh(app: SweepApp, run: list[Path], in_process: InProcess) -> None:
    document = app.document(in_process, data=False)
    assert made_by(in_process, document["command"]) == document["best"]["metrics"]
    assert document["refreshed"] is False


def test_the_command_for_names_with_a_prefix(app: SweepApp, run: list[Path], in_process: InProcess) -> None:
    for path in run:
        state = torch.load(path)
        torch.save({"deep": {"net": {f"model.{name}": value for name, value in state["model"].items()}}}, path)
    document = app.document(in_process, "--state-key", "deep.net", "--strip-prefix", "model.")
    assert made_by(in_process, document["command"]) == document["best"]["metrics"]


def test_the_command_for_files_that_look_like_options(app: SweepApp, run: list[Path], in_process: InProcess) -> None:
    """They are given after ``--``, in the printed command, too."""
    files = [f"-{path.name}" for path in run[:2]]
    for path, name in zip(run, files, strict=False):
        path.rename(name)
    document = app.document(in_process, sources=files)
    assert made_by(in_process, document["command"]) == document["best"]["metrics"]


@pytest.mark.usefixtures("run")
def test_what_is_printed(app: SweepApp, in_process: InProcess, tmp_path: Path) -> None:
    """The table and the command on stdout; pasted into a shell it is the command of --json. No file is written."""
    before = tree(tmp_path)
    code, stdout, stderr = in_process("sweep", "a run", *app.words(function="prints"))
    assert code == 0, stderr
    document = app.document(in_process, function="prints")
    assert tree(tmp_path) == before
    lines = stdout.splitlines()
    assert lines[0].split() == ["accuracy", "loss"]
    assert lines[1].startswith("step_4.pt (last)")
    assert [line.split("  ")[0] for line in lines[2:10]] == [
        "last, statistics refreshed", "last 1", "last 2", "last 3", "all 4", "first 1", "first 2", "first 3"
    ]  # fmt: skip
    assert lines[11].startswith("best by loss: the average of ")
    assert lines[12].startswith("to write it: ")
    assert shlex.split(lines[12].removeprefix("to write it: ")) == document["command"]
    assert len(lines) == 13
    assert [line for line in lines if "← best" in line]
    assert "printed by" not in stdout
    assert stderr.count("printed by the function") == 9


@pytest.mark.usefixtures("run")
def test_report_and_plot(app: SweepApp, in_process: InProcess, tmp_path: Path) -> None:
    """Both are written, the report with what --json prints, and nothing else."""
    before = tree(tmp_path)
    for option in ("", "--json"):
        more = ["--report", "sweep.json", "--plot", "sweep.svg", "--overwrite", option]
        code, stdout, stderr = in_process("sweep", "a run", *app.words(*filter(None, more)))
        assert code == 0, stderr
    document = json.loads(stdout)
    assert document.items() <= json.loads(Path("sweep.json").read_text()).items()
    assert Path("sweep.svg").read_bytes().startswith(b"<?xml")
    assert tree(tmp_path).keys() - before.keys() == {"sweep.json", "sweep.svg"}
    assert not {"--report", "--plot", "--overwrite", "--json", "--eval", "--minimize"} & set(document["command"])


@pytest.mark.parametrize(
    ("more", "exit_code", "says"),
    [
        (["--plot", "old.png"], 5, "--plot old.png: exists already."),
        (["--report", "old.json"], 5, "--report old.json: exists already, and is not a report of ckpt-avg. "),
        (["--report", "a run/step_2.json", "--overwrite"], 2, "is one of the checkpoints"),
        (["--plot", "a.png", "--report", "./a.png"], 2, "--report ./a.png: "),
        (["--plot", "sweep.jpg"], 2, "--plot sweep.jpg: expected a name that ends in .png or .svg or .pdf, "),
        (["--last", "1"], 4, "Name at least two to compare"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_faults_that_are_found_before_the_work(
    app: SweepApp, run: list[Path], in_process: InProcess, more: list[str], exit_code: int, says: str
) -> None:
    """If it failed, hours of work would be lost, or a file that someone needs."""
    run[1].rename("a run/step_2.json")
    sources = [run[0], "a run/step_2.json", *run[2:]]
    for name in ("old.png", "old.json"):
        Path(name).write_bytes(b"old")
    before = tree(Path())
    code, _, stderr = in_process("sweep", *sources, *app.words(*more, function="raises"))
    assert code == exit_code, stderr
    assert says in stderr
    assert "no test set" not in stderr, "the function was called"
    assert tree(Path()) == before


@pytest.mark.usefixtures("run")
def test_without_matplotlib(app: SweepApp, in_process: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before any work; without --plot nobody needs it."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find_spec(name, *more)
    )
    code, _, stderr = in_process("sweep", "a run", *app.words("--plot", "sweep.png", function="raises"))
    assert code == 2
    assert "pip install 'ckpt-avg[plot]'" in stderr
    assert "no test set" not in stderr
    assert in_process("sweep", "a run", *app.words("--last", "2"))[0] == 0


@pytest.mark.usefixtures("run")
def test_a_picture_that_cannot_be_drawn_does_not_lose_the_numbers(
    app: SweepApp, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep may have taken hours; whatever the drawing does, what was measured is printed or in the report."""
    monkeypatch.setattr("ckpt_avg.cli.plots._saved", lambda *_: 1 / 0)
    more = ["--plot", "sweep.png", "--report", "sweep.json", "--last", "2"]
    code, stdout, stderr = in_process("sweep", "a run", *app.words(*more))
    assert code == 5
    assert "to write it" in stdout
    assert "Error: --plot: matplotlib could not draw it: ZeroDivisionError" in stderr
    assert "command" in json.loads(Path("sweep.json").read_text())
    assert not Path("sweep.png").exists()
    code, stdout, _ = in_process("sweep", "a run", *app.words(*more, "--json", "--overwrite"))
    assert code == 5
    document = json.loads(stdout)
    assert document["error"]["exit_code"] == 5
    assert document["command"][0] == "ckpt-avg"


@pytest.mark.usefixtures("run")
def test_a_failing_function_has_its_exit_code(app: SweepApp, in_process: InProcess) -> None:
    code, stdout, _ = in_process("sweep", "a run", *app.words("--json", function="raises"))
    assert code == json.loads(stdout)["error"]["exit_code"] == 7


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        ("--model", "--eval needs a model. Add --model MODULE:FACTORY."),
        ("--eval", "--eval is missing. Add --eval MODULE:FUNCTION to measure each average."),
        ("--data", "Add --data MODULE:FACTORY, or --bn keep to average them."),
    ],
)
def test_what_is_missing(app: SweepApp, in_process: InProcess, missing: str, advice: str) -> None:
    words = app.words()
    at = words.index(missing)
    code, _, stderr = in_process("sweep", "a run", *words[:at], *words[at + 2 :])
    assert code == 2
    assert advice in stderr


# ---------------------------------------------------------------------------------------------------------------------
# The real run


@pytest.mark.slow
def test_the_real_run(
    run_folder: Path, train: Any, in_process: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digits: the printed command makes the file whose loss the sweep found to be the lowest."""
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = in_process(
        "sweep", run_folder, "--last", "3", "--model", "train:make_model", "--data", "train:train_loader",
        "--bn-batches", "3", "--app-dir", run_folder, "--device", "cpu", "--eval", "train:evaluate",
        "--minimize", "loss", "--json",
    )  # fmt: skip
    assert code == 0, stderr
    document = json.loads(stdout)
    assert [(each["side"], each["size"]) for each in document["windows"]] == [
        ("last", 1), ("last", 2), ("last", 3), ("first", 1), ("first", 2)
    ]  # fmt: skip
    code, _, stderr = in_process(*document["command"][1:])
    assert code == 0, stderr
    model = train.make_model()
    model.load_state_dict(load_file("swa.safetensors"))
    assert train.evaluate(model) == document["best"]["metrics"]
    model.load_state_dict(torch.load(run_folder / "epoch_20.pt", weights_only=False)["model"])
    assert train.evaluate(model) == document["last"]["metrics"]
