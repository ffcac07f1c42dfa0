"""Page-locked memory on the way to a CUDA device, with a fake device that does everything as late as it may.

`tests/mean/test_devices.py` has the tests that need a GPU.
"""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mean.inputs import every_dtype, mixed_run, save

from ckpt_avg import average
from ckpt_avg.checkpoint.spec import BY_TORCH_NAME
from ckpt_avg.mean import block_sizes, staging, stream, torch_engine
from ckpt_avg.mean.averager import Averager
from ckpt_avg.mean.blocks import Block
from ckpt_avg.mean.plan import OutputTensor, Plan

ELEMENTS = 20_001


class Memory:
    """Gives memory, full of nonsense.

    Attributes:
        most: the most bytes that were in use at a time.
    """

    def __init__(self) -> None:
        self.most = 0
        self._given: list[weakref.ref[torch.UntypedStorage]] = []

    def take(self, nbytes: int) -> torch.Tensor:
        taken = torch.full((nbytes,), 0xAA, dtype=torch.uint8)
        self._given = [given for given in (*self._given, weakref.ref(taken.untyped_storage())) if given() is not None]
        self.most = max(self.most, sum(storage.nbytes() for given in self._given if (storage := given()) is not None))
        return taken


class LateDevice:
    """The stream of one worker. What is queued is done when the worker waits for it, or looks at a value.

    Args:
        room: how many copies of inputs fit on the device.
        full_at: the number of the block at which the device has no memory for sums.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, room: int | None = None, full_at: int | None = None) -> None:
        self._queued: collections.deque[Callable[[], object]] = collections.deque()
        self._done = self.copies = self.blocks = 0
        self.page_locked, self.memory = Memory(), Memory()
        self._room, self._full_at = room, full_at
        self._average = Averager.average
        for name, value in (("Stream", torch.device), ("set_stream", print), ("Event", lambda blocking: _Event(self))):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(
            staging, "_page_locked", lambda nbytes: self.page_locked.take(1 << (nbytes - 1).bit_length())
        )
        monkeypatch.setattr(staging, "_queue_copy", self.copy)
        monkeypatch.setattr(Averager, "average", lambda *values: LateDevice.average(self, *values))
        monkeypatch.setattr(torch_engine, "TorchEngine", _Engine)
        monkeypatch.setattr(stream, "engine_for", lambda device: "torch")
        monkeypatch.setattr(block_sizes, "_torch_sizes", block_sizes._cuda_sizes)

    def queue(self, work: Callable[[], object]) -> None:
        self._queued.append(work)

    def queued(self) -> int:
        return self._done + len(self._queued)

    def run(self, until: int) -> None:
        while self._done < until:
            self._queued.popleft()()
            self._done += 1

    def copy(self, values: torch.Tensor, device: torch.device) -> torch.Tensor:
        if self.copies == self._room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.copies += 1
        copied = self.memory.take(values.nbytes).view(values.dtype)
        self.queue(lambda: copied.copy_(values))
        return copied

    def average(
        self,
        averager: Averager,
        block: Block,
        inputs: Mapping[int, torch.Tensor],
        output: torch.Tensor,
        weights: Sequence[float] | None,
    ) -> None:
        self.blocks += 1
        if self.blocks == self._full_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.run(self.queued())  # the copies, after which the sums come in the stream
        mean = torch.empty_like(output)
        self._average(averager, block, inputs, mean, weights)
        self.queue(lambda: output.copy_(mean))


class _Event:
    def __init__(self, device: LateDevice) -> None:
        self._device, self._recorded = device, 0

    def record(self) -> None:
        self._recorded = self._device.queued()

    def synchronize(self) -> None:
        self._device.run(self._recorded)


class _Engine(torch_engine.TorchEngine):
    """Sums on the CPU, but has its inputs copied as for CUDA."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._staging = staging.Staging(torch.device("cpu"))


@pytest.mark.guarantee("same-bytes")
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"allow_nonfinite": True}], ids=str)
@pytest.mark.parametrize("memory", [2**20, 2**27])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_no_memory_is_used_again_before_the_device_is_done_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], memory: int, suffix: str
) -> None:
    """Otherwise one input is summed in the place of another, or a mean is written before it is there."""
    paths = save(tmp_path, mixed_run(5), suffix)
    average(paths, tmp_path / "expected", **options)
    device = LateDevice(monkeypatch)
    average(paths, tmp_path / "found", threads=1, memory=memory, **options)
    assert device.copies > 5 * 5, "the inputs went through the device"
    assert 0 < device.page_locked.most <= memory
    assert 0 < device.memory.most <= memory
    assert (tmp_path / "expected").read_bytes() == (tmp_path / "found").read_bytes()


@pytest.mark.guarantee("cuda-memory")
@pytest.mark.parametrize("full", [{"room": 0}, {"room": 7}, {"full_at": 1}, {"full_at": 3}], ids=str)
def test_a_device_that_gets_full_keeps_no_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: dict[str, int]
) -> None:
    """From the block at which it is full on, they stay in the memory of the host, and go there in chunks."""
    paths = save(tmp_path, every_dtype(3, ELEMENTS))
    average(paths, tmp_path / "expected")
    device = LateDevice(monkeypatch, **full)
    average(paths, tmp_path / "found", threads=1, memory=2**20)
    assert device.copies == full.get("room", 3 * full.get("full_at", 0))
    assert device.blocks > 3
    assert (tmp_path / "expected").read_bytes() == (tmp_path / "found").read_bytes()


@pytest.mark.parametrize(("asked", "expected"), [("cpu", "cpu"), ("cuda", "cuda:2"), ("cuda:1", "cuda:1")])
def test_workers_use_the_device_that_is_current_in_the_program(
    monkeypatch: pytest.MonkeyPatch, asked: str, expected: str
) -> None:
    """In a new thread the first GPU is current, whatever `torch.cuda.set_device` was called with."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    found: list[str] = []

    def engine(device: str, *arguments: Any, **options: Any) -> None:
        found.append(device)
        raise InterruptedError

    monkeypatch.setattr(torch_engine, "TorchEngine", engine)
    monkeypatch.setattr(stream, "engine_for", lambda device: "torch")
    tensor = OutputTensor("w", (9,), BY_TORCH_NAME["float32"], BY_TORCH_NAME["float32"], "mean", 0, 9)
    with pytest.raises(InterruptedError):
        stream.write_means([], Plan((tensor,), (), 1, {}), [], device=asked, threads=1, memory=2**27)
    assert found == [expected]
