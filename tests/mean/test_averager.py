"""Blocks of many small tensors, and a device that runs out of memory."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from mean.inputs import save
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_avg import NonFiniteError, average
from ckpt_avg.checkpoint.spec import BY_TORCH_NAME
from ckpt_avg.mean import arithmetic, averager, block_sizes
from ckpt_avg.mean.averager import Averager
from ckpt_avg.mean.blocks import Block
from ckpt_avg.mean.plan import OutputTensor

State = dict[str, torch.Tensor]
SHAPES = [(3,), (), (0, 5), (7, 11), (1,), (130,), (2, 2, 2)]


def small_tensors(number: int, dtype: torch.dtype = torch.float32) -> list[State]:
    """States of 300 tensors with few elements or none."""
    states = []
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        shapes = [SHAPES[index % len(SHAPES)] for index in range(300)]
        values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
        states.append({f"layer.{index}": each for index, each in enumerate(values)})
    return states


@pytest.mark.parametrize(
    ("suffix", "reverse", "memory"),
    [(".safetensors", False, 2**20), (".safetensors", False, 2**27), (".pt", False, 2**20), (".pt", True, 2**20)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_each_of_many_small_tensors_is_its_own_mean(
    tmp_path: Path, suffix: str, reverse: bool, dtype: torch.dtype, memory: int
) -> None:
    """Sums over neighbours at once must not shift an element, whatever is next to it in the file."""
    states = small_tensors(3, dtype)
    paths = save(tmp_path, [dict(reversed(each.items())) if reverse else each for each in states], suffix)
    average(paths, tmp_path / "out", memory=memory, threads=3)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    found = load_file(tmp_path / "out")
    for name in states[0]:
        exact = sum(state[name].to(wide) for state in states) / 3
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], exact.to(dtype), rtol=1e-7, atol=0, msg=name)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_nan_is_found_in_the_tensor_that_holds_it(tmp_path: Path, suffix: str) -> None:
    """The error must name the right one of the tensors in a block, and the index in that tensor."""
    states = small_tensors(2)
    states[1]["layer.143"][6, 10] = float("nan")
    with pytest.raises(NonFiniteError, match=r"tensor 'layer.143'(.|\n)*1 of 77 elements, the first at index 76"):
        average(save(tmp_path, states, suffix), tmp_path / "out")


def test_overflow_is_found_in_the_tensor_that_has_it(tmp_path: Path) -> None:
    states = small_tensors(2)
    for state in states:
        state["layer.145"][99] = 1e6
    with pytest.raises(NonFiniteError, match=r"tensor 'layer.145': the mean 1e\+06 at index 99"):
        average(save(tmp_path, states), tmp_path / "out", dtype="float16")


# -- A device without memory ----------------------------------------------------------------------------------------


def average_on_cpu(inputs: list[torch.Tensor], chunk: int, times: int = 1) -> None:
    """Averages a block several times; each must give the exact mean."""
    numel, dtype = len(inputs[0]), BY_TORCH_NAME["float32"]
    block = Block([(OutputTensor("w", (numel,), dtype, dtype, "mean", 0, numel), 0, numel)])
    one = Averager(torch.device("cpu"), chunk, (), allow_nonfinite=False)
    for _ in range(times):
        output = torch.empty(numel)
        one.average(block, dict(enumerate(inputs)), output)
        assert torch.equal(output, (sum(each.double() for each in inputs) / len(inputs)).float())


@pytest.mark.guarantee("cuda-memory")
@pytest.mark.parametrize("room", [1024, 5000, 70_000])
def test_smaller_chunks_where_the_device_is_full(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """An average must not fail, nor change, because another program uses the GPU's memory."""
    made: list[int] = []
    buffers = averager._Buffers

    def limited(device: torch.device, chunk: int) -> averager._Buffers:
        made.append(chunk)
        if chunk > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return buffers(device, chunk)

    monkeypatch.setattr(averager, "_Buffers", limited)
    average_on_cpu([torch.randn(200_001) for _ in range(3)], 65_536, times=2)
    assert made[-1] <= room
    assert len(made) == len(set(made)), "the smaller chunk is kept"


def test_it_fails_in_the_middle_and_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out at any chunk: those before it are computed again, to the same bits."""
    real = averager.mean_of_narrower
    calls: list[int] = []

    def sometimes(values: object, *arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(values, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(averager, "mean_of_narrower", sometimes)
    average_on_cpu([torch.randn(40_000) for _ in range(2)], 16_384)


@pytest.mark.guarantee("cuda-memory")
def test_no_room_for_the_smallest_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must end, with torch's error, not try for ever."""

    def full(device: torch.device, chunk: int) -> averager._Buffers:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(averager, "_Buffers", full)
    with pytest.raises(torch.OutOfMemoryError):
        average_on_cpu([torch.ones(10)], 65_536)


class Allocated(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, except those that exist already.

    Attributes:
        most: the most bytes at a time.
    """

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()
        self.most = 0
        self._existing = [each.untyped_storage() for each in existing]
        self._allocated: list[weakref.ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            alive = [storage for each in self._allocated if (storage := each()) is not None]
            if not any(storage is result.untyped_storage() for storage in [*self._existing, *alive]):
                alive.append(result.untyped_storage())
            self._allocated = [weakref.ref(storage) for storage in alive]
            self.most = max(self.most, sum(storage.nbytes() for storage in alive))
        return result


@pytest.mark.parametrize("allow_nonfinite", [False, True])
@pytest.mark.parametrize(
    ("stored", "written"),
    [
        *(("float32", written) for written in ("float32", "bfloat16", "float16", "float64")),
        *(("float64", written) for written in ("float64", "bfloat16", "float32")),
        *((each, each) for each in ("bfloat16", "float16", "float8_e5m2", "complex64")),
    ],
)
def test_sums_take_no_more_memory_than_blocks_leave_for_them(
    monkeypatch: pytest.MonkeyPatch, stored: str, written: str, allow_nonfinite: bool
) -> None:
    """Of a GPU: blocks have the size at which the inputs and these sums fit in --memory."""
    monkeypatch.setattr(arithmetic, "_has_subnormal", lambda values: True)  # as on CUDA, which does not look
    numel = 10_000
    tensor = OutputTensor("w", (numel,), BY_TORCH_NAME[stored], BY_TORCH_NAME[written], "mean", 0, numel)
    inputs = [torch.randn(2 * numel) for _ in range(3)]
    dtype = getattr(torch, stored)
    values = [each.view(dtype) if dtype.is_complex else each[:numel].to(dtype) for each in inputs]
    output = torch.empty(numel, dtype=getattr(torch, written))
    one = Averager(torch.device("cpu"), numel, (), allow_nonfinite=allow_nonfinite)
    with Allocated(*values, output) as allocated:
        one.average(Block([(tensor, 0, numel)]), dict(enumerate(values)), output)
    most = block_sizes._FLOAT64_SUMS if stored == "float64" else block_sizes._SUMS
    assert 0.5 * most * numel < allocated.most < most * numel + 1000
