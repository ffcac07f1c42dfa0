"""The mean, through the public `average`, against exact arithmetic."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mean.inputs import State, any_bits, awkward_inputs, bits, digest, mixed_run, save, ties
from recorded import Recorded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from system.faults.exact import BFLOAT16, FLOAT8, FLOAT16, FLOAT32, FLOAT64, Format, beyond_float64_error, exact_mean

from ckpt_avg import IncompatibleError, NonFiniteError, UsageError, average, verify
from ckpt_avg.mean.arithmetic import mean_of_float64, round_to

MiB = 2**20


def mean_of(
    folder: Path, states: Sequence[State], suffix: str = ".safetensors", **options: Any
) -> dict[str, torch.Tensor]:
    """The output's tensors for an average of states."""
    average(save(folder, states, suffix), folder / "mean.safetensors", overwrite=True, **options)
    return load_file(folder / "mean.safetensors")


# -- Exactness ------------------------------------------------------------------------------------------------------


@functools.cache
def awkward_case(number: int, fmt: Format) -> tuple[list[torch.Tensor], list[int]]:
    inputs = awkward_inputs(number, fmt)
    return inputs, exact_mean(inputs, fmt)


TOP = 1.7976931348623157e308
cases = pytest.mark.parametrize("number", [2, 3, 8, 100])
narrow = pytest.mark.parametrize("fmt", [FLOAT32, BFLOAT16, FLOAT16], ids=lambda fmt: str(fmt.dtype))


@pytest.mark.guarantee("accurate", "extreme-values", "float8")
@cases
@narrow
def test_each_element_is_the_exact_mean_rounded_once(tmp_path: Path, number: int, fmt: Format) -> None:
    inputs, expected = awkward_case(number, fmt)
    got = fmt.codes(mean_of(tmp_path, [{"w": values} for values in inputs])["w"])
    assert len(got) >= 4_000  # 48,000 over the cases
    wrong = [index for index, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]]
    assert not wrong, f"{len(wrong)} differ, the first at {wrong[0]}: {[values[wrong[0]].item() for values in inputs]}"


@pytest.mark.guarantee("accurate")
@pytest.mark.parametrize(
    ("wrong", "number", "fmt"),
    [
        ("sum in the inputs' dtype", 8, FLOAT32),
        ("sum in the inputs' dtype", 3, FLOAT16),
        ("sum in float32", 100, BFLOAT16),
        ("sum in float32", 100, FLOAT16),
        ("rounded twice", 3, BFLOAT16),
        ("rounded twice", 100, FLOAT16),
        ("scaled before the sum", 3, FLOAT32),
    ],
)
def test_the_cases_catch_a_mean_that_is_nearly_right(wrong: str, number: int, fmt: Format) -> None:
    """A control of the test above: each usual shortcut gets some of its elements wrong."""
    inputs, expected = awkward_case(number, fmt)
    wide = torch.stack(inputs).double()
    if wrong == "sum in the inputs' dtype":
        total = sum(inputs[1:], inputs[0])
        mean = (total / number).double()
    elif wrong == "sum in float32":
        mean = (sum((values.float() for values in inputs[1:]), inputs[0].float()) / number).double()
    elif wrong == "scaled before the sum":
        mean = sum((values / number for values in wide[1:]), wide[0] / number)
    else:
        mean = wide.sum(0) / number
    rounded = mean.float().to(fmt.dtype) if wrong == "rounded twice" else _round_once(mean, fmt)
    assert fmt.codes(rounded) != expected


def _round_once(mean: torch.Tensor, fmt: Format) -> torch.Tensor:
    return fmt.values([fmt.infinity if math.isinf(value) else fmt.nearest_to(value) for value in mean.tolist()])


@pytest.mark.parametrize("number", [49, 98, 103])
@narrow
def test_the_division_is_a_true_one(tmp_path: Path, number: int, fmt: Format) -> None:
    """For these numbers n · (1/n) is not 1, so that multiplying by the reciprocal shows."""
    assert number * (1 / number) != 1
    rows = ties(number, fmt, 500, np.random.default_rng(number))
    inputs = [torch.from_numpy(row).to(fmt.dtype) for row in rows]
    states = [{"w": values} for values in inputs]
    assert fmt.codes(mean_of(tmp_path, states)["w"]) == exact_mean(inputs, fmt)
    assert FLOAT64.codes(mean_of(tmp_path, states, dtype="float64")["w"]) == exact_mean(inputs, fmt, FLOAT64)
    control = torch.stack(inputs).double().sum(0) * (1 / number)
    assert FLOAT64.codes(control) != exact_mean(inputs, fmt, FLOAT64)


@pytest.mark.guarantee("accurate")
@pytest.mark.parametrize("number", [3, 8, 100])
@narrow
def test_inputs_of_any_bits_stay_within_the_error_of_a_float64_sum(tmp_path: Path, number: int, fmt: Format) -> None:
    """Whatever the inputs: float64's error bound, then one correct rounding."""
    inputs = any_bits(fmt, number, 1_000, seed=-number % 1000)
    got = fmt.codes(mean_of(tmp_path, [{"w": values} for values in inputs])["w"])
    assert beyond_float64_error(got, inputs, fmt) == 0


def exact(column: Sequence[float]) -> float:
    """The mean, rounded once: Python converts a fraction to the nearest float, ties to even."""
    return float(sum(map(Fraction, column), Fraction(0)) / len(column))


def float64_inputs(kind: str, number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    size = (number, 300)
    if kind == "one magnitude":
        return rng.uniform(-1, 1, size)
    if kind == "many magnitudes":
        return np.ldexp(rng.uniform(-1, 1, size), rng.integers(-40, 40, size))
    if kind == "subnormal":
        return np.ldexp(rng.uniform(-1, 1, size), rng.integers(-1074, -1000, size))
    if kind == "ties":
        return rng.uniform(1, 2, 300) + rng.integers(-3, 4, size) * 2.0**-52
    if kind == "cancelling":
        values = rng.uniform(-1, 1, size)
        values[-1] = -values[:-1].sum(0)
        return values
    return rng.choice([TOP, -TOP, math.nextafter(TOP, 0), TOP * 0.999, TOP / 3, 1.0], size)


FLOAT64_KINDS = ["one magnitude", "many magnitudes", "subnormal", "ties", "cancelling", "largest"]


@pytest.mark.guarantee("accurate", "extreme-values")
@cases
@pytest.mark.parametrize("kind", FLOAT64_KINDS)
def test_float64_is_the_exact_mean_rounded_once(tmp_path: Path, number: int, kind: str) -> None:
    """Whatever additions lose, whether sums overflow, and also where the output is narrower."""
    rows = float64_inputs(kind, number)
    states = [{"w": torch.from_numpy(row)} for row in rows]
    assert mean_of(tmp_path, states)["w"].tolist() == [exact(column) for column in rows.T.tolist()]
    if kind in ("many magnitudes", "ties"):
        inputs = [state["w"] for state in states]
        for fmt in (FLOAT32, BFLOAT16):
            got = mean_of(tmp_path, states, dtype=str(fmt.dtype).removeprefix("torch."))["w"]
            assert fmt.codes(got) == exact_mean(inputs, FLOAT64, fmt)


@pytest.mark.parametrize("kind", ["one magnitude", "many magnitudes", "ties"])
def test_the_float64_cases_catch_a_sum_that_is_nearly_right(kind: str) -> None:
    """A control of the test above: a plain sum, and Python's exact sum that is rounded before the division."""
    columns = float64_inputs(kind, 8 if kind == "ties" else 3).T.tolist()
    expected = [exact(column) for column in columns]
    assert [functools.reduce(float.__add__, column) / len(column) for column in columns] != expected
    if kind == "one magnitude":
        assert [math.fsum(column) / len(column) for column in columns] != expected


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("fmt", [FLOAT32, BFLOAT16], ids=lambda fmt: str(fmt.dtype))
def test_float64_means_next_to_a_midpoint_of_the_output_are_rounded_once(fmt: Format, sign: int) -> None:
    """A third of a step of float64 away from it: the nearest float64 is the midpoint itself."""
    for odd, step in itertools.product((1, 3), (2.0**-52, -(2.0**-52))):
        middle = sign * (1 + odd * 2.0 ** -(fmt.mantissa + 1))
        inputs = [torch.tensor([value], dtype=torch.float64) for value in (middle, middle, middle + step)]
        mean = mean_of_float64(inputs.__getitem__, torch.tensor(3.0, dtype=torch.float64), 3, is_narrowed=True)
        assert fmt.codes(round_to(mean, fmt.dtype)) == exact_mean(inputs, FLOAT64, fmt)


@given(
    rows=st.lists(
        st.lists(
            st.one_of(
                st.sampled_from([TOP, -TOP, math.nextafter(TOP, 0), TOP / 3, 1.0, 5e-324, -0.0, 2.0**-1022]),
                st.floats(allow_nan=False, allow_infinity=False),
            ),
            min_size=7,
            max_size=7,
        ),
        min_size=1,
        max_size=12,
    ),
    fmt=st.sampled_from([FLOAT64, FLOAT32, BFLOAT16]),
)
@settings(max_examples=200, deadline=None)
def test_any_float64_values_have_their_exact_mean(rows: list[list[float]], fmt: Format) -> None:
    inputs = [torch.tensor(row, dtype=torch.float64) for row in rows]
    count = torch.tensor(float(len(rows)), dtype=torch.float64)
    mean = mean_of_float64(inputs.__getitem__, count, len(inputs), is_narrowed=fmt is not FLOAT64)
    assert fmt.codes(round_to(mean, fmt.dtype)) == exact_mean(inputs, FLOAT64, fmt)


AWKWARD = {
    "float64": torch.tensor([0.1, -0.0, 5e-324, TOP, -1 / 3], dtype=torch.float64),
    "float32": torch.tensor([0.1, -0.0, 1e-45, 3.4028235e38, -1 / 3]),
    "bfloat16": torch.tensor([0.1, -0.0, 1e-40, 3.3e38, -1 / 3]).bfloat16(),
    "float16": torch.tensor([0.1, -0.0, 6e-8, 65504, -1 / 3]).half(),
    "complex64": torch.complex(torch.tensor([0.1, -0.0, 1e-45]), torch.tensor([-0.0, 3.4e38, 1 / 3])),
    **{
        str(fmt.dtype).removeprefix("torch."): torch.arange(fmt.largest + 1, dtype=torch.uint8).view(fmt.dtype)
        for fmt in FLOAT8
    },
    "bool": torch.tensor([True, False]),
    "uint64": torch.tensor([2**64 - 1, 0], dtype=torch.uint64),
    "int64": torch.tensor([-(2**63), 2**53 + 1]),
    "uint8": torch.arange(256, dtype=torch.int64).to(torch.uint8),
    "int8": torch.tensor([-128, 127], dtype=torch.int8),
    "exponents": torch.arange(256, dtype=torch.int64).to(torch.uint8).view(torch.float8_e8m0fnu),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(0.3),
}


@pytest.mark.guarantee("equal-inputs")
@pytest.mark.parametrize("number", [1, 2, 3, 10])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_equal_inputs_come_out_bit_for_bit(tmp_path: Path, number: int, suffix: str) -> None:
    """Of every dtype; ten times 0.1 too, whose float64 sum divided by ten is not 0.1."""
    assert sum([0.1] * 10) / 10 != 0.1
    got = mean_of(tmp_path, [AWKWARD] * number, suffix)
    assert got.keys() == AWKWARD.keys()
    for name, values in AWKWARD.items():
        assert (got[name].dtype, got[name].shape, bits(got[name])) == (values.dtype, values.shape, bits(values)), name


@pytest.mark.guarantee("complex")
def test_complex64_is_averaged_as_two_planes(tmp_path: Path) -> None:
    planes = awkward_case(3, FLOAT32)[0]
    inputs = [torch.complex(plane, plane.flip(0)) for plane in planes]
    got = torch.view_as_real(mean_of(tmp_path, [{"w": values} for values in inputs])["w"])
    for plane in (0, 1):
        expected = exact_mean([torch.view_as_real(values)[:, plane].contiguous() for values in inputs], FLOAT32)
        assert FLOAT32.codes(got[:, plane].contiguous()) == expected


@pytest.mark.guarantee("float8")
@pytest.mark.parametrize("fmt", FLOAT8, ids=lambda fmt: str(fmt.dtype))
@pytest.mark.parametrize("number", [2, 3, 7])
def test_float8_without_scales_is_the_exact_mean_rounded_once(tmp_path: Path, fmt: Format, number: int) -> None:
    inputs = any_bits(fmt, number, 2_000, seed=number)
    got = mean_of(tmp_path, [{"w": values} for values in inputs])["w"]
    assert fmt.codes(got) == exact_mean(inputs, fmt)


# -- Output dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@narrow
def test_each_dtype_of_the_output_is_rounded_once(tmp_path: Path, fmt: Format, dtype: str) -> None:
    target = {"float64": FLOAT64, "float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}[dtype]
    # One sign and exponents near zero: within the range of all of them. The means are ties, or next to ties.
    rng = np.random.default_rng(1)
    middle = torch.from_numpy(1 + (rng.integers(0, 128, 800) + 0.5) / 128)
    nudge = torch.from_numpy(rng.choice([-1, 0, 1], 800) * 2.0**-fmt.mantissa)
    inputs = [middle.to(fmt.dtype), (middle + nudge).to(fmt.dtype)]
    state = [{"w": values, "n": torch.tensor([3]), "z": torch.ones(1, dtype=torch.complex64)} for values in inputs]
    got = mean_of(tmp_path, state, dtype=dtype)
    assert got["w"].dtype == getattr(torch, dtype)
    assert target.codes(got["w"]) == exact_mean(inputs, fmt, target)
    assert (got["n"].dtype, got["z"].dtype) == (torch.int64, torch.complex64)


@pytest.mark.guarantee("overflow")
@pytest.mark.parametrize(("value", "fits"), [(65519.996, True), (65520.0, False), (-1e5, False), (1e300, False)])
def test_overflow_of_a_narrower_dtype_is_refused_not_clamped(tmp_path: Path, value: float, fits: bool) -> None:
    index = 70_000  # after the first block
    values = torch.ones(80_000, dtype=torch.float64)
    values[index] = value
    paths = save(tmp_path, [{"layer.w": values}, {"layer.w": values}])
    output = tmp_path / "mean.safetensors"
    if fits:
        average(paths, output, dtype="float16", memory=MiB)
        assert load_file(output)["layer.w"][index].item() == 65504
        return
    with pytest.raises(NonFiniteError) as error:
        average(paths, output, dtype="float16", memory=MiB)
    assert error.value.exit_code == 4
    for fact in ("'layer.w'", "float16", f"{value:g}", "70,000", "wider --dtype"):
        assert fact in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["0.safetensors", "1.safetensors"]


def test_overflow_becomes_infinite_where_that_is_allowed(tmp_path: Path) -> None:
    state = {"w": torch.tensor([70000.0, -70000.0, 1.0])}
    got = mean_of(tmp_path, [state, state], dtype="float16", allow_nonfinite=True)["w"]
    assert got.tolist() == [math.inf, -math.inf, 1.0]


# -- The same bytes, however they are computed ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run of mixed tensors, and the digest of its average with default options."""
    folder = tmp_path_factory.mktemp("mixed")
    average(save(folder, mixed_run()), folder / "mean.safetensors")
    found = digest(folder / "mean.safetensors")
    (folder / "mean.safetensors").unlink()
    return folder, found


@pytest.mark.guarantee("same-bytes")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("memory", [MiB, 8 * MiB, 1024 * MiB])
def test_threads_and_memory_do_not_change_the_bytes(
    mixed: tuple[Path, str], tmp_path: Path, threads: int, memory: int
) -> None:
    average([mixed[0]], tmp_path / "mean.safetensors", threads=threads, memory=memory)
    assert digest(tmp_path / "mean.safetensors") == mixed[1]


def test_formats_may_be_mixed_and_give_the_same_data(tmp_path: Path) -> None:
    """One run, saved by safetensors, by torch, and by both in turn, under the same names. Headers tell them apart."""
    states = mixed_run()
    digests = set()
    for kind in ("safetensors", "torch", "mixed"):
        folder = tmp_path / kind
        folder.mkdir()
        for index, state in enumerate(states):
            path = folder / f"{index}.ckpt"
            if kind == "torch" or (kind == "mixed" and index % 2):
                torch.save({"epoch": index, "state_dict": dict(reversed(state.items()))}, path)
            else:
                save_file(state, path)
        digests.add(average([folder], folder / "mean.safetensors").data_digest)
    assert len(digests) == 1


@pytest.mark.parametrize("memory", [MiB, 128 * MiB])
def test_a_tensor_larger_than_a_block_equals_torch(tmp_path: Path, memory: int) -> None:
    inputs = [torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    got = mean_of(tmp_path, [{"w": values} for values in inputs], memory=memory)["w"]
    assert got.equal(((inputs[0].double() + inputs[1].double()) / 2).float())


def test_progress_counts_every_input_byte_once(mixed: tuple[Path, str], tmp_path: Path) -> None:
    recorded = Recorded()
    average([mixed[0]], tmp_path / "mean.safetensors", memory=MiB, progress=recorded.progress)
    assert recorded.passes() == [sum(value.nbytes for state in mixed_run() for value in state.values())]


# -- Layouts --------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels last": lambda x: x.view(8, 6, 10, 10).contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.view(60, 80).t(),
    "every second": lambda x: x[::2],
    "columns": lambda x: x.view(48, 100)[:, 3:71],
    "a slice with an offset": lambda x: x[1001:],
    "expanded": lambda x: x[:40].view(40, 1).expand(40, 33),
    "permuted": lambda x: x.view(4, 10, 12, 10).permute(2, 0, 3, 1),
    "a single element": lambda x: x[17],
    "strided empty": lambda x: x.view(60, 80).t()[3:3],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("memory", [MiB, 128 * MiB])
def test_tensors_of_any_layout_are_averaged_by_element(tmp_path: Path, dtype: torch.dtype, memory: int) -> None:
    """One checkpoint contains the views, the other contiguous copies of others."""
    storages = [torch.randn(4800, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(2)]
    views = [{name: layout(storage) for name, layout in LAYOUTS.items()} for storage in storages]
    assert not all(view.is_contiguous() for view in views[0].values())
    copies = {name: view.contiguous().clone() for name, view in views[1].items()}
    got = mean_of(tmp_path, [views[0], copies], ".pt", memory=memory)
    for name in LAYOUTS:
        expected = (views[0][name].double() + views[1][name].double()) / 2
        expected = expected if dtype == torch.float64 else expected.float().to(dtype)
        assert got[name].equal(expected), name


def test_a_transposed_tensor_whose_rows_span_more_than_a_window(tmp_path: Path) -> None:
    inputs = [torch.arange(4096 * 4096, dtype=torch.float32).mul_(factor).view(4096, 4096).t() for factor in (1, 3)]
    got = mean_of(tmp_path, [{"w": inputs[0]}, {"w": inputs[1].contiguous()}], ".pt", memory=32 * MiB)["w"]
    assert got.equal(inputs[0] * 2)


def test_inputs_are_not_changed(tmp_path: Path) -> None:
    paths = [*save(tmp_path, mixed_run(2))]
    torch.save({"w": torch.randn(100, 100).t()}, tmp_path / "a.pt")
    torch.save({"w": torch.randn(100, 100).t()}, tmp_path / "b.pt")
    for names in (paths, [tmp_path / "a.pt", tmp_path / "b.pt"]):
        for path in names:
            path.chmod(0o444)
        before = [(path.read_bytes(), os.stat(path).st_mtime_ns, os.stat(path).st_mode) for path in names]
        average(names, tmp_path / "mean.safetensors", overwrite=True)
        assert [(path.read_bytes(), os.stat(path).st_mtime_ns, os.stat(path).st_mode) for path in names] == before


@pytest.mark.guarantee("differences")
@pytest.mark.parametrize("shapes", [((1,), (5,)), ((5,), (1,)), ((1, 5), (5, 1)), ((), (1,)), ((2, 3), (6,))])
def test_shapes_are_never_broadcast(tmp_path: Path, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(IncompatibleError) as error:
        mean_of(tmp_path, [{"w": torch.ones(shape)} for shape in shapes])
    assert error.value.exit_code == 4
    for fact in ("'w'", f"expected {list(shapes[0])}", f"got {list(shapes[1])}", "1.safetensors"):
        assert fact in str(error.value)
    assert not (tmp_path / "mean.safetensors").exists()


def test_tied_tensors_are_written_under_each_name(tmp_path: Path) -> None:
    """Averaged as a function of the names, so that summing in place cannot count a shared storage twice."""
    states = []
    for value in (1.0, 2.0, 3.0):
        shared = torch.full((4,), value)
        states.append({"embed.weight": shared, "head.weight": shared, "part": shared[1:]})
    result = average(save(tmp_path, states, ".pt"), tmp_path / "mean.safetensors")
    got = load_file(tmp_path / "mean.safetensors")
    assert {name: values.tolist() for name, values in got.items()} == {
        "embed.weight": [2.0] * 4,
        "head.weight": [2.0] * 4,
        "part": [2.0] * 3,
    }
    assert any("tied" in notice and "'embed.weight'='head.weight'" in notice for notice in result.notices)


def test_sums_follow_the_order_of_the_checkpoints(tmp_path: Path) -> None:
    """The sum of values too far apart for float64 depends on its order, so the order is part of the promise."""
    values = (2.0**60, 1.0, -(2.0**60))
    paths = save(tmp_path, [{"w": torch.tensor([each]), "i": torch.tensor(step)} for step, each in enumerate(values)])
    third = torch.tensor(1 / 3).item()
    for order, expected in (((0, 1, 2), 0.0), ((0, 2, 1), third), ((2, 0, 1), third), ((1, 0, 2), 0.0)):
        out = tmp_path / "mean.safetensors"
        average([paths[index] for index in order], out, overwrite=True, keep_order=True, non_float="last")
        assert load_file(out)["w"].item() == expected
        assert load_file(out)["i"].item() == 2  # of the latest step, wherever it is named
        assert len(verify(out, sources=paths).checkpoints) == 3
        with safe_open(out, framework="pt") as reader:
            sources = json.loads(reader.metadata()["ckpt_avg.sources"])
        assert [source["name"] for source in sources] == [f"{index}.safetensors" for index in range(3)]
        assert [source.get("summed", index) for index, source in enumerate(sources)] == [*map(order.index, range(3))]


@pytest.mark.guarantee("many-checkpoints")
def test_a_thousand_checkpoints(tmp_path: Path) -> None:
    """More than may be open at once on many systems, each read in the order of its step."""
    values = [[(step * 37 % 101) / 8 - step, float(step)] for step in range(1000)]
    for step, pair in enumerate(values):
        save_file({"w": torch.tensor(pair)}, tmp_path / f"step_{step}.safetensors")
    result = average(tmp_path, tmp_path / "mean.safetensors")
    assert len(result.checkpoints) == 1000
    exact = [float(sum(map(Fraction, column)) / 1000) for column in zip(*values, strict=True)]
    assert torch.equal(load_file(tmp_path / "mean.safetensors")["w"], torch.tensor(exact))


# -- NaN and Inf ----------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("nonfinite")
def test_nan_and_inf_are_refused_with_every_place(tmp_path: Path) -> None:
    """All files that contain some, each with the first index and the count, in other blocks and chunks."""
    states = [{"fine": torch.ones(10), "layer.w": torch.ones(100_000)} for _ in range(4)]
    states[1]["layer.w"][torch.tensor([70_001, 70_002, 99_999])] = math.nan
    states[3]["layer.w"][0] = -math.inf
    for threads, memory in ((1, MiB), (2, 128 * MiB)):
        with pytest.raises(NonFiniteError) as error:
            mean_of(tmp_path, states, threads=threads, memory=memory)
        assert error.value.exit_code == 4
        message = str(error.value)
        for fact in (
            "tensor 'layer.w': NaN or Inf in these checkpoints:",
            f"{tmp_path / '1.safetensors'}: 3 of 100,000 elements, the first at index 70,001",
            f"{tmp_path / '3.safetensors'}: 1 of 100,000 elements, the first at index 0",
            "--exclude",
            "--allow-nonfinite",
        ):
            assert fact in message
        assert "0.safetensors" not in message
        assert "2.safetensors" not in message
        assert sorted(os.listdir(tmp_path)) == [f"{index}.safetensors" for index in range(4)]


WITH_INFINITY = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e5m2)
NONFINITE = [
    *((dtype, value) for dtype in WITH_INFINITY for value in (math.nan, math.inf, -math.inf)),
    *((fmt.dtype, math.nan) for fmt in FLOAT8 if fmt.infinity is None),
]


@pytest.mark.parametrize(("dtype", "value"), NONFINITE, ids=str)
@pytest.mark.parametrize("number", [1, 3])
def test_one_nan_is_found_in_every_dtype(tmp_path: Path, dtype: torch.dtype, value: float, number: int) -> None:
    states = [{"w": torch.ones(2_000).to(dtype)} for _ in range(number)]
    broken = torch.ones(2_000, dtype=torch.float32)
    broken[1_234] = value
    states[-1]["w"] = torch.complex(torch.ones(2_000), broken) if dtype.is_complex else broken.to(dtype)
    with pytest.raises(NonFiniteError, match=r"1 of 2,000 elements, the first at index 1,234"):
        mean_of(tmp_path, states)


def test_infinities_that_cancel_are_found(tmp_path: Path) -> None:
    states = [{"w": torch.tensor([math.inf])}, {"w": torch.tensor([-math.inf])}]
    with pytest.raises(NonFiniteError, match=r"(?s)0\.safetensors: 1 of 1.*1\.safetensors: 1 of 1"):
        mean_of(tmp_path, states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_infinity_in_a_constant_is_kept_and_nan_is_not(tmp_path: Path, dtype: torch.dtype) -> None:
    """Attention masks are saved as buffers. A weight that is infinite somewhere differs elsewhere."""
    mask = torch.triu(torch.full((5, 5), -math.inf), 1).to(dtype)
    states = [{"a": torch.rand(7).to(dtype), "mask": mask, "z": torch.rand(7).to(dtype)} for _ in range(3)]
    assert mean_of(tmp_path, states)["mask"].equal(mask)
    for name, value in (("mask", math.nan), ("z", math.inf)):
        broken = [{**state, name: state[name].clone()} for state in states]
        for state in broken:
            state[name].view(-1)[3] = value
        with pytest.raises(NonFiniteError, match=f"tensor '{name}'"):
            mean_of(tmp_path, broken)


@pytest.mark.guarantee("nonfinite")
def test_allowed_nan_and_inf_touch_only_their_own_elements(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        columns = [[1.0, math.nan, math.inf, math.inf, -math.inf, 4.0], [3.0, 1.0, 1.0, -math.inf, -math.inf, 5.0]]
        states = [{"w": torch.tensor(column, dtype=dtype)} for column in columns]
        got = mean_of(tmp_path, states, allow_nonfinite=True)["w"].double()
        assert got.tolist()[0::5] == [2.0, 4.5]
        assert got.isnan().tolist() == [False, True, False, True, False, False]
        assert got[2] == math.inf
        assert got[4] == -math.inf


def test_finite_values_whose_sum_is_not_are_no_false_alarm(tmp_path: Path) -> None:
    """The quick check sums the means of a chunk, and this sum may overflow although no mean does."""
    states = [{"w": torch.full((5_000,), value, dtype=torch.float64)} for value in (TOP, TOP / 2)]
    assert mean_of(tmp_path, states)["w"].isfinite().all()


# -- Integers, bools and BatchNorm counters -------------------------------------------------------------------------


@pytest.mark.guarantee("integers")
def test_equal_integers_are_copied(tmp_path: Path) -> None:
    exact = {name: AWKWARD[name] for name in ("bool", "uint64", "int64", "uint8", "int8", "exponents")}
    states = [exact | {"w": torch.tensor([value])} for value in (1.0, 2.0)]
    got = mean_of(tmp_path, states)
    assert {name: bits(got[name]) for name in exact} == {name: bits(values) for name, values in exact.items()}


@pytest.mark.guarantee("integers")
def test_different_integers_are_refused_all_at_once(tmp_path: Path) -> None:
    states = [
        {f"count.{i}": torch.arange(5) for i in range(3)} | {"mask": torch.zeros(4, dtype=torch.bool)} for _ in "abc"
    ]
    states[2]["count.1"] = torch.tensor([0, 1, 2, 9, 9])
    states[1]["mask"] = torch.tensor([False, True, True, False])
    with pytest.raises(IncompatibleError) as error:
        mean_of(tmp_path, states)
    assert error.value.exit_code == 4
    message = str(error.value)
    for fact in (
        "2 integer or bool tensors",
        str(tmp_path / "0.safetensors"),
        f"'count.1': first at index 3 in {tmp_path / '2.safetensors'}",
        f"'mask': first at index 1 in {tmp_path / '1.safetensors'}",
        "--non-float last",
    ):
        assert fact in message
    assert "count.0" not in message
    assert not (tmp_path / "mean.safetensors").exists()


@pytest.mark.guarantee("integers")
def test_different_integers_may_be_the_last_checkpoints(tmp_path: Path) -> None:
    states = [{"count": torch.tensor([200 + i]), "mask": torch.tensor([i == 1])} for i in range(3)]
    got = mean_of(tmp_path, states, non_float="last")
    assert (got["count"].item(), got["mask"].item()) == (202, False)


@pytest.mark.guarantee("integers")
def test_the_batch_counter_is_the_lasts(tmp_path: Path) -> None:
    """Not an error, not a sum, not a float; and only next to running statistics."""
    states = []
    for index in range(3):
        layer = torch.nn.BatchNorm1d(4)
        for _ in range(index + 5):
            layer(torch.randn(8, 4))
        states.append({f"bn.{name}": values.clone() for name, values in layer.state_dict().items()})
    got = mean_of(tmp_path, states, bn="keep")
    assert got["bn.num_batches_tracked"].item() == 7
    assert got["bn.num_batches_tracked"].dtype == torch.int64
    expected = exact_mean([state["bn.running_var"] for state in states], FLOAT32)
    assert FLOAT32.codes(got["bn.running_var"]) == expected
    others = [{"x.num_batches_tracked": torch.tensor(i)} for i in range(2)]
    with pytest.raises(IncompatibleError, match=r"'x\.num_batches_tracked'"):
        mean_of(tmp_path, others, bn="keep")


# -- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("no-float64", "no-gpu")
@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"threads": 0}, r"--threads: 0 is out of range\. Use 1 to 1,024"),
        ({"memory": 1000}, r"--memory: 1,000 bytes is out of range\. Use 1\.0 MiB or more"),
        ({"memory": MiB - 1}, r"--memory: .* is out of range"),
        ({"dtype": "int8"}, r"--dtype: 'int8' is not one of keep, float64"),
        ({"non_float": "mean"}, r"--non-float: 'mean' is not one of equal, last"),
        ({"device": "mps"}, r"--device: 'mps' cannot be used\. Use auto, cpu, cuda or cuda:N"),
        ({"device": "fpga-9"}, r"--device: 'fpga-9' cannot be used"),
        ({"device": "cuda:99"}, r"--device cuda:99: torch finds \d+ CUDA devices? on this machine\. Use --device cpu"),
    ],
)
def test_invalid_options_are_refused(tmp_path: Path, options: dict[str, Any], fact: str) -> None:
    with pytest.raises(UsageError, match=fact) as error:
        mean_of(tmp_path, [{"w": torch.ones(1)}], **options)
    assert error.value.exit_code == 2


def test_torch_threads_are_left_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    mean_of(tmp_path, [{"w": torch.ones(1)}] * 2, threads=2)
    assert torch.get_num_threads() == before


@pytest.fixture(autouse=True)
def no_litter(tmp_path: Path) -> Iterator[None]:
    """No test leaves a hidden file."""
    yield
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
