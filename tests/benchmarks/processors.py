"""Float32 safetensors checkpoints on other processors: several ranks of one machine, and a GPU."""

from __future__ import annotations

import filecmp
import sys
from pathlib import Path

from programs import OURS, ours
from rounds import Program, Setup, importing, in_turn, median, output_of, ratio, remove, row, table, walls

IMPORT = "import torch"


def measure_ranks(setup: Setup) -> None:
    """Wall seconds with 2 and 4 ranks of torchrun, as a ratio to one process; the same bytes."""
    inputs = setup.plain()
    programs = {OURS: ours(inputs)}
    for size in (2, 4):
        programs[f"torchrun, {size} ranks"] = _with_ranks(size, inputs)
    print("Several ranks of one machine, page cache warm: what they cost, since one process uses its cores anyway.\n")
    _compare(setup, programs)


def measure_cuda(setup: Setup) -> None:
    """Wall seconds on the CPU and on a GPU, the start of CUDA apart; the same bytes."""
    import torch

    if not torch.cuda.is_available():
        print("left out: torch finds no CUDA device", flush=True)
        return
    inputs = setup.plain()
    print(f"{torch.cuda.get_device_name()}, page cache warm.\n")
    start = "import torch; torch.zeros(1, device='cuda')"
    programs = {"start of torch and CUDA": Program(lambda output: [sys.executable, "-c", start])}
    programs |= {f"--device {name}": ours(inputs, "--device", name) for name in ("cpu", "cuda", "auto")}
    _compare(setup, programs)


def _with_ranks(size: int, inputs: list[Path]) -> Program:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "-m", "ckpt_avg"]
    return Program(lambda output: [*launcher, "average", "-q", "-o", str(output), *map(str, inputs)], inputs)


def _compare(setup: Setup, programs: dict[str, Program]) -> None:
    outputs = setup.scratch()
    runs = in_turn({IMPORT: importing("torch"), **programs}, setup.rounds, outputs)
    first = next(name for name in programs if programs[name].reads)
    table("program", "wall, s", "ratio", "without `import torch`, s", "CPU, s", "peak RSS of one process, MiB")
    for name in programs:
        wall, cpu = walls(runs[name]), median(each.cpu for each in runs[name])
        net = median(walls(runs[name], runs[IMPORT]))
        row(name, median(wall), ratio(wall, walls(runs[first])), net, cpu, f"{max(one.peak for one in runs[name]):.0f}")
    written = [output_of(name, runs, outputs) for name in programs if programs[name].reads]
    if not all(filecmp.cmp(written[0], other, shallow=False) for other in written[1:]):
        raise AssertionError("the outputs differ")
    print("\nAll outputs are the same bytes.")
    remove(outputs)
