"""Worker threads: the cores that control groups grant, and how workers share items and stop together."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

import pytest

from ckpt_avg import machine
from ckpt_avg.machine import SharedItems, run_workers
from ckpt_avg.mean.block_sizes import most_workers


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(machine, "Path", lambda text: tmp_path / str(text).lstrip("/"))
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "sys/fs/cgroup")
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, math.inf),
        ({"proc/self/cgroup": "0::/\n"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "5:cpuset:/x\n4:cpu,cpuacct:/j\n0::/\n",
                "sys/fs/cgroup/cpu/j/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/j/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/j\n",
                "sys/fs/cgroup/cpu/j/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/j/cpu.cfs_period_us": "100000\n",
            },
            math.inf,
        ),
    ],
)
def test_quotas(system: Path, files: dict[str, str], cores: float) -> None:
    write(system, files)
    assert machine.cpu_quota() == cores


@pytest.mark.parametrize(("quota", "expected"), [(math.inf, 8), (2.5, 3), (0.2, 1), (100, 8)])
def test_threads_follow_the_quota(monkeypatch: pytest.MonkeyPatch, quota: float, expected: int) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.choose_threads(None) == expected


def test_ranks_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks with a worker for every core each would be four times too many."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    assert machine.choose_threads(None, 4) == 2
    assert machine.choose_threads(None, 64) == 1
    assert machine.choose_threads(3, 4) == 3


@pytest.mark.parametrize(("device", "memory", "expected"), [("cpu", 128, 16), ("cuda:1", 128, 4), ("cuda", 1, 1)])
def test_a_gpu_gets_no_more_threads_than_it_can_feed(
    monkeypatch: pytest.MonkeyPatch, device: str, memory: int, expected: int
) -> None:
    """With a small share of the memory each, they would wait for the interpreter lock."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 16)
    assert machine.choose_threads(None, most=most_workers(device, memory * 2**20)) == expected
    assert machine.choose_threads(9, most=most_workers(device, memory * 2**20)) == 9


def test_each_item_goes_to_one_worker() -> None:
    found: list[int] = []
    run_workers(4, iter(range(1000)), found.extend)
    assert sorted(found) == list(range(1000))


def test_the_first_error_is_raised_and_the_others_get_no_more_items() -> None:
    """Without it an error would be known only when every other block has been computed."""
    started, failed = threading.Barrier(3), threading.Event()
    endless = iter(int, 1)

    def work(items: SharedItems[int]) -> None:
        if started.wait(10) == 0:
            failed.set()
            raise ValueError("broken")
        failed.wait(10)
        for _ in items:
            pass

    with pytest.raises(ValueError, match="broken"):
        run_workers(3, endless, work)


def test_an_interrupt_stops_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ckpt_avg.machine.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_workers(2, iter(int, 1), lambda items: [None for _ in items])


def test_a_thread_that_cannot_start_ends_those_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the error would come only after all the work."""
    start = threading.Thread.start
    running: list[threading.Thread] = []

    def limited(thread: threading.Thread) -> None:
        if len(running) == 2:
            raise RuntimeError("can't start new thread")
        running.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    taken: list[int] = []

    def work(items: SharedItems[int]) -> None:
        for item in items:
            time.sleep(0.005)
            taken.append(item)

    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_workers(3, range(500), work)
    assert len(taken) < 500
