"""The native engine: averages blocks with kernel.c, which maps or reads the inputs itself, one window at a time.

A call takes a block, whatever its size, and works without the interpreter lock. In memory it needs a window of each
input: mapped pages, or a slot that the kernel fills. An input whose elements are not consecutive in its file is
gathered into its slot beforehand.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import offset_of, read_into, stream_bytes
from ckpt_avg.engine import kernel
from ckpt_avg.files import platform
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.mean.blocks import Block
from ckpt_avg.mean.nonfinite import Constants, out_of_range, refuse_nonfinite

_SMALL = 64 * 1024  # bytes below which reading is cheaper than mapping, faulting in and unmapping
_ROW = struct.Struct("5q")  # what is set of a row of the kernel's table: where, descriptor, offset, dtype, position


class NativeEngine:
    """Averages blocks. Not shared between threads.

    Args:
        checkpoints: the inputs.
        slot: bytes of the window of one input.
        shared: the elements of a block are averaged several times, so they are read into the slots once.
        allow_nonfinite: accept NaN and Inf in the inputs.
    """

    def __init__(
        self, checkpoints: Sequence[Checkpoint], slot: int, *, shared: bool = False, allow_nonfinite: bool = False
    ) -> None:
        built = kernel()
        if built is None:
            raise ValueError("there is no kernel")
        self._kernel = built
        self._checkpoints, self._slot, self._shared = checkpoints, slot, shared
        self._checks = 0 if allow_nonfinite else built.CHECK_FINITE | built.CHECK_RANGE
        self._constants = Constants(checkpoints)
        self._rows: list[bytes] = [b""] * len(checkpoints)
        self._memory = memoryview(platform.memory(len(checkpoints) * slot))
        self._files: list[tuple[InputFile, int] | None] = [None] * len(checkpoints)  # and the offset of the block

    def fit(self, block: Block, indices: Sequence[int]) -> list[Block]:
        """Returns the block, or smaller ones if elements have to be gathered: those fit in a slot."""
        if not any(self._is_gathered(block, index) for index in indices):
            return [block]
        checkpoints = [self._checkpoints[index] for index in indices]
        return block.split(self._slot // block.source_dtype.itemsize, checkpoints)

    def read(self, block: Block, indices: Sequence[int]) -> None:
        """Finds the elements of a block in each of these checkpoints; gathers those that are not consecutive."""
        for index in indices:
            checkpoint = self._checkpoints[index]
            ranges = block.stored_in(checkpoint)
            place = self._place(block, index)
            dtype = self._code(ranges[0][0].dtype.torch_name)
            self._files[index] = place
            position = index * self._slot
            nbytes = block.numel * ranges[0][0].dtype.itemsize
            if place is None or (self._is_gathered(block, index) and nbytes <= self._slot):
                read_into(checkpoint, ranges, self._memory[position : position + nbytes])
                row = (self._kernel.MEMORY, -1, 0, dtype, position)
            else:
                file, offset = place
                maps = min(self._slot, nbytes) >= _SMALL and file.is_mapped
                row = (self._kernel.MAP if maps else self._kernel.READ, file.descriptor(), offset, dtype, position)
            self._rows[index] = _ROW.pack(*row).ljust(self._kernel.ROW, b"\0")

    def average(
        self, block: Block, indices: Sequence[int], weights: Sequence[float] | None, output: memoryview
    ) -> None:
        """Computes the mean of a block.

        Args:
            block: one that `read` was called with last.
            indices: of the checkpoints, in the order of the sum; `read` was called with them.
            weights: theirs; None if all count the same.
            output: receives the mean, in bytes of the output dtype.

        Raises:
            NonFiniteError: an input contains NaN or Inf, or the mean overflows the output dtype, or its sum float64.
            CheckpointFormatError: a file cannot be read, or has changed.
            ResourceError: a file cannot be mapped.
        """
        packed = b"" if weights is None else struct.pack(f"{len(weights)}d", *weights)
        self._average(block, indices, packed, output, self._checks)

    def _average(self, block: Block, indices: Sequence[int], weights: bytes, output: memoryview, check: int) -> None:
        kernel = self._kernel
        # A complex element is a pair of real ones.
        width = 2 if block.source_dtype.kind == "complex" else 1
        dtype = self._code(block.dtype.torch_name)
        table = bytearray().join(self._rows[index] for index in indices)
        what, index, code, value = kernel.mean(
            table, weights, self._memory, self._slot, width * block.numel, dtype, output, check
        )
        if what == kernel.DONE:
            return
        if what == kernel.OUT_OF_RANGE:
            raise out_of_range(*block.locate(index // width), value)
        if what == kernel.NOT_FINITE:
            self._average_tensors(block, indices, weights, output, width)
            return
        file, offset = self._place_of(indices[index])
        if what == kernel.NOT_MAPPED:
            raise file.mapping_refused(code)
        raise file.failure(offset, code if what == kernel.NOT_READ else None)

    def _average_tensors(
        self, block: Block, indices: Sequence[int], weights: bytes, output: memoryview, width: int
    ) -> None:
        """Averages the tensors of a block with NaN or Inf one by one. Only constants may have Inf."""
        begin = 0
        for part in block.tensors():
            target = output[begin : begin + part.nbytes]
            begin += part.nbytes
            self.read(part, indices)
            self._average(part, indices, weights, target, self._kernel.CHECK_RANGE)
            bad, _ = self._kernel.nonfinite(target, self._code(block.dtype.torch_name), width, True)
            nans, _ = self._kernel.nonfinite(target, self._code(block.dtype.torch_name), width, False)
            tensor = part.ranges[0][0]
            if nans or (bad and tensor.name not in self._constants):
                refuse_nonfinite([self._checkpoints[each] for each in indices], tensor, self._count)
        self.read(block, indices)  # as it was, for another mean

    def _place_of(self, index: int) -> tuple[InputFile, int]:
        place = self._files[index]
        if place is None:
            raise ValueError("the kernel read no file of this checkpoint")
        return place

    def _is_gathered(self, block: Block, index: int) -> bool:
        """Whether the elements of a block are copied into a slot: not consecutive, or read once for several means."""
        place = self._place(block, index)
        return place is None or (self._shared and not place[0].is_mapped)

    def _place(self, block: Block, index: int) -> tuple[InputFile, int] | None:
        """Returns the file and the offset of a block's elements, if they are consecutive."""
        checkpoint = self._checkpoints[index]
        ranges = block.stored_in(checkpoint)
        tensor, start, _ = ranges[0]
        if len(ranges) > 1 or not tensor.is_contiguous:
            return None
        return checkpoint.files[tensor.file], offset_of(tensor, start)

    def _code(self, dtype: str) -> int:
        code: int = self._kernel.DTYPES["float32" if dtype == "complex64" else dtype]
        return code

    def _count(self, checkpoint: Checkpoint, name: str) -> tuple[int, int]:
        """Returns how many elements of a tensor are NaN or Inf, and the index of the first."""
        tensor = checkpoint.spec.tensors[name]
        count, first = 0, -1
        for start, contents in stream_bytes(checkpoint, tensor):
            width = 2 if tensor.dtype.kind == "complex" else 1
            found, index = self._kernel.nonfinite(contents, self._code(tensor.dtype.torch_name), width, True)
            if found:
                first = start + index if first < 0 else first
                count += found
        return count, first
