"""The staging buffers through which chunks reach a CUDA device.

On the CPU a chunk is used without a copy. A CUDA device receives it through page-locked buffers, while the chunk before
it is being summed.
"""

from __future__ import annotations

import contextlib

import torch


class Staging:
    """The staging buffers of one worker. Not shared between threads.

    For a CUDA device there are two slots, each a page-locked buffer on the host and a buffer of the same size on the
    device. A chunk is copied into one slot, on a stream of its own, while the chunk in the other is still in use.
    Events prevent a buffer from being filled again before its last use is complete.

    Args:
        device: where chunks are copied to.
        nbytes: bytes of the largest chunk.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._turn = 0
        self._slots: list[_Slot] = []
        if device.type == "cuda":
            self._compute, self._copies = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._slots = [_Slot(device, nbytes) for _ in range(2)]
            for stream in (self._compute, self._copies):  # the memory of the buffers may still be in use on it
                stream.wait_stream(torch.cuda.current_stream(device))

    def context(self) -> contextlib.AbstractContextManager[object]:
        """Returns a context in which the worker's stream for computation is current; on the CPU it does nothing."""
        return torch.cuda.stream(self._compute) if self._slots else contextlib.nullcontext()

    def copy_in(self, chunk: torch.Tensor) -> torch.Tensor:
        """Returns the chunk on the device; on the CPU the chunk itself. Valid until the next call.

        Queue everything that uses it before the next call, on the stream of `context`.
        """
        if not self._slots:
            return chunk
        self._slots[self._turn].used.record(self._compute)
        self._turn ^= 1
        slot = self._slots[self._turn]
        slot.copied.synchronize()  # the page-locked buffer has been read
        pinned = slot.pinned[: chunk.nbytes].view(chunk.dtype)
        on_device = slot.on_device[: chunk.nbytes].view(chunk.dtype)
        pinned.copy_(chunk)
        self._copies.wait_event(slot.used)  # the device's buffer has been used
        with torch.cuda.stream(self._copies):
            on_device.copy_(pinned, non_blocking=True)
            slot.copied.record(self._copies)
        self._compute.wait_event(slot.copied)
        return on_device


class _Slot:
    """A pair of buffers, and the events after which each can be filled again."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.on_device = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.copied, self.used = torch.cuda.Event(blocking=True), torch.cuda.Event()
