"""Measures averaging side by side with the least it can cost and with other tools, in one run, as ratios.

    python tests/benchmarks/run.py [--only NAME[,NAME]] [--gigabytes 1] [--checkpoints 8] [--rounds 3] [--folder DIR]
                                   [--peers PYTHON]

    warm      float32 safetensors, page cache warm: next to the least it can cost
    profile   the same: the start, headers and plan, and the digest of the output alone
    cold      the same, the inputs dropped from the page cache before each run
    model     the same, with a module of the user's that imports torch
    readers   the same, with 0 to 32 threads that read ahead
    threads   warm, with 2 to 16 threads
    engines   warm, the native engine and torch
    ranks     warm, shared by the ranks of torchrun
    cuda      warm, on a GPU where there is one, next to the copies that the bus allows
    formats   warm, as many bytes of other dtypes, of torch.save and of shards, next to float32 safetensors
    tensors   warm, as many bytes in tensors of 10 KB, next to the usual layout
    fixture   the fixture run, next to the start of Python and of torch
    memory    peak resident sets by size, checkpoints and threads, over sparse files
    peers     mergekit and sd-mecha where PYTHON has them, and what people write by hand
    files     `check` and a dry run of up to 10,000 files
    llama     `check` and `inspect` of 100 checkpoints of a Llama 2 7B

In each round the programs run in turn. Times are medians of whole processes, ratios are medians of the rounds' ratios,
memory is the largest. `ckpt-avg` runs with two threads unless the table says otherwise. Outputs are compared with the
exact mean or with each other. --gigabytes is the size of a checkpoint and scales all sections. At most
2.5 · checkpoints times as much disk is needed, and for warm caches as much memory.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.metadata
import inspect
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import headers, sections
from benchmarks.harness import Setup, heading

import ckpt_avg

SECTIONS = {
    name[8:]: measure
    for module in (sections, headers)
    for name, measure in vars(module).items()
    if name.startswith("measure_")
}
_ROOM = 2.5  # inputs of two kinds, and outputs


def main() -> None:
    """Prints the tables of the chosen sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME[,NAME]", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where inputs and outputs are written, on a disk")
    parser.add_argument("--peers", metavar="PYTHON", default=sys.executable)
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(SECTIONS):
        parser.error(f"--only: expected some of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    nbytes = int(arguments.gigabytes * 1e9)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if (needed := _ROOM * arguments.checkpoints * nbytes) > (free := shutil.disk_usage(folder).free):
            parser.error(f"{folder}: {needed / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} are free")
        _print_machine()
        compileall.compile_dir(next(iter(ckpt_avg.__path__)), quiet=1)  # as an installer does
        setup = Setup(nbytes, arguments.checkpoints, arguments.rounds, Path(folder), arguments.peers)
        for name, measure in SECTIONS.items():
            if name in arguments.only:
                sizes = f"--gigabytes {arguments.gigabytes:g} --checkpoints {setup.checkpoints} --rounds {setup.rounds}"
                heading(name, inspect.getdoc(measure), f"run.py --only {name} {sizes}")
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
