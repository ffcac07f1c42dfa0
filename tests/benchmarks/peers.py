"""Other tools that average the same checkpoints, and loops that people write by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Program, script

_MERGEKIT = "mergekit.scripts.run_yaml"


@dataclass(frozen=True)
class Peer:
    """A tool to compare with.

    Attributes:
        program: how it is run.
        imports: the module that it imports before it begins.
        python: by which interpreter.
        tolerance: the relative error that its arithmetic allows; 0 if it sums in float64 and divides once.
    """

    program: Program
    imports: str = "torch"
    python: str = sys.executable
    tolerance: float = 0.0


def installed(inputs: Sequence[Path], python: str, folder: Path) -> dict[str, Peer]:
    """Returns the programs that average these inputs, by name.

    Args:
        inputs: files named ``model.safetensors``, each in a folder with its configuration.
        python: the interpreter that may have the other tools; a line names those that it lacks.
        folder: for their configuration files.
    """
    found = {}
    if version := _version("mergekit", _MERGEKIT, python):
        for dtype in ("float32", "float64"):
            # Linear merging adds products with the weight 1 and divides once.
            tolerance = len(inputs) * 2**-24 if dtype == "float32" else 0.0
            program = _mergekit(inputs, python, folder / f"{dtype}.yml", dtype)
            name = f"mergekit {version}, linear, `--lazy-unpickle`, {dtype} sums"
            found[name] = Peer(program, _MERGEKIT, python, tolerance)
    if version := _version("sd-mecha", "sd_mecha", python):
        # A running average, which rounds in each step: in float64, then once to float32.
        program = script("by_sd_mecha", inputs, interpreter=python)
        found[f"sd-mecha {version}, `n_average`, float64, 2 threads"] = Peer(program, "sd_mecha", python, 2**-23)
    found["by hand: `safe_open`, one tensor at a time, float64 sums, `save_file`"] = Peer(script("by_hand", inputs))
    found["like timm's `avg_checkpoints.py`: load each, add in float64"] = Peer(script("as_timm", inputs))
    return found


def _mergekit(inputs: Sequence[Path], python: str, config: Path, dtype: str) -> Program:
    models = [{"model": str(path.parent), "parameters": {"weight": 1.0}} for path in inputs]
    # JSON is YAML.
    config.write_text(json.dumps({"merge_method": "linear", "dtype": dtype, "out_dtype": "float32", "models": models}))
    command = ["env", "HF_HUB_OFFLINE=1", python, "-m", _MERGEKIT, str(config)]
    options = ["--lazy-unpickle", "--allow-crimes", "--no-copy-tokenizer", "--quiet"]
    return Program(lambda output: [*command, str(output), *options], inputs)


def _version(project: str, module: str, python: str) -> str | None:
    """Returns the version of an installed project, and imports it once, so that its bytecode is compiled."""
    code = f"import {module}; from importlib.metadata import version; print(version({project!r}))"
    done = subprocess.run([python, "-c", code], check=False, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        print(f"{project} skipped: {python} cannot import it ({reason[0]})\n", flush=True)
        return None
    return done.stdout.split()[-1]
