"""Runs the blocks of a documentation page in their order, in an empty folder, as a reader who copies them would.

Blocks of ``console`` are run by bash: the lines that begin with ``$``, and with ``>``, which continue them. Blocks of
``python`` are run as scripts. A comment in front of a block says what else is to be done with it:

- ``<!-- not run: REASON -->``: it is only shown
- ``<!-- file: NAME -->``: it is the contents of a file
- ``<!-- continues -->``: it goes on where the Python blocks before it end
- ``<!-- fails: CODE -->``: its last command ends with this exit code
- ``<!-- prints -->``: it is what the last block printed, to stdout and stderr; numbers may differ

At the top of a page, ``<!-- needs: LIBRARY, … -->`` names the libraries that it uses, and
``<!-- without BatchNorm -->`` says that its run has no such layers.

In the folder are ``RUN``, the fixture run, with its ``train.py`` and the log ``metrics.csv``, and some of its
checkpoints as ``a.pt``, ``b.pt``, ``c.safetensors`` and ``weights.pt``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RUN = ROOT / "fixtures" / "mnist_cnn"
STAND_INS = (
    ROOT / "tests" / "system" / "trainers" / "producers"
)  # its sitecustomize.py makes timm run without torchvision

_BLOCK = re.compile(
    r"(?P<comments>(?:^[ ]*<!-- (?:(?!-->).)* -->\n)*)"
    r"^(?P<indent>[ ]*)```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
_COMMENT = re.compile(r"<!-- ([a-z ]+?)(?:: (.*?))? -->")
_NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]\d+)?|  +|(?: (?:helped|did not help))?:| \((?:better|worse|equal)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: ``console``, ``python``, ``text``, …
        text: what is in it.
        line: its line in the page.
        notes: what the comments in front of it say.
    """

    language: str
    text: str
    line: int
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def commands(self) -> str:
        """The commands of a console block, without their prompts."""
        return "\n".join(line[2:] for line in self.text.splitlines() if line.startswith(("$ ", "> ")))


def blocks(page: Path) -> Iterator[Block]:
    """Yields the blocks of a page."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        inside = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        notes = {name: value or "" for name, value in _COMMENT.findall(found["comments"])}
        yield Block(found["language"], inside, text.count("\n", 0, found.start("language")) + 1, notes)


def needs(page: Path) -> list[str]:
    """Returns the libraries that a page uses."""
    found = re.search(r"^<!-- needs: (.*?) -->$", page.read_text(), re.MULTILINE)
    return found[1].split(", ") if found else []


def runs(page: Path) -> bool:
    """Whether a page has a block to run."""
    return any(block.language in ("console", "python") and "not run" not in block.notes for block in blocks(page))


def make_folder(folder: Path, *, batch_norm: bool = True) -> None:
    """Fills the folder in which the blocks of a page are run."""
    import torch
    from safetensors.torch import save_file

    (folder / "RUN").mkdir()
    saved = {path: torch.load(path, weights_only=False) for path in RUN.glob("*.pt")}  # their arguments are a Namespace
    for path, checkpoint in saved.items():
        if batch_norm:
            shutil.copy(path, folder / "RUN")
        else:
            state = {name: each for name, each in checkpoint["model"].items() if "bn" not in name}
            torch.save(checkpoint | {"model": state}, folder / "RUN" / path.name)
    script = (RUN / "train.py").read_text().replace("__file__", repr(str(RUN / "train.py")))
    whole = "DataLoader(_train_set(), batch"
    assert whole in script
    # Few images: what the pages show is not how good the statistics are.
    (folder / "train.py").write_text(script.replace(whole, "DataLoader(list(_train_set())[:256], batch"))
    for name, epoch in (("a.pt", 18), ("b.pt", 19), ("weights.pt", 20)):
        shutil.copy(folder / "RUN" / f"epoch_{epoch}.pt", folder / name)
    save_file(torch.load(folder / "weights.pt", weights_only=False)["model"], folder / "c.safetensors")
    rows = [f"{saved[path]['epoch']},{saved[path]['loss']}" for path in sorted(saved)]
    (folder / "metrics.csv").write_text("\n".join(["step,val_loss", *rows, ""]))


def run_page(page: Path, folder: Path) -> None:
    """Runs the blocks of a page in a folder. Raises AssertionError if one does not do what the page says."""
    make_folder(folder, batch_norm="<!-- without BatchNorm -->" not in page.read_text())
    script, printed = "", ""
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if "not run" in block.notes:
            assert block.notes["not run"], f"{where}: give the reason"
        elif "file" in block.notes:
            path = folder / block.notes["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif "prints" in block.notes:
            assert _words(printed) == _words(block.text), f"{where}: not what is printed:\n{printed}"
        elif block.language == "console":
            assert "pip install" not in block.commands, f"{where}: installing is not run. Give the reason"
            printed = _run(["bash", "-euo", "pipefail", "-c", block.commands], folder, block, where)
        elif block.language == "python":
            script = f"{script}\n{block.text}" if "continues" in block.notes else block.text
            printed = _run([sys.executable, "-c", script], folder, block, where)


def _words(text: str) -> list[str]:
    return [re.sub(_NUMBER, " ", line).rstrip() for line in text.strip().splitlines()]


def _run(command: list[str], folder: Path, block: Block, where: str) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{STAND_INS}",
        "HOME": str(folder),
        "COLUMNS": "80",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",  # the models are small
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=600,
        check=False,
    )
    expected = int(block.notes.get("fails", "0"))
    assert done.returncode == expected, f"{where}: exit {done.returncode}, expected {expected}\n{done.stdout}"
    return done.stdout
