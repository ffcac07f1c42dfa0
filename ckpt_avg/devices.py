"""Where the mean is computed, and how a chunk gets there.

On the CPU a chunk is used where it lies. On a CUDA device it is copied through a pinned buffer on the worker's own
stream, so that one worker's copy overlaps another's arithmetic.
"""

from __future__ import annotations

import contextlib
import os

import torch

from ckpt_avg.errors import UsageError
from ckpt_avg.launch import Launch

_MOST_THREADS = 1024


def choose_device(name: str, launch: Launch | None = None) -> torch.device:
    """Returns the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here; of several ranks each has its own.

    Raises:
        UsageError: there is no such device, or it has no float64.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launch is not None and torch.cuda.is_available():
        name = f"cuda:{launch.local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"--device {name}: expected cpu or cuda; the mean needs float64, which {device.type} may not have. Use cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices. Use --device cpu."
        )
    return device


def usable_cores() -> int:
    """Returns how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_threads(threads: int | None, launch: Launch | None = None) -> int:
    """Returns the number of workers: as asked for, or one for each usable core, shared with the ranks beside this one.

    Raises:
        UsageError: it is out of range.
    """
    if threads is None:
        return max(1, usable_cores() // (launch.local_size if launch else 1))
    if not 1 <= threads <= _MOST_THREADS:
        raise UsageError(f"--threads: expected from 1 to {_MOST_THREADS:,}, got {threads:,}.")
    return threads


class Staging:
    """One worker's way of bringing chunks to a device. Not shared between threads.

    Args:
        device: where chunks go.
        nbytes: the largest chunk, in bytes.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Two buffers: the next chunk is filled while the last one is still on its way.
        self._pinned = [
            torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2 if self._stream else 0)
        ]
        self._done = [torch.cuda.Event() for _ in self._pinned]
        self._turn = 0

    def context(self) -> contextlib.AbstractContextManager[object]:
        """Makes the worker's stream current, where there is one."""
        return torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext()

    def bring(self, chunk: torch.Tensor) -> torch.Tensor:
        """Returns the chunk on the device; on the CPU the chunk itself."""
        if self._stream is None:
            return chunk
        self._turn ^= 1
        self._done[self._turn].synchronize()
        pinned = self._pinned[self._turn][: chunk.nbytes].view(chunk.dtype)
        pinned.copy_(chunk)
        copied = pinned.to(self._device, non_blocking=True)
        self._done[self._turn].record()
        return copied
