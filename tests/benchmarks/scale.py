"""Measures what grows with bytes, checkpoints and files: runs of up to 400,000 files and 1 TB, sparse.

    python tests/benchmarks/scale.py [--only NAME[,NAME]] [--folder DIR]

    headers   `check` and `average --dry-run` over up to 400 checkpoints of 1,000 shards
    llama     `check` and `inspect` on 100 checkpoints of a 7-billion-parameter model
    terabyte  runs of 10 GB, 100 GB and 1 TB of input, or as much of it as 8 minutes allow

Inputs are sparse files. Their bytes come from no disk, but each page of them is still brought into the page cache,
where the kernel fills it with zeros. Outputs are real. Files are new at each run, and so cold. Needs 2 GB of disk,
500,000 inodes, and for `terabyte` room for the output.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import arguments_of, ckpt_avg, remove, row, run, table
from benchmarks.inputs import Shapes, layout, llama_shapes, many, write_run

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
_MINUTES = 8.0  # that the largest run may take
_RUNS = ((100, 1), (400, 1), (6, 1000), (19, 1000), (100, 100), (400, 100), (100, 1000), (400, 1000))


def measure_headers(folder: Path) -> None:
    """Whole runs of `check` and of `average --dry-run`; where one stops, why."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    print(f"2,000 tensors of 4 KiB in each checkpoint; hard limit of {limit:,} open files\n")
    table("checkpoints", "shards", "files", "command", "wall, s", "processor, s", "peak RSS, MB")
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
                row(*about, done.wall, done.user + done.system, f"{done.peak:.0f}")
            except RuntimeError as error:
                row(*about, "stops", "", "")
                stops.append(f"{name} of {checkpoints} × {shards}: {str(error).splitlines()[-1]}")
        remove(home)
    if stops:
        print("\nWhere it stops:\n\n" + "\n".join(f"- {stop}" for stop in stops))


def measure_llama(folder: Path) -> None:
    """`check` and `inspect` on 100 checkpoints of a Llama 2 7B, of which headers alone are read.

    One bfloat16 safetensors file, three shards, or what `torch.save` writes with the two float32 moments of Adam
    in the same file: 9 TB, sparse. As a yardstick `safetensors.safe_open` reads the same headers, tensor by tensor.
    """
    shapes = llama_shapes(4096, 11008, 32, 32000)  # 291 tensors, 6.7 billion elements
    whole = write_run(folder / "whole", shapes, _LLAMAS, dtype="BF16")
    write_run(folder / "sharded", shapes, _LLAMAS, shards=3, dtype="BF16")
    _write_zips(folder / "zips", shapes)
    table("", "wall, s", "peak RSS, MB")
    for title, arguments in (
        ("safe_open, one file each", [sys.executable, "-c", _YARDSTICK, *map(str, whole)]),
        ("check, one file each", [*_COMMAND, "check", str(folder / "whole")]),
        ("check, three shards each", [*_COMMAND, "check", str(folder / "sharded")]),
        ("check, torch.save with Adam", [*_COMMAND, "check", str(folder / "zips")]),
        ("inspect, one file each", [*_COMMAND, "inspect", str(folder / "whole")]),
    ):
        done = run(arguments)
        row(title, done.wall, f"{done.peak:.0f}")
    for name in ("whole", "sharded", "zips"):
        remove(folder / name)


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


def measure_terabyte(folder: Path) -> None:
    """Actual runs over 64 checkpoints, each ten times as large as the one before, as far as the time allows."""
    print("64 checkpoints\n")
    table("input, GB", "output, GB", "wall, s", "input, GB/s", "processor, s", "peak RSS, MB")
    rate = 0.0
    for asked in (10, 100, 1000):
        gigabytes = asked if not rate else min(asked, int(rate * 60 * _MINUTES))
        home, output = folder / "run", folder / "out.safetensors"
        write_run(home, layout(int(gigabytes * 1e9) // 64), 64)
        done = run(ckpt_avg(home, "-o", output))
        rate = gigabytes / done.wall
        row(gigabytes, gigabytes / 64, done.wall, rate, done.user + done.system, f"{done.peak:.0f}")
        remove(home)
        remove(output)
    print(f"\n1 TB at the rate of the last run: {1000 / rate / 60:.1f} minutes.")


SECTIONS = {"headers": measure_headers, "llama": measure_llama, "terabyte": measure_terabyte}

if __name__ == "__main__":
    chosen = arguments_of(__doc__, SECTIONS)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        for section in chosen.only:
            print(f"\n## {section}\n", flush=True)
            SECTIONS[section](Path(name))
