"""Runs the commands that need no torch, of the ckpt-avg that is installed for the interpreter that runs this script.

It needs only the standard library, click and tqdm, so it shows whether ckpt-avg works on any Python:

    PYTHON -m venv new
    new/bin/pip install click tqdm
    new/bin/pip install --no-deps dist/ckpt_avg-*.whl
    new/bin/python tests/system/packages/installed.py native

The argument is the engine that the installation must have: native, or torch, which needs torch for the mean.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

FIXTURE = Path(__file__).parents[3] / "fixtures" / "mnist_cnn"
# SHA-256 of the data section of the mean of the last eight checkpoints with --bn keep, on any machine.
DATA = "e534c1312163115065f89df97e02457295c2091d35659ad828f1491ce58ab699"


def data_of(output: Path) -> str:
    """Returns the SHA-256 of all that follows the header of a safetensors file."""
    content = output.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def command(*arguments: str, expected: int = 0) -> str:
    """Runs the console script next to the interpreter; returns what it prints."""
    script = Path(sys.executable).with_name("ckpt-avg")
    done = subprocess.run([script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != expected:
        raise SystemExit(f"ckpt-avg {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main(engine: str) -> None:
    """Averages the fixture run and looks at the result with every command that runs no model."""
    version = command("--version")
    assert version.endswith(f"{engine} engine\n"), version
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "mean.safetensors")
        average = ("average", str(FIXTURE), "--last", "8", "--bn", "keep", "-o", str(output))
        command(*average)
        assert data_of(output) == DATA, data_of(output)
        assert "exists" in command(*average, expected=5)
        command("verify", str(output), "--sources", str(FIXTURE))
        damaged = bytearray(output.read_bytes())
        damaged[-1] ^= 1
        output.write_bytes(damaged)
        command("verify", str(output), expected=9)
    command("check", str(FIXTURE))
    command("average", "--help")
    listed = json.loads(command("inspect", str(FIXTURE), "--json"))
    assert "epoch_20.pt" in json.dumps(listed)
    command("inspect", "no such file", expected=2)
    print(f"Python {sys.version.split()[0]}: {version.strip()}: works")


if __name__ == "__main__":
    main(sys.argv[1])
