"""Blocks of many small tensors, and a device that runs out of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ckpt_avg import NonFiniteError, average
from ckpt_avg.checkpoint.spec import BY_TORCH_NAME
from ckpt_avg.mean import averager
from ckpt_avg.mean.averager import Averager
from ckpt_avg.mean.blocks import Block
from ckpt_avg.mean.plan import OutputTensor

SHAPES = [(3,), (), (0, 5), (7, 11), (1,), (130,), (2, 2, 2)]


def tensors(seed: int, dtype: torch.dtype = torch.float32, count: int = 300) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer.{index}": torch.randn(SHAPES[index % len(SHAPES)], generator=generator, dtype=torch.float64).to(dtype)
        for index in range(count)
    }


def as_safetensors(values: dict[str, torch.Tensor], path: Path) -> None:
    save_file(values, path.with_suffix(".safetensors"))


def as_torch(values: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(values, path.with_suffix(".pt"))


def as_torch_in_another_order(values: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(dict(reversed(values.items())), path.with_suffix(".pt"))


@pytest.mark.parametrize("write", [as_safetensors, as_torch, as_torch_in_another_order])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("memory", [2**20, 2**27])
def test_each_of_many_small_tensors_is_its_own_mean(
    tmp_path: Path, write: Callable[[dict[str, torch.Tensor], Path], None], dtype: torch.dtype, memory: int
) -> None:
    """Sums over neighbours at once must not shift an element, whatever lies beside it in the file."""
    runs = [tensors(seed, dtype) for seed in range(3)]
    for index, values in enumerate(runs):
        write(values, tmp_path / f"step_{index}")
    average(sorted(tmp_path.iterdir()), tmp_path / "out", memory=memory, threads=3)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    with safe_open(tmp_path / "out", framework="pt") as found:
        for name in runs[0]:
            exact = sum(values[name].to(wide) for values in runs) / 3
            assert found.get_tensor(name).dtype == dtype
            torch.testing.assert_close(found.get_tensor(name), exact.to(dtype), rtol=1e-7, atol=0, msg=name)


@pytest.mark.parametrize("write", [as_safetensors, as_torch])
def test_nan_is_found_in_the_tensor_that_holds_it(
    tmp_path: Path, write: Callable[[dict[str, torch.Tensor], Path], None]
) -> None:
    """Within a run of neighbours the error must name the right one, and the index in it."""
    for index in range(2):
        values = tensors(index)
        if index:
            values["layer.143"][6, 10] = float("nan")
        write(values, tmp_path / f"step_{index}")
    with pytest.raises(NonFiniteError, match=r"tensor 'layer.143'(.|\n)*1 of 77 elements, the first at index 76"):
        average(sorted(tmp_path.iterdir()), tmp_path / "out")


def test_overflow_is_found_in_the_tensor_that_has_it(tmp_path: Path) -> None:
    for index in range(2):
        values = tensors(index)
        values["layer.145"][99] = 1e6
        as_safetensors(values, tmp_path / f"step_{index}")
    with pytest.raises(NonFiniteError, match=r"tensor 'layer.145'.*got 1e\+06 at index 99"):
        average(sorted(tmp_path.iterdir()), tmp_path / "out", dtype="float16")


def block_of(numel: int) -> Block:
    dtype = BY_TORCH_NAME["float32"]
    return Block([(OutputTensor("w", (numel,), dtype, dtype, "mean", 0, numel), 0, numel)])


@pytest.mark.guarantee("cuda-memory")
@pytest.mark.parametrize("room", [1024, 5000, 70_000])
def test_smaller_chunks_where_the_device_is_full(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """A run must not fail, nor change, because another program has taken the GPU's memory."""
    made: list[int] = []
    buffers = averager._Buffers

    def limited(device: torch.device, chunk: int) -> averager._Buffers:
        made.append(chunk)
        if chunk > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return buffers(device, chunk)

    monkeypatch.setattr(averager, "_Buffers", limited)
    inputs = [torch.randn(200_001) for _ in range(3)]
    outputs = [torch.empty(200_001) for _ in range(2)]
    one = Averager(torch.device("cpu"), 65_536, (), allow_nonfinite=False)
    for output in outputs:
        one.average(block_of(200_001), inputs, output)
    expected = (sum(each.double() for each in inputs) / 3).float()
    assert all(torch.equal(output, expected) for output in outputs)
    assert made[-1] <= room
    assert len(made) == len(set(made)), "the smaller chunk is kept"


def test_it_fails_in_the_middle_and_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory may run out at any chunk: those before it are computed again, to the same bits."""
    real = averager.mean_of_narrower
    calls: list[int] = []

    def sometimes(chunk: object, *arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(chunk, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(averager, "mean_of_narrower", sometimes)
    inputs = [torch.randn(40_000) for _ in range(2)]
    output = torch.empty(40_000)
    Averager(torch.device("cpu"), 16_384, (), allow_nonfinite=False).average(block_of(40_000), inputs, output)
    assert torch.equal(output, (sum(each.double() for each in inputs) / 2).float())


@pytest.mark.guarantee("cuda-memory")
def test_no_room_for_the_smallest_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must end, with torch's error, not try for ever."""

    def full(device: torch.device, chunk: int) -> averager._Buffers:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(averager, "_Buffers", full)
    with pytest.raises(torch.OutOfMemoryError):
        Averager(torch.device("cpu"), 65_536, (), allow_nonfinite=False).average(
            block_of(10), [torch.ones(10)], torch.empty(10)
        )
