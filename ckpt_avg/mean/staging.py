"""Page-locked memory, through which inputs reach a CUDA device and means come back.

A worker has one stream, on which the device does everything in order: it copies an input, then sums it, and copies a
mean when it is complete. So nothing has to wait for anything there. The worker itself waits in two places only: before
it reads into memory that may still be being copied, and for a block's mean. What the device does for one worker
overlaps with what it does for the others, and with their reading.
"""

from __future__ import annotations

import ctypes

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import Ranges, read_into, torch_dtype


class Staging:
    """The page-locked memory of the worker that creates it, whose current stream is then a new one.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_stream(torch.cuda.Stream(device))  # of this thread
        self._device = device
        self._inputs = [_PageLocked(), _PageLocked()]
        self._mean = _PageLocked()

    def read(self, checkpoint: Checkpoint, ranges: Ranges) -> torch.Tensor:
        """Returns elements of one dtype, flat, on the device. The next input is read while these are copied.

        Raises:
            torch.OutOfMemoryError: the device has no memory for them.
            ChangedWhileReadingError, CheckpointFormatError: as `read_into`.
        """
        memory = self._inputs[0]
        self._inputs.reverse()
        nbytes = sum((stop - start) * tensor.dtype.itemsize for tensor, start, stop in ranges)
        values = memory.take(nbytes)
        read_into(checkpoint, ranges, _bytes_of(values))
        copied = _queue_copy(values.view(torch_dtype(ranges[0][0].dtype)), self._device)
        memory.in_use_until_now()
        return copied

    def mean(self, nbytes: int) -> torch.Tensor:
        """Returns memory for the mean of a block, as bytes, to be copied to without blocking."""
        return self._mean.take(nbytes)

    def fetch(self, nbytes: int, output: memoryview) -> None:
        """Waits for everything so far, then copies the mean to ``output``."""
        self._mean.in_use_until_now()
        # torch copies without the interpreter lock.
        torch.frombuffer(output, dtype=torch.uint8).copy_(self._mean.take(nbytes))


class _PageLocked:
    """Memory that the device copies from or to."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = torch.cuda.Event(blocking=True)

    def take(self, nbytes: int) -> torch.Tensor:
        """Waits for the last use, and returns so many bytes; the same ones again if they are enough."""
        self._used.synchronize()
        if self._memory.nbytes < nbytes:
            self._memory = _page_locked(nbytes)
        return self._memory[:nbytes]

    def in_use_until_now(self) -> None:
        """Says that what has been queued on the stream so far uses it."""
        self._used.record()


def _page_locked(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _queue_copy(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    return values.to(device, non_blocking=True)


def _bytes_of(values: torch.Tensor) -> memoryview:
    """Returns the memory of contiguous values on the CPU, to be used while they exist."""
    return memoryview((ctypes.c_char * values.nbytes).from_address(values.data_ptr())).cast("B")
