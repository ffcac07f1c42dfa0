"""Measures the averaging of float32 safetensors checkpoints: side by side, in one run, as ratios.

    python tests/benchmarks/run.py [--gigabytes 1] [--checkpoints 8] [--rounds 3] [--folder DIR]

Each round runs the floor program, this project and the hand-written loop in turn, page cache warm; the medians are
shown, and the outputs of the last two are compared bit by bit. Then the peak resident set, for models and numbers of
checkpoints of other sizes, over sparse files. Needs room for the inputs and one output.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

from inputs import layout, write_random, write_sparse
from measure import Run, ckpt_avg, run

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--checkpoints", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"
    print(f"{machine}, Python {platform.python_version()}\n")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        speed(Path(folder), int(arguments.gigabytes * 1e9), arguments.checkpoints, arguments.rounds)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        memory(Path(folder))


def speed(folder: Path, nbytes: int, count: int, rounds: int) -> None:
    inputs = list(map(str, write_random(folder, count, nbytes)))
    programs = {
        "floor: import torch, fault in, write, fsync": lambda output: [sys.executable, str(HERE / "floor.py"), output],
        "ckpt-avg": lambda output: ckpt_avg("-o", output),
        "safe_open loop, float64, save_file": lambda output: [sys.executable, str(HERE / "naive.py"), output],
    }
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    outputs: dict[str, str] = {}
    for _ in range(rounds):
        for path in inputs:
            with open(path, "rb") as file:
                while file.read(2**24):
                    pass
        for name, command in programs.items():
            outputs[name] = str(folder / f"{len(outputs)}.out")
            Path(outputs[name]).unlink(missing_ok=True)
            runs[name].append(run([*command(outputs[name]), *inputs]))
        compare(outputs["ckpt-avg"], outputs["safe_open loop, float64, save_file"])
    floor = statistics.median(one.wall for one in runs["floor: import torch, fault in, write, fsync"])
    print(f"{count} float32 checkpoints of {os.path.getsize(inputs[0]) / 1e9:.2f} GB, medians of {rounds} rounds\n")
    print("| program | wall, s | ratio to the floor | CPU, s | peak RSS, MiB |\n|---|---|---|---|---|")
    for name, measured in runs.items():
        wall = statistics.median(one.wall for one in measured)
        cpu = statistics.median(one.cpu for one in measured)
        peak = max(one.peak for one in measured)
        print(f"| {name} | {wall:.2f} | {wall / floor:.2f} | {cpu:.2f} | {peak:.0f} |")


def compare(ours: str, theirs: str) -> None:
    """Fails unless both files hold the same bits in every tensor."""
    import torch
    from safetensors import safe_open

    with safe_open(ours, framework="pt") as a, safe_open(theirs, framework="pt") as b:
        assert sorted(a.keys()) == sorted(b.keys())
        for name in a.keys():  # noqa: SIM118 (the reader is no dict)
            x, y = a.get_tensor(name).view(torch.int32), b.get_tensor(name).view(torch.int32)
            assert torch.equal(x, y), name


def memory(folder: Path) -> None:
    print("\n| model | checkpoints | peak RSS, MiB |\n|---|---|---|")
    for megabytes, counts in ((256, (2, 8, 32)), (1024, (2, 8, 32)), (4096, (2, 8))):
        for count in counts:
            paths = [folder / f"{megabytes}-{index}.safetensors" for index in range(count)]
            for path in paths:
                write_sparse(path, layout(megabytes * 2**20))
            output = folder / "out.safetensors"
            peak = run(ckpt_avg("-o", output, *paths)).peak
            print(f"| {megabytes / 1024:g} GiB | {count} | {peak:.0f} |", flush=True)
            for path in (*paths, output):
                path.unlink()


main()
