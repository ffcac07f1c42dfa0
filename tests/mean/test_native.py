"""The native engine: the same bytes as torch on any bits, no crash on files that change, no access out of bounds."""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from formats.safetensors_bytes import lay_out
from mean.inputs import bits, save
from mean.plans import plan_of
from safetensors.torch import load_file
from system.faults.exact import BFLOAT16, exact_mean

from ckpt_avg import (
    ChangedWhileReadingError,
    CheckpointFormatError,
    NonFiniteError,
    ResourceError,
    UsageError,
    average,
)
from ckpt_avg.checkpoint.spec import BY_TORCH_NAME
from ckpt_avg.engine import engine_for
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.mean import block_sizes, native
from ckpt_avg.mean.memory_output import MemoryOutput
from ckpt_avg.mean.plan import make_plan
from ckpt_avg.mean.stream import Mean, write_means

_kernel = pytest.importorskip("ckpt_avg._kernel", reason="the native engine was not built here")

DTYPES = {name: getattr(torch, name) for name in _kernel.DTYPES} | {"complex64": torch.complex64}
linux = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped on Linux alone")


@pytest.fixture(autouse=True)
def _native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment chooses, these tests are of the native engine."""
    monkeypatch.delenv("CKPT_AVG_ENGINE", raising=False)


def random_bits(numel: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any bits: NaN of every payload, infinities, subnormal numbers, zeros of both signs."""
    return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)


def states_of_any_bits(number: int, numel: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(number)
    states = [{name: random_bits(numel, dtype, generator) for name, dtype in DTYPES.items()} for _ in range(number)]
    for state in states[1:]:  # elements that are equal in all inputs
        for name, values in state.items():
            values[: numel // 4] = states[0][name][: numel // 4]
    return states


def by_both_engines(monkeypatch: pytest.MonkeyPatch, sources: Any, folder: Path, **options: Any) -> list[bytes]:
    made = []
    for engine in ("native", "torch"):
        monkeypatch.setenv("CKPT_AVG_ENGINE", engine)
        result = average(sources, folder / f"{engine}.safetensors", allow_nonfinite=True, **options)
        assert result.engine == engine
        made.append((folder / f"{engine}.safetensors").read_bytes())
    return made


# -- The same bytes as torch ----------------------------------------------------------------------------------------


@pytest.mark.guarantee("same-bytes")
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("dtype", ["keep", "float64", "float32", "bfloat16", "float16"])
def test_any_bits_of_every_dtype_give_the_bytes_that_torch_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, dtype: str
) -> None:
    """Groups of four inputs and the rest; whole blocks of 1,024 elements and a part of one."""
    paths = save(tmp_path, states_of_any_bits(number, 10_007))
    native, torchs = by_both_engines(monkeypatch, paths, tmp_path, dtype=dtype)
    assert native == torchs


def finite_bits(numel: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any bits of values below two."""
    contents = random_bits(numel, dtype, generator).view(torch.uint8).view(numel, dtype.itemsize)
    contents[:, -1] &= 0xBF  # without the exponent's highest bit
    if "fnuz" in str(dtype):
        contents[contents == 0x80] = 0
    return contents.view(dtype).flatten()


@pytest.mark.guarantee("same-bytes")
@pytest.mark.parametrize("number", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_any_bits_of_finite_values_give_the_bytes_that_torch_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, dtype: str
) -> None:
    """NaN and Inf are handled apart, in some other order."""
    generator = torch.Generator().manual_seed(number)
    real = {name: each for name, each in DTYPES.items() if name != "complex64"}
    paths = save(
        tmp_path, [{name: finite_bits(10_007, each, generator) for name, each in real.items()} for _ in range(number)]
    )
    native, torchs = by_both_engines(monkeypatch, paths, tmp_path, dtype=dtype)
    assert native == torchs


@pytest.mark.guarantee("same-bytes")
@pytest.mark.parametrize("number", [3, 8, 251])
@pytest.mark.parametrize("name", [name for name in _kernel.DTYPES if name.startswith("float8")])
def test_float8_means_are_the_same_up_to_the_precision_of_float32_and_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    """Float32 is used while the number of inputs times the largest is below 2**24 of the smallest positive number.

    Beyond, small values between large ones that cancel each other would be lost.
    """
    values = torch.arange(128, dtype=torch.uint8).view(DTYPES[name]).double()
    largest, last = (int(each.nonzero().max()) for each in (values.isfinite(), values * number < 2**24 * values[1]))
    generator = torch.Generator().manual_seed(number)
    ends = torch.tensor([[last - 1, last, 0, 1, 2, 3, 9], [min(last + 1, largest), last, 0, 1, 2, 3, 9]])
    codes = ends[:, torch.randint(0, 7, (number, 5003), generator=generator)].to(torch.uint8)
    codes |= 0x80 * torch.randint(0, 2, codes.shape, generator=generator, dtype=torch.uint8)
    if name.endswith("fnuz"):
        codes[codes == 0x80] = 1  # that is NaN
    cancelled = codes[0] & 3 | 1
    cancelled[: number // 2] = largest
    cancelled[-(number // 2) :] = largest | 0x80
    tensors = [each.view(DTYPES[name]) for each in (*codes, cancelled)]
    paths = save(tmp_path, [dict(zip("abc", each, strict=True)) for each in zip(*tensors, strict=True)])
    for dtype in ("keep", "bfloat16"):
        native, torchs = by_both_engines(monkeypatch, paths, tmp_path / dtype, dtype=dtype)
        assert native == torchs


def nearly_ties(number: int, gaps: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Codes of bfloat16, (number, columns), whose means are midpoints, or differ from one by a last place of the least.

    All inputs but two have one exponent; their sum is ``number`` times a midpoint. Those two have exponents lower by
    the column's gap and cancel each other but for their last place, which a sum of too few bits has lost by then.
    """
    count = len(gaps)
    middle = 2 * rng.integers(132, 255 * (number - 2) // number - 1, count) + 1  # in halves of the last place
    each, left = np.divmod(number * middle // 2, number - 2)
    exponent = rng.integers(60, 190, count)
    codes = np.empty((number, count), np.int64)
    codes[:-2] = each - 128 + (np.arange(number - 2)[:, None] < left) + (exponent << 7)
    codes[-2:] = exponent - gaps << 7
    codes[-2] += rng.integers(0, 2, count)
    codes[-1] |= 0x8000
    codes[:, ::2] = rng.permuted(codes[:, ::2], axis=0)
    return codes ^ rng.choice([0, 0x8000], count)


def bfloat16_mean(inputs: Sequence[torch.Tensor]) -> list[int]:
    """The codes that the kernel gives."""
    slot, dtype = inputs[0].nbytes, _kernel.DTYPES["bfloat16"]
    table = table_of([(_kernel.MEMORY, -1, 0, dtype, index * slot) for index in range(len(inputs))])
    output = bytearray(slot)
    memory = bytearray().join(map(bits, inputs))
    assert _kernel.mean(table, b"", memory, slot, slot // 2, dtype, output, 3)[0] == _kernel.DONE
    return np.frombuffer(output, np.uint16).tolist()


@pytest.mark.guarantee("accurate")
@pytest.mark.parametrize("number", [6, 8, 16, 62, 250])
def test_bfloat16_means_are_exact_up_to_the_precision_of_float32_and_beyond(number: int) -> None:
    """Blocks of 1,024 elements in which no, some and many inputs are too far apart for float32, or too large.

    Those elements are computed in float64: one by one, or the whole block.
    """
    rng = np.random.default_rng(number)
    limit = 16 - (number - 1).bit_length()  # to the difference of exponents in float32
    shares = np.repeat([0, 0.02, 0.5], 1024)
    beyond = limit + rng.choice([1, 1, 1, 2, 8], len(shares))
    gaps = np.where(rng.random(len(shares)) < shares, beyond, limit - rng.integers(0, 3, len(shares)))
    ends = rng.integers(1, limit << 7, (number, 3083))  # the least codes, and the largest, too large or just not
    ends[:, :1024] += 255 - limit << 7
    ends[:, 1024:2048] += 239 << 7
    ends[rng.random(ends.shape) < 0.2] = 0
    ends[:, 1024:1040] = 239 + limit << 7 | 127  # the least with a sum beyond float32
    ends[:, 2048:2050] = 0
    ends[:, 2050:2066] = rng.choice([1, limit << 7], (number, 16))  # subnormal, and as far apart as it may be
    signs = rng.choice([0, 0x8000], ends.shape)
    signs[:, ::2] = 0
    signs[:, 2049] = 0x8000
    inputs = [BFLOAT16.values(row) for row in np.concatenate([nearly_ties(number, gaps, rng), ends | signs], axis=1)]
    assert bfloat16_mean(inputs) == exact_mean(inputs, BFLOAT16)


def test_very_many_bfloat16_inputs_leave_no_room_in_float32() -> None:
    number = 2**17 + 1
    ones = torch.ones(32, dtype=torch.bfloat16)
    little = ones / 256
    inputs = [little, *[ones] * (number // 2), *[-ones] * (number // 2)]
    assert bfloat16_mean(inputs) == [BFLOAT16.nearest_to(1 / 256 / number)] * 32


@pytest.mark.parametrize("name", ["float16", "float8_e5m2", "float8_e4m3fn"])
def test_every_code_is_widened_the_same_way_with_and_without_special_instructions(name: str) -> None:
    """Processors may have some that take sixteen elements at a time; what is left is widened as on any other."""
    size = DTYPES[name].itemsize
    contents = torch.arange(256**size).to(torch.uint16 if size == 2 else torch.uint8).numpy().tobytes()

    def widened(part: bytes) -> bytes:
        output = bytearray(4 * len(part) // size)
        row = (_kernel.MEMORY, -1, 0, _kernel.DTYPES[name], 0)
        _kernel.mean(table_of([row]), b"", bytearray(part).ljust(8), max(8, len(part)), len(part) // size, 1, output, 0)
        return bytes(output)

    parts = (contents[begin : begin + 13 * size] for begin in range(0, len(contents), 13 * size))
    assert b"".join(map(widened, parts)) == widened(contents)
    assert (
        torch.frombuffer(bytearray(widened(contents)), dtype=torch.float32)
        .nan_to_num(nan=7.5)
        .equal(torch.frombuffer(bytearray(contents), dtype=DTYPES[name]).float().nan_to_num(nan=7.5))
    )


@pytest.mark.guarantee("same-bytes")
@pytest.mark.parametrize("options", [{"memory": 2**20, "threads": 3}, {"io": "pread"}, {"threads": 1}], ids=str)
def test_large_tensors_are_computed_window_by_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Windows that begin anywhere in a page, mapped and read."""
    paths = save(tmp_path, states_of_any_bits(3, 300_007))
    native, torchs = by_both_engines(monkeypatch, paths, tmp_path, **options)
    assert native == torchs


@pytest.mark.guarantee("same-bytes")
def test_elements_that_are_not_consecutive_or_not_of_one_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels-last, transposed and repeated elements; tensors in another order; dtypes that differ."""
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        kind = (torch.float32, torch.bfloat16, torch.float16)[index]
        state = {
            "channels last": torch.randn(40, 30, 7, 9, generator=generator).to(memory_format=torch.channels_last),
            "transposed": torch.randn(500, 700, generator=generator).t(),
            "repeated": torch.randn(300, 1, generator=generator).expand(300, 50),
            "part": torch.randn(1000, generator=generator)[3:77],
            **{f"small {name}": torch.randn(37, generator=generator).to(kind) for name in range(50)},
            "plain": torch.randn(80_000, generator=generator).to(kind),
        }
        names = list(state) if index else list(reversed(state))
        torch.save({name: state[name] for name in names}, tmp_path / f"step_{index}.pt")
    for options in ({"memory": 2**20}, {"memory": 2**27}):
        native, torchs = by_both_engines(
            monkeypatch, tmp_path, tmp_path / "..", dtype="float32", overwrite=True, **options
        )
        assert native == torchs


def in_order(state: dict[str, torch.Tensor], names: Sequence[str]) -> bytes:
    """A safetensors file with the tensors in this order, which safetensors itself would not write."""
    header, contents = {}, b""
    for name in names:
        end = len(contents) + state[name].nbytes
        code = BY_TORCH_NAME[str(state[name].dtype).removeprefix("torch.")].name
        header[name] = {"dtype": code, "shape": list(state[name].shape), "data_offsets": [len(contents), end]}
        contents += bits(state[name])
    return lay_out(json.dumps(header), contents)


def data_of(contents: bytes) -> bytes:
    """What follows the header."""
    return contents[8 + int.from_bytes(contents[:8], "little") :]


@pytest.mark.guarantee("same-bytes")
@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_tensors_in_a_file_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Scattered, reversed, or in turn from both ends, in one file or all; small, empty and large, of any dtypes."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes = {f"t{index}": choose.choice([0, 1, 1, 3, 37, 1_000, 40_001]) for index in range(80)}
    dtypes = {name: choose.choice(list(DTYPES.values())) for name in sizes}
    states = [{name: random_bits(sizes[name], dtypes[name], generator) for name in sizes} for _ in range(3)]
    paths = save(tmp_path, states)
    expected, _ = by_both_engines(monkeypatch, paths, tmp_path / "..", overwrite=True)
    names = list(sizes)
    alternating = [name for pair in zip(names, names[::-1], strict=True) for name in pair]
    for order in (names[::-1], list(dict.fromkeys(alternating)), choose.sample(names, len(names))):
        for path, state in choose.sample([*zip(paths, states, strict=True)], choose.choice([1, 3])):
            path.write_bytes(in_order(state, order))
        native, torchs = by_both_engines(monkeypatch, paths, tmp_path / "..", memory=2**20, threads=2, overwrite=True)
        assert native == torchs
        assert data_of(native) == data_of(expected)


@pytest.mark.parametrize("io", [pytest.param("mmap", marks=linux), "pread"])
def test_several_means_of_one_block_are_each_their_own(tmp_path: Path, io: str) -> None:
    """Also of a block with a constant that has Inf, whose tensors are averaged one by one, and if maps are refused."""
    states = []
    for index in range(4):
        generator = torch.Generator().manual_seed(index)
        mask = torch.tensor([0.0, -torch.inf])
        states.append({"a": torch.randn(70_000, generator=generator), "mask": mask, "z": torch.randn(9) + index})
    paths = save(tmp_path, states)
    windows = ([0, 1, 2], [3, 1], [0, 1, 2, 3])
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path)) for path in paths]
        for file in (file for checkpoint in checkpoints for file in checkpoint.files):
            file.use_io(io)
        plan = make_plan([checkpoint.spec for checkpoint in checkpoints])
        outputs = [MemoryOutput(plan) for _ in windows]
        means = [Mean(window, output.write) for window, output in zip(windows, outputs, strict=True)]
        write_means(checkpoints, plan, means, device="cpu", threads=2, memory=2**21)
        for window, output in zip(windows, outputs, strict=True):
            for name, found in output.tensors().items():
                total = sum(states[index][name].double() for index in window)
                assert found.equal((total / len(window)).float()), (window, name)


@pytest.mark.guarantee("same-bytes")
@pytest.mark.parametrize("engine", ["native", "torch"])
def test_subnormal_numbers_count_whatever_the_program_does_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Threads inherit a processor's mode that takes them for zero; some libraries set it when they are imported."""
    monkeypatch.setenv("CKPT_AVG_ENGINE", engine)
    single = torch.tensor([2.0**-149, -(2.0**-130)])
    double = torch.tensor([2.0**-1074, 2.0**-1030], dtype=torch.float64)
    paths = save(tmp_path, [{"single": single * k, "double": double * k} for k in (1, 3)])
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot set that mode here")
    try:
        average(paths, tmp_path / "out.safetensors")
        assert torch.tensor([2.0**-149]).add(0.0).item() == 0, "the mode of this thread is as it was"
    finally:
        torch.set_flush_denormal(False)
    found = load_file(tmp_path / "out.safetensors")
    assert found["single"].equal(single * 2)
    assert found["double"].equal(double * 2)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_a_mean_of_several_is_the_one_of_its_own_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    """Float64 sums are exact; those of float32 inputs are not, also if other checkpoints store float64."""
    monkeypatch.setenv("CKPT_AVG_ENGINE", engine)
    states = [{name: random_finite(10 * index + seed) for seed, name in enumerate("ab")} for index in range(4)]
    states[3]["a"], states[2]["b"] = states[3]["a"].double(), states[2]["b"].double()
    paths = save(tmp_path, states)
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path)) for path in paths]
        plan = make_plan([checkpoint.spec for checkpoint in checkpoints], dtype="float64")
        windows = ([0, 1, 2], [0, 1, 2, 3], [1, 3], [0])
        outputs = [MemoryOutput(plan) for _ in windows]
        means = [Mean(window, output.write) for window, output in zip(windows, outputs, strict=True)]
        write_means(checkpoints, plan, means, device="cpu", threads=1, memory=2**24)
    for window, output in zip(windows, outputs, strict=True):
        average([paths[index] for index in window], tmp_path / "one.safetensors", dtype="float64", overwrite=True)
        expected = load_file(tmp_path / "one.safetensors")
        assert all(values.equal(expected[name]) for name, values in output.tensors().items()), window


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_nan_outside_a_mean_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """Whoever excludes the checkpoints that are named gets a mean."""
    monkeypatch.setenv("CKPT_AVG_ENGINE", engine)
    states = [{"w": torch.ones(3000)} for _ in range(4)]
    states[1]["w"][7] = states[3]["w"][8] = torch.nan
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path)) for path in save(tmp_path, states)]
        plan = make_plan([checkpoint.spec for checkpoint in checkpoints])
        means = [Mean([2, 1, 0], MemoryOutput(plan).write)]
        with pytest.raises(NonFiniteError) as error:
            write_means(checkpoints, plan, means, device="cpu", threads=1, memory=2**24)
    assert "1.safetensors: 1 of 3,000 elements, the first at index 7" in str(error.value)
    assert "3.safetensors" not in str(error.value)


def random_finite(seed: int) -> torch.Tensor:
    """Float32 values of so many magnitudes that a float64 sum of them rounds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3000, generator=generator) * 2.0 ** torch.randint(-60, 60, (3000,), generator=generator)


def test_every_nan_has_one_code(tmp_path: Path) -> None:
    """Otherwise the bytes would depend on which of two NaNs a processor's addition returns."""
    codes = {"float64": -0x0007_FFFF_FFFF_FFFE, "float32": -0x003F_FFFE, "bfloat16": -0x003E, "float16": -0x01FE}
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    state = {
        name: torch.tensor([code, 0], dtype=integers[DTYPES[name].itemsize]).view(DTYPES[name])
        for name, code in {**codes, "float8_e5m2": 0xFE, "float8_e4m3fn": 0xFF, "float8_e4m3fnuz": 0x80}.items()
    }
    other = {name: torch.zeros(2, dtype=torch.float32).to(values.dtype) for name, values in state.items()}
    average(save(tmp_path, [state, other]), tmp_path / "mean.safetensors", allow_nonfinite=True)
    found = {
        name: values.view(integers[values.itemsize])[0].item() & (1 << 8 * values.itemsize) - 1
        for name, values in load_file(tmp_path / "mean.safetensors").items()
    }
    assert found == {
        "float64": 0x7FF8_0000_0000_0000,
        "float32": 0x7FC0_0000,
        "bfloat16": 0x7FC0,
        "float16": 0x7E00,
        "float8_e5m2": 0x7F,
        "float8_e4m3fn": 0x7F,
        "float8_e4m3fnuz": 0x80,
    }


# -- Files that change, and disks that fail -------------------------------------------------------------------------


@pytest.fixture
def instead_of_mean(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Returns what replaces the kernel's function for the mean."""

    def replace(mean: Callable[..., Any]) -> None:
        names = {name: getattr(_kernel, name) for name in dir(_kernel)}
        monkeypatch.setattr(native, "kernel", lambda: SimpleNamespace(**{**names, "mean": mean}))

    return replace


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return save(tmp_path, [{"w": torch.full((400_000,), float(index))} for index in range(2)])


@pytest.mark.guarantee("changing-inputs")
@pytest.mark.parametrize("io", [pytest.param("mmap", marks=linux), "pread"])
@pytest.mark.parametrize("length", [0, 100, 1_000_000])
def test_a_file_that_is_cut_is_an_error_also_in_other_programs(
    tmp_path: Path, paths: list[Path], instead_of_mean: Callable[..., None], io: str, length: int
) -> None:
    """It is cut after it was checked, just before its pages are read: SIGBUS would end this process."""

    def mean(*arguments: Any) -> Any:
        os.truncate(paths[1], length)
        return _kernel.mean(*arguments)

    instead_of_mean(mean)
    with pytest.raises(ChangedWhileReadingError, match=rf"{paths[1]}: changed while reading"):
        average(paths, tmp_path / "out.safetensors", io=io)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.guarantee("read-errors")
@pytest.mark.parametrize(("what", "reason"), [("NOT_READ", "Stale file handle"), ("LOST", "Input/output error")])
def test_a_disk_that_fails_is_an_error_with_file_and_place(
    tmp_path: Path, paths: list[Path], instead_of_mean: Callable[..., None], what: str, reason: str
) -> None:
    instead_of_mean(lambda *arguments: (getattr(_kernel, what), 1, 116, 0.0))
    with pytest.raises(
        CheckpointFormatError, match=rf"{paths[1]}: reading at byte [\d,]+ failed: {reason}\. Check the"
    ):
        average(paths, tmp_path / "out.safetensors")


@pytest.mark.guarantee("no-mmap")
@linux
def test_a_file_system_without_maps_is_read(
    tmp_path: Path, paths: list[Path], instead_of_mean: Callable[..., None]
) -> None:
    """Maps are used only where they were asked for, and a refusal is an error then."""

    def mean(table: memoryview, *arguments: Any) -> Any:
        for row in range(0, len(table), _kernel.ROW):
            if struct.unpack_from("q", table, row) == (_kernel.MAP,):
                return _kernel.NOT_MAPPED, row // _kernel.ROW, 19, 0.0
        return _kernel.mean(table, *arguments)

    instead_of_mean(mean)
    average(paths, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["w"].eq(0.5).all()
    with pytest.raises(ResourceError, match=r"--io mmap: the system refused the mapping: No such device\."):
        average(paths, tmp_path / "out2.safetensors", io="mmap")


_FAULT = """
import ctypes, faulthandler, mmap, os, signal, sys
from ckpt_avg import _kernel, average
if "before" in sys.argv:
    faulthandler.enable()
average(sys.argv[1:3], sys.argv[3], io="mmap")
if "after" in sys.argv:
    faulthandler.enable()
    average(sys.argv[1:3], sys.argv[3] + "2", io="mmap")
if "sent" in sys.argv:
    os.kill(os.getpid(), signal.SIGBUS)
with open(sys.argv[3], "r+b") as file:
    mapped = mmap.mmap(file.fileno(), 0)
    os.ftruncate(file.fileno(), 0)
    mapped[0]
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize("when", ["never", "before", "after", "sent", "before sent", "after sent"])
def test_other_faults_go_to_the_handler_that_was_there(tmp_path: Path, paths: list[Path], when: str) -> None:
    """Whoever installed it, and whenever: the process ends by the signal, and nothing loops."""
    command = [sys.executable, "-c", _FAULT, *map(str, paths), str(tmp_path / "out.safetensors"), *when.split()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGBUS, ended.stderr
    assert ("Fatal Python error: Bus error" in ended.stderr) == ("before" in when or "after" in when)


def test_a_call_ends_soon_however_many_checkpoints_there_are() -> None:
    """Ctrl-C, and the failure of another thread, wait for it."""
    plan = plan_of({"w": ("F32", (2**26,))})
    for number in (2, 1000):
        _, elements = block_sizes._native_sizes(2**30, 1, plan, range(plan.nbytes), number)
        assert 2**22 <= 4 * elements * number <= 2**28


# -- What the kernel accepts ----------------------------------------------------------------------------------------


def table_of(rows: Sequence[tuple[int, ...]]) -> bytearray:
    table = bytearray(len(rows) * _kernel.ROW)
    for index, row in enumerate(rows):
        struct.pack_into("5q", table, index * _kernel.ROW, *row)
    return table


ROW = (_kernel.MEMORY, -1, 0, _kernel.DTYPES["float32"], 0)
GOOD: dict[str, Any] = {
    "table": table_of([ROW, (*ROW[:4], 64)]), "weights": struct.pack("2d", 0.5, 0.5), "memory": bytearray(128),
    "slot": 64, "elements": 16, "dtype": 1, "output": bytearray(64), "check": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"table": bytearray()},
        {"table": bytearray(_kernel.ROW + 8)},
        {"table": table_of([(3, -1, 0, 1, 0)])},
        {"table": table_of([(-1, -1, 0, 1, 0)])},
        {"table": table_of([(_kernel.MAP, 0, -1, 1, 0)])},
        {"table": table_of([(_kernel.READ, 0, 2**63 - 8, 1, 0)])},
        {"table": table_of([(_kernel.READ, 0, 0, 1, 65)])},
        {"table": table_of([(_kernel.MEMORY, 0, 0, 1, -1)])},
        {"table": table_of([(_kernel.MEMORY, -1, 0, 8, 0)])},
        {"table": table_of([(_kernel.MEMORY, -1, 0, -1, 0)])},
        {"table": table_of([(_kernel.MEMORY, -1, 0, _kernel.DTYPES["float64"], 0)])},
        {"weights": bytes(8)},
        {"weights": bytes(17)},
        {"weights": bytes(24)},
        {"memory": bytearray(127)},
        {"memory": bytearray()},
        {"slot": 0},
        {"slot": -64},
        {"slot": 63},
        {"elements": 17},
        {"elements": -1},
        {"elements": 2**62},
        {"dtype": 8},
        {"dtype": -1},
        {"output": bytearray(63)},
    ],
    ids=str,
)
def test_calls_out_of_bounds_are_refused(wrong: dict[str, Any]) -> None:
    assert _kernel.mean(*GOOD.values())[0] == _kernel.DONE
    with pytest.raises(ValueError, match=r"^[a-z ,]+$"):
        _kernel.mean(*{**GOOD, **wrong}.values())


@pytest.mark.parametrize(
    "arguments",
    [
        (bytes(16), 0, bytearray(16), 0, (4,), (1,), (1,), 8),
        (bytes(16), 1, bytearray(16), 0, (4,), (1,), (1,), 4),
        (bytes(16), 0, bytearray(16), 4, (4,), (1,), (1,), 4),
        (bytes(16), -1, bytearray(16), 0, (4,), (1,), (1,), 1),
        (bytes(16), 0, bytearray(16), 0, (4, 4), (4, 1), (5, 1), 1),
        (bytes(16), 0, bytearray(16), 0, (2**62, 2**62), (2**62, 1), (1, 1), 1),
        (bytes(16), 0, bytearray(16), 0, (4,), (-1,), (1,), 1),
        (bytes(16), 0, bytearray(16), 0, (0,), (1,), (1,), 1),
        (bytes(16), 0, bytearray(16), 0, (4,), (1, 1), (1,), 1),
        (bytes(16), 0, bytearray(16), 0, (4,), (1,), (1,), 3),
        (bytes(16), 0, bytearray(16), 0, (2,) * 70, (0,) * 70, (0,) * 70, 1),
    ],
    ids=str,
)
def test_boxes_out_of_bounds_are_refused(arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"^[a-z0-9 ,]+$"):
        _kernel.copy(*arguments)


@pytest.mark.parametrize(
    ("values", "dtype", "width", "expected"),
    [
        ([1.0, 2.0, 3.0], "float32", 1, (0, -1)),
        ([1.0, float("nan"), float("inf"), 0.0], "float32", 1, (2, 1)),
        ([1.0, 2.0, float("nan"), float("-inf"), 0.0, 0.0], "float32", 2, (1, 1)),
        ([1.0] * 5000 + [float("inf")], "float64", 1, (1, 5000)),
        ([], "float32", 1, (0, -1)),
    ],
)
def test_what_is_not_finite_is_counted(values: list[float], dtype: str, width: int, expected: tuple[int, int]) -> None:
    contents = torch.tensor(values, dtype=DTYPES[dtype]).numpy().tobytes()
    assert _kernel.nonfinite(contents, _kernel.DTYPES[dtype], width, True) == expected


def test_the_first_value_out_of_range_is_named() -> None:
    values = torch.ones(5_000, dtype=torch.float64)
    values[[3_000, 4_000]] = 70_000.0
    table = table_of([(_kernel.MEMORY, -1, 0, _kernel.DTYPES["float64"], 0)])
    arguments = (
        table,
        b"",
        bytearray(values.numpy().tobytes()),
        40_000,
        5_000,
        _kernel.DTYPES["float16"],
        bytearray(10_000),
    )
    assert _kernel.mean(*arguments, 3) == (_kernel.OUT_OF_RANGE, 3_000, 0, 70_000.0)
    assert _kernel.mean(*arguments, 0)[0] == _kernel.DONE


def test_other_threads_run_meanwhile() -> None:
    slot = 32 * 2**20
    memory, output = mmap.mmap(-1, 2 * slot), mmap.mmap(-1, slot)
    worker = threading.Thread(
        target=_kernel.mean, args=(table_of([ROW, (*ROW[:4], slot)]), b"", memory, slot, slot // 4, 1, output, 3)
    )
    worker.start()
    steps = 0
    while worker.is_alive():
        steps += 1
    assert steps > 100, "the interpreter lock is held"


# -- Which engine ---------------------------------------------------------------------------------------------------


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (engine_for("cpu"), engine_for("cuda:0")) == ("native", "torch")
    monkeypatch.setenv("CKPT_AVG_ENGINE", "torch")
    assert engine_for("cpu") == "torch"
    monkeypatch.setenv("CKPT_AVG_ENGINE", "fast")
    with pytest.raises(UsageError, match=r"CKPT_AVG_ENGINE=fast: no such engine\. Use native or torch\."):
        engine_for("cpu")


def test_without_a_kernel_torch_does_the_work(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no C compiler was found. An explicit --io mmap is not silently something else."""
    monkeypatch.setattr("ckpt_avg.engine._kernel", None)
    result = average(paths, tmp_path / "out.safetensors", io="mmap")
    assert result.engine == "torch"
    assert [text for text in result.notices if text.startswith("--io mmap: only the native engine maps files")]
    monkeypatch.setenv("CKPT_AVG_ENGINE", "native")
    with pytest.raises(UsageError, match="CKPT_AVG_ENGINE=native: this installation has no native engine"):
        average(paths, tmp_path / "out2.safetensors")


_COMMANDS = """
import sys
from ckpt_avg.cli.main import cli
folder = sys.argv[1]
for command in (
    ["average", folder, "-o", f"{folder}/mean.safetensors", "--sha256"],
    ["check", folder],
    ["inspect", folder],
    ["verify", f"{folder}/mean.safetensors"],
    ["verify", f"{folder}/mean.safetensors", "--sources", f"{folder}/0.safetensors", f"{folder}/1.safetensors"],
):
    cli.main(command, standalone_mode=False)
    print("after", command[0], {"torch", "numpy"} & set(sys.modules), file=sys.stderr)
"""


def test_no_command_imports_torch_if_no_model_is_run(paths: list[Path]) -> None:
    """To import it takes longer than to average a few gigabytes."""
    command = [sys.executable, "-c", _COMMANDS, str(paths[0].parent)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("after") == 5
    assert ended.stderr.count("set()") == 5, ended.stderr
