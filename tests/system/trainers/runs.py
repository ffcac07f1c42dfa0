"""Runs that real libraries trained: their folders, what each checkpoint contains, and what was recorded of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from system.faults.exact import BFLOAT16, FLOAT16, exact_mean
from system.faults.tracing import REQUIRE

PRODUCERS = Path(__file__).parent / "producers"
TRAINERS = "trainers"  # what REQUIRE calls them
EXACT = {each.dtype: each for each in (BFLOAT16, FLOAT16)}
State = dict[str, torch.Tensor]

# Each producer with the modules it cannot do without, and its runs.
LIBRARIES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "transformers": (("transformers", "accelerate"), ("bert", "gpt2_tied", "bert_sharded", "plain", "pytorch_bin")),
    "accelerate": (("accelerate",), ("accelerate", "accelerate_bin", "accelerate_two", "accelerate_fsdp")),
    "lightning": (
        ("lightning",),
        (
            "lightning",
            "lightning_metric",
            "lightning_top",
            "lightning_average",
            "lightning_fsdp",
            "lightning_model_parallel",
        ),
    ),
    "dcp": (
        ("torch",),
        (
            "dcp_flat",
            "dcp_nested",
            "dcp_wide",
            "dcp_fsdp",
            "dcp_safetensors",
            "dcp_safetensors_two",
            "dcp_safetensors_index",
            "dcp_safetensors_consolidated",
        ),
    ),
    "timm": (("timm",), ("timm", "timm_top")),
    "mmengine": (("mmengine",), ("mmengine", "mmengine_iter", "mmengine_average")),
    "peft": (("peft", "transformers", "accelerate"), ("peft",)),
    "torch": (
        ("torch",),
        tuple(
            f"torch_{form}_{name}"
            for form in ("zip", "stream")
            for name in ("bare", "tutorial", "compiled", "parallel", "compiled_parallel", "averaged", "module")
        ),
    ),
}
RUNS = tuple(run for _, runs in LIBRARIES.values() for run in runs)
LIBRARY_OF = {run: library for library, (_, runs) in LIBRARIES.items() for run in runs}


@dataclass(frozen=True)
class Saved:
    """A checkpoint.

    Attributes:
        path: where it is.
        facts: what its library recorded: kind, step, epoch, metrics, learning_rate (of the step that made it), …
        out: the folder of the producer.
    """

    path: Path
    facts: Mapping[str, Any]
    out: Path

    @property
    def truth(self) -> State:
        """The weights, by the names of the model without wrappers."""
        return torch.load(self.out / self.facts["truth"])

    @property
    def ema(self) -> State:
        """The running average next to them."""
        return torch.load(self.out / self.facts["ema"])


@dataclass(frozen=True)
class Run:
    """A run folder, with its checkpoints in the order of training."""

    name: str
    folder: Path
    checkpoints: Sequence[Saved]

    @property
    def out(self) -> Path:
        """The folder of the producer."""
        return self.folder.parent.parent


class Trainers:
    """Trains with each library once, when it is first asked for."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._done: dict[str, dict[str, Run]] = {}
        self._failed: dict[str, BaseException] = {}

    def run(self, name: str) -> Run:
        """Returns a run; skips the test where its library is missing."""
        library = LIBRARY_OF[name]
        if library in self._failed:
            raise self._failed[library]
        if library not in self._done:
            try:
                self._done[library] = self._train(library)
            except BaseException as error:
                self._failed[library] = error
                raise
        return self._done[library][name]

    def _train(self, library: str) -> dict[str, Run]:
        needs(library)
        out = self._out / library
        execute(library, out)
        runs = {}
        for name, notes in json.loads((out / "ledger.json").read_text()).items():
            folder = out / "runs" / name
            runs[name] = Run(name, folder, [Saved(folder / note["path"], note, out) for note in notes])
        assert set(runs) == set(LIBRARIES[library][1])
        return runs


def needs(library: str) -> None:
    """Skips the test where a library is missing, unless all are asked for."""
    missing = [module for module in LIBRARIES[library][0] if find_spec(module) is None]
    if missing:
        if TRAINERS in os.environ.get(REQUIRE, ""):
            pytest.fail(f"{REQUIRE} asks for the trainers, and {', '.join(missing)} is not installed")
        pytest.skip(f"needs {', '.join(missing)}")


def execute(library: str, *arguments: object) -> None:
    """Runs a producer in a process of its own: warnings, threads and imports of the library stay there."""
    command = [sys.executable, "-W", "ignore", str(PRODUCERS / f"write_{library}.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def mean(states: Sequence[State]) -> State:
    """Returns the exact mean, rounded once; of integers, what the last state has."""
    found = {}
    for name, last in states[-1].items():
        values = [state[name] for state in states]
        if last.dtype in EXACT:
            codes = torch.tensor(exact_mean(values, EXACT[last.dtype]), dtype=torch.int32).to(torch.int16)
            found[name] = codes.view(last.dtype).reshape(last.shape)
        elif last.is_floating_point():  # of no more than float32's precision, whose sums are exact in float64
            found[name] = (sum(value.double() for value in values) / len(values)).to(last.dtype)
        else:
            found[name] = last
    return found
