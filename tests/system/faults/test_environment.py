"""What surrounds a run: memory, streams, signals, loader workers and names. They end it cleanly, or change nothing."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from system.faults.outputs import begin, litter, make_averaging, state
from system.faults.rank_runs import HUNG, Group, rank_server
from system.faults.runs import Runs

pytestmark = pytest.mark.slow

Command = Callable[..., "subprocess.CompletedProcess[str]"]

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and peaks as Linux counts them")
long = pytest.mark.campaign

USER = """
import os, signal, subprocess, sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

def make():
    return nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300))

def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 300, generator=generator) for _ in range(4)]

def writes_to_raw_descriptors():
    for batch in batches():
        for descriptor in (1, 2):
            try:
                os.write(descriptor, b"said by a library " * 300)
            except OSError:
                pass
        yield batch

def takes_its_time_to_stop():
    yield batches()[0]
    try:
        open("ready", "w").close()
        time.sleep(60)
    finally:
        open("stopping", "w").close()
        time.sleep(60)

class Rows(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        trouble = os.environ.get("TEST_TROUBLE", "")
        with open(f"worker.{os.getpid()}", "w"):
            pass
        if index == 13 and trouble == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 13 and trouble == "raises":
            raise LookupError("row 13 is bad")
        if index == 13 and trouble == "waits":
            open("ready", "w").close()
            time.sleep(60)
        return torch.cat(batches())[index]

def in_workers():
    return DataLoader(Rows(), batch_size=6, num_workers=2, multiprocessing_context="fork")
"""


@pytest.fixture
def normed(tmp_path: Path) -> list[object]:
    """Arguments for a refreshed average of two checkpoints into `out/mean.safetensors`, without the data."""
    (tmp_path / "out").mkdir()
    (tmp_path / "user.py").write_text(USER)
    for seed in range(2):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300))
        model(torch.randn(8, 300))
        save_file(model.state_dict(), tmp_path / f"{seed}.safetensors")
    return ["average", "0.safetensors", "1.safetensors", "-o", "out/mean.safetensors", "-q", "--device", "cpu",
            "--model", "user:make", "--data"]  # fmt: skip


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command in a process group of its own, in the test's folder; what is left of it is killed."""
    started: list[subprocess.Popen[str]] = []

    def call(*arguments: object, trouble: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "ckpt_avg", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"TEST_TROUBLE": trouble},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Returns once a file is there."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- Imports --------------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("signals")
def test_ctrl_c_while_modules_are_imported_ends_in_silence(ckpt_avg: Command, tmp_path: Path) -> None:
    """If it failed, whoever sees a typing error and stops the command gets a traceback of its imports."""
    (tmp_path / "click.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n")
    ended = ckpt_avg("--version", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


FEW_FILES = "have to be open at once|too many open files"


@pytest.mark.guarantee("open-files", "out-of-memory")
@linux
@pytest.mark.parametrize(
    ("kind", "limit", "says"),
    [
        (
            resource.RLIMIT_AS,
            150 * 2**20,
            "out of memory: .*segment.*\\. Raise the limit on the memory of this process",
        ),
        *((resource.RLIMIT_NOFILE, files, FEW_FILES) for files in (5, 6)),
    ],
)
def test_a_limit_that_is_too_low_for_any_run_is_exit_6(
    ckpt_avg: Command, tmp_path: Path, kind: int, limit: int, says: str
) -> None:
    """If it failed, a limit of the job would look like a broken installation, or like a file that is missing."""
    for seed in range(2):
        save_file({"w": torch.full((3,), float(seed))}, tmp_path / f"{seed}.safetensors")
    ended = ckpt_avg(
        "average", "0.safetensors", "1.safetensors", "-o", "mean.safetensors",
        preexec_fn=lambda: resource.setrlimit(kind, (limit, limit)),
        env=os.environ | {"CKPT_AVG_ENGINE": "torch"},  # the native engine needs less than that
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (6, ""), ended
    assert "Traceback" not in ended.stderr  # torch may say that it could not look at the processor
    assert re.match(f"Error: .*({says})", ended.stderr.splitlines()[-1])
    assert sorted(os.listdir(tmp_path)) == ["0.safetensors", "1.safetensors"]


# -- Signals and workers --------------------------------------------------------------------------------------------


@pytest.mark.guarantee("second-ctrl-c")
def test_a_second_ctrl_c_ends_at_once(
    start: Callable[..., subprocess.Popen[str]], normed: list[object], tmp_path: Path
) -> None:
    """If it failed, code that stops slowly could not be interrupted but by kill -9."""
    (tmp_path / "out" / "mean.safetensors").write_bytes(b"the old one")
    process = start(*normed, "user:takes_its_time_to_stop", "--overwrite")
    for moment in ("ready", "stopping"):
        wait_for(tmp_path / moment, process)
        process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    process.communicate(timeout=30)
    assert time.monotonic() - begin < 5
    assert process.returncode == -signal.SIGINT  # which a shell shows as 130
    assert os.listdir(tmp_path / "out") == ["mean.safetensors"]
    assert (tmp_path / "out" / "mean.safetensors").read_bytes() == b"the old one"


@pytest.mark.guarantee("loader-workers")
def test_forked_loader_workers_change_nothing(ckpt_avg: Command, normed: list[object], tmp_path: Path) -> None:
    """If it failed, users of `num_workers` would get other statistics, or workers that fail after the signals."""
    made = []
    for data in ("user:batches", "user:in_workers"):
        ended = ckpt_avg(*normed, data, "--overwrite")
        assert (ended.returncode, ended.stderr) == (0, "")
        made.append(load_file(tmp_path / "out" / "mean.safetensors"))
    assert all(made[0][name].equal(made[1][name]) for name in made[0])


@pytest.mark.guarantee("loader-workers")
@pytest.mark.parametrize(
    ("trouble", "says"),
    [("dies", "DataLoader worker"), pytest.param("raises", "LookupError: row 13 is bad", marks=long)],
    ids=["dies", "raises"],
)
def test_a_loader_worker_that_fails_is_exit_7(
    start: Callable[..., subprocess.Popen[str]], normed: list[object], tmp_path: Path, trouble: str, says: str
) -> None:
    """If it failed, a lost worker would hang the run, or statistics of some of the batches be published."""
    process = start(*normed, "user:in_workers", trouble=trouble)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7, err
    last = err[err.rindex("Error: the dataloader raised at batch") :]
    assert says in last
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.guarantee("loader-workers")
@pytest.mark.parametrize(
    ("number", "to_group", "expected"),
    [
        (signal.SIGINT, True, 130),
        pytest.param(signal.SIGTERM, True, 143, marks=long),
        pytest.param(signal.SIGTERM, False, 143, marks=long),  # torch waits some seconds for its workers
    ],
    ids=["Ctrl-C", "scheduler", "kill"],
)
def test_a_signal_ends_the_loader_workers_too(
    start: Callable[..., subprocess.Popen[str]],
    normed: list[object],
    tmp_path: Path,
    number: int,
    to_group: bool,
    expected: int,
) -> None:
    """If it failed, workers would stay behind, or take the signal for the main process's and remove its files."""
    process = start(*normed, "user:in_workers", trouble="waits")
    wait_for(tmp_path / "ready", process)
    os.killpg(process.pid, number) if to_group else process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == expected, err
    (said,) = (line for line in err.splitlines() if line.startswith("Error: "))  # torch may speak of its workers too
    assert "the output path is unchanged" in said
    assert os.listdir(tmp_path / "out") == []
    workers = [int(path.suffix[1:]) for path in tmp_path.glob("worker.*")]
    assert workers
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{worker}") for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [worker for worker in workers if os.path.exists(f"/proc/{worker}")]


# -- Streams --------------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("closed-streams")
@pytest.mark.parametrize("closed", [(0, 1, 2), pytest.param((0, 1), marks=long)], ids=str)
def test_what_is_written_to_closed_streams_does_not_reach_the_output(
    ckpt_avg: Command, normed: list[object], tmp_path: Path, closed: Sequence[int]
) -> None:
    """If it failed, the output would be opened as descriptor 1, and a library that prints would write into it."""

    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    arguments = ["refresh-bn", *normed[1:2], *normed[3:], "user:writes_to_raw_descriptors", "--overwrite"]
    assert ckpt_avg(*arguments).returncode == 0
    expected = (tmp_path / "out" / "mean.safetensors").read_bytes()
    ended = ckpt_avg(*arguments, preexec_fn=close)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "mean.safetensors").read_bytes() == expected


@pytest.mark.guarantee("odd-paths")
def test_names_of_any_bytes_work_in_the_c_locale(ckpt_avg: Command, tmp_path: Path) -> None:
    """If it failed, a run on a machine without a locale would end in UnicodeEncodeError after hours."""
    odd = os.fsdecode(b"-r \xff\n\xc3\xbc")
    (tmp_path / odd).mkdir()
    for step in range(2):
        contents = tmp_path / "w.safetensors"
        save_file({"w": torch.full((3,), float(step))}, contents)
        contents.rename(tmp_path / odd / f"{odd}_{step}.safetensors")
    c_locale = os.environ | {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    output = f"{odd}/{odd} mean.safetensors"
    ended = ckpt_avg("average", "-o", output, "--report", f"{odd}/report.json", "--", odd, env=c_locale)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    (tmp_path / odd / f"{odd} mean.safetensors").rename(tmp_path / "plain.safetensors")
    assert load_file(tmp_path / "plain.safetensors")["w"].tolist() == [0.5] * 3
    assert json.loads((tmp_path / odd / "report.json").read_text())["written"] is True
    (tmp_path / "plain.safetensors").rename(tmp_path / odd / f"{odd} mean.safetensors")
    again = ckpt_avg("average", "-o", output, "--", odd, env=c_locale)
    assert again.returncode == 5
    assert "exists already" in again.stderr
    assert "Traceback" not in again.stderr


# -- Memory ---------------------------------------------------------------------------------------------------------


def starve(runs: Runs, folder: Path, output: Path, limits: Sequence[int]) -> None:
    """Averages two checkpoints of 32 MB with so many MiB of address space to spare; too few must be said, no more."""

    def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_file({**tensors, **{f"{number}": torch.ones(9) for number in range(500)}}, path)

    run = make_averaging(folder, 8_000_000, count=2, write=write)
    codes = []
    for spare in limits:
        ended = runs.run(*run.command(output, *begin(output, overwrite=False), "--threads", "2"), spare_memory=spare)
        assert ended.code == 0 or (ended.code == 6 and "out of memory" in ended.error), (spare, ended)
        assert "Traceback" not in ended.error, (spare, ended)
        assert (state(output, run.new), litter(output)) == ("absent" if ended.code else "new", []), (spare, ended)
        codes.append(ended.code)
    print(Counter(codes))
    assert (codes[0], codes[-1]) == (6, 0)


@pytest.mark.guarantee("out-of-memory")
@linux
@pytest.mark.parametrize(
    "limits", [[0, 30, 60, 150, 260, 1000], pytest.param([*range(0, 400, 2), 1000], marks=long)], ids=["few", "many"]
)
def test_a_limit_on_memory_is_exit_6_wherever_it_strikes(
    runs: Runs, inputs: Path, output: Path, limits: Sequence[int]
) -> None:
    """If it failed, a job with too little memory would leave a traceback, or half an output."""
    starve(runs, inputs, output, limits)


# -- No hang --------------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("no-hang")
def test_the_harness_of_ranks_catches_a_hang(tmp_path: Path) -> None:
    """A control: of a rank that stops, with nobody to notice in time, it says that all had to be killed."""
    save_file({"w": torch.ones(3)}, tmp_path / "0.safetensors")
    save_file({"w": torch.zeros(3)}, tmp_path / "1.safetensors")
    command = ["average", "0.safetensors", "1.safetensors", "-o", "mean.safetensors", "-q"]
    group = Group(2, command, folder=tmp_path, faults={1: [("after request", "sleep 60")]}, timeout=1.0)
    ended = rank_server().run(group)
    assert [each.code for each in ended] == [HUNG, HUNG]
    assert not (tmp_path / "mean.safetensors").exists()
