"""What grows with tensors, with bytes, with checkpoints and with files: runs of up to 400,000 files and 1 TB, sparse.

    python tests/benchmarks/scale.py [--only NAME[,NAME]] [--folder DIR] [--minutes 8]

    headers   `check` and `average --dry-run` over up to 400 checkpoints of 1,000 shards
    llama     `check` and `inspect` on 100 checkpoints of a 7-billion-parameter model
    plan      headers, comparison, plan and output header by the number of tensors
    model     wall time and peak resident set as linear functions, fitted to small runs and tried on others
    terabyte  runs of 10 GB, 100 GB and 1 TB of input, or as much of it as --minutes allow

Inputs are sparse files. Their bytes come from no disk, but each page of them is still brought into the page cache,
where the kernel fills it with zeros. Outputs are real. Files are new at each run, and so cold. Needs numpy, 2 GB of
disk, 500,000 inodes, a hard limit of 16,000 open files for `model`, and for `terabyte` room for the output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import Run, ckpt_avg, remove, row, run, table
from benchmarks.inputs import Shapes, layout, llama_shapes, many, write_run, write_sparse

_PHASES = """
import json, sys, time
from pathlib import Path
from ckpt_avg.runs.compatibility import refuse_differences
from ckpt_avg.output.header import encode_header, encode_tensors
from ckpt_avg.mean.blocks import cut_into_blocks
from ckpt_avg.mean.plan import make_plan
from ckpt_avg.formats.open import open_with
from ckpt_avg.formats.reading import Reading
import gc; gc.disable()
def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
found, reading = [], Reading()
def mark():
    found.append((time.process_time(), resident()))
mark()
specs = [open_with(path, reading).spec for path in sorted(Path(sys.argv[1]).iterdir())]
mark()
refuse_differences(specs)
mark()
plan = make_plan(specs)
mark()
encode_header(encode_tensors(plan), {})
mark()
for _ in cut_into_blocks(plan, 1 << 20):
    pass
mark()
print(json.dumps(found))
"""
_YARDSTICK = """
import sys
from safetensors import safe_open
for path in sys.argv[1:]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            part = file.get_slice(name)
            part.get_shape(), part.get_dtype()
"""
_LLAMAS = 100
_COMMAND = [sys.executable, "-m", "ckpt_avg"]
_WORKERS = 2
_RUNS = ((100, 1), (400, 1), (6, 1000), (19, 1000), (100, 100), (400, 100), (100, 1000), (400, 1000))


def measure_headers(folder: Path) -> None:
    """Whole runs of `check` and of `average --dry-run`; where one stops, why."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    print(f"2,000 tensors of 4 KiB in each checkpoint; hard limit of {limit:,} open files\n")
    table("checkpoints", "shards", "files", "command", "wall, s", "CPU, s", "peak RSS, MiB")
    stops: list[str] = []
    for checkpoints, shards in _RUNS:
        home = folder / "run"
        write_run(home, many(2000, 4096), checkpoints, shards)
        for name, arguments in (
            ("check", ["check", str(home)]),
            ("dry run", ["average", "-q", str(home), "-o", str(folder / "out.safetensors"), "--dry-run"]),
        ):
            about = (checkpoints, f"{shards:,}", f"{checkpoints * shards:,}", name)
            try:
                done = run([*_COMMAND, *arguments])
                row(*about, done.wall, done.cpu, f"{done.peak:.0f}")
            except RuntimeError as error:
                row(*about, "stops", "", "")
                stops.append(f"{name} of {checkpoints} × {shards}: {str(error).splitlines()[-1]}")
        remove(home)
    if stops:
        print("\nWhere it stops:\n\n" + "\n".join(f"- {stop}" for stop in stops))


def measure_llama(folder: Path) -> None:
    """`check` and `inspect` on 100 checkpoints of a Llama 2 7B, of which headers alone are read.

    One bfloat16 safetensors file, three shards, or what `torch.save` writes with the two float32 moments of Adam beside
    the weights: 9 TB, sparse. As a yardstick `safetensors.safe_open` reads the same headers, tensor by tensor.
    """
    _write_llamas(folder)
    yardstick = [sys.executable, "-c", _YARDSTICK, *map(str, sorted((folder / "whole").iterdir()))]
    table("", "wall, s", "peak RSS, MiB")
    for title, arguments in (
        ("safe_open, one file each", yardstick),
        ("check, one file each", [*_COMMAND, "check", str(folder / "whole")]),
        ("check, three shards each", [*_COMMAND, "check", str(folder / "sharded")]),
        ("check, torch.save with Adam", [*_COMMAND, "check", str(folder / "zips")]),
        ("inspect, one file each", [*_COMMAND, "inspect", str(folder / "whole")]),
    ):
        done = run(arguments)
        row(title, done.wall, f"{done.peak:.0f}")
    for name in ("whole", "sharded", "zips"):
        remove(folder / name)


def _write_llamas(folder: Path) -> None:
    """Writes ``whole/step_<n>.safetensors``, ``sharded/checkpoint-<n>/`` and ``zips/step_<n>.pt``."""
    shapes = llama_shapes(4096, 11008, 32, 32000)  # 291 tensors, 6.7 billion elements
    shards = [dict(list(shapes.items())[start::3]) for start in range(3)]
    names = [f"model-{index:05}-of-00003.safetensors" for index in (1, 2, 3)]
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    (folder / "whole").mkdir()
    for step in range(1, _LLAMAS + 1):
        write_sparse(folder / "whole" / f"step_{step}.safetensors", shapes, "BF16", 2)
        checkpoint = folder / "sharded" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name, shard in zip(names, shards, strict=True):
            write_sparse(checkpoint / name, shard, "BF16", 2)
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _write_zips(folder / "zips", shapes)


def _write_zips(folder: Path, shapes: Shapes) -> None:
    """Writes torch files without the bytes of their tensors, which are never touched."""
    import torch

    folder.mkdir()
    model = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    moments = {
        index: {"step": torch.tensor(0.0), "exp_avg": torch.empty(shape), "exp_avg_sq": torch.empty(shape)}
        for index, shape in enumerate(shapes.values())
    }
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(moments)}]}
    with torch.serialization.skip_data():
        for step in range(1, _LLAMAS + 1):
            torch.save({"model": model, "optimizer": optimizer, "step": step}, folder / f"step_{step}.pt")


def measure_plan(folder: Path) -> None:
    """Each step between the headers and the first tensor byte, by the number of tensors."""
    table(
        *(
            "tensors",
            "checkpoints",
            "header, CPU µs per tensor and checkpoint",
            "header, bytes per tensor and checkpoint",
        ),
        *("compare, µs per tensor and checkpoint", "plan, µs per tensor", "output header, µs per tensor"),
        *("tasks, µs per tensor", "plan and after, bytes per tensor", "whole dry run, s", "peak RSS, MiB"),
    )
    for tensors in (1000, 10_000, 100_000, 300_000):
        for checkpoints in (2, 8):
            home = folder / "run"
            write_run(home, many(tensors, 4096), checkpoints)
            phases = subprocess.run([sys.executable, "-c", _PHASES, str(home)], stdout=subprocess.PIPE, check=True)
            marks = json.loads(phases.stdout)
            seconds = [after[0] - before[0] for before, after in itertools.pairwise(marks)]
            both = tensors * checkpoints
            done = run([*_COMMAND, "average", "-q", str(home), "-o", str(folder / "out.safetensors"), "--dry-run"])
            row(
                *(f"{tensors:,}", checkpoints, f"{seconds[0] / both * 1e6:.1f}"),
                *(f"{(marks[1][1] - marks[0][1]) * 1024 / both:.0f}", f"{seconds[1] / both * 1e6:.2f}"),
                *(f"{each / tensors * 1e6:.1f}" for each in seconds[2:]),
                *(f"{(marks[-1][1] - marks[1][1]) * 1024 / tensors:.0f}", done.wall, f"{done.peak:.0f}"),
            )
            remove(home)


@dataclass(frozen=True)
class Case:
    """A run of so many checkpoints of ``mebibytes`` each, in so many tensors and shards."""

    tensors: int
    checkpoints: int
    mebibytes: int
    shards: int = 1

    def terms(self) -> list[float]:
        """Returns what multiplies each coefficient of the wall time."""
        elements = self.mebibytes * 2**18
        each = 128 * 2**20 // _WORKERS  # as `mean.stream` does
        window = max(1024, min(4 * 2**20, (each - 2 * 2**20) // (8 * (self.checkpoints + 1))))
        windows = self.checkpoints * max(-(-elements // window), self.shards)
        nbytes = self.mebibytes * 2**20
        both = self.tensors * self.checkpoints
        return [1, both, nbytes * self.checkpoints, nbytes, self.checkpoints * self.shards, windows]

    def memory_terms(self) -> list[float]:
        """Returns what multiplies each coefficient of the peak resident set."""
        return [1, self.tensors * self.checkpoints, self.checkpoints * self.shards]

    def measure(self, folder: Path) -> Run:
        """Averages the run."""
        home = folder / "run"
        write_run(home, many(self.tensors, self.mebibytes * 2**20 // self.tensors), self.checkpoints, self.shards)
        done = run(ckpt_avg(home, "-o", folder / "out.safetensors", "--overwrite"))
        remove(home)
        return done


_FITTED = [
    Case(64, 2, 64),
    *(Case(64, count, 64) for count in (8, 32, 128)),
    Case(64, 2, 1024),
    Case(64, 8, 512),
    Case(64, 400, 16),
    *(Case(tensors, count, 64) for tensors in (8192, 32768) for count in (2, 8)),
    Case(65536, 4, 64),
    *(Case(1024, count, 64, 512) for count in (2, 8)),
    Case(1024, 5, 64, 1024),
    Case(256, 64, 64, 64),
]
_HELD_OUT = [Case(4096, 16, 256), Case(128, 200, 32), Case(64, 64, 128)]
_HELD_OUT += [Case(2048, 8, 128, 256), Case(16384, 6, 512, 16)]
_NAMES = ("start, s", "tensor and checkpoint, µs", "input, s per GB", "output, s per GB", "file, µs", "window, µs")
_UNITS = (1, 1e6, 1e9, 1e9, 1e6, 1e6)


def fit(terms: list[list[float]], values: list[float]) -> list[float]:
    """Returns coefficients ≥ 0 with the least sum of squared relative errors: what would be negative is left out."""
    matrix, wanted = np.array(terms), np.array(values)
    used = list(range(matrix.shape[1]))
    scale = matrix.max(axis=0)
    while True:
        found = np.linalg.lstsq(matrix[:, used] / scale[used] / wanted[:, None], np.ones(len(wanted)), rcond=None)[0]
        if found.min() >= 0:
            break
        del used[int(found.argmin())]
    result = [0.0] * matrix.shape[1]
    for index, value in zip(used, found, strict=True):
        result[index] = float(value / scale[index])
    return result


def predict(coefficients: list[float], terms: list[float]) -> float:
    """Returns the value of the linear function."""
    return sum(each * term for each, term in zip(coefficients, terms, strict=True))


def measure_model(folder: Path) -> None:
    """Fits wall, CPU and memory to runs, tries them on others, and says what 1 TB would take."""
    done = [case.measure(folder) for case in _FITTED]
    terms = [case.terms() for case in _FITTED]
    wall, cpu = (fit(terms, [getattr(each, name) for each in done]) for name in ("wall", "cpu"))
    peak = fit([case.memory_terms() for case in _FITTED], [each.peak * 2**20 for each in done])
    table("", *_NAMES)
    for name, found in (("wall", wall), ("CPU", cpu)):
        row(name, *(f"{each * unit:.3g}" for each, unit in zip(found, _UNITS, strict=True)))
    print()
    table("", "start, MiB", "tensor and checkpoint, bytes", "file, bytes")
    row("peak RSS", f"{peak[0] / 2**20:.0f}", *(f"{each:.0f}" for each in peak[1:]))
    print()
    columns = ("tensors", "checkpoints", "MiB each", "shards", "wall, s", "predicted", "CPU, s", "predicted")
    table("", *columns, "peak RSS, MiB", "predicted")
    measured = [*done, *(case.measure(folder) for case in _HELD_OUT)]
    for case, each in zip((*_FITTED, *_HELD_OUT), measured, strict=True):
        row(
            "held out" if case in _HELD_OUT else "fitted",
            *(case.tensors, case.checkpoints, case.mebibytes, case.shards),
            *(each.wall, predict(wall, case.terms()), each.cpu, predict(cpu, case.terms())),
            *(f"{each.peak:.0f}", f"{predict(peak, case.memory_terms()) / 2**20:.0f}"),
        )
    print("\nInputs of 1 TB together, predicted:\n")
    table("checkpoints", "shards", "tensors", "wall, min", "of it windows, min", "peak RSS, MiB")
    for checkpoints, shards, tensors in ((16, 16, 500), (64, 4, 300), (256, 1, 300), (400, 1, 300), (400, 1000, 2000)):
        case = Case(tensors, checkpoints, int(1e12 / checkpoints / 2**20), shards)
        whole = predict(wall, case.terms()) / 60
        windows = wall[-1] * case.terms()[-1] / 60
        row(checkpoints, shards, tensors, whole, windows, f"{predict(peak, case.memory_terms()) / 2**20:.0f}")


def measure_terabyte(folder: Path, minutes: float) -> None:
    """Actual runs over 64 checkpoints, each ten times as large as the one before, as far as the time allows."""
    print("64 checkpoints\n")
    table("input, GB", "output, GB", "wall, s", "input, GB/s", "CPU, s", "peak RSS, MiB", "anonymous, MiB")
    rate = 0.0
    for asked in (10, 100, 1000):
        gigabytes = asked if not rate else min(asked, int(rate * 60 * minutes))
        home, output = folder / "run", folder / "out.safetensors"
        write_run(home, layout(int(gigabytes * 1e9) // 64), 64)
        done = run(ckpt_avg(home, "-o", output))
        rate = gigabytes / done.wall
        shown = (done.wall, rate, done.cpu)
        row(gigabytes, gigabytes / 64, *shown, f"{done.peak:.0f}", f"{done.anonymous:.0f}")
        remove(home)
        remove(output)
    print(f"\n1 TB at the rate of the last run: {1000 / rate / 60:.1f} minutes.")


def main() -> None:
    """Prints the tables of the sections that were asked for."""
    sections = {
        "headers": measure_headers,
        "llama": measure_llama,
        "plan": measure_plan,
        "model": measure_model,
        "terabyte": lambda folder: measure_terabyte(folder, arguments.minutes),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME[,NAME]", default=",".join(sections))
    parser.add_argument("--folder", default=None, help="where inputs and outputs are written, on a disk")
    parser.add_argument("--minutes", type=float, default=8.0, help="that the largest run may take")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.only.split(",") if name not in sections]:
        parser.error(f"--only: expected some of {', '.join(sections)}, got {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for section in arguments.only.split(","):
            print(f"\n## {section}\n", flush=True)
            sections[section](folder)


if __name__ == "__main__":
    main()
