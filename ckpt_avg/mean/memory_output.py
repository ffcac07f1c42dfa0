"""An average that is kept in memory: written like the output file's data section, read as tensors."""

from __future__ import annotations

import mmap

import torch

from ckpt_avg.checkpoint.tensor_reads import torch_dtype
from ckpt_avg.mean.plan import Plan


class MemoryOutput:
    """The data section of an output, in memory. Threads may write to it side by side."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._buffer = mmap.mmap(-1, max(1, plan.nbytes))

    def write(self, contents: memoryview, offset: int) -> None:
        """Takes bytes and their offset in the data section."""
        self._buffer[offset : offset + len(contents)] = contents

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors by name: views of this memory."""
        return {
            tensor.name: torch.frombuffer(
                self._buffer, dtype=torch_dtype(tensor.dtype), count=tensor.numel, offset=tensor.offset
            ).view(tensor.shape)
            if tensor.numel
            else torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
            for tensor in self._plan.tensors
        }
