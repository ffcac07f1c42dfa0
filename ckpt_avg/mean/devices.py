"""Where the mean is computed, and how a chunk gets there.

On the CPU a chunk is used where it lies. To a CUDA device it is copied through page-locked buffers, while the one
before it is being summed.
"""

from __future__ import annotations

import contextlib

import torch

from ckpt_avg.distributed.launch import Launch
from ckpt_avg.errors import UsageError


def choose_devices(name: str, launch: Launch | None = None) -> tuple[torch.device, torch.device]:
    """Returns the devices that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means: for the sums, and for the model.

    ``auto`` sums on the CPU: each input byte is used once, so a GPU gains little there. If several ranks share a
    machine, ``cuda`` is a GPU for each of them.

    Raises:
        UsageError: there is no such device, or it has no float64.
    """
    if name == "auto":
        return torch.device("cpu"), _device("cuda" if torch.cuda.is_available() else "cpu", launch)
    device = _device(name, launch)
    return device, device


def _device(name: str, launch: Launch | None) -> torch.device:
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


class Staging:
    """One worker's way of bringing chunks to a device. Not shared between threads.

    For a CUDA device there are two slots, each a page-locked buffer here and one of the same size there. A chunk is
    copied into one slot while the other's is still on its way or in use, by a stream of copies beside the stream of
    computation; events keep a buffer from being filled again before the other side is done with it.

    Args:
        device: where chunks go.
        nbytes: the largest chunk, in bytes.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._turn = 0
        self._slots: list[_Slot] = []
        if device.type == "cuda":
            self._compute, self._copies = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._slots = [_Slot(device, nbytes) for _ in range(2)]
            for stream in (self._compute, self._copies):  # the buffers' memory may still be in use there
                stream.wait_stream(torch.cuda.current_stream(device))

    def context(self) -> contextlib.AbstractContextManager[object]:
        """Makes the worker's stream of computation current, where there is one."""
        return torch.cuda.stream(self._compute) if self._slots else contextlib.nullcontext()

    def bring(self, chunk: torch.Tensor) -> torch.Tensor:
        """Returns the chunk on the device; on the CPU the chunk itself. It stands until the next call.

        What is to be done with it must be queued before the next call, on the stream of `context`.
        """
        if not self._slots:
            return chunk
        self._slots[self._turn].used.record(self._compute)
        self._turn ^= 1
        slot = self._slots[self._turn]
        slot.copied.synchronize()  # the page-locked buffer has been read
        here = slot.pinned[: chunk.nbytes].view(chunk.dtype)
        there = slot.on_device[: chunk.nbytes].view(chunk.dtype)
        here.copy_(chunk)
        self._copies.wait_event(slot.used)  # the device's buffer has been computed with
        with torch.cuda.stream(self._copies):
            there.copy_(here, non_blocking=True)
            slot.copied.record(self._copies)
        self._compute.wait_event(slot.copied)
        return there


class _Slot:
    """A pair of buffers, and when each of them is free again."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.on_device = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.copied, self.used = torch.cuda.Event(blocking=True), torch.cuda.Event()
