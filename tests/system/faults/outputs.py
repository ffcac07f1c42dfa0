"""Outputs in tests of faults: what is averaged, where the output goes, and what is found there afterwards."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from system.faults.tracing import refuse_or_skip

from ckpt_avg import average

OLD = b"the old output" * 1000
TIGHT = ("--memory", "1MiB", "--threads", "1")  # many small writes
naming = pytest.mark.parametrize("unnamed", [True, False], ids=["O_TMPFILE", "hidden name"])
replacing = pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])


def few_or(many: int, few: int) -> list[object]:
    """Returns how often to try: a few times, and many times in a campaign."""
    return [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.campaign)]


@dataclass(frozen=True)
class Averaging:
    """Checkpoints, and the bytes of their average."""

    sources: list[Path]
    new: bytes

    def command(self, output: Path, *options: object) -> tuple[object, ...]:
        """Returns the arguments that average them."""
        return ("average", *self.sources, "-o", output, "-q", *options)


def make_averaging(
    folder: Path, elements: int, count: int = 3, write: Callable[[dict[str, torch.Tensor], Path], None] = save_file
) -> Averaging:
    """Writes checkpoints of so many elements, and averages them."""
    sources = [folder / f"{seed}.ckpt" for seed in range(count)]
    for seed, path in enumerate(sources):
        generator = torch.Generator().manual_seed(seed)
        write({"w": torch.rand(elements, generator=generator), "b": torch.ones(5)}, path)
    average(sources, folder / "mean.safetensors")
    new = (folder / "mean.safetensors").read_bytes()
    (folder / "mean.safetensors").unlink()
    return Averaging(sources, new)


def begin(output: Path, overwrite: bool) -> tuple[str, ...]:
    """Empties the output's folder, or leaves an old output alone in it; returns the options that a run needs."""
    for path in output.parent.iterdir():
        if path.name != "lost+found":
            path.unlink()
    if overwrite:
        output.write_bytes(OLD)
    return ("--overwrite",) if overwrite else ()


def state(output: Path, new: bytes) -> str:
    """Returns what is at a path: ``absent``, ``old``, ``new``, or ``partial`` for anything else."""
    try:
        contents = output.read_bytes()
    except FileNotFoundError:
        return "absent"
    return "new" if contents == new else "old" if contents == OLD else "partial"


def state_after(output: Path, new: bytes, overwrite: bool) -> str:
    """Returns the same, but ``lost`` if there was an old output and now is none."""
    left = state(output, new)
    return "lost" if overwrite and left == "absent" else left


def litter(output: Path) -> list[str]:
    """Returns every other name in the output's folder."""
    return sorted(name for name in os.listdir(output.parent) if name != output.name)


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A small file system of its own; the test is skipped where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        refuse_or_skip("mount", f"needs a file system of its own: {getattr(error, 'stderr', error)}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
