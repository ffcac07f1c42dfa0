"""The programs that are compared: this project's command, the floor, loops by hand, other projects' tools."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from inputs import files_of
from measure import ckpt_avg
from rounds import Program

HERE = Path(__file__).parent
FLOOR, OURS, NAIVE = "floor: import torch, fault in, write, fsync", "ckpt-avg", "`safe_open` loop, float64, `save_file`"
TIMM = "as timm's avg_checkpoints.py does"
_MERGEKIT = "mergekit.scripts.run_yaml"


@dataclass(frozen=True)
class Peer:
    """A tool to compare with.

    Attributes:
        program: how it is run.
        imports: the module that it imports before it begins.
        python: by which interpreter.
        exact: whether it sums in float64 and divides once, so that its bits must be those of the mean.
        tolerance: the relative error that is let through where it does not.
    """

    program: Program
    imports: str = "torch"
    python: str = sys.executable
    exact: bool = True
    tolerance: float = 0.0


def script(name: str, inputs: Sequence[Path], python: str = sys.executable) -> Program:
    """Returns a program of this folder, over files."""
    files = files_of(list(inputs))
    return Program(lambda output: [python, str(HERE / name), str(output), *map(str, files)], files)


def ours(inputs: Sequence[Path], *options: object) -> Program:
    """Returns this project's command."""
    return Program(lambda output: ckpt_avg("-o", output, *options, *inputs), files_of(list(inputs)))


def floor(inputs: Sequence[Path]) -> Program:
    """Returns the floor program, which writes as many bytes as the output of these inputs has."""
    return script("floor.py", inputs)


def comparable(inputs: list[Path], python: str, folder: Path) -> dict[str, Peer]:
    """Returns all programs that average these inputs, by name.

    Args:
        inputs: files named ``model.safetensors``, each in a folder with its configuration.
        python: the interpreter that may have the other tools; what it has not is left out, with a line that says so.
        folder: for their configuration files.
    """
    found = {
        FLOOR: Peer(floor(inputs)),
        OURS: Peer(ours(inputs)),
        NAIVE: Peer(script("naive.py", inputs)),
        TIMM: Peer(script("as_timm.py", inputs)),
    }
    if version := _version("mergekit", _MERGEKIT, python):
        for dtype in ("float32", "float64"):
            program = Program(_mergekit(inputs, python, folder / f"{dtype}.yml", dtype), inputs)
            # Linear merging adds products with the weight 1 and divides once.
            peer = Peer(program, _MERGEKIT, python, exact=dtype == "float64", tolerance=len(inputs) * 2**-24)
            found[f"mergekit {version}, linear, `--lazy-unpickle`, {dtype}"] = peer
    if version := _version("sd-mecha", "sd_mecha", python):
        # A running average, which rounds in each step: in float64, then once to float32.
        program = script("by_sd_mecha.py", inputs, python)
        peer = Peer(program, "sd_mecha", python, exact=False, tolerance=2**-23)
        found[f"sd-mecha {version}, `n_average`, float64, 2 threads"] = peer
    return found


def _mergekit(inputs: Sequence[Path], python: str, config: Path, dtype: str) -> Callable[[Path], list[str]]:
    models = [{"model": str(path.parent), "parameters": {"weight": 1.0}} for path in inputs]
    # JSON is YAML.
    config.write_text(json.dumps({"merge_method": "linear", "dtype": dtype, "out_dtype": "float32", "models": models}))
    options = ["--lazy-unpickle", "--allow-crimes", "--no-copy-tokenizer", "--quiet"]
    offline = ["env", "HF_HUB_OFFLINE=1"]
    return lambda output: [*offline, python, "-m", _MERGEKIT, str(config), str(output), *options]


def _version(project: str, module: str, python: str) -> str | None:
    """Returns the version of an installed project, and imports it once, so that its bytecode is compiled."""
    code = f"import {module}; from importlib.metadata import version; print(version({project!r}))"
    done = subprocess.run([python, "-c", code], check=False, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        print(f"{project} left out: {python} cannot import it ({reason[0]})\n", flush=True)
        return None
    return done.stdout.split()[-1]
