"""`Averager`: computes the mean of a block in chunks, on the CPU or a CUDA device, and finds NaN and Inf."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import stream
from ckpt_avg.mean.arithmetic import as_real, mean_of_float64, mean_of_narrower, round_to, weighted_sum, write_nans
from ckpt_avg.mean.block_sizes import LEAST_CHUNK
from ckpt_avg.mean.blocks import Block
from ckpt_avg.mean.nonfinite import Constants, out_of_range, refuse_nonfinite


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

    def average(
        self,
        block: Block,
        inputs: Mapping[int, torch.Tensor],
        output: torch.Tensor,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Computes the mean of a block.

        On CUDA it is queued on the current stream, and looked at once, after all of it. (Sums of float64, and weighted
        ones, are looked at in each chunk.)

        Args:
            block: which elements these are.
            inputs: the values of each checkpoint in the mean, by its index and in the order of the sum: flat, in the
                dtype in which it stores them, on the CPU or all of them on the device.
            output: receives the mean: flat, in the output dtype, on the CPU. If it is page-locked, wait for the stream
                before you use it.
            weights: of the inputs; None if all count the same.

        Raises:
            NonFiniteError: an input contains NaN or Inf, or the mean overflows the output dtype, or its sum float64.
            torch.OutOfMemoryError: the device has no memory even for the smallest chunk; or it has none, and the inputs
                are on it.
        """
        while True:
            try:
                self._average(block, inputs, output, weights)
                return
            except torch.OutOfMemoryError:
                if self._chunk <= LEAST_CHUNK or any(values.is_cuda for values in inputs.values()):
                    raise
            self._buffers = None
            self._chunk = max(LEAST_CHUNK, self._chunk // 8)
            torch.cuda.empty_cache()

    def _average(
        self,
        block: Block,
        inputs: Mapping[int, torch.Tensor],
        output: torch.Tensor,
        weights: Sequence[float] | None,
    ) -> None:
        if self._buffers is None:
            self._buffers = _Buffers(self._device, self._chunk)
        may_overflow = block.dtype is not block.source_dtype or weights is not None
        values = list(inputs.values())
        starts = range(0, block.numel, self._chunk)
        sums: list[torch.Tensor] = []
        for start in starts:
            part = output[start : start + self._chunk]
            mean, rounded = self._mean(self._buffers, values, weights, start, part)
            if self._allow_nonfinite:
                write_nans(mean, rounded)
            else:
                # One sum shows any NaN or Inf, at 1/N of the cost of checking every input.
                sums.append(mean.sum())
                if may_overflow:
                    sums[-1].masked_fill_(_overflowed(mean, rounded).any(), math.nan)
            as_real(part).copy_(rounded, non_blocking=True)
        found = torch.stack(sums).tolist() if sums else []
        for start in (start for start, total in zip(starts, found, strict=False) if not math.isfinite(total)):
            part = output[start : start + self._chunk]
            mean, rounded = self._mean(self._buffers, values, weights, start, part)
            checkpoints = [self._checkpoints[index] for index in inputs]
            self._refuse(
                checkpoints, block, range(start, start + part.numel()), mean, rounded if may_overflow else None
            )

    def _mean(
        self,
        buffers: _Buffers,
        inputs: Sequence[torch.Tensor],
        weights: Sequence[float] | None,
        start: int,
        output: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the means of a chunk in float64, and rounded to the dtype of the output."""

        def values(index: int) -> torch.Tensor:
            chunk = inputs[index][start : start + output.numel()]
            return as_real(chunk.to(self._device, non_blocking=True))

        number = len(inputs)
        # A fill, since a copy to the device would wait for it.
        count = torch.full((), number, dtype=torch.float64, device=self._device)
        if weights is not None:
            mean = weighted_sum(values, weights, buffers.total, buffers.wide, buffers.single)
        elif any(each.dtype == torch.float64 for each in inputs):
            is_narrowed = output.dtype != torch.float64
            mean = mean_of_float64(
                lambda index: values(index).to(torch.float64), count, number, is_narrowed=is_narrowed
            )
        else:
            mean = mean_of_narrower(values, count, number, buffers.total, buffers.wide, buffers.single)
        return mean, round_to(mean, as_real(output).dtype, (buffers.wide, buffers.single))

    def _refuse(
        self,
        checkpoints: Sequence[Checkpoint],
        block: Block,
        elements: range,
        mean: torch.Tensor,
        cast: torch.Tensor | None,
    ) -> None:
        """Raises NonFiniteError if elements of a block are NaN or Inf, except in constants, or the cast overflows."""
        width = mean.numel() // len(elements)  # a complex element is two real ones
        for tensor, begin, end in block.parts(elements.start, elements.stop):
            here = mean[begin * width : end * width]
            if not here.isfinite().all() and (here.isnan().any() or tensor.name not in self._constants):
                refuse_nonfinite(checkpoints, tensor, _count_nonfinite)
        if cast is not None and (overflowed := _overflowed(mean, cast)).any():
            first = _first(overflowed)
            tensor, index = block.locate(elements.start + first)
            raise out_of_range(tensor, index, mean[first].item())


class _Buffers:
    """The accumulator and an input widened once or twice, for one chunk."""

    def __init__(self, device: torch.device, chunk: int) -> None:
        # A complex element is two real ones.
        self.total = torch.empty(2 * chunk, dtype=torch.float64, device=device)
        self.wide = torch.empty(2 * chunk, dtype=torch.float64, device=device)
        self.single = torch.empty(2 * chunk, dtype=torch.float32, device=device)


def _overflowed(mean: torch.Tensor, cast: torch.Tensor) -> torch.Tensor:
    known = cast.to(torch.float32) if cast.element_size() == 1 else cast  # not every float8 dtype has isfinite
    return known.isfinite().logical_not_().logical_and_(mean.isfinite())


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
