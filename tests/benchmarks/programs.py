"""Programs that benchmarks compare: ``python programs.py NAME[=THREADS] OUTPUT INPUT...``."""

import os
import sys
from threading import Thread

_READ, _WRITE = 1024 * 1024, 256 * 1024  # bytes at a time, about as fast as any size


def floor(output: str, inputs: list[str], threads: int) -> None:
    """Reads every input byte with some threads, then writes and fsyncs as many bytes as a checkpoint has."""
    _run(_readers(inputs, threads))
    _write(output, inputs)


def overlapped_floor(output: str, inputs: list[str], threads: int) -> None:
    """The same, and writes while it reads, as if the mean were known: the least that averaging can cost."""
    _run([*_readers(inputs, threads), Thread(target=_write, args=(output, inputs))])


def _readers(inputs: list[str], threads: int) -> list[Thread]:
    files = [os.open(path, os.O_RDONLY) for path in inputs]
    pieces = iter([(file, start) for file in files for start in range(0, os.fstat(file).st_size, _READ)])

    def read() -> None:
        memory = bytearray(_READ)
        for file, start in pieces:
            os.preadv(file, [memory], start)

    return [Thread(target=read) for _ in range(threads)]


def _write(output: str, inputs: list[str]) -> None:
    size = sum(map(os.path.getsize, inputs)) // len(inputs)
    block = memoryview(bytes(_WRITE))
    written = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_EXCL)
    for start in range(0, size, _WRITE):
        os.write(written, block[: size - start])
    os.fsync(written)


def _run(threads: list[Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def by_hand(output: str, inputs: list[str], threads: int) -> None:
    """What people write by hand: one tensor at a time through safe_open, float64 sums, save_file."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.set_num_threads(threads)
    readers = [safe_open(path, framework="pt") for path in inputs]
    result = {}
    for name in readers[0].keys():  # noqa: SIM118 (the reader is no dict)
        total = readers[0].get_tensor(name).double()
        for reader in readers[1:]:
            total += reader.get_tensor(name)
        result[name] = (total / len(readers)).to(torch.float32)
    save_file(result, output)


def as_timm(output: str, inputs: list[str], threads: int) -> None:
    """As timm's avg_checkpoints.py does: one whole checkpoint after the other, float64 sums, one division."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(threads)
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


def by_sd_mecha(output: str, inputs: list[str], threads: int) -> None:
    """Averages with sd-mecha's recipe of `n_average`, in float64."""
    import sd_mecha
    import torch

    recipe = sd_mecha.n_average(*map(sd_mecha.model, inputs))
    sd_mecha.merge(recipe, merge_dtype=torch.float64, output_dtype=torch.float32, threads=threads, output=output)


if __name__ == "__main__":
    _, _what, _output, *_inputs = sys.argv
    _name, _, _threads = _what.partition("=")
    _programs = (floor, overlapped_floor, by_hand, as_timm, by_sd_mecha)
    {each.__name__: each for each in _programs}[_name](_output, _inputs, int(_threads))
