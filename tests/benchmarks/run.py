"""Measures averaging side by side with the least it can cost and with other tools, in one run, as ratios.

    python tests/benchmarks/run.py [--only NAME[,NAME]] [--gigabytes 1] [--checkpoints 8] [--rounds 3] [--folder DIR]
                                   [--peers PYTHON]

    warm     float32 safetensors, page cache warm: the floor and ckpt-avg
    cold     the same, each program after the page cache of its inputs was dropped
    threads  the same, warm, with 1, 2, 4, … threads
    first    the same: time from the end of `import torch` to the first tensor byte
    ranks    the same, warm, shared by the ranks of torchrun
    cuda     the same, warm, on a GPU, where there is one
    formats  bfloat16, float16, torch.save and shards of the same total bytes, next to float32 safetensors
    peers    mergekit and sd-mecha where PYTHON has them, and what people write by hand
    memory   peak resident sets of models of 0.25, 1 and 4 GiB and of 2, 8 and 32 checkpoints, over sparse files
    tensors  many small tensors, the usual ones, and one large tensor

In each round the programs run in turn; medians over the rounds are shown, and ratios are medians of each round's. All
times are of whole processes. Outputs are compared with the exact mean. --gigabytes scales the sizes of all sections. At
most 2 · checkpoints + 2 times as much disk is needed, and for warm caches as much memory.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import sections
from benchmarks.harness import Setup, arguments_of

# In the order of their definitions: the first ones share their inputs.
SECTIONS = {name[8:]: measure for name, measure in vars(sections).items() if name.startswith("measure_")}
SHARING = ("warm", "cold", "threads", "first", "ranks", "cuda", "formats")


def main() -> None:
    """Prints the tables of the chosen sections."""
    arguments = arguments_of(__doc__, SECTIONS, gigabytes=1.0, checkpoints=8, rounds=3, peers=sys.executable)
    _print_machine()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        nbytes = int(arguments.gigabytes * 1e9)
        setup = Setup(nbytes, arguments.checkpoints, arguments.rounds, Path(folder), arguments.peers)
        for name, measure in SECTIONS.items():
            if name not in arguments.only:
                continue
            if name not in SHARING:
                setup.release()
            print(f"\n## {name}\n", flush=True)
            if name not in SHARING or setup.has_room(name, 1.25 * (setup.checkpoints + 2) * nbytes):
                measure(setup)


def _print_machine() -> None:
    cores, usable = os.cpu_count(), len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "safetensors", "ckpt-avg")]
    print(
        f"{platform.machine()}, {cores} cores ({usable} usable), {memory:.0f} GiB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, {', '.join(versions)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
