"""Reading what real libraries left runs none of their code: no import, no class looked up, nothing executed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from system.trainers.runs import LIBRARIES, Trainers

pytestmark = pytest.mark.trainers

# What the classes in the checkpoints belong to.
OF_THE_TRAINERS = {
    *("transformers", "accelerate", "lightning", "timm", "mmengine", "peft", "nets"),
    "torch.distributed.checkpoint.metadata",
}

_AUDIT = """
import json, sys
from pathlib import Path
control, folders = sys.argv[1] == "control", list(map(Path, sys.argv[3:]))
import ckpt_avg
from ckpt_avg.cli.main import cli
from ckpt_avg.cli.exits import run

def work(folder, number):
    out = Path(sys.argv[2]) / f"{number}.safetensors"
    for arguments in (["inspect", folder], ["check", folder], ["average", folder, "-o", out, "--bn", "keep", "-q"]):
        code = run(cli, [*map(str, arguments), "--json"])
        assert code == 0, (code, arguments)

for number, folder in enumerate(folders):
    work(folder, f"before-{number}")  # whatever is imported late is imported now
if control:
    import torch
    suffixes = (".pt", ".pth", ".bin", ".tar")
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
events, listening = set(), True
# Importing looks files up, compiles and executes them; a pickle looks up classes.
named = ("import", "exec", "compile", "pickle.find_class", "marshal.loads", "code.__new__", "function.__new__")
begin = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.", "socket.", "ctypes.dlopen",
         "urllib.", "http.", "ftplib.", "smtplib.", "os.putenv", "shutil.", "webbrowser.", "sys.set")

def hook(event, arguments):
    if listening and (event in named or event.startswith(begin)):
        events.add((event, str(arguments)[:200]))

sys.addaudithook(hook)
before = set(sys.modules)
if control:
    for path in files:
        try:
            torch.load(path, weights_only=False)
        except Exception:
            pass
else:
    for number, folder in enumerate(folders):
        work(folder, number)
listening = False
print(json.dumps([sorted(events), sorted(set(sys.modules) - before), sorted(sys.modules)]), file=sys.stderr)
"""


def audit(mode: str, out: Path, folders: list[Path]) -> tuple[list[tuple[str, str]], list[str], set[str]]:
    """Opens, inspects, checks and averages run folders twice, the second time under an audit hook.

    Returns:
        The events, the modules that were imported under the hook, and all that were ever imported.
    """
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _AUDIT, mode, out, *folders],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    events, modules, ever = json.loads(done.stderr.splitlines()[-1])
    return events, modules, set(ever)


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_code_of_a_checkpoint_runs(library: str, trainers: Trainers, tmp_path: Path) -> None:
    folders = [trainers.run(name).folder for name in LIBRARIES[library][1]]
    events, modules, ever = audit("ours", tmp_path / "out", folders)
    assert events == []
    assert modules == []
    assert not ever & OF_THE_TRAINERS


@pytest.mark.parametrize("library", ["transformers", "mmengine"])
def test_the_audit_sees_what_loading_them_does(library: str, trainers: Trainers, tmp_path: Path) -> None:
    """The same hook while `torch.load` reads the same files: the test above can fail."""
    folders = [trainers.run(name).folder for name in LIBRARIES[library][1]]
    events, _, ever = audit("control", tmp_path / "out", folders)
    assert {"import", "pickle.find_class"} <= {event for event, _ in events}
    assert ever & OF_THE_TRAINERS
