"""uv, which makes environments from a cache in a second, and runs other tools in environments of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from system.faults.tracing import refuse_or_skip

ROOT = Path(__file__).parents[3]
CONSTRAINTS = ROOT / "tests" / "constraints.txt"


def program() -> str:
    """Returns the path of uv."""
    found = shutil.which("uv")
    if found is None:
        refuse_or_skip("packages", "uv is not installed: pip install -e '.[packages]'")
    return found


def run(*arguments: object, cwd: Path = ROOT, expected: int = 0, **variables: str) -> str:
    """Runs uv with further environment variables; returns what it prints."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("CKPT_AVG_", "PYTHON"))}
    own = {"UV_PYTHON_DOWNLOADS": "never", "UV_CONSTRAINT": str(CONSTRAINTS), "UV_NO_PROGRESS": "1"}
    if "PIP_FIND_LINKS" in outer:
        own["UV_FIND_LINKS"] = ",".join(outer["PIP_FIND_LINKS"].split())  # where pip of this machine looks, too
    command = [program(), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=outer | own | variables, capture_output=True, text=True, timeout=600, check=False
    )
    text = done.stdout + done.stderr
    assert done.returncode == expected, text
    return text


def tool(name: str, *arguments: object, package: str = "", **options: object) -> str:
    """Runs a command of a package from PyPI, in an environment of its own."""
    return run("tool", "run", "-q", "-c", CONSTRAINTS, "--from", package or name, name, *arguments, **options)  # type: ignore[arg-type]
