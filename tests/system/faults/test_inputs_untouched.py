"""No command writes to its inputs, or next to them.

strace shows every call of a run that might, and the contents of the folder are compared. Access times are ignored.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from system.faults.checkpoints import FORMS, run_folder, safetensors_files
from system.faults.runs import Ended, Runs
from system.faults.tracing import OPENS, TRACE, changes

pytestmark = pytest.mark.slow

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, images):
        return self.head(self.bn(self.conv(images)).mean(dim=(2, 3)))

def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(4, 1, 3, 3, generator=generator) for _ in range(3)]

def score(model):
    return {"size": float(model(torch.ones(1, 1, 3, 3)).double().square().sum())}
"""


def contents(folder: Path) -> dict[str, tuple[object, ...]]:
    """Returns what is in a folder, and the folder itself: kind and mode, owner, modification time, bytes."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        data = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[str(path)] = (status.st_mode, status.st_uid, status.st_ino, status.st_nlink, status.st_mtime_ns, data)
    return found


def app(folder: Path) -> list[str]:
    """The options for a model and batches, with their module in a folder of its own."""
    folder.mkdir()
    (folder / "untouched_app.py").write_text(MODULE)
    return ["--model", "untouched_app:Net", "--data", "untouched_app:batches", "--app-dir", str(folder)]


def commands(sources: list[Path], output: Path, options: list[str]) -> list[tuple[object, ...]]:
    """Every command, with these checkpoints, those that only read first; their output is in another folder."""
    first = sources[0] / "model_10.pth" if sources[0].name == "inputs" else sources[0]
    score = ("--eval", "untouched_app:score")
    return [
        ("check", *sources),
        ("inspect", first),
        ("average", *sources, "-o", output, "-q", "--bn", "keep", "--sha256"),
        ("verify", output, "--sources", *sources),
        ("average", *sources, "-o", output, "-q", "--io", "pread", "--overwrite", *options, *score),
        ("refresh-bn", first, "-o", output, "-q", "--overwrite", *options),
        ("sweep", *sources, "-q", *options, *score, "--minimize", "size"),
        ("soup", *sources, "-o", output, "-q", "--overwrite", *options, *score, "--minimize", "size"),
        ("compare", *sources, "-q"),
        ("average", *sources, "-o", output, "--dry-run", "--bn", "keep", "--overwrite"),
    ]


def assert_untouched(runs: Runs, inputs: Path, commands: Sequence[tuple[object, ...]]) -> None:
    """Each command succeeds, reads there, and neither changes anything nor tries to."""
    before = contents(inputs)
    for command in commands:
        ended = runs.run(*command, strace=TRACE)
        assert ended.code == 0, (command, ended.error)
        assert opened(ended, inputs), command
        assert changes(ended.calls, inputs) == [], command
        assert contents(inputs) == before, command


@pytest.mark.guarantee("inputs-untouched")
@pytest.mark.parametrize("write", FORMS)
def test_no_kind_of_input_is_written_to(
    runs: Runs, inputs: Path, output: Path, tmp_path: Path, write: Callable[[Path], list[Path]]
) -> None:
    """Nor is anything next to it: by `check`, `inspect`, `average` and `verify`."""
    assert_untouched(runs, inputs, commands(write(inputs), output, app(tmp_path / "app"))[:4])


def test_no_command_writes_to_its_inputs(runs: Runs, inputs: Path, output: Path, tmp_path: Path) -> None:
    """Nor next to them: with a refresh, measurements, a sweep, reading with ``pread``, a dry run."""
    assert_untouched(runs, inputs, commands(run_folder(inputs), output, app(tmp_path / "app"))[4:])


@pytest.mark.guarantee("inputs-untouched")
@pytest.mark.campaign
@pytest.mark.parametrize("write", FORMS)
def test_no_command_writes_to_any_kind_of_input(
    runs: Runs, inputs: Path, output: Path, tmp_path: Path, write: Callable[[Path], list[Path]]
) -> None:
    sources = write(inputs)
    made = commands(sources, output, app(tmp_path / "app"))
    assert_untouched(runs, inputs, made)
    print(f"{write.__name__}: {len(made)} commands")


def opened(ended: Ended, folder: Path) -> bool:
    """Whether the run was seen to open anything there, so that the trace is no empty one."""
    return any(call.name in OPENS and f"{folder}" in call.text for call in ended.calls)


@pytest.mark.guarantee("inputs-untouched")
@pytest.mark.parametrize(
    ("wrong", "name"),
    [("opening_inputs_for_writing", "openat"), ("touching_inputs", "utimensat"), ("leaving_a_note", "openat")],
)
def test_the_trace_catches_a_reader_that_writes(runs: Runs, inputs: Path, output: Path, wrong: str, name: str) -> None:
    """A control: afterwards the inputs are as they were, but not all the time."""
    sources = safetensors_files(inputs)
    ended = runs.run("average", *sources, "-o", output, "-q", "--bn", "keep", strace=TRACE, wrong=[wrong])
    assert ended.code == 0, ended.error
    assert name in {call.name for call in changes(ended.calls, inputs)}


def test_a_comparison_catches_changes_of_any_kind(inputs: Path) -> None:
    """A control of what inputs are compared by."""
    first, *_ = safetensors_files(inputs)

    def note() -> None:
        (inputs / "note").touch()

    before = contents(inputs)
    for change in (lambda: os.utime(first, (1, 1)), lambda: first.chmod(0o640), lambda: first.write_bytes(b""), note):
        change()
        assert contents(inputs) != before
        before = contents(inputs)
