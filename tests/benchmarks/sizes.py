"""How memory and time depend on the size of the model, the number of checkpoints and of tensors."""

from __future__ import annotations

import os
from pathlib import Path

from checking import difference
from inputs import Shapes, layout, many, write_random, write_sparse
from measure import ckpt_avg, run
from programs import floor, ours
from rounds import Setup, importing, in_turn, median, output_of, ratio, remove, row, table, walls

_GIB = 2**30
_CACHED = 0.6  # of the machine's memory: the page cache holds inputs of this size beside everything else


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
            _measure(setup, name, shapes, count, is_sparse)


def _measure(setup: Setup, name: str, shapes: Shapes, count: int, is_sparse: bool) -> None:
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
