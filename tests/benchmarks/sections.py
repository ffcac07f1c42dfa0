"""The sections of `run`: what is measured, and the table of each."""

from __future__ import annotations

import filecmp
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks.checking import Difference, difference, same
from benchmarks.harness import (
    FLOOR,
    IMPORT,
    OURS,
    Program,
    Rounds,
    Setup,
    ckpt_avg,
    comparable,
    cool,
    importing,
    in_turn,
    ours,
    output_of,
    remove,
    resident,
    row,
    run,
    script,
    table,
    warm,
)  # fmt: skip
from benchmarks.inputs import Form, Shapes, files_of, layout, llama, many, write_random, write_run

_GIB = 2**30
_CACHED = 0.6  # of the machine's memory: the page cache holds inputs of this size next to everything else
CASES: dict[str, tuple[str, Form]] = {
    "bfloat16 safetensors": ("bfloat16", "safetensors"),
    "float16 safetensors": ("float16", "safetensors"),
    "float32 `torch.save`": ("float32", "zip"),
    "float32 safetensors, 4 shards with an index": ("float32", "shards"),
}
PLAIN = "float32 safetensors"
_OUTPUTS = 8  # at most, one of each program


def _assert_exact(name: str, found: Difference) -> None:
    if found.wrong:
        raise AssertionError(f"{name}: {found}")


# -- Float32 safetensors: page cache warm and cold, threads, and how soon the first byte is read -------------------


def _described(setup: Setup) -> str:
    return f"{setup.checkpoints} float32 safetensors checkpoints of {setup.nbytes / 1e9:.2f} GB"


def measure_warm(setup: Setup) -> None:
    """Wall seconds, page cache warm, as a ratio to the floor."""
    inputs, outputs = setup.plain(), setup.scratch()
    programs = {FLOOR: script("floor", inputs), OURS: ours(inputs)}
    runs = in_turn(programs, setup.rounds, outputs)
    print(f"{_described(setup)}, page cache warm, whole process, medians of {setup.rounds} rounds\n")
    table("program", "wall, s", "ratio to the floor", "CPU, s", "peak RSS, MiB", "anonymous, MiB")
    for name, done in runs.items():
        row(name, done.wall, done.ratio(runs[FLOOR]), done.cpu, done.peak, done.anonymous)
    found = difference(output_of(OURS, programs, outputs), inputs)
    _assert_exact(OURS, found)
    print(f"\nEach of the {found.elements:,} elements of ckpt-avg's output is the float64 mean, rounded.")
    remove(outputs)


def measure_cold(setup: Setup) -> None:
    """Wall seconds if nothing of the inputs is in the page cache."""
    inputs, outputs = setup.plain(), setup.scratch()
    left: list[str] = []

    def before(name: str, program: Program) -> None:
        left.append(f"{cool(program.reads):.4f} ({name.partition(':')[0]})")

    runs = in_turn({FLOOR: script("floor", inputs), OURS: ours(inputs)}, setup.rounds, outputs, before)
    after = resident(inputs)
    megabytes = sum(path.stat().st_size for path in inputs) / 1e6
    print(f"{_described(setup)}, page cache of the inputs dropped before each run, medians of {setup.rounds} rounds\n")
    table("program", "wall, s", "ratio to the floor", "input, MB/s", "CPU, s", "peak RSS, MiB")
    for name, done in runs.items():
        row(name, done.wall, done.ratio(runs[FLOOR]), f"{megabytes / done.wall:.0f}", done.cpu, done.peak)
    print(f"\nFraction of the inputs' pages in memory before each run: {', '.join(left)}; after the last: {after:.4f}.")
    remove(outputs)


def measure_threads(setup: Setup) -> None:
    """Wall seconds with 1, 2, 4, … threads, as a ratio to 1."""
    inputs, outputs = setup.plain(), setup.scratch()
    cores = len(os.sched_getaffinity(0))
    counts = sorted({1, 2, cores, *(2**power for power in range(cores.bit_length()))})
    programs = {IMPORT: importing("torch")} | {str(count): ours(inputs, "--threads", count) for count in counts}
    runs = in_turn(programs, setup.rounds, outputs)
    start = runs.pop(IMPORT)
    print(
        f"{_described(setup)}, page cache warm, medians of {setup.rounds} rounds, {cores} usable cores; "
        f"`import torch` {start.wall:.2f} s\n"
    )
    table("`--threads`", "wall, s", "ratio to 1", "without `import torch`, s", "ratio to 1", "CPU, s", "peak RSS, MiB")
    one = runs["1"]
    for name, done in runs.items():
        net = done.less(start)
        row(name, done.wall, done.ratio(one), net.wall, net.ratio(one.less(start)), done.cpu, done.peak)
    remove(outputs)


def measure_first(setup: Setup) -> None:
    """Seconds from the end of `import torch` to the first tensor byte."""
    inputs, outputs = setup.plain(), setup.scratch()
    rounds = max(5, setup.rounds)
    command = script("first_byte", inputs).command(outputs / "out.safetensors")
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
        imports, first = zip(*times, strict=True)
        row(state, *(f"{value:.3f}" for value in (median(imports), median(first), min(first), max(first))))
    remove(outputs)


# -- Other processors: several ranks of one machine, and a GPU -----------------------------------------------------


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
        print("skipped: torch finds no CUDA device", flush=True)
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
    written = [name for name in programs if programs[name].reads]
    table("program", "wall, s", "ratio", "without `import torch`, s", "CPU, s", "peak RSS of one process, MiB")
    for name in programs:
        done = runs[name]
        row(name, done.wall, done.ratio(runs[written[0]]), done.less(runs[IMPORT]).wall, done.cpu, done.peak)
    first, *others = (output_of(name, runs, outputs) for name in written)
    if not all(filecmp.cmp(first, other, shallow=False) for other in others):
        raise AssertionError("the outputs differ")
    print("\nAll outputs are the same bytes.")
    remove(outputs)


# -- Other dtypes and formats of the same total bytes --------------------------------------------------------------


def measure_formats(setup: Setup) -> None:
    """Each format is measured in the same rounds as float32 safetensors, and its output is checked."""
    if not setup.has_room("formats", (2 * setup.checkpoints + 2) * setup.nbytes):
        return
    print(
        f"{setup.checkpoints} checkpoints of {setup.nbytes / 1e9:.2f} GB in each format, page cache warm, "
        f"medians of {setup.rounds} rounds. Bytes are those of the inputs; ratios are to float32 safetensors in the "
        "same rounds.\n"
    )
    table(
        *("format", "wall, s", "MB/s", "ratio of MB/s"),
        *("without `import torch`, s", "MB/s", "ratio of MB/s", "peak RSS, MiB", "output"),
    )
    for name, (dtype, form) in CASES.items():
        folder, outputs = setup.scratch(), setup.scratch()
        inputs = write_random(folder, setup.checkpoints, setup.nbytes, dtype=dtype, form=form)
        programs = {IMPORT: importing("torch"), PLAIN: ours(setup.plain()), name: ours(inputs)}
        runs = in_turn(programs, setup.rounds, outputs)
        plain, mine = (output_of(each, programs, outputs) for each in (PLAIN, name))
        if name == next(iter(CASES)):
            _assert_exact(PLAIN, difference(plain, setup.plain()))
            _format_row(PLAIN, runs, setup.plain(), setup.plain(), "exact")
        if dtype != "float32":
            _assert_exact(name, difference(mine, inputs))
        elif not same(mine, plain):
            raise AssertionError(f"{name}: not the bits of {PLAIN}")
        _format_row(name, runs, inputs, setup.plain(), "exact" if dtype != "float32" else f"bits of {PLAIN}")
        remove(folder)
        remove(outputs)


def _format_row(name: str, runs: dict[str, Rounds], inputs: list[Path], plain: list[Path], checked: str) -> None:
    mine, theirs = (sum(file.stat().st_size for file in files_of(paths)) / 1e6 for paths in (inputs, plain))
    cells: list[object] = []
    for done, other in ((runs[name], runs[PLAIN]), (runs[name].less(runs[IMPORT]), runs[PLAIN].less(runs[IMPORT]))):
        cells += [done.wall, f"{mine / done.wall:.0f}", mine / theirs / done.ratio(other)]
    row(name, *cells, runs[name].peak, checked)


# -- Other tools over the same checkpoints; some of them know only Llamas ------------------------------------------


def measure_peers(setup: Setup) -> None:
    """Wall seconds, memory and error of every tool that is installed."""
    if not setup.has_room("peers", (setup.checkpoints + _OUTPUTS) * setup.nbytes):
        return
    folder, outputs = setup.scratch(), setup.scratch()
    shapes, config = llama(setup.nbytes)
    inputs = write_random(folder, setup.checkpoints, setup.nbytes, shapes=shapes, config=config)
    peers = comparable(inputs, setup.peers, folder)
    programs = {name: peer.program for name, peer in peers.items()}
    starts = {f"import {peer.imports}": importing(peer.imports, peer.python) for peer in peers.values()}
    runs = in_turn({**programs, **starts}, setup.rounds, outputs)
    errors: dict[str, Difference] = {}
    for name, peer in peers.items():
        if name == FLOOR:
            continue
        errors[name] = difference(output_of(name, programs, outputs), inputs)
        if errors[name].wrong if peer.exact else errors[name].relative > peer.tolerance:
            raise AssertionError(f"{name}: {errors[name]}")
    print(
        f"{setup.checkpoints} float32 safetensors checkpoints of {setup.nbytes / 1e9:.2f} GB with the layout of a "
        f"Llama ({len(shapes)} tensors), page cache warm, medians of {setup.rounds} rounds\n"
    )
    table(
        *("program", "wall, s", "ratio to ckpt-avg", "of it imports, s", "CPU, s"),
        *("peak RSS, MiB", "anonymous, MiB", "output"),
    )
    for name, peer in peers.items():
        done, start = runs[name], runs[f"import {peer.imports}"].wall
        times = done.wall, done.ratio(runs[OURS]), start, done.cpu
        row(name, *times, done.peak, done.anonymous, errors.get(name, "not computed"))
    print(
        "\nExact is the float64 mean, rounded to float32, which alone makes relative errors to 6.0e-08. All that sum "
        "in float64 and divide once must be exact. sd-mecha's running average rounds in each step, so that it may miss "
        "in the last bit where the mean is halfway between two float32 numbers; float32 sums miss in the last few. "
        "The floor and ckpt-avg fsync their output, the others do not."
    )
    remove(folder)
    remove(outputs)


# -- Memory and time by the size of the model, the number of checkpoints and of tensors ----------------------------


def measure_memory(setup: Setup) -> None:
    """Peak resident sets over sparse files, and the ratio of the largest to the smallest."""
    scale = setup.nbytes / 1e9
    print("Peak resident set of the whole process, sparse float32 files, page cache as it comes, one run each\n")
    table("model, GiB", "checkpoints", "peak RSS, MiB", "anonymous, MiB", "wall, s")
    bare = run(importing("torch").command(Path()))
    row("`import torch` alone", "", f"{bare.peak:.0f}", f"{bare.anonymous:.0f}", bare.wall)
    peaks = []
    for gibibytes in (0.25 * scale, scale, 4 * scale):
        if not setup.has_room(f"{gibibytes:g} GiB", 1.1 * gibibytes * _GIB):
            continue
        for count in (2, 8, 32):
            folder = setup.scratch()
            paths = write_run(folder, layout(int(gibibytes * _GIB)), count)
            done = run(ckpt_avg("-o", folder / "out.safetensors", *paths))
            row(f"{gibibytes:g}", count, f"{done.peak:.0f}", f"{done.anonymous:.0f}", done.wall)
            peaks.append(done.peak)
            remove(folder)
    print(f"\nThe largest is {max(peaks) / min(peaks):.3f} of the smallest.")


def measure_tensors(setup: Setup) -> None:
    """Time without `import torch` for each input byte, and for each tensor and checkpoint.

    Two checkpoints of random numbers are also compared with the exact mean.
    """
    number = max(1000, setup.nbytes // 10_000)
    cases: dict[str, tuple[Shapes, bool]] = {
        "1,000 tensors of 1 KB": (many(1000, 1000), False),
        f"{number:,} tensors of 10 KB": (many(number, 10_000), False),
        "middle: the usual layout, as many bytes": (layout(number * 10_000), False),
        f"one tensor of {4 * setup.nbytes / 1e9:g} GB, sparse": ({"only": (setup.nbytes,)}, True),
    }
    print(f"Page cache warm, medians of {setup.rounds} rounds; net is without `import torch`\n")
    table(
        *("model", "checkpoints", "input, GB", "floor, s", "ckpt-avg, s", "ratio", "floor net, s", "ckpt-avg net, s"),
        *("net ns per input byte", "net µs per tensor and checkpoint", "CPU, s", "peak RSS, MiB"),
    )
    for name, (shapes, is_sparse) in cases.items():
        for count in (2, 8):
            _measure_tensors(setup, name, shapes, count, is_sparse)


def _measure_tensors(setup: Setup, name: str, shapes: Shapes, count: int, is_sparse: bool) -> None:
    each = 4 * sum(map(math.prod, shapes.values()))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not setup.has_room(name, (2 if is_sparse else count + 2) * each):
        return
    if count * each > _CACHED * memory:
        row(f"{name}: skipped, the page cache would not hold it", count, count * each / 1e9, *[""] * 9)
        return
    folder, outputs = setup.scratch(), setup.scratch()
    paths = write_run(folder, shapes, count) if is_sparse else write_random(folder, count, each, shapes=shapes)
    programs = {IMPORT: importing("torch"), FLOOR: script("floor", paths), OURS: ours(paths)}
    runs = in_turn(programs, setup.rounds, outputs)
    least, mine = runs[FLOOR], runs[OURS]
    net = mine.less(runs[IMPORT]).wall
    row(
        *(name, count, f"{count * each / 1e9:.3g}", least.wall, mine.wall, mine.ratio(least)),
        *(least.less(runs[IMPORT]).wall, net, f"{net / count / each * 1e9:.3g}"),
        *(f"{net / count / len(shapes) * 1e6:.3g}", mine.cpu, mine.peak),
    )
    if count == 2 and not is_sparse:
        _assert_exact(name, difference(output_of(OURS, programs, outputs), paths))
    remove(folder)
    remove(outputs)
