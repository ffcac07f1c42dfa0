"""The torch engine: reads blocks and averages them with torch, on a CUDA device or a CPU without the native engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import read_bytes, torch_dtype
from ckpt_avg.mean.averager import Averager
from ckpt_avg.mean.blocks import Block
from ckpt_avg.mean.staging import Staging


class TorchEngine:
    """Averages blocks. Not shared between threads; the thread that creates it uses one thread of torch.

    On a CUDA device the inputs of a block are kept there, unless it runs out of memory: from then on they stay in the
    memory of the host, and go to the device in chunks.

    Args:
        device: where sums are computed.
        chunk: elements summed at a time.
        checkpoints: the inputs.
        allow_nonfinite: accept NaN and Inf in the inputs.
    """

    def __init__(self, device: str, chunk: int, checkpoints: Sequence[Checkpoint], *, allow_nonfinite: bool) -> None:
        torch.set_num_threads(1)  # the workers are the parallelism
        torch.set_flush_denormal(False)  # of this thread, which inherits what the program has set
        self._staging = None if device == "cpu" else Staging(torch.device(device))
        self._is_full = False
        self._averager = Averager(torch.device(device), chunk, checkpoints, allow_nonfinite=allow_nonfinite)
        self._checkpoints, self._chunk = checkpoints, chunk
        self._values: dict[int, torch.Tensor] = {}

    def fit(self, block: Block, indices: Sequence[int]) -> list[Block]:
        """Returns the block, or smaller ones if elements have to be gathered: those have the elements of a chunk."""
        checkpoints = [self._checkpoints[index] for index in indices]
        is_whole = all(len(block.stored_in(checkpoint)) == 1 for checkpoint in checkpoints)
        return [block] if is_whole else block.split(self._chunk, checkpoints)

    def read(self, block: Block, indices: Sequence[int]) -> None:
        """Reads the elements of a block from each of these checkpoints, in the dtype in which it stores them."""
        self._values = {}  # the block before is not kept as well
        for index in indices:
            self._values[index] = self._read(block, self._checkpoints[index])

    def average(
        self, block: Block, indices: Sequence[int], weights: Sequence[float] | None, output: memoryview
    ) -> None:
        """Computes the mean of a block that `read` was called with last, as `Averager.average` does."""
        if self._staging is None:
            self._average(block, indices, weights, torch.frombuffer(output, dtype=torch.uint8))
            return
        mean = self._staging.mean(len(output))
        try:
            self._average(block, indices, weights, mean)
            is_full = False
        except torch.OutOfMemoryError:
            is_full = True  # while the error exists, so do the values on the device
        if is_full:
            self._keep_on_the_host()
            self._average(block, indices, weights, mean)
        self._staging.fetch(len(output), output)

    def _average(
        self, block: Block, indices: Sequence[int], weights: Sequence[float] | None, output: torch.Tensor
    ) -> None:
        inputs = {index: self._values[index] for index in indices}
        self._averager.average(block, inputs, output.view(torch_dtype(block.dtype)), weights)

    def _read(self, block: Block, checkpoint: Checkpoint) -> torch.Tensor:
        ranges = block.stored_in(checkpoint)
        if self._staging is not None and not self._is_full:
            try:
                return self._staging.read(checkpoint, ranges)
            except torch.OutOfMemoryError:
                self._keep_on_the_host()
        return torch.frombuffer(read_bytes(checkpoint, ranges), dtype=torch_dtype(ranges[0][0].dtype))

    def _keep_on_the_host(self) -> None:
        self._is_full = True
        self._values = {index: values.cpu() for index, values in self._values.items()}
        torch.cuda.empty_cache()
