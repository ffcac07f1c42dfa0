"""The sections of `run`: what is measured, and the table of each."""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.checking import Difference, difference, same
from benchmarks.harness import (
    FLOOR,
    IMPORT,
    OURS,
    Program,
    Runs,
    Setup,
    ckpt_avg,
    comparable,
    cool,
    floor,
    importing,
    in_turn,
    median,
    ours,
    output_of,
    ratio,
    remove,
    resident,
    row,
    run,
    script,
    table,
    walls,
    warm,
)  # fmt: skip
from benchmarks.inputs import Form, Shapes, files_of, layout, llama, many, write_random, write_sparse

_GIB = 2**30
_CACHED = 0.6  # of the machine's memory: the page cache holds inputs of this size beside everything else
CASES: dict[str, tuple[str, Form]] = {
    "bfloat16 safetensors": ("bfloat16", "safetensors"),
    "float16 safetensors": ("float16", "safetensors"),
    "float32 `torch.save`": ("float32", "zip"),
    "float32 safetensors, 4 shards with an index": ("float32", "shards"),
}
PLAIN = "float32 safetensors"
_OUTPUTS = 8  # at most, one of each program

# -- Float32 safetensors: page cache warm and cold, threads, and how soon the first byte is read -------------------


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
        first = [started for _, started in times]
        shown = (median(imported for imported, _ in times), median(first), min(first), max(first))
        row(state, *(f"{value:.3f}" for value in shown))
    remove(outputs)


def _described(setup: Setup) -> str:
    return f"{setup.checkpoints} float32 safetensors checkpoints of {setup.nbytes / 1e9:.2f} GB"


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


# -- Other dtypes and formats of the same total bytes --------------------------------------------------------------


def measure_formats(setup: Setup) -> None:
    """Each format is measured beside float32 safetensors, in the same rounds, and its output is checked."""
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
            if (found := difference(plain, setup.plain())).wrong:
                raise AssertionError(f"{PLAIN}: {found}")
            _format_row(PLAIN, runs, setup.plain(), setup.plain(), "exact")
        if dtype == "float32":
            checked, right = "bits of float32 safetensors", same(mine, plain)
        else:
            found = difference(mine, inputs)
            checked, right = str(found), not found.wrong
        if not right:
            raise AssertionError(f"{name}: {checked}")
        _format_row(name, runs, inputs, setup.plain(), checked)
        remove(folder)
        remove(outputs)


def _format_row(name: str, runs: Runs, inputs: list[Path], plain: list[Path], checked: str) -> None:
    mine, theirs = (sum(file.stat().st_size for file in files_of(paths)) / 1e6 for paths in (inputs, plain))
    cells: list[object] = []
    for without in (None, runs[IMPORT]):
        seconds, reference = walls(runs[name], without), walls(runs[PLAIN], without)
        relative = median(mine / one / (theirs / other) for one, other in zip(seconds, reference, strict=True))
        cells += [median(seconds), f"{mine / median(seconds):.0f}", relative]
    row(name, *cells, f"{max(one.peak for one in runs[name]):.0f}", checked)


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
        of_program = runs[name]
        times = median(walls(of_program)), ratio(walls(of_program), walls(runs[OURS]))
        start, cpu = median(walls(runs[f"import {peer.imports}"])), median(one.cpu for one in of_program)
        peaks = max(one.peak for one in of_program), max(one.anonymous for one in of_program)
        row(name, *times, start, cpu, *(f"{peak:.0f}" for peak in peaks), errors.get(name, "not computed"))
    print(
        "\nExact is the float64 mean, rounded to float32, which alone makes relative errors to 6.0e-08. All that sum "
        "in float64 and divide once must be exact. sd-mecha's running average rounds in each step, so that it may miss "
        "in the last bit where the mean lies halfway between two float32 numbers; float32 sums miss in the last few. "
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
            paths = _sparse(folder, count, layout(int(gibibytes * _GIB)))
            done = run(ckpt_avg("-o", folder / "out.safetensors", *paths))
            row(f"{gibibytes:g}", count, f"{done.peak:.0f}", f"{done.anonymous:.0f}", done.wall)
            peaks.append(done.peak)
            remove(folder)
    print(f"\nThe largest is {max(peaks) / min(peaks):.3f} of the smallest.")


def measure_tensors(setup: Setup) -> None:
    """Time without `import torch` for each input byte, and for each tensor and checkpoint.

    Where there are two checkpoints of random numbers, the output is held against the exact mean.
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
    each = sum(4 * extents[0] * (extents[1] if len(extents) > 1 else 1) for extents in shapes.values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not setup.has_room(name, (2 if is_sparse else count + 2) * each):
        return
    if count * each > _CACHED * memory:
        row(f"{name}: left out, the page cache would not hold it", count, count * each / 1e9, *[""] * 9)
        return
    folder, outputs = setup.scratch(), setup.scratch()
    paths = _sparse(folder, count, shapes) if is_sparse else write_random(folder, count, each, shapes=shapes)
    programs = {"import": importing("torch"), "floor": floor(paths), "ours": ours(paths)}
    runs = in_turn(programs, setup.rounds, outputs)
    least, mine = (walls(runs[key]) for key in ("floor", "ours"))
    least_net, net = (median(walls(runs[key], runs["import"])) for key in ("floor", "ours"))
    per_byte, per_tensor = net / count / each * 1e9, net / count / len(shapes) * 1e6
    row(
        *(name, count, f"{count * each / 1e9:.3g}", median(least), median(mine), ratio(mine, least), least_net, net),
        *(f"{per_byte:.3g}", f"{per_tensor:.3g}"),
        *(median(one.cpu for one in runs["ours"]), f"{max(one.peak for one in runs['ours']):.0f}"),
    )
    if count == 2 and not is_sparse:
        found = difference(output_of("ours", programs, outputs), paths)
        if found.wrong:
            raise AssertionError(f"{name}: {found}")
    remove(folder)
    remove(outputs)


def _sparse(folder: Path, count: int, shapes: Shapes) -> list[Path]:
    paths = [folder / f"step_{index}.safetensors" for index in range(count)]
    for path in paths:
        write_sparse(path, shapes)
    return paths
