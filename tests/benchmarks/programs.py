"""Programs that benchmarks run and compare: ``python programs.py NAME OUTPUT INPUT...``."""

import ctypes
import mmap
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

_MADV_POPULATE_READ = 22
_STEP = 8 * 2**20
_BLOCK = 256 * 1024  # as fast as any size here, and up to 20 times as fast as 8 MiB: see docs/benchmarks.md


def floor(output: str, inputs: list[str]) -> None:
    """The least that averaging can cost: import torch, fault in each input page by 2 threads, write and fsync."""
    import torch  # noqa: F401 (its import is part of what is measured)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_touch, inputs))
    block = memoryview(bytes(_BLOCK))
    left = os.path.getsize(inputs[0])
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_EXCL)
    while left:
        left -= os.write(descriptor, block[: min(_BLOCK, left)])
    os.fsync(descriptor)


def _touch(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        for offset in range(0, size, _STEP):
            flags, access = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
            mapping = mmap.mmap(file.fileno(), min(_STEP, size - offset), flags=flags, prot=access, offset=offset)
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
            if libc.madvise(address, len(mapping), _MADV_POPULATE_READ):
                raise OSError(ctypes.get_errno(), path)


def naive(output: str, inputs: list[str]) -> None:
    """What people write by hand: one tensor at a time through safe_open, float64 sums, save_file."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    readers = [safe_open(path, framework="pt") for path in inputs]
    result = {}
    for name in readers[0].keys():  # noqa: SIM118 (the reader is no dict)
        total = readers[0].get_tensor(name).double()
        for reader in readers[1:]:
            total += reader.get_tensor(name)
        result[name] = (total / len(readers)).to(torch.float32)
    save_file(result, output)


def as_timm(output: str, inputs: list[str]) -> None:
    """As timm's avg_checkpoints.py does: one whole checkpoint after the other, float64 sums, one division."""
    import torch
    from safetensors.torch import load_file, save_file

    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for path in inputs:
        for name, tensor in load_file(path).items():
            if name in sums:
                sums[name] += tensor.to(torch.float64)
            else:
                sums[name] = tensor.clone().to(torch.float64)
            counts[name] = counts.get(name, 0) + 1
    for name, count in counts.items():
        sums[name].div_(count)
    limits = torch.finfo(torch.float32)
    save_file({name: total.clamp(limits.min, limits.max).to(torch.float32) for name, total in sums.items()}, output)


def by_sd_mecha(output: str, inputs: list[str]) -> None:
    """Averages with sd-mecha's recipe of `n_average`, in float64, by 2 threads."""
    import sd_mecha
    import torch

    recipe = sd_mecha.n_average(*map(sd_mecha.model, inputs))
    sd_mecha.merge(recipe, merge_dtype=torch.float64, output_dtype=torch.float32, threads=2, output=output)


def first_byte(output: str, inputs: list[str]) -> None:
    """Prints seconds: of `import ckpt_avg`, and from the end of `import torch` to the first tensor byte."""
    import torch  # noqa: F401 (whose import does not count)

    begin = time.perf_counter()
    from ckpt_avg import Progress, average

    imported = time.perf_counter()

    class Started(Exception):
        """The next thing would have been to read a tensor. Nothing is written."""

    def start(total: int) -> None:
        raise Started

    try:
        average(inputs, output, progress=Progress(start=start))
    except Started:
        print(imported - begin, time.perf_counter() - begin)


if __name__ == "__main__":
    _, _name, _output, *_inputs = sys.argv
    {each.__name__: each for each in (floor, naive, as_timm, by_sd_mecha, first_byte)}[_name](_output, _inputs)
