"""Averages with unequal weights, as the whole command makes them: bytes, bounds, tables, metadata, verification."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from commands.test_publish import same_bytes
from commands.test_verify import seal
from commands.user_modules import data, make, of_file, score, trained
from formats.test_sharded import write
from mean.inputs import bits, every_dtype, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from system.faults.exact import BFLOAT16, FLOAT8, FLOAT16, FLOAT32, FLOAT64, Format

from ckpt_avg import IncompatibleError, UsageError, VerificationError, average, inspect, verify
from ckpt_avg.engine import kernel
from ckpt_avg.errors import NonFiniteError
from ckpt_avg.mean.weight_formulas import decay_weights, ema_weights, exponent_of, power_weights
from ckpt_avg.progress import Progress

Run = Callable[..., tuple[int, str, str]]
WEIGHTS = [0.5, 0.207, 0.159, 0.134]
FORMATS: dict[str, Format] = {str(each.dtype): each for each in (FLOAT64, FLOAT32, BFLOAT16, FLOAT16, *FLOAT8)}
FORMATS = {name: each for name, each in FORMATS.items() if "fnuz" not in name}


@pytest.fixture
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and kernel() is None:
        pytest.skip("the native engine was not built here")
    monkeypatch.setenv("CKPT_AVG_ENGINE", request.param)
    return str(request.param)


each_engine = pytest.mark.parametrize("engine", ["native", "torch"], indirect=True)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 100, 200, 300, 1000 and 1100 of a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (100, 200, 300, 1000, 1100):
        values = torch.Generator().manual_seed(step)
        torch.save({"model": {"w": torch.randn(50, generator=values)}, "global_step": step}, folder / f"step_{step}.pt")
    return folder


def written(source: Any, folder: Path, **options: Any) -> tuple[torch.Tensor, list[float]]:
    """The tensor ``w`` of an average, and the weights that its metadata records."""
    result = average(source, folder / "out.safetensors", overwrite=True, **options)
    recorded = [each["weight"] for each in json.loads(metadata(result.output)["ckpt_avg.sources"])]
    assert recorded == list(result.weights or ())
    return load_file(result.output)["w"], recorded


# -- Bytes and bounds -------------------------------------------------------------------------------------------------


def parts(values: torch.Tensor) -> torch.Tensor:
    """The real numbers of a tensor."""
    return torch.view_as_real(values).reshape(-1) if values.is_complex() else values.reshape(-1)


def assert_is_the_weighted_sum(got: torch.Tensor, inputs: Sequence[torch.Tensor], weights: Sequence[float]) -> None:
    """Each element is the float64 sum of rounded products, in order, rounded once: bit for bit, and near the exact sum.

    The bound: each product and each addition is off by 2⁻⁵³ of itself, and a product below the normal numbers by half
    of the smallest subnormal number.
    """
    fmt = next(each for each in FORMATS.values() if each.dtype == parts(got).dtype)
    columns = list(zip(*(parts(values).double().tolist() for values in inputs), strict=True))
    codes = fmt.codes(parts(got))
    assert len(codes) == len(columns) > 0
    error = len(weights) * Fraction(2) ** -53 / (1 - len(weights) * Fraction(2) ** -53)
    for code, column in zip(codes, columns, strict=True):
        total = weights[0] * column[0]
        for weight, value in zip(weights[1:], column[1:], strict=True):
            total += weight * value
        units = Fraction(total) / fmt.unit
        negative = math.copysign(1, total) < 0
        assert code == fmt.nearest(units.numerator, units.denominator, negative_zero=negative)
        terms = [Fraction(weight) * Fraction(value) for weight, value in zip(weights, column, strict=True)]
        bound = error * sum(map(abs, terms)) + len(weights) * Fraction(2) ** -1075
        assert abs(Fraction(total) - sum(terms)) <= bound


@pytest.mark.guarantee("weighted")
@each_engine
@pytest.mark.parametrize("weights", [WEIGHTS, [0.25, 0.0, 0.6, 0.15], [1.25, -0.5, 0.375, -0.125]], ids=str)
def test_every_dtype_is_the_weighted_sum_in_float64_rounded_once(
    tmp_path: Path, engine: str, weights: list[float]
) -> None:
    states = every_dtype(4, 400)
    if min(weights) < 0:  # so that no result is out of range
        states = [{name: value / 8 if value.is_floating_point() and value.element_size() > 1 else value
                   for name, value in state.items() if "float8" not in name} for state in states]  # fmt: skip
    result = average(save(tmp_path, states), tmp_path / "out.safetensors", weights=weights)
    assert (result.engine, result.weights) == (engine, tuple(weights))
    found = load_file(result.output)
    used = [index for index, weight in enumerate(weights) if weight]
    for name, value in states[0].items():
        if name == "integers":
            assert torch.equal(found[name], value)
        else:
            inputs = [states[index][name] for index in used]
            assert_is_the_weighted_sum(found[name], inputs, [weights[index] for index in used])


@each_engine
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_another_dtype_of_the_output(tmp_path: Path, engine: str, dtype: str) -> None:
    states = [{"a": torch.randn(300), "b": torch.randn(300, dtype=torch.float64), "c": torch.randn(300).half()}
              for _ in range(4)]  # fmt: skip
    average(save(tmp_path, states), tmp_path / "out.safetensors", weights=WEIGHTS, dtype=dtype)
    for name, value in load_file(tmp_path / "out.safetensors").items():
        assert value.dtype == getattr(torch, dtype)
        assert_is_the_weighted_sum(value, [state[name] for state in states], WEIGHTS)


@each_engine
def test_strided_and_sharded_tensors(tmp_path: Path, engine: str) -> None:
    """Elements that are not consecutive in their file are gathered first."""
    states = [{"a": torch.randn(37, 53), "b": torch.randn(4, 3, 5, 5)} for _ in range(4)]
    folders = []
    for index, state in enumerate(states):
        folders.append(tmp_path / f"checkpoint-{index}")
        if index % 2:
            write(folders[-1], {"a": state["a"].t().contiguous().t()}, {"b": state["b"]}, suffix="bin",
                  stem="pytorch_model")  # fmt: skip
        else:
            write(folders[-1], {"b": state["b"]}, {"a": state["a"]})
    average(folders, tmp_path / "out.safetensors", weights=WEIGHTS)
    for name, value in load_file(tmp_path / "out.safetensors").items():
        assert_is_the_weighted_sum(value, [state[name] for state in states], WEIGHTS)


@each_engine
@pytest.mark.parametrize("memory", [2**20, 128 * 2**20])
def test_threads_and_memory_change_no_byte(tmp_path: Path, engine: str, memory: int) -> None:
    states = [{"w": torch.randn(700_003), "v": torch.randn(300).double()} for _ in range(3)]
    paths = save(tmp_path, states)
    options: dict[str, Any] = {"weights": [0.7, 0.2, 0.1]}
    one = average(paths, tmp_path / "one.safetensors", threads=1, **options)
    many = average(paths, tmp_path / "many.safetensors", threads=5, memory=memory, io="pread", **options)
    assert one.output.read_bytes() == many.output.read_bytes()
    expected = 0.7 * states[0]["w"].double() + 0.2 * states[1]["w"].double() + 0.1 * states[2]["w"].double()
    assert bits(load_file(one.output)["w"]) == bits(expected.float())


@pytest.mark.guarantee("weighted")
@each_engine
@pytest.mark.parametrize(
    "options",
    [
        {"weights": [1 / 3] * 3},
        {"weights": "1,1,1", "normalize": True},
        {"weights": {"step_300.pt": 2, "step_200.pt": 2, "step_100.pt": 2}, "normalize": True},
        {"weighting": "linear"},
        {"weighting": "cosine", "last": 1},
    ],
    ids=str,
)
def test_equal_weights_write_the_file_of_the_mean(run: Path, tmp_path: Path, engine: str, options: Any) -> None:
    average(run, tmp_path / "mean.safetensors", to_step=300, last=options.get("last"))
    average(run, tmp_path / "out.safetensors", to_step=300, **options)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "mean.safetensors").read_bytes()


def test_weights_on_many_ranks_write_the_same_bytes(tmp_path: Path) -> None:
    paths = save(tmp_path, [{"a": torch.randn(300, 211), "b": torch.randn(90_001)} for _ in range(3)])
    same_bytes(tmp_path, paths, (2, 5), weights=[0.5, 0.75, -0.25])
    same_bytes(tmp_path, paths, (3,), weighting="minus-sqrt")


# -- Rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weighting": "minus-sqrt"}, decay_weights([100, 200, 300, 1000, 1100], "minus-sqrt")),
        ({"weighting": "minus-sqrt", "weighting_by": "index"}, decay_weights(range(5), "minus-sqrt")),
        ({"weighting": "cosine", "last": 3}, decay_weights([300, 1000, 1100], "cosine")),
        ({"weighting": "linear"}, [0.1 / 1.1, 0.1 / 1.1, 0.7 / 1.1, 0.1 / 1.1, 0.1 / 1.1]),
        ({"weighting": "ema", "half_life": 100}, ema_weights([100, 200, 300, 1000, 1100], 100)),
        ({"weighting": "ema", "half_life": "25%"}, ema_weights([100, 200, 300, 1000, 1100], 250)),
        ({"weighting": "ema", "half_life": "50%", "last": 2}, ema_weights([1000, 1100], 50)),
        ({"weighting": "power", "width": 0.1}, power_weights([100, 200, 300, 1000, 1100], exponent_of(0.1))),
        ({"weighting": "power", "width": 0.1, "last": 3}, power_weights([300, 1000, 1100], exponent_of(0.1), 200)),
        ({"weighting": "power", "width": 0.1, "every": 2}, power_weights([100, 300, 1100], exponent_of(0.1))),
        (
            {"weighting": "power", "width": 0.1, "every": 2, "last": 2},
            power_weights([300, 1100], exponent_of(0.1), 200),
        ),
        (
            {"weighting": "power", "width": 0.1, "weighting_by": "index", "last": 3},
            power_weights([3, 4, 5], exponent_of(0.1), 2),
        ),
    ],
    ids=str,
)
def test_rules_on_a_run(run: Path, tmp_path: Path, options: dict[str, Any], expected: list[float]) -> None:
    """``power`` begins at the step of the checkpoint before the window in the run, at 0 if there is none."""
    found, weights = written(run, tmp_path, **options)
    assert weights == pytest.approx(expected, rel=1e-14)
    paths = average(run, tmp_path / "dry.safetensors", dry_run=True, **options).checkpoints
    inputs = [torch.load(path)["model"]["w"] for path in paths]
    assert_is_the_weighted_sum(found, inputs, weights)


def test_power_begins_at_a_lower_step_than_that_of_the_first(run: Path, tmp_path: Path) -> None:
    """Two checkpoints of one step: between them there are no steps that one could count for."""
    torch.save({"model": {"w": torch.ones(50)}, "global_step": 1000}, run / "again_1000.pt")
    first = average(run, tmp_path / "dry.safetensors", last=2, dry_run=True)
    assert first.steps == (1000, 1100)
    _, weights = written(run, tmp_path, last=2, weighting="power", width=0.1)
    assert weights == power_weights([1000, 1100], exponent_of(0.1), 300)


def test_steps_that_folders_record(tmp_path: Path) -> None:
    """As everywhere: the steps of checkpoint-100/unet and checkpoint-900/unet are those of their folders."""
    for step in (100, 200, 900):
        write(tmp_path / f"checkpoint-{step}", {"w": torch.ones(2)})
    paths = [tmp_path / f"checkpoint-{step}" for step in (900, 100, 200)]
    _, weights = written(paths, tmp_path, weighting="minus-sqrt")
    assert weights == decay_weights([100, 200, 900], "minus-sqrt")


def test_listed_weights_follow_the_checkpoints_as_listed(run: Path, tmp_path: Path) -> None:
    """If they followed the steps, the user would get the opposite of what was written."""
    paths = [run / "step_1000.pt", run / "step_100.pt"]
    found, weights = written(paths, tmp_path, weights=[0.9, 0.1])
    old, new = (torch.load(path)["model"]["w"] for path in reversed(paths))
    assert weights == [0.1, 0.9]
    assert_is_the_weighted_sum(found, [old, new], [0.1, 0.9])
    found, _ = written(paths, tmp_path, weights=[0.9, 0.1], keep_order=True)
    assert_is_the_weighted_sum(found, [new, old], [0.9, 0.1])


def test_a_copy_takes_no_weight_and_this_is_said(run: Path, tmp_path: Path) -> None:
    """Before the number of weights is refused: the user counts the files."""
    shutil.copy(run / "step_300.pt", run / "step_300_again.pt")
    said: list[str] = []
    with pytest.raises(UsageError, match="expected 5 weights"):
        average(run, tmp_path / "out.safetensors", weights=[0.1] * 4 + [0.3] * 2, progress=Progress(notice=said.append))
    assert said[0].startswith("--weights: no weight belongs to step_300_again.pt: skipped")


def test_power_is_near_the_average_that_training_kept(tmp_path: Path) -> None:
    """A toy run: the closer its raw checkpoints, the nearer is the average after training to the one kept during it."""
    steps, gamma = 512, exponent_of(0.15)
    values = torch.Generator().manual_seed(0)
    weight, target, kept = (
        torch.zeros(64).double(),
        torch.randn(64, generator=values).double(),
        torch.zeros(64).double(),
    )
    folder = tmp_path / "run"
    folder.mkdir()
    for step in range(1, steps + 1):
        weight += 0.02 * (target - weight) + 0.002 * torch.randn(64, generator=values)
        beta = (1 - 1 / step) ** (gamma + 1)
        kept = beta * kept + (1 - beta) * weight
        if step % 4 == 0:
            torch.save({"w": weight}, folder / f"step_{step}.pt")
    errors = []
    for every in (32, 16, 4, 1):
        found, _ = written(folder, tmp_path, weighting="power", width=0.15, every=every)
        errors.append((found - kept).norm().item() / kept.norm().item())
    assert all(later < 0.75 * earlier for earlier, later in itertools.pairwise(errors)), errors
    plain = average(folder, tmp_path / "mean.safetensors").output
    assert 20 * errors[-1] < (load_file(plain)["w"] - kept).norm().item() / kept.norm().item()


# -- Weights of 0 and below -------------------------------------------------------------------------------------------


@each_engine
def test_a_checkpoint_of_weight_0_is_checked_but_not_summed(run: Path, tmp_path: Path, engine: str) -> None:
    names = ["step_100.pt", "step_200.pt", "step_300.pt"]
    paths = [run / name for name in names]
    found, weights = written(paths, tmp_path, weights=[0.5, 0.0, 0.5])
    average([paths[0], paths[2]], tmp_path / "two.safetensors")
    assert bits(found) == bits(load_file(tmp_path / "two.safetensors")["w"])  # the sum is divided
    assert weights == [0.5, 0.0, 0.5]
    verify(tmp_path / "out.safetensors", sources=[run])
    torch.save({"model": {"w": torch.full((50,), math.nan)}, "global_step": 200}, paths[1])
    assert torch.equal(written(paths, tmp_path, weights=[0.5, 0.0, 0.5])[0], found)
    torch.save({"model": {"w": torch.ones(51)}, "global_step": 200}, paths[1])
    with pytest.raises(IncompatibleError, match="w"):
        written(paths, tmp_path, weights=[0.5, 0.0, 0.5])


@each_engine
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_negative_weights_that_leave_the_range_are_refused(tmp_path: Path, engine: str, dtype: torch.dtype) -> None:
    """Also if the output has the dtype of the inputs, which holds every mean of positive weights."""
    top = torch.full((5,), torch.finfo(dtype).max)
    paths = save(tmp_path, [{"w": top.to(dtype)}, {"w": (-top).to(dtype)}])
    with pytest.raises(NonFiniteError, match="'w'"):
        average(paths, tmp_path / "out.safetensors", weights=[1.5, -0.5])


NEGATIVE: dict[str, Any] = {"weights": [-1.0, 0.5, 1.5], "device": "cpu"}


@pytest.fixture
def trained_run(tmp_path: Path) -> list[Path]:
    return save(tmp_path, [trained(seed) for seed in range(3)], ".pt")


def test_running_variances_are_never_averaged_with_negative_weights(trained_run: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    with pytest.raises(UsageError) as caught:
        average(trained_run, output, bn="keep", **NEGATIVE)
    assert str(caught.value) == (
        "--weights: with negative ones, running variances might become negative: '1.running_var', '6.running_var'. Add "
        "--model and --data to recompute those of BatchNorm, or use weights of 0 and above."
    )
    other = save(tmp_path, [{"evonorm.running_var": torch.rand(3)} for _ in range(3)])
    with pytest.raises(UsageError, match=r"'evonorm\.running_var'"):
        average(other, output, **NEGATIVE)
    assert not output.exists()
    result = average(trained_run, output, model=make, data=data, evaluate=score, **NEGATIVE)
    assert result.statistics == "refreshed"
    assert all((value >= 0).all() for name, value in load_file(output).items() if name.endswith("running_var"))


def test_frozen_statistics_stay_with_negative_weights(tmp_path: Path) -> None:
    """As the buffers of torch's AveragedModel, which are the same in each."""
    states = [trained(seed) for seed in range(3)]
    states = [
        {name: states[0][name] if "running" in name or "num_b" in name else value for name, value in state.items()}
        for state in states
    ]
    result = average(save(tmp_path, states, ".pt"), tmp_path / "out.safetensors", **NEGATIVE)
    assert result.statistics == "frozen"
    found = load_file(result.output)
    assert all(torch.equal(found[name], value) for name, value in states[0].items() if "running" in name)


# -- BatchNorm --------------------------------------------------------------------------------------------------------


def test_batch_norm_is_averaged_with_the_weights_or_measured_again(trained_run: list[Path], tmp_path: Path) -> None:
    weights = [0.2, 0.3, 0.5]
    kept = average(trained_run, tmp_path / "kept.safetensors", weights=weights, bn="keep")
    states = [torch.load(path) for path in trained_run]
    for name, value in load_file(kept.output).items():
        if value.is_floating_point():
            assert_is_the_weighted_sum(value, [state[name] for state in states], weights)
        else:
            assert torch.equal(value, states[-1][name])
    refreshed = average(
        trained_run, tmp_path / "new.safetensors", weights=weights, model=make, data=data, evaluate=score, device="cpu"
    )
    assert refreshed.evaluations[-1].metrics == of_file(refreshed.output)
    model = make()
    model.load_state_dict(load_file(kept.output))
    pooled = torch.cat([model[0](batch).transpose(0, 1).reshape(4, -1) for batch in data()], dim=1)
    torch.testing.assert_close(load_file(refreshed.output)["1.running_mean"], pooled.mean(dim=1), rtol=1e-5, atol=1e-6)


# -- Provenance and verification --------------------------------------------------------------------------------------


def test_the_metadata_record_the_weights_and_how_they_were_made(run: Path, tmp_path: Path) -> None:
    _, weights = written(run, tmp_path, weighting="ema", half_life="25%")
    recorded = metadata(tmp_path / "out.safetensors")
    assert recorded["ckpt_avg.method"] == "weighted mean"
    assert json.loads(recorded["ckpt_avg.weighting"]) == {"weighting": "ema", "by": "step", "half_life": "25%"}
    again = average(run, tmp_path / "again.safetensors", weights=weights)
    assert load_file(again.output)["w"].equal(load_file(tmp_path / "out.safetensors")["w"])  # printed weights make it
    assert json.loads(metadata(again.output)["ckpt_avg.weighting"]) == {"weighting": "listed"}
    average(run, tmp_path / "mean.safetensors")
    assert "ckpt_avg.weighting" not in metadata(tmp_path / "mean.safetensors")
    found = inspect(tmp_path / "out.safetensors").checkpoint
    assert found is not None
    assert found.averaged == "ckpt-avg made it"


@each_engine
@pytest.mark.parametrize(
    "options",
    [{"weighting": "minus-sqrt"}, {"weights": [0.5, 0.0, 0.7, -0.2, 0.0]}, {"weights": [0.5, 0, 0.5, 0, 0]}],
    ids=str,
)
def test_an_average_with_weights_verifies(run: Path, tmp_path: Path, engine: str, options: dict[str, Any]) -> None:
    result = average(run, tmp_path / "out.safetensors", **options)
    report = verify(result.output, sources=[run])
    assert (report.checkpoints, report.weights) == (result.checkpoints, result.weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sources: sources[0].update(weight=0.51), "not the mean of these checkpoints: it differs at index"),
        (lambda sources: [each.pop("weight") for each in sources], "not the mean of these checkpoints: it differs at"),
        (lambda sources: sources[0].pop("weight"), "expected its sources and options in its metadata, got none that"),
        (lambda sources: sources[0].update(weight=True), "expected its sources and options in its metadata"),
        (lambda sources: sources[0].update(weight="1"), "expected its sources and options in its metadata"),
        (lambda sources: sources[0].update(weight=math.nan), "expected its sources and options in its metadata"),
        (lambda sources: [each.update(weight=0.0) for each in sources], "expected its sources and options in its meta"),
    ],
)
def test_other_weights_do_not_verify(
    run: Path, tmp_path: Path, change: Callable[[list[dict[str, Any]]], Any], message: str
) -> None:
    output = average(run, tmp_path / "out.safetensors", weighting="minus-sqrt").output
    recorded = metadata(output)
    sources = json.loads(recorded["ckpt_avg.sources"])
    change(sources)
    seal(output, {**recorded, "ckpt_avg.sources": json.dumps(sources)})
    verify(output)
    with pytest.raises(VerificationError, match=message):
        verify(output, sources=[run])


# -- What is printed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_the_weights_are_printed(run: Path, tmp_path: Path, in_process: Run, dry_run: list[str]) -> None:
    output = tmp_path / "out.safetensors"
    words = ["average", run, "--weights", "0.5,0.25,0.125,0.125,0", *dry_run, "-o", output]
    code, out, err = in_process(*words)
    assert (code, err) == (0, "")
    assert out.splitlines()[1:7] == [
        "checkpoint    step  weight",
        "step_100.pt   100   0.5",
        "step_200.pt   200   0.25",
        "step_300.pt   300   0.125",
        "step_1000.pt  1000  0.125",
        "step_1100.pt  1100  0",
    ]
    code, out, _ = in_process(*words, "--json", "--overwrite")
    document = json.loads(out)
    assert code == 0
    assert document["steps"] == [100, 200, 300, 1000, 1100]
    assert document["weights"] == [0.5, 0.25, 0.125, 0.125, 0.0]
    if not dry_run:
        assert "it is the weighted mean of 5 checkpoints" in in_process("verify", output, "--sources", run)[1]


def test_equal_weights_are_not_printed(run: Path, tmp_path: Path, in_process: Run) -> None:
    words = ["average", run, "--dry-run", "-o", tmp_path / "out.safetensors"]
    assert "checkpoint  " not in in_process(*words)[1]
    assert json.loads(in_process(*words, "--json")[1])["weights"] is None


def test_the_table_is_at_most_80_columns_wide(tmp_path: Path, in_process: Run) -> None:
    paths = []
    for step in (1, 20_000_000):
        paths.append(tmp_path / f"{'a_very_long_name_of_a_checkpoint' * 5}_step_{step}.safetensors")
        save_file({"w": torch.ones(1)}, paths[-1])
    out = in_process("average", *paths, "--weights", "1e-7,0.9999999", "--dry-run", "-o", tmp_path / "o.safetensors")[1]
    lines = out.splitlines()[1:4]
    assert max(map(len, lines)) <= 80
    assert all("…" in line for line in lines[1:])
    assert lines[2].endswith("step_20000000.safetensors  20000000  1")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--weights", "0.5,0.5"], 2, "expected 5 weights, one for each of step_100.pt, step_200.pt, …, step_1100.pt"),
        (["--weights", "1,1,1,1,1"], 2, "5 weights with the sum 5, not 1. Add --normalize to divide by it."),
        (["--weights", "0,0,0,0,0"], 2, "all weights are 0."),
        (["--weights", "nan,0,0,0,1"], 2, "nan is no weight."),
        (["--weights", "no.json"], 2, "--weights 'no.json': cannot be read: No such file"),
        (["--weighting", "ema"], 2, "--weighting ema needs --half-life."),
        (["--weighting", "power", "--width", "0.3"], 2, "--width 0.3: no power has this width."),
        (["--weighting", "power", "--width", "wide"], 2, "'wide' is not a number. Write for example"),
        (["--weighting", "ema", "--half-life", "100", "--weighting-by", "index"], 2, "uses none. Use a percentage"),
    ],
    ids=str,
)
def test_faults_are_found_before_the_work(
    run: Path, tmp_path: Path, in_process: Run, words: list[str], code: int, message: str
) -> None:
    found, out, err = in_process("average", run, *words, "-o", tmp_path / "out.safetensors")
    assert (found, out) == (code, "")
    assert message in err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_run_that_records_epochs(run_folder: Path, tmp_path: Path, in_process: Run) -> None:
    """Epochs stand in for steps, as for --from-step; but a half-life in steps is none in epochs."""
    words = ["average", run_folder, "--bn", "keep", "--last", "3", "--overwrite", "-o", tmp_path / "out.safetensors"]
    code, _, err = in_process(*words, "--weighting", "ema", "--half-life", "1000")
    assert code == 4
    assert "--half-life 1000 counts steps, and the checkpoints record only epochs: epoch_18.pt, epoch_19.pt, " in err
    code, out, err = in_process(*words, "--weighting", "ema", "--half-life", "50%")
    assert code == 0
    assert out.splitlines()[1] == "checkpoint   epoch  weight"
    assert out.splitlines()[4] == "epoch_20.pt  20     0.571429"
    assert "--weighting ema: the run records no steps, so its epochs are used" in err
    in_process(*words, "--weighting", "power", "--width", "0.1")
    recorded = metadata(tmp_path / "out.safetensors")
    assert json.loads(recorded["ckpt_avg.weighting"]) == {"weighting": "power", "by": "epoch", "width": "0.1"}
    weights = [each["weight"] for each in json.loads(recorded["ckpt_avg.sources"])]
    assert weights == power_weights([18, 19, 20], exponent_of(0.1), 17)


def test_a_half_life_without_steps(tmp_path: Path, in_process: Run) -> None:
    paths = save(tmp_path, [{"w": torch.ones(2) * each} for each in range(2)])
    paths = [path.rename(path.with_name(f"{name}.safetensors")) for path, name in zip(paths, "ab", strict=True)]
    words = ["average", *paths, "-o", tmp_path / "out.safetensors", "--weighting", "ema"]
    code, _, err = in_process(*words, "--half-life", "1000")
    assert code == 4
    assert "and not every checkpoint records one: a.safetensors, b.safetensors. Use a percentage" in err
    code, out, err = in_process(*words, "--half-life", "100%")
    assert code == 0
    assert "a.safetensors  0.333333" in out
    assert "not every checkpoint records a step or an epoch, so they are taken as evenly spaced" in err


def test_epochs_that_are_counted_from_0_end_one_later(tmp_path: Path) -> None:
    """Otherwise the first would have no weight: nothing is trained at 0."""
    folder = tmp_path / "run"
    folder.mkdir()
    for epoch in range(3):
        torch.save({"model": {"w": torch.full((2,), float(epoch))}, "epoch": epoch}, folder / f"epoch_{epoch}.pt")
    _, weights = written(folder, tmp_path, weighting="power", width=0.2)
    assert weights == power_weights([1, 2, 3], exponent_of(0.2))
    _, weights = written(folder, tmp_path, weighting="power", width=0.2, last=2)
    assert weights == power_weights([2, 3], exponent_of(0.2), 1)


def test_two_checkpoints_of_one_step(run: Path, tmp_path: Path, in_process: Run) -> None:
    torch.save({"model": {"w": torch.ones(50)}, "global_step": 200}, tmp_path / "other_200.pt")
    code, _, err = in_process("average", run / "step_100.pt", run / "step_200.pt", tmp_path / "other_200.pt",
                              "--weighting", "minus-sqrt", "-o", tmp_path / "out.safetensors")  # fmt: skip
    assert code == 4
    assert "expected steps that increase" in err
