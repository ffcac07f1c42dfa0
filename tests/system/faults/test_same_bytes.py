"""One average has the same bytes in any environment, and each of its elements is the exact mean."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from mean.inputs import any_bits, awkward_inputs, digest, mixed_run, save
from safetensors.torch import load_file
from system.faults.exact import BFLOAT16, FLOAT16, FLOAT32, Format, beyond_float64_error, exact_mean
from system.faults.rank_runs import Group, rank_server

from ckpt_avg import average

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `run` of three checkpoints of many dtypes and sizes."""
    folder = tmp_path_factory.mktemp("same") / "run"
    folder.mkdir()
    save(folder, mixed_run())
    return folder


@pytest.fixture(scope="module")
def expected(run: Path) -> str:
    """The digest of its average, computed in this process."""
    average(run, run.parent / "mean.safetensors")
    return digest(run.parent / "mean.safetensors")


# -- The environment of a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """How a process is started.

    Attributes:
        flags: of Python.
        options: of the command, none of which may change a byte.
        variables: of the environment.
        umask: for `os.umask`.
        source: how the run folder is named, seen from its parent; empty: by its absolute path, from somewhere else.
    """

    flags: Sequence[str] = ()
    options: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    umask: int = 0o022
    source: str = ""


PLAIN = Environment(
    flags=["-O"],
    variables={"PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8", "PYTHONUTF8": "0", "TZ": "America/New_York"},
    umask=0,
)
STRANGE = Environment(
    flags=["-OO"],
    options=["--threads", "3", "--memory", "1MiB", "--io", "pread"],
    variables={
        "PYTHONHASHSEED": "7",
        "LC_ALL": "C",
        "TZ": "Pacific/Kiritimati",
        "OMP_NUM_THREADS": "2",
        "TEST_CLOCK": "300000000",
    },
    umask=0o077,
    source="run/../run/",
)

# Run before anything else in every process: a clock that is years ahead, and what a wrong writer would do.
_CLOCK = """
import os, time
ahead, now, now_ns = int(os.environ.get("TEST_CLOCK", 0)), time.time, time.time_ns
time.time, time.time_ns = lambda: now() + ahead, lambda: now_ns() + ahead * 10**9
"""
_WRONG = """
import ckpt_avg.output.header as header
encode = header.encode_header
header.encode_header = lambda plan, metadata, **given: encode(plan, {{**metadata, "more": {value}}}, **given)
"""


def digests(run: Path, folder: Path, several: Sequence[Environment], *, more: str = "") -> set[str]:
    """Averages in processes of their own; returns the digests of what they wrote."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_CLOCK + (_WRONG.format(value=more) if more else ""))
    outputs, processes = [], []
    for index, each in enumerate(several):
        outputs.append(folder / f"{index}.safetensors")
        command = [
            sys.executable,
            *each.flags,
            "-m",
            "ckpt_avg",
            "average",
            each.source or str(run),
            "-q",
            *each.options,
        ]
        processes.append(
            subprocess.Popen(
                [*command, "-o", str(outputs[-1])],
                cwd=run.parent if each.source else folder,
                env=os.environ | {"PYTHONPATH": str(folder)} | each.variables,
                umask=each.umask,
                stdout=subprocess.DEVNULL,
            )
        )
    assert [process.wait(timeout=120) for process in processes] == [0] * len(processes)
    return {digest(output) for output in outputs}


@pytest.mark.guarantee("python-O", "same-bytes")
def test_neither_clock_nor_seed_nor_folder_nor_flags_change_a_byte(run: Path, expected: str, tmp_path: Path) -> None:
    """If it failed, nobody could tell by its digest whether a release holds the weights that it should."""
    assert digests(run, tmp_path / "right", [PLAIN, STRANGE]) == {expected}


@pytest.mark.parametrize(
    "more",
    [
        "str(int(__import__('time').time()) // 1000)",
        pytest.param("' '.join({'a', 'b', 'c', 'd', 'e'})", marks=pytest.mark.campaign),
    ],
    ids=["time", "order of a set"],
)
def test_the_environments_catch_a_writer_that_depends_on_them(run: Path, tmp_path: Path, more: str) -> None:
    """A control: the time in the metadata, and the order of a set."""
    assert len(digests(run, tmp_path / "wrong", [PLAIN, STRANGE], more=more)) == 2


def by_ranks(run: Path, output: Path, size: int, *options: object) -> str:
    """Averages on several ranks; returns the digest."""
    ended = rank_server().run(Group(size, ["average", run, "-o", output, "-q", *options], timeout=60.0))
    assert [each.code for each in ended] == [0] * size, ended
    return digest(output)


@pytest.mark.guarantee("same-bytes", "uneven-ranks")
@pytest.mark.parametrize("size", [2, 4])
def test_the_number_of_ranks_does_not_change_a_byte(run: Path, expected: str, tmp_path: Path, size: int) -> None:
    """If it failed, the weights would depend on how many machines happened to be free."""
    assert by_ranks(run, tmp_path / "mean.safetensors", size) == expected


@pytest.mark.guarantee("same-bytes")
@pytest.mark.campaign
def test_many_environments_and_ranks_give_one_digest(run: Path, expected: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    several = [
        Environment(
            flags=rng.choice([[], ["-O"], ["-OO"], ["-X", "dev"]]),
            options=["--threads", rng.choice("12358"), "--memory", rng.choice(["1MiB", "3MiB", "64MiB", "1GiB"]),
                     "--io", rng.choice(["auto", "mmap", "pread"]), "--device", rng.choice(["auto", "cpu"])],
            variables={
                "PYTHONHASHSEED": str(rng.randrange(2**32)),
                "LC_ALL": rng.choice(["C", "POSIX", "C.UTF-8", "none"]),
                "PYTHONUTF8": rng.choice("01"),
                "TZ": rng.choice(["UTC", "Asia/Kathmandu", "America/St_Johns"]),
                "OMP_NUM_THREADS": rng.choice("124"),
                "TEST_CLOCK": str(rng.randrange(-(10**9), 10**9)),
            },
            umask=rng.choice([0, 0o022, 0o027, 0o077]),
            source=rng.choice(["", "run", "./run/", "../" + run.parent.name + "/run"]),
        )
        for _ in range(100)
    ]  # fmt: skip
    found = set()
    for begin in range(0, len(several), 2):
        found |= digests(run, tmp_path / "all", several[begin : begin + 2])
        for output in (tmp_path / "all").glob("*.safetensors"):
            output.unlink()
    shared = [
        by_ranks(run, tmp_path / f"{size}-{memory}-{io}.safetensors", size, "--memory", memory, "--io", io)
        for size, memory, io in itertools.product([1, 2, 3, 4], ["1MiB", "64MiB"], ["auto", "pread"])
    ]
    print(f"{len(several)} processes, {len(shared)} groups of ranks: digests", len(found | set(shared)))
    assert found | set(shared) == {expected}


# -- The exact mean -------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("accurate")
@pytest.mark.campaign
@pytest.mark.parametrize("fmt", [FLOAT32, BFLOAT16, FLOAT16], ids=lambda fmt: str(fmt.dtype))
def test_each_of_many_elements_is_the_exact_mean_rounded_once(tmp_path: Path, fmt: Format) -> None:
    """Many numbers of checkpoints and elements; and arbitrary bits, where sums in float64 may err."""
    counts = {"exact": 0, "wrong": 0, "of any bits": 0, "of any bits, other than exact": 0, "out of bounds": 0}
    for number, more in itertools.product([2, 3, 5, 7, 8, 16, 33, 64, 100], range(4)):
        inputs = awkward_inputs(number, fmt, 600 + more)
        got = codes_of_mean(tmp_path, inputs, fmt)
        counts["exact"] += len(got)
        counts["wrong"] += sum(a != b for a, b in zip(got, exact_mean(inputs, fmt), strict=True))
        inputs = any_bits(fmt, number, 1_000, seed=1000 * number + more)
        got = codes_of_mean(tmp_path, inputs, fmt)
        counts["of any bits"] += len(got)
        counts["of any bits, other than exact"] += sum(
            a != b for a, b in zip(got, exact_mean(inputs, fmt), strict=True)
        )
        counts["out of bounds"] += beyond_float64_error(got, inputs, fmt)
    print(fmt.dtype, json.dumps(counts))
    assert (counts["wrong"], counts["out of bounds"]) == (0, 0)
    assert counts["exact"] >= 150_000


def codes_of_mean(folder: Path, inputs: Sequence[torch.Tensor], fmt: Format) -> list[int]:
    """Returns the bits of each element of the command's average."""
    average(save(folder, [{"w": values} for values in inputs]), folder / "mean.safetensors", overwrite=True)
    return fmt.codes(load_file(folder / "mean.safetensors")["w"])
