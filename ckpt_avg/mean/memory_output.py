"""An output in memory, and small tensors that are written over those of an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckpt_avg.checkpoint.tensor_reads import torch_dtype
from ckpt_avg.files import platform
from ckpt_avg.mean.plan import Plan

if TYPE_CHECKING:
    import torch

    from ckpt_avg.mean.stream import Write


class MemoryOutput:
    """The data section of an output in memory. Several threads may write to it at the same time."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._buffer = platform.memory(max(1, plan.nbytes), is_filled=True)

    def write(self, contents: memoryview, offset: int) -> None:
        """Writes bytes at an offset in the data section."""
        self._buffer[offset : offset + len(contents)] = contents

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors by name: views of this memory."""
        import torch

        return {
            tensor.name: torch.frombuffer(
                self._buffer, dtype=torch_dtype(tensor.dtype), count=tensor.numel, offset=tensor.offset
            ).view(tensor.shape)
            if tensor.numel
            else torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
            for tensor in self._plan.tensors
        }


def write_tensors(tensors: Mapping[str, torch.Tensor], plan: Plan, write: Write) -> None:
    """Writes small tensors over those in an output."""
    import torch

    planned = plan.by_name()
    for name, value in tensors.items():
        write(memoryview(bytes(value.reshape(-1).view(torch.uint8).tolist())), planned[name].offset)
