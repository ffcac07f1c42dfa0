"""The sections of `run` that read headers alone: many files, and large models."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.harness import Setup, row, run, table
from benchmarks.inputs import Shapes, llama_shapes, many, write_run

_COMMAND = [sys.executable, "-m", "ckpt_avg"]
_BY_HAND = """
import sys
from safetensors import safe_open
for path in sys.argv[1:]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():
            part = file.get_slice(name)
            part.get_shape(), part.get_dtype()
"""
_LLAMAS = 100
_FILES = ((100, 1), (400, 1), (100, 100))  # checkpoints and shards of each


def measure_files(setup: Setup) -> None:
    """`check` and `average --dry-run` of many files: checkpoints of 2,000 tensors, in one file or in shards."""
    table("checkpoints × shards", "files", "command", "wall, s", "peak RSS, MB")
    for checkpoints, shards in _FILES:
        home = setup.empty("inputs")
        write_run(home / "run", many(2000, 4096), checkpoints, shards)
        dry = ["average", "--dry-run", "-q", "-o", str(home / "out.safetensors")]
        for name, arguments in (("`check`", ["check"]), ("`average --dry-run`", dry)):
            done = run([*_COMMAND, *arguments, str(home / "run")])
            row(f"{checkpoints} × {shards:,}", f"{checkpoints * shards:,}", name, done.wall, f"{done.peak:.0f}")


def measure_llama(setup: Setup) -> None:
    """`check` and `inspect` of 100 checkpoints of a Llama 2 7B (291 tensors, 6.7 billion elements), sparse.

    One bfloat16 safetensors file, three shards, or what `torch.save` writes with the two float32 moments of Adam
    in the same file.
    """
    shapes, home = llama_shapes(4096, 11008, 32, 32000), setup.empty("inputs")
    whole = write_run(home / "whole", shapes, _LLAMAS, dtype="BF16")
    write_run(home / "sharded", shapes, _LLAMAS, shards=3, dtype="BF16")
    _write_zips(home / "zips", shapes)
    table("", "wall, s", "peak RSS, MB")
    for title, arguments in (
        ("by hand: `safe_open`, `get_slice` of each tensor", [sys.executable, "-c", _BY_HAND, *map(str, whole)]),
        ("`check`, one safetensors file each", [*_COMMAND, "check", str(home / "whole")]),
        ("`check`, three shards each", [*_COMMAND, "check", str(home / "sharded")]),
        ("`check`, `torch.save` with Adam's state in the same file", [*_COMMAND, "check", str(home / "zips")]),
        ("`inspect`, one safetensors file each", [*_COMMAND, "inspect", str(home / "whole")]),
    ):
        done = run(arguments)
        row(title, done.wall, f"{done.peak:.0f}")


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
