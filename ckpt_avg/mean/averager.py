"""`Averager`: computes the mean of a block in chunks, on the CPU or a CUDA device, and finds NaN and Inf."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import stream
from ckpt_avg.mean.arithmetic import as_real, mean_of_float64, mean_of_narrower, round_to, write_nans
from ckpt_avg.mean.blocks import Block
from ckpt_avg.mean.nonfinite import Constants, out_of_range, refuse_nonfinite
from ckpt_avg.mean.staging import Staging
from ckpt_avg.mean.stream import LEAST_CHUNK


class Averager:
    """Averages blocks. Not shared between threads.

    If the device runs out of memory, chunks get smaller.

    Args:
        device: where sums are computed.
        chunk: elements summed at a time.
        checkpoints: from which means are computed, to name those with NaN or Inf.
        allow_nonfinite: accept NaN and Inf in the inputs.
    """

    def __init__(
        self, device: torch.device, chunk: int, checkpoints: Sequence[Checkpoint], *, allow_nonfinite: bool
    ) -> None:
        self._device, self._chunk = device, chunk
        self._checkpoints = checkpoints
        self._allow_nonfinite = allow_nonfinite
        self._constants = Constants(checkpoints)
        self._buffers: _Buffers | None = None

    def average(self, block: Block, inputs: Mapping[int, torch.Tensor], output: torch.Tensor) -> None:
        """Computes the mean of a block.

        Args:
            block: which elements these are.
            inputs: the values of each checkpoint in the mean, by its index and in the order of the sum: flat, in the
                dtype in which it stores them, on the CPU.
            output: receives the mean: flat, in the output dtype, on the CPU.

        Raises:
            NonFiniteError: an input contains NaN or Inf, or the mean overflows the output dtype.
            torch.OutOfMemoryError: the device has no memory even for the smallest chunk.
        """
        while True:
            try:
                self._average(block, inputs, output)
                return
            except torch.OutOfMemoryError:
                if self._chunk <= LEAST_CHUNK:
                    raise
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # a copy into the buffers may not be finished
            self._buffers = None
            self._chunk = max(LEAST_CHUNK, self._chunk // 8)
            torch.cuda.empty_cache()

    def _average(self, block: Block, inputs: Mapping[int, torch.Tensor], output: torch.Tensor) -> None:
        if self._buffers is None:
            self._buffers = _Buffers(self._device, self._chunk)
        with self._buffers.staging.context():
            count = torch.tensor(float(len(inputs)), dtype=torch.float64, device=self._device)
            for start in range(0, block.numel, self._chunk):
                stop = min(block.numel, start + self._chunk)
                chunks = {index: values[start:stop] for index, values in inputs.items()}
                self._average_chunk(self._buffers, block, start, chunks, count, output[start:stop])

    def _average_chunk(
        self,
        buffers: _Buffers,
        block: Block,
        start: int,
        inputs: Mapping[int, torch.Tensor],
        count: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        chunks = list(inputs.values())

        def values(position: int) -> torch.Tensor:
            return as_real(buffers.staging.copy_in(chunks[position]))

        if any(each.dtype == torch.float64 for each in chunks):
            is_narrowed = output.dtype != torch.float64
            mean = mean_of_float64(lambda position: values(position).to(torch.float64), count, is_narrowed=is_narrowed)
        else:
            mean = mean_of_narrower(values, count, len(inputs), buffers.total, buffers.wide, buffers.single)
        # One sum shows any NaN or Inf, at 1/N of the cost of checking every input.
        if not self._allow_nonfinite and not math.isfinite(mean.sum().item()):
            width = mean.numel() // output.numel()  # a complex element is two real ones
            for tensor, begin, end in block.parts(start, start + output.numel()):
                here = mean[begin * width : end * width]
                if not here.isfinite().all() and (here.isnan().any() or tensor.name not in self._constants):
                    refuse_nonfinite([self._checkpoints[index] for index in inputs], tensor, _count_nonfinite)
        rounded = round_to(mean, as_real(output).dtype, (buffers.wide, buffers.single))
        if block.dtype is not block.source_dtype and not self._allow_nonfinite:
            overflowed = rounded.isfinite().logical_not_().logical_and_(mean.isfinite())
            if overflowed.any():
                first = _first(overflowed)
                tensor, index = block.locate(start + first)
                raise out_of_range(tensor, index, mean[first].item())
        if self._allow_nonfinite:
            write_nans(mean, rounded)
        as_real(output).copy_(rounded)


class _Buffers:
    """The staging buffers, the accumulator and an input widened once or twice, for one chunk."""

    def __init__(self, device: torch.device, chunk: int) -> None:
        self.staging = Staging(device, chunk * 8)
        with self.staging.context():  # a complex element is two real ones
            self.total = torch.empty(2 * chunk, dtype=torch.float64, device=device)
            self.wide = torch.empty(2 * chunk, dtype=torch.float64, device=device)
            self.single = torch.empty(2 * chunk, dtype=torch.float32, device=device)


def _first(found: torch.Tensor) -> int:
    """Returns the index of the first true element."""
    return int(found.to(torch.uint8).argmax())


def _count_nonfinite(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """Returns how many elements of a tensor are NaN or Inf, and the index of the first."""
    count, first = 0, -1
    for start, values in stream(checkpoint, checkpoint.spec.tensors[name]):
        bad = values.to(torch.complex128 if values.is_complex() else torch.float64).isfinite().logical_not_()
        if bad.any():
            first = start + _first(bad) if first < 0 else first
            count += int(bad.sum())
    return count, first
