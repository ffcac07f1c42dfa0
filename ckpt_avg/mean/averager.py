"""`Averager`: one worker's arithmetic, chunk by chunk, on the CPU or on a CUDA device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.errors import NonFiniteError
from ckpt_avg.mean.blocks import Run
from ckpt_avg.mean.devices import Staging
from ckpt_avg.mean.nonfinite import describe_nonfinite, refuse_overflow
from ckpt_avg.mean.rounding import round_to
from ckpt_avg.mean.sums import as_real, mean_of_float64, mean_of_narrower

LEAST_CHUNK = 1024  # elements


class Averager:
    """Averages runs of elements. Not shared between threads.

    Where the device's memory does not suffice, chunks get smaller.

    Args:
        device: where sums are kept.
        chunk: elements summed at a time.
        checkpoints: what is averaged, to name those with NaN or Inf.
        allow_nonfinite: let NaN and Inf of the inputs through.
    """

    def __init__(
        self, device: torch.device, chunk: int, checkpoints: Sequence[Checkpoint], *, allow_nonfinite: bool
    ) -> None:
        self._device, self._chunk = device, chunk
        self._checkpoints = checkpoints
        self._allow_nonfinite = allow_nonfinite
        self._buffers: _Buffers | None = None

    def average(self, run: Run, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> None:
        """Computes the mean of a run.

        Args:
            run: which elements these are.
            inputs: the values of each checkpoint, flat, in the dtype of the source, on the CPU.
            output: takes the mean: flat, in the dtype of the output, on the CPU.

        Raises:
            NonFiniteError: an input holds NaN or Inf, or the mean overflows the output dtype.
            torch.OutOfMemoryError: the device has no room for even the smallest chunk.
        """
        while not self._has_averaged(run, inputs, output):
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # a copy into the buffers may be on its way
            self._buffers = None
            self._chunk = max(LEAST_CHUNK, self._chunk // 8)
            torch.cuda.empty_cache()

    def _has_averaged(self, run: Run, inputs: Sequence[torch.Tensor], output: torch.Tensor) -> bool:
        try:
            if self._buffers is None:
                self._buffers = _Buffers(self._device, self._chunk)
            with self._buffers.staging.context():
                count = torch.tensor(float(len(inputs)), dtype=torch.float64, device=self._device)
                for start in range(0, run.numel, self._chunk):
                    stop = min(run.numel, start + self._chunk)
                    parts = [values[start:stop] for values in inputs]
                    self._average(self._buffers, run, start, parts, count, output[start:stop])
        except torch.OutOfMemoryError:
            if self._chunk <= LEAST_CHUNK:
                raise
            return False
        return True

    def _average(
        self,
        buffers: _Buffers,
        run: Run,
        start: int,
        inputs: Sequence[torch.Tensor],
        count: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        def chunk(index: int) -> torch.Tensor:
            return as_real(buffers.staging.bring(inputs[index]))

        if run.source_dtype.torch_name == "float64":
            mean = mean_of_float64(chunk, count)
        else:
            mean = mean_of_narrower(chunk, count, len(inputs), buffers.total, buffers.wide, buffers.single)
        # One number tells of any NaN or Inf: it costs 1/N of looking at every input.
        if not self._allow_nonfinite and not math.isfinite(mean.sum().item()):
            bad = mean.isfinite().logical_not_()
            if bad.any():
                parts = mean.numel() // output.numel()  # two of a complex element
                tensor, _ = run.locate(start + int(bad.to(torch.uint8).argmax()) // parts)
                raise NonFiniteError(describe_nonfinite(self._checkpoints, tensor), lines=True)
        rounded = round_to(mean, as_real(output).dtype, (buffers.wide, buffers.single))
        if run.dtype is not run.source_dtype and not self._allow_nonfinite:
            refuse_overflow(lambda index: run.locate(start + index), mean, rounded)
        as_real(output).copy_(rounded)


class _Buffers:
    """What lies on the device: the way there, the accumulator and an input widened once or twice, for one chunk."""

    def __init__(self, device: torch.device, chunk: int) -> None:
        self.staging = Staging(device, chunk * 8)
        with self.staging.context():  # a complex element is two real ones
            self.total = torch.empty(2 * chunk, dtype=torch.float64, device=device)
            self.wide = torch.empty(2 * chunk, dtype=torch.float64, device=device)
            self.single = torch.empty(2 * chunk, dtype=torch.float32, device=device)
