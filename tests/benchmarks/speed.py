"""Float32 safetensors checkpoints: page cache warm and cold, more threads, and how soon the first byte is read."""

from __future__ import annotations

import os
import subprocess
import sys

from checking import difference
from page_cache import cool, resident, warm
from programs import FLOOR, HERE, OURS, floor, ours
from rounds import Program, Setup, importing, in_turn, median, output_of, ratio, remove, row, table, walls

IMPORT = "import torch"


def measure_warm(setup: Setup) -> None:
    """Wall seconds, page cache warm, as a ratio to the floor."""
    inputs, outputs = setup.plain(), setup.scratch()
    programs = {FLOOR: floor(inputs), OURS: ours(inputs)}
    runs = in_turn(programs, setup.rounds, outputs)
    print(f"{_described(setup)}, page cache warm, whole process, medians of {setup.rounds} rounds\n")
    table("program", "wall, s", "ratio to the floor", "CPU, s", "peak RSS, MiB", "anonymous, MiB")
    for name, of_program in runs.items():
        cpu = median(one.cpu for one in of_program)
        peaks = max(one.peak for one in of_program), max(one.anonymous for one in of_program)
        times = median(walls(of_program)), ratio(walls(of_program), walls(runs[FLOOR]))
        row(name, *times, cpu, *(f"{peak:.0f}" for peak in peaks))
    found = difference(output_of(OURS, programs, outputs), inputs)
    if found.wrong:
        raise AssertionError(f"ckpt-avg: {found}")
    print(f"\nEach of the {found.elements:,} elements of ckpt-avg's output is the float64 mean, rounded.")
    remove(outputs)


def measure_cold(setup: Setup) -> None:
    """Wall seconds where each program finds nothing of the inputs in the page cache."""
    inputs, outputs = setup.plain(), setup.scratch()
    left: list[str] = []

    def before(name: str, program: Program) -> None:
        left.append(f"{cool(program.reads):.4f} ({name.partition(':')[0]})")

    runs = in_turn({FLOOR: floor(inputs), OURS: ours(inputs)}, setup.rounds, outputs, before)
    after = resident(inputs)
    nbytes = sum(path.stat().st_size for path in inputs)
    print(f"{_described(setup)}, page cache of the inputs dropped before each run, medians of {setup.rounds} rounds\n")
    table("program", "wall, s", "ratio to the floor", "input, MB/s", "CPU, s", "peak RSS, MiB")
    for name, of_program in runs.items():
        wall, cpu = median(walls(of_program)), median(one.cpu for one in of_program)
        peak = f"{max(one.peak for one in of_program):.0f}"
        row(name, wall, ratio(walls(of_program), walls(runs[FLOOR])), f"{nbytes / wall / 1e6:.0f}", cpu, peak)
    print(f"\nFraction of the inputs' pages in memory before each run: {', '.join(left)}; after the last: {after:.4f}.")
    remove(outputs)


def measure_threads(setup: Setup) -> None:
    """Wall seconds with 1, 2, 4, … threads, as a ratio to 1."""
    inputs, outputs = setup.plain(), setup.scratch()
    cores = len(os.sched_getaffinity(0))
    counts = sorted({1, 2, cores, *(2**power for power in range(cores.bit_length()))})
    programs = {IMPORT: importing("torch")}
    programs |= {str(count): ours(inputs, "--threads", count) for count in counts}
    runs = in_turn(programs, setup.rounds, outputs)
    start = runs.pop(IMPORT)
    print(
        f"{_described(setup)}, page cache warm, medians of {setup.rounds} rounds, {cores} usable cores; "
        f"`import torch` {median(walls(start)):.2f} s\n"
    )
    table("`--threads`", "wall, s", "ratio to 1", "without `import torch`, s", "ratio to 1", "CPU, s", "peak RSS, MiB")
    one, net = walls(runs["1"]), walls(runs["1"], start)
    for name, of_program in runs.items():
        wall, work = walls(of_program), walls(of_program, start)
        cpu, peak = median(each.cpu for each in of_program), max(each.peak for each in of_program)
        row(name, median(wall), ratio(wall, one), median(work), ratio(work, net), cpu, f"{peak:.0f}")
    remove(outputs)


def measure_first(setup: Setup) -> None:
    """Seconds from the end of `import torch` to the first tensor byte."""
    inputs, outputs = setup.plain(), setup.scratch()
    rounds = max(5, setup.rounds)
    command = [sys.executable, str(HERE / "first_byte.py"), str(outputs / "out.safetensors"), *map(str, inputs)]
    seconds: dict[str, list[tuple[float, float]]] = {"warm": [], "cold": []}
    for _ in range(rounds):
        for state, prepare in (("warm", warm), ("cold", cool)):
            prepare(inputs)
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            imported, started = map(float, printed.split())
            seconds[state].append((imported, started))
    print(f"{_described(setup)}, from the end of `import torch`, {rounds} rounds\n")
    table("page cache of the inputs", "`import ckpt_avg`, s", "first tensor byte, s: median", "least", "most")
    for state, times in seconds.items():
        first = [started for _, started in times]
        shown = (median(imported for imported, _ in times), median(first), min(first), max(first))
        row(state, *(f"{value:.3f}" for value in shown))
    remove(outputs)


def _described(setup: Setup) -> str:
    return f"{setup.checkpoints} float32 safetensors checkpoints of {setup.nbytes / 1e9:.2f} GB"
