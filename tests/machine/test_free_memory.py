"""How much memory is free: what Linux and its control groups tell, and what to take where nothing does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_avg.machine import control_groups
from ckpt_avg.machine import free_memory as module
from ckpt_avg.machine.free_memory import free_memory

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         100000 kB\nMemAvailable:    8000000 kB\nHugePages_Total: 0\n"
AVAILABLE = 8_000_000 * 1024
GIB = 2**30

System = Callable[[dict[str, str]], None]


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> System:
    """A made-up /proc and /sys: paths that are given are read from there, all others are missing."""

    def make(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for each in (module, control_groups):
            monkeypatch.setattr(each, "Path", lambda text: tmp_path / str(text).lstrip("/"))
        monkeypatch.setattr(control_groups, "_ROOT", tmp_path / "sys/fs/cgroup")

    return make


def group(limit: str, used: str, name: str = "/user.slice/job", cached: int = 0) -> dict[str, str]:
    return {
        "/proc/meminfo": MEMINFO,
        "/proc/self/cgroup": f"0::{name}\n",
        f"/sys/fs/cgroup{name}/memory.max": limit + "\n",
        f"/sys/fs/cgroup{name}/memory.current": used + "\n",
        f"/sys/fs/cgroup{name}/memory.stat": f"anon 1000\ninactive_anon 7\ninactive_file {cached}\nactive_file 9\n",
    }


def group_of_version_1(limit: int, used: int, name: str, shown_as: str, cached: int = 0) -> dict[str, str]:
    return {
        "/proc/meminfo": MEMINFO,
        "/proc/self/cgroup": f"12:pids:{name}\n11:hugetlb,memory:{name}\n1:name=systemd:{name}\n",
        f"/sys/fs/cgroup/memory{shown_as}/memory.limit_in_bytes": f"{limit}\n",
        f"/sys/fs/cgroup/memory{shown_as}/memory.usage_in_bytes": f"{used}\n",
        f"/sys/fs/cgroup/memory{shown_as}/memory.stat": f"inactive_file 5\ntotal_inactive_file {cached}\n",
    }


def test_of_this_machine() -> None:
    """Here, whatever this machine is: a number of bytes below what it has."""
    found = free_memory()
    assert isinstance(found, int)
    assert 0 <= found <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_what_is_available_counts_and_not_what_is_unused(system: System) -> None:
    """MemFree leaves out the page cache, which is most of the memory of a machine that has read checkpoints."""
    system({"/proc/meminfo": MEMINFO})
    assert free_memory() == AVAILABLE


def test_the_limit_of_the_control_group(system: System) -> None:
    """In a container the machine's memory says nothing: taking half of it would end in the OOM killer."""
    system(group(str(2 * GIB), str(GIB // 2)))
    assert free_memory() == 2 * GIB - GIB // 2


def test_a_group_that_is_over_its_limit_leaves_nothing(system: System) -> None:
    system(group(str(GIB), str(GIB + 4096)))
    assert free_memory() == 0


def test_a_group_without_a_limit(system: System) -> None:
    system(group("max", str(GIB)))
    assert free_memory() == AVAILABLE


def test_a_limit_above_what_the_machine_has(system: System) -> None:
    system(group(str(2**50), "0"))
    assert free_memory() == AVAILABLE


def test_the_group_of_a_container_is_the_root(system: System) -> None:
    """In a cgroup namespace the process's group is called ``/``, and its files lie at the mount point."""
    system(group(str(GIB), "0", name="/") | {"/proc/self/cgroup": "0::/\n"})
    assert free_memory() == GIB


def test_the_tightest_limit_of_the_groups_above(system: System) -> None:
    """A scheduler puts the limit on the job, and the process into a group inside it that has none of its own."""
    system(
        group("max", "1000", name="/slurm/job_1/step_0/task_0")
        | group(str(2 * GIB), "0", name="/slurm/job_1/step_0")
        | group(str(GIB), "4096", name="/slurm/job_1")
        | group(str(GIB // 2), "0", name="/slurm/job_2")
        | {"/proc/self/cgroup": "0::/slurm/job_1/step_0/task_0\n"}
    )
    assert free_memory() == GIB - 4096


def test_cached_files_are_given_up(system: System) -> None:
    """Reading checkpoints fills the group with pages of theirs, which the kernel takes back at once."""
    system(group(str(GIB), str(GIB), cached=GIB // 2))
    assert free_memory() == GIB // 2


@pytest.mark.parametrize("shown_as", ["/docker/abc", ""], ids=["on the host", "in the container"])
def test_control_groups_of_version_1(system: System, shown_as: str) -> None:
    """A container sees its own group at the mount point, whatever the name that the process has for it."""
    system(group_of_version_1(GIB, GIB // 2, "/docker/abc", shown_as, cached=4096))
    assert free_memory() == GIB // 2 + 4096


def test_no_limit_in_version_1(system: System) -> None:
    """It is a very large number there."""
    system(group_of_version_1(9223372036854771712, GIB, "/", ""))
    assert free_memory() == AVAILABLE


@pytest.mark.parametrize(
    "text",
    [
        "12:memory:/docker/abc\n11:cpu,cpuacct:/docker/abc\n",
        "",
        "12:memory:/docker/abc\n0::/init.scope\n",
        "0::/a:b::c\n",
    ],
    ids=["version 1", "empty", "both", "colons"],
)
def test_groups_whose_files_are_not_there(system: System, text: str) -> None:
    system({"/proc/meminfo": MEMINFO, "/proc/self/cgroup": text})
    assert free_memory() == AVAILABLE


@pytest.mark.parametrize("text", ["", "MemTotal: 1000 kB\n", "MemAvailable:       0 kB\n"])
def test_a_meminfo_that_does_not_say(system: System, text: str) -> None:
    """Kernels before 3.14 have no MemAvailable."""
    system({"/proc/meminfo": text})
    assert free_memory() == 2 * GIB


def test_elsewhere_half_of_the_machine(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system({})
    monkeypatch.setattr(os, "sysconf_names", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 2})
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1_000_000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_memory() == 4096 * 500_000


@pytest.mark.parametrize("names", [{}, {"SC_PAGE_SIZE": 1}, None])
def test_where_not_even_that_is_known(system: System, monkeypatch: pytest.MonkeyPatch, names: object) -> None:
    system({})
    if names is None:
        monkeypatch.delattr(os, "sysconf_names")
    else:
        monkeypatch.setattr(os, "sysconf_names", names)
    assert free_memory() == 2 * GIB
