"""How much a worker computes at a time, such that all workers together stay within ``--memory``."""

from __future__ import annotations

import mmap

from ckpt_avg.checkpoint.spec import DType
from ckpt_avg.mean.plan import Plan

LEAST_CHUNK = 1024  # elements
# Elements that torch sums at a time: few enough that the float64 sum and the widened input, 2 MiB together, stay in the
# cache of a core, and enough to outweigh the calls.
_CHUNK = 128 * 1024
_MOST_ELEMENTS = 8 * 1024 * 1024  # larger blocks are no faster
_MOST_CUDA_ELEMENTS = 1024 * 1024  # of a block, which is one chunk: enough to outweigh the launches of its kernels
_SUMS, _FLOAT64_SUMS = 70, 150  # bytes on CUDA for each element: what the sum, the rounding and the checks need at most
_CUDA_MEMORY = 32 * 1024 * 1024  # bytes of a worker
_LEAST_BLOCKS = 2  # for each worker, so that all finish at about the same time
_MOST_OUTPUT = 4 * 1024 * 1024  # bytes of a block of the native engine: enough to outweigh what Python does for each
_MOST_INPUT = 256 * 1024 * 1024  # bytes of a block in all checkpoints: a call is not interrupted
# Bytes of all windows of a worker together, so that memory does not grow with the checkpoints.
# The kernel uses less of a window that it reads a file into (READ_TOGETHER).
_WINDOWS = 4 * 1024 * 1024
_LEAST_WINDOW = 64 * 1024  # where they would get smaller than this, they take more together


def sizes_for(
    device: str, *, is_native: bool, memory: int, threads: int, plan: Plan, within: range, checkpoints: int
) -> tuple[int, int]:
    """Returns the size of a window (in bytes) or of a chunk (in elements), as the engine needs it, and of a block.

    Args:
        device: where sums are computed.
        is_native: whether the native engine computes them.
        memory: bytes of working memory, shared by the workers.
        threads: workers.
        plan: the tensors of the output.
        within: the bytes of the data section to compute.
        checkpoints: how many there are.
    """
    sizes = _native_sizes if is_native else _torch_sizes if device == "cpu" else _cuda_sizes
    return sizes(memory, threads, plan, within, checkpoints)


def most_workers(device: str, memory: int) -> int | None:
    """Returns how many workers are worth starting; None if there may be one for each core.

    On CUDA each operation of torch holds the interpreter lock for some microseconds, whatever the size of the block. If
    a worker has less than `_CUDA_MEMORY`, workers wait for the lock longer than for the copies; and torch reserves 22
    MiB of the device for each stream.
    """
    return None if device == "cpu" else max(1, memory // _CUDA_MEMORY)


def _native_sizes(memory: int, threads: int, plan: Plan, within: range, checkpoints: int) -> tuple[int, int]:
    """Returns the bytes of a window and the elements of a block such that the workers together use ``memory`` bytes.

    A worker has a window of each checkpoint, and the output of its block, in memory.
    """
    each = memory // threads
    output = min(_MOST_OUTPUT, each // 4)
    window = min(max(_WINDOWS // checkpoints, _LEAST_WINDOW), (each - output) // checkpoints)
    itemsize = max([tensor.dtype.itemsize for tensor in plan.tensors], default=1)
    most = min(output, _MOST_INPUT // checkpoints) // itemsize
    elements = min(most, _share(plan, within, threads, most // 16))
    return max(mmap.PAGESIZE, window - window % mmap.PAGESIZE), max(LEAST_CHUNK, elements)


def _torch_sizes(memory: int, threads: int, plan: Plan, within: range, checkpoints: int) -> tuple[int, int]:
    """Returns the elements of a chunk and of a block such that the workers together use ``memory`` bytes.

    For each element of its block, a worker has the bytes of every checkpoint and of the output in memory; for each
    element of a chunk a sum and a widened input (32 bytes, since a complex element has two parts). With more
    checkpoints, blocks are smaller.
    """
    each = memory // threads
    chunk = max(LEAST_CHUNK, min(_CHUNK, each // 64))
    # Bytes of an element in all inputs that are read, and in the output; of a copied element one input is read.
    nbytes = max(
        (checkpoints if is_mean else 1) * source.itemsize + dtype.itemsize for source, dtype, is_mean in _kinds(plan)
    )
    share = _share(plan, within, threads, chunk)
    elements = max(LEAST_CHUNK, min(_MOST_ELEMENTS, share, (each - 32 * chunk) // nbytes))
    return min(chunk, elements), elements


def _cuda_sizes(memory: int, threads: int, plan: Plan, within: range, checkpoints: int) -> tuple[int, int]:
    """Returns the elements of a chunk, which is a whole block, twice.

    The workers together use ``memory`` bytes of the host, and as many of the device. For each element of its block, a
    worker has on the device every input that is read, and room for the sum; on the host the output, and page-locked
    memory for two inputs and an output, which torch rounds up to powers of two.
    """
    nbytes = max(
        max(
            (checkpoints if is_mean else 1) * source.itemsize
            + (_FLOAT64_SUMS if source.torch_name == "float64" else _SUMS),
            4 * source.itemsize + 3 * dtype.itemsize,
        )
        for source, dtype, is_mean in _kinds(plan)
    )
    share = _share(plan, within, threads, _CHUNK)
    elements = max(LEAST_CHUNK, min(_MOST_CUDA_ELEMENTS, share, memory // threads // nbytes))
    return elements, elements


def _share(plan: Plan, within: range, threads: int, least: int) -> int:
    """Returns how many elements a block may have if each worker is to get several, but at least ``least``."""
    here = sum([tensor.numel for tensor in plan.tensors]) * len(within) // max(1, plan.nbytes)
    return max(least, here // (_LEAST_BLOCKS * threads))


def _kinds(plan: Plan) -> set[tuple[DType, DType, bool]]:
    """Returns what elements there are: the dtype of the inputs, that of the output, and whether they are averaged."""
    return {(tensor.source_dtype, tensor.dtype, tensor.rule == "mean") for tensor in plan.tensors}
