"""Whether the mean is faster on a CUDA device or on the CPU: measured on this machine, not guessed.

Each input byte is used once, so what decides is how fast bytes get to the device, against how fast these cores add. The
result's bytes are the same either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from ckpt_avg.checkpoint.spec import BY_TORCH_NAME
from ckpt_avg.mean.averager import Averager
from ckpt_avg.mean.blocks import Run
from ckpt_avg.mean.plan import OutputTensor, Piece, Plan
from ckpt_avg.mean.stream import divide_memory

WORTH = 32 * 2**30  # input bytes below which starting CUDA takes longer than it could save
_INPUTS = 8
_ELEMENTS = 4 * 1024 * 1024


def choose_by_race(
    asked: str, device: torch.device, nbytes: int, *, threads: int, memory: int, notice: Callable[[str], None]
) -> torch.device:
    """Returns where to compute the mean.

    Args:
        asked: the option; anything but ``auto`` is the answer by itself.
        device: what it stands for, where the refresh runs.
        nbytes: of all inputs.
        threads, memory: of the mean.
        notice: told who won.
    """
    cpu = torch.device("cpu")
    if asked != "auto" or device.type == "cpu":
        return device
    if nbytes < WORTH:
        return cpu
    rates = {each: rate(each, threads, memory) for each in (cpu, device)}
    winner = max(rates, key=lambda each: rates[each])
    found = " and ".join(f"{value / 1e9:.1f} GB/s on {each}" for each, value in rates.items())
    notice(f"the mean is computed on {winner}: {found}, measured here")
    return winner


def rate(device: torch.device, threads: int, memory: int) -> float:
    """Returns input bytes per second that so many workers average on a device; 0 where it cannot."""
    dtype = BY_TORCH_NAME["float32"]
    tensor = OutputTensor("w", (_ELEMENTS,), dtype, dtype, "mean", 0, _ELEMENTS)
    run = Run((Piece(tensor, 0, _ELEMENTS),))
    inputs = [torch.full((_ELEMENTS,), float(index)) for index in range(_INPUTS)]

    def work(averager: Averager) -> None:
        torch.set_num_threads(1)
        averager.average(run, inputs, torch.empty(_ELEMENTS))

    plan = Plan((tensor,), (), _INPUTS)
    chunk = divide_memory(memory, plan, threads=threads, checkpoints=_INPUTS, device=device).chunk
    averagers = [Averager(device, chunk, (), allow_nonfinite=True) for _ in range(threads)]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, averagers))  # allocations, kernels and pages that are needed once
            start = time.perf_counter()
            list(pool.map(work, averagers))
    except RuntimeError:  # no room, or no CUDA after all: then it has lost
        return 0.0
    finally:
        torch.set_num_threads(before)
    return threads * sum(each.nbytes for each in inputs) / (time.perf_counter() - start)
