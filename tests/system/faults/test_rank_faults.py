"""Ranks that fail, are killed, freeze or are started wrongly: the others stop with the cause, and nothing is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from system.faults.harness import REQUIRE
from system.faults.rank_runs import NO_MOUNTS, Ended, Group, RankServer, free_port, rank_server

from ckpt_avg import average

pytestmark = pytest.mark.slow

PUBLISHED_OR_NOT = "The output path is as it was, or complete if it had been published."
CLOSED = "was lost: its connection was closed"
long = pytest.mark.campaign
SOON = 8.0  # seconds in which ranks must have ended, on a machine that does other things too

MODULE = """
import os, time
import torch
from torch import nn

RANK = os.environ["RANK"]
WHERE = os.environ.get("FAILS_AT", "")

def fail(where):
    if WHERE == where and RANK == "1":
        raise ValueError(f"broken in {where}")

fail("import")

def make():
    fail("model")
    return nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300))

def data():
    fail("data")
    return loader()

def loader():
    for number in range(6):
        if number == 3:
            fail("loader")
            if "PAUSE" in os.environ:
                open(os.environ["PAUSE"] + RANK, "w").close()
                if RANK == os.environ["MARKING"]:
                    while not all(os.path.exists(os.environ["PAUSE"] + rank) for rank in "01"):
                        time.sleep(0.01)
                    open(os.environ["PAUSE"], "w").close()
                time.sleep(20)
        yield torch.full((4, 300), float(number)) + torch.arange(4.0)[:, None]

def forward_batch(model, batch):
    fail("forward")
    model(batch)

def score(model):
    fail("score")
    return {"loss": float(model[0].weight.sum())}

def measure(model):
    return {"loss": float(model[0].weight.sum())}
"""


@pytest.fixture(scope="module")
def server() -> RankServer:
    """Forks ranks."""
    return rank_server()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints of six pages, `user.py`, and what one process makes of them, `one.safetensors`."""
    folder = tmp_path_factory.mktemp("inputs")
    for number in range(2):
        torch.manual_seed(number)
        model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300))
        model[1].running_mean += number  # or the statistics would count as frozen
        save_file(model.state_dict(), folder / f"{number}.safetensors")
    (folder / "user.py").write_text(MODULE)
    average(sources_of(folder), folder / "one.safetensors", bn="keep")
    return folder


def sources_of(folder: Path) -> list[Path]:
    return [folder / "0.safetensors", folder / "1.safetensors"]


def command(inputs: Path, output: Path, *options: object, refresh: bool = False) -> list[object]:
    user = ["--model", "user:make", "--data", "user:data", "--app-dir", inputs] if refresh else ["--bn", "keep"]
    return ["average", *sources_of(inputs), "-o", output, "-q", *user, *options]


def codes(ended: Sequence[Ended]) -> list[int]:
    return [each.code for each in ended]


def assert_stopped(ended: Sequence[Ended], failed: int, cause: str, output: Path, *, code: int) -> None:
    """Asserts that one rank failed with a code and a message, that the others name it, and that nothing is there."""
    for rank, each in enumerate(ended):
        assert each.code == (code if rank == failed else 8), (rank, each)
        assert f"[rank {rank}] Error: " in each.err
        assert each.out == ""
        if rank == failed:
            assert cause in each.err
        else:
            assert f"[rank {rank}] Error: rank {failed} failed: " in each.err
            assert cause in each.err
            assert each.err.endswith(f"{PUBLISHED_OR_NOT}\n")
        assert each.seconds < SOON
    assert os.listdir(output.parent) == []


# -- A rank that fails ----------------------------------------------------------------------------------------------


@pytest.mark.guarantee("rank-fails")
@pytest.mark.parametrize(
    ("where", "cause"),
    [
        ("import", "--model user:make: importing user failed: ValueError: broken in import"),
        pytest.param("model", "ValueError: broken in model", marks=long),
        pytest.param("data", "ValueError: broken in data", marks=long),
        ("loader", "the dataloader raised at batch 4: ValueError: broken in loader"),
        pytest.param(
            "forward",
            "the model raised at batch 2 (a tensor of shape [4, 300]): ValueError: broken in forward",
            marks=long,
        ),
    ],
)
def test_code_of_the_user_that_fails_on_one_rank_only(
    server: RankServer, inputs: Path, output: Path, where: str, cause: str
) -> None:
    """If it failed, what is wrong on one machine would hang all others, or be reported by none."""
    group = Group(3, command(inputs, output, refresh=True), environment={"FAILS_AT": where})
    assert_stopped(server.run(group), 1, cause, output, code=7)


@pytest.mark.guarantee("rank-fails")
@pytest.mark.parametrize(
    ("what", "cause", "code"),
    [
        ("missing", "no such file or folder", 2),
        pytest.param("cut off", "1.safetensors: ", 3, marks=long),
        pytest.param("not a checkpoint", "1.safetensors: ", 3, marks=long),
        pytest.param("another shape", "don't fit together", 4, marks=long),
        ("nan", "NaN", 4),
    ],
)
def test_checkpoints_that_are_wrong_on_one_rank_only(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path, what: str, cause: str, code: int
) -> None:
    """If it failed, a disk that is wrong on one machine would hang the others, or spoil the output."""
    for rank in range(2):
        shutil.copytree(inputs, tmp_path / f"rank{rank}")
    bad = tmp_path / "rank1" / "1.safetensors"
    if what == "missing":
        bad.unlink()
    elif what == "cut off":
        os.truncate(bad, 1000)
    elif what == "not a checkpoint":
        bad.write_bytes(b"hello" * 100)
    elif what == "another shape":
        save_file({"w": torch.ones(3)}, bad)
    else:  # behind the samples by which files are compared, in rank 1's half
        tensors = load_file(bad)
        tensors["1.bias"][0] = float("nan")
        for rank in range(2):
            save_file(tensors, tmp_path / f"rank{rank}" / "1.safetensors")
    arguments = ["average", "0.safetensors", "1.safetensors", "-o", output, "-q", "--bn", "keep"]
    ended = server.run(Group(2, arguments, own_folders={rank: tmp_path / f"rank{rank}" for rank in range(2)}))
    failed = 1
    if what == "nan" and ended[0].code != 8:
        failed = 0  # whose share holds the first of the small tensors
    assert ended[failed].code == code, ended
    assert cause.lower() in ended[failed].err.lower()
    assert_stopped(ended, failed, cause if what in ("missing", "nan") else "", output, code=code)


@pytest.mark.parametrize(
    ("point", "action", "cause"),
    [
        ("in write", "ENOSPC", "writing failed: No space left on device"),
        ("before fsync", "EIO", "fsync failed, so the data is discarded: Input/output error"),
    ],
)
@pytest.mark.parametrize("failing", [1, pytest.param(2, marks=long)])
def test_a_disk_that_fails_on_one_rank(
    server: RankServer, inputs: Path, output: Path, point: str, action: str, cause: str, failing: int
) -> None:
    """If it failed, bytes that one machine could not write would be published."""
    ended = server.run(Group(3, command(inputs, output), faults={failing: [(point, action)]}))
    assert_stopped(ended, failing, cause, output, code=5)


@pytest.mark.parametrize(
    ("point", "action", "cause"),
    [
        ("before posix_fallocate", "ENOSPC", "not enough space"),
        pytest.param("before posix_fallocate", "EDQUOT", "not enough space", marks=long),
        pytest.param("before fsync", "EIO", "fsync failed", marks=long),
    ],
)
def test_a_disk_that_fails_on_rank_0(
    server: RankServer, inputs: Path, output: Path, point: str, action: str, cause: str
) -> None:
    """If it failed, the others would wait for rank 0 for ever."""
    ended = server.run(Group(2, command(inputs, output), faults={0: [(point, action)]}))
    assert_stopped(ended, 0, cause, output, code=5)


@long
def test_an_output_that_came_to_exist_meanwhile_is_kept(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, somebody else's file would be replaced, or the other ranks report success."""
    ended = server.run(Group(2, command(inputs, output), faults={0: [("before link", f"mark {output}")]}))
    assert codes(ended) == [5, 8]
    assert "was created by something else during the run, and is kept" in ended[0].err
    assert "rank 0 failed: " in ended[1].err
    assert "was created by something else during the run, and is kept" in ended[1].err
    assert os.listdir(output.parent) == [output.name]
    assert output.read_bytes() == b""


def test_an_output_folder_that_is_not_shared(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, a rank would fill a file of its own, and the output have holes."""
    ended = server.run(Group(2, command(inputs, output), faults={1: [("start", f"hide {output.parent}")]}))
    if ended[1].code == NO_MOUNTS:
        if "mount" in os.environ.get(REQUIRE, ""):
            pytest.fail(f"{REQUIRE} asks for mounts, and none was possible")
        pytest.skip("needs a mount of its own, and none may be made here")
    assert_stopped(ended, 1, f"{output}: the file that rank 0 created cannot be opened here", output, code=5)


# -- A rank that is killed ------------------------------------------------------------------------------------------

STEPS = ["request", "files", "header", "output", "output created", "output opened", "mean"]
POINTS = [f"{moment} {step}" for step in STEPS for moment in ("before", "after")]
# Before the first step some may still be joining, and behind the mean rank 0 may have published.
POINTS = [*POINTS[1:-1], "in write"]


def assert_lost(ended: Sequence[Ended], killed: int) -> None:
    """Asserts that one rank was killed, and that the others say so soon."""
    for rank, each in enumerate(ended):
        assert each.code == (-signal.SIGKILL if rank == killed else 8), (rank, each)
        if rank != killed:
            # Before it torch says so, too, where the store was in rank 0.
            assert each.err.endswith(f"[rank {rank}] Error: rank {killed} {CLOSED}. {PUBLISHED_OR_NOT}\n")
            assert each.seconds < SOON


def kill(server: RankServer, inputs: Path, output: Path, killed: int, point: str, **options: Any) -> list[Ended]:
    arguments = command(inputs, output, refresh=options.pop("refresh", False))
    return server.run(Group(3, arguments, faults={killed: [(point, "kill")]}, **options))


@pytest.mark.guarantee("no-hang")
@pytest.mark.parametrize("point", ["after request", "after output", "in write"])
def test_a_rank_that_is_killed_stops_the_others(server: RankServer, inputs: Path, output: Path, point: str) -> None:
    """If it failed, the others would hang, or leave a hidden file as large as the output."""
    assert_lost(kill(server, inputs, output, 1, point), 1)
    assert os.listdir(output.parent) == []


@pytest.mark.guarantee("no-hang")
@pytest.mark.parametrize(
    "point",
    ["in write", "before link", *(pytest.param(each, marks=long) for each in ("after output opened", "after mean"))],
)
def test_rank_0_that_is_killed_stops_the_others(server: RankServer, inputs: Path, output: Path, point: str) -> None:
    """If it failed, nobody would remove what rank 0 leaves."""
    assert_lost(kill(server, inputs, output, 0, point), 0)
    assert os.listdir(output.parent) == []


@long
def test_rank_0_that_is_killed_as_soon_as_it_has_joined_stops_the_others(
    server: RankServer, inputs: Path, output: Path
) -> None:
    """If it failed, the others, some of which may be joining still, would hang."""
    ended = kill(server, inputs, output, 0, "before request", timeout=10)
    assert codes(ended) == [-signal.SIGKILL, 8, 8]
    for rank in (1, 2):
        assert f"[rank {rank}] Error: " in ended[rank].err
        assert "rank 0 was lost: " in ended[rank].err or "ranks to find each other" in ended[rank].err
        assert ended[rank].seconds < SOON


@pytest.mark.parametrize("point", ["before output", "after output"])
def test_rank_0_that_is_killed_when_it_has_made_the_file(
    server: RankServer, inputs: Path, output: Path, point: str
) -> None:
    """If it failed, the hidden file, with its space reserved, would stay."""
    assert_lost(kill(server, inputs, output, 0, point), 0)
    assert os.listdir(output.parent) == []


@pytest.mark.parametrize(
    ("step", "killed"),
    [
        ("statistics", 0),
        ("statistics", 1),
    ],
)
def test_a_rank_that_is_killed_during_the_refresh(
    server: RankServer, inputs: Path, output: Path, step: str, killed: int
) -> None:
    """If it failed, statistics of some of the batches would be published."""
    assert_lost(kill(server, inputs, output, killed, f"before {step}", refresh=True), killed)
    assert os.listdir(output.parent) == []


@pytest.mark.parametrize(
    "point", ["after link", *(pytest.param(f"{each} done", marks=long) for each in ("before", "after"))]
)
def test_rank_0_that_is_killed_behind_the_publishing(
    server: RankServer, inputs: Path, output: Path, point: str
) -> None:
    """If it failed, a complete output would be taken away, or keep a second name."""
    ended = kill(server, inputs, output, 0, point)
    assert ended[0].code == -signal.SIGKILL
    for rank in (1, 2):
        assert ended[rank].code in ((0, 8) if point == "after done" else (8,))
    assert output.read_bytes() == (inputs / "one.safetensors").read_bytes()
    assert os.listdir(output.parent) == [output.name]


@long
def test_a_rank_that_is_killed_when_its_work_is_done_spoils_nothing(
    server: RankServer, inputs: Path, output: Path
) -> None:
    """If it failed, a complete output would be reported as a failure by the rank that published it."""
    ended = server.run(
        Group(3, command(inputs, output), faults={1: [("before done", "sleep 1"), ("before done", "kill")]})
    )
    assert codes(ended)[:2] == [0, -signal.SIGKILL]
    assert output.read_bytes() == (inputs / "one.safetensors").read_bytes()
    assert os.listdir(output.parent) == [output.name]


@pytest.mark.parametrize(
    "point",
    ["before link", *(pytest.param(each, marks=long) for each in ("after mean", "before replace", "after statistics"))],
)
def test_a_rank_that_is_killed_while_rank_0_finishes(
    server: RankServer, inputs: Path, output: Path, point: str
) -> None:
    """If it failed, rank 0 would blame the output for what another rank did, with another exit code."""
    options = ["--overwrite"] if point == "before replace" else []
    options += ["--eval", "user:score"] if point == "after statistics" else []
    arguments = command(inputs, output, *options, refresh=point == "after statistics")
    step = "after statistics" if point == "after statistics" else "after mean"
    ended = server.run(Group(3, arguments, faults={1: [(step, "kill")], 0: [(point, "sleep 1.5")]}))
    if ended[0].code == 0:
        assert os.listdir(output.parent) == [output.name]
    else:
        assert_lost(ended, 1)
        assert os.listdir(output.parent) == []


def test_all_ranks_that_are_killed_leave_a_hidden_file_at_most(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, something would stand at the output's own path."""
    marker = output.parent.parent / "marker"
    faults = {0: [("before mean", f"mark {marker}"), ("before mean", "sleep 9")]}
    group = Group(3, command(inputs, output), faults=faults, marker=marker, signal=signal.SIGKILL, struck=range(3))
    assert codes(server.run(group)) == [-signal.SIGKILL] * 3
    (left,) = os.listdir(output.parent)
    assert left.startswith(".mean.safetensors.")
    assert left.endswith(".tmp")
    # The next run neither minds nor touches it.
    assert codes(server.run(Group(2, command(inputs, output)))) == [0, 0]
    assert sorted(os.listdir(output.parent)) == [left, output.name]


def test_a_rank_that_never_comes_is_noticed_where_the_launcher_says_so(
    server: RankServer, inputs: Path, output: Path
) -> None:
    """If it failed, ranks would sit out the launcher's SIGTERM until it kills them."""
    faults = {1: [("start", "sleep 1"), ("start", "kill")]}
    ended = server.run(Group(3, command(inputs, output), faults=faults, terminates=True, timeout=5))
    assert ended[1].code == -signal.SIGKILL
    assert all(ended[rank].code in (8, 143) for rank in (0, 2)), ended


@pytest.mark.guarantee("no-hang")
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("killed", [0, 1, 2])
@pytest.mark.parametrize("round_", range(3))
@pytest.mark.campaign
def test_a_kill_at_any_step_leaves_nothing_or_all(
    server: RankServer, inputs: Path, output: Path, point: str, killed: int, round_: int
) -> None:
    """The same, for every rank and step, and again."""
    ended = kill(server, inputs, output, killed, point)
    if killed == 0 and point == "in write":  # its share is too small to be seen on some sizes
        assert codes(ended) in ([0, 0, 0], [-signal.SIGKILL, 8, 8])
    else:
        assert_lost(ended, killed)
    assert all(name.endswith(".tmp") for name in os.listdir(output.parent) if name != output.name)


# -- A rank that freezes --------------------------------------------------------------------------------------------


@pytest.mark.guarantee("no-hang")
@pytest.mark.parametrize("frozen", [1, pytest.param(0, marks=long)])
def test_a_frozen_rank_is_noticed(server: RankServer, inputs: Path, output: Path, frozen: int) -> None:
    """If it failed, one process that hangs would hang all of them for ever."""
    ended = server.run(
        Group(2, command(inputs, output, "--rank-timeout", 1.5), faults={frozen: [("before mean", "stop")]}, timeout=20)
    )
    assert codes(ended) == [8, 8]  # it too, once it goes on
    # Before it torch says that the store in rank 0 does not answer.
    assert ended[1 - frozen].err.endswith(
        f"[rank {1 - frozen}] Error: rank {frozen} was lost: it gave no sign of life for 1.5 s. {PUBLISHED_OR_NOT}\n"
    )
    assert ended[1 - frozen].seconds < SOON
    assert os.listdir(output.parent) == []


@long
def test_of_several_ranks_all_name_the_one_that_is_frozen(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, users would look at a machine that is well."""
    ended = server.run(
        Group(4, command(inputs, output, "--rank-timeout", 1.5), faults={1: [("before mean", "stop")]}, timeout=20)
    )
    assert codes(ended) == [8] * 4
    assert os.listdir(output.parent) == []
    assert all(
        f"rank 1 was lost: it gave no sign of life for 1.5 s. {PUBLISHED_OR_NOT}" in ended[rank].err
        for rank in (0, 2, 3)
    )


@long
def test_a_failure_is_heard_while_another_rank_says_nothing(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, a rank that is busy for some seconds would cost the others, and itself, the cause of a failure."""
    faults = {1: [("before mean", "hold 3")], 2: [("in write", "sleep 0.3"), ("in write", "ENOSPC")]}
    ended = server.run(Group(3, command(inputs, output), faults=faults, timeout=25))
    assert codes(ended) == [8, 8, 5]
    assert os.listdir(output.parent) == []
    assert all("rank 2 failed: " in ended[rank].err for rank in (0, 1)), ended[1].err


# -- Signals --------------------------------------------------------------------------------------------------------


def struck(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path, number: int, ranks: Sequence[int], **options: Any
) -> list[Ended]:
    """Sends a signal to ranks that run the user's loader."""
    environment = {"PAUSE": str(tmp_path / "pause"), "MARKING": "0"}
    arguments = command(inputs, output, *options.pop("arguments", ()), refresh=True)
    group = Group(
        2, arguments, environment=environment, marker=tmp_path / "pause", signal=number, struck=ranks, **options
    )
    return server.run(group)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), pytest.param(signal.SIGHUP, 129, marks=long)]
)
def test_a_signal_to_all_ranks_gives_its_own_code(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path, number: int, code: int
) -> None:
    """If it failed, a job that a scheduler or the user ends would look like a fault."""
    ended = struck(server, inputs, output, tmp_path, number, [0, 1])
    assert codes(ended) == [code, code]
    assert all(f"[rank {rank}] Error: " in ended[rank].err for rank in range(2))
    assert all(each.seconds < SOON for each in ended)
    assert os.listdir(output.parent) == []


@long
@pytest.mark.parametrize("terminated", [0, 1])
def test_a_signal_to_one_rank_stops_the_other(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path, terminated: int
) -> None:
    """If it failed, the other would go on for hours without it, or never end."""
    ended = struck(server, inputs, output, tmp_path, signal.SIGTERM, [terminated], terminates=True)
    assert ended[terminated].code == 143
    assert ended[1 - terminated].code in (8, 143)
    assert os.listdir(output.parent) == []


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=long)])
def test_a_launchers_sigterm_after_another_rank_died_gives_that_cause(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path, killed: int
) -> None:
    """If it failed, logs of the ranks that are left would say that they were terminated, and not why."""
    ended = struck(server, inputs, output, tmp_path, signal.SIGKILL, [killed], terminates=True)
    assert ended[killed].code == -signal.SIGKILL
    assert ended[1 - killed].code == 8
    assert ended[1 - killed].err == f"[rank {1 - killed}] Error: rank {killed} {CLOSED}. {PUBLISHED_OR_NOT}\n"
    assert os.listdir(output.parent) == []


def test_a_launchers_sigterm_that_comes_while_a_rank_stops_gives_that_cause(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path
) -> None:
    """If it failed, whether logs say why would depend on a race with the launcher."""
    marker = tmp_path / "marker"
    faults = {
        1: [("before mean", "EIO")],
        0: [("before destroy_process_group", f"mark {marker}"), ("before destroy_process_group", "sleep 2")],
    }
    ended = server.run(Group(2, command(inputs, output), faults=faults, marker=marker, struck=[0]))
    assert ended[0].code == 8, ended
    assert "[rank 0] Error: rank 1 failed: " in ended[0].err
    assert os.listdir(output.parent) == []


# -- Ranks that were started differently ----------------------------------------------------------------------------


@pytest.mark.guarantee("ranks-agree")
def test_other_arguments_on_one_rank_are_named_on_all(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, the output would be of two kinds."""
    group = Group(2, command(inputs, output), own_arguments={1: command(inputs, output, "--dtype", "bfloat16")})
    ended = server.run(group)
    assert codes(ended) == [8, 8]
    for rank, each in enumerate(ended):
        assert each.err == (
            f"[rank {rank}] Error: expected the same arguments and versions on all ranks, got on rank 0 and on rank 1 "
            "dtype: 'keep' and 'bfloat16'. Start all ranks with the same command.\n"
        )
    assert os.listdir(output.parent) == []


@pytest.mark.guarantee("ranks-agree")
def test_another_version_on_one_rank_is_named_on_all(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, one machine's older rules would decide a part of the bytes."""
    ended = server.run(Group(2, command(inputs, output), faults={1: [("start", "version")]}))
    assert codes(ended) == [8, 8]
    assert all("rank 1 version of ckpt_avg: " in each.err and "'0.0.1'" in each.err for each in ended)


@long
def test_another_command_on_one_rank_is_refused_on_all(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, ranks would exchange what they do not understand."""
    other = ["refresh-bn", inputs / "0.safetensors", "-o", output, "-q", "--model", "user:make", "--data", "user:data"]
    group = Group(2, command(inputs, output), own_arguments={1: [*other, "--app-dir", inputs]})
    ended = server.run(group)
    assert codes(ended) == [8, 8]
    assert os.listdir(output.parent) == []


@pytest.mark.guarantee("ranks-agree")
@pytest.mark.parametrize(
    ("what", "named"), [("bytes", "run/1.safetensors: "), pytest.param("selection", "'run/1.safetensors'", marks=long)]
)
def test_other_files_on_one_rank_are_named_on_all(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path, what: str, named: str
) -> None:
    """If it failed, two machines' different copies of a run would be mixed."""
    for rank in range(2):
        (tmp_path / f"rank{rank}" / "run").mkdir(parents=True)
        for path in sources_of(inputs):
            shutil.copy(path, tmp_path / f"rank{rank}" / "run")
    if what == "bytes":
        path = tmp_path / "rank1" / "run" / "1.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    else:
        (tmp_path / "rank1" / "run" / "0.safetensors").unlink()
    ended = server.run(
        Group(
            2,
            ["average", "run", "-o", output, "-q", "--bn", "keep"],
            own_folders={rank: tmp_path / f"rank{rank}" for rank in range(2)},
        )
    )
    assert codes(ended) == [3, 3], ended
    for rank, each in enumerate(ended):
        assert each.err.startswith(f"[rank {rank}] Error: ")
        assert "expected the same files on all ranks, got on rank 1 other ones than on rank 0" in each.err
        assert named in each.err
    assert os.listdir(output.parent) == []


def test_numbers_that_make_no_sense_are_refused(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, a broken launcher would give a hang, or a traceback."""
    ended = server.run(Group(2, command(inputs, output), environment={"WORLD_SIZE": "two"}, timeout=10))
    assert codes(ended) == [2, 2], ended
    for each in ended:
        assert "WORLD_SIZE='two', LOCAL_RANK=" in each.err
        assert ": not the numbers of a rank as torchrun sets them. " in each.err
    assert os.listdir(output.parent) == []


def test_a_missing_address_is_an_error_that_says_what_to_do(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, variables that another program left behind would give a traceback."""
    missing = {rank: {"MASTER_ADDR": None, "MASTER_PORT": None} for rank in range(2)}
    ended = server.run(Group(2, command(inputs, output), own_environment=missing, timeout=10))
    assert codes(ended) == [2, 2]
    assert all("for a single process unset RANK and WORLD_SIZE." in each.err for each in ended)


@pytest.mark.parametrize(
    "variables", [{"RANK": "0", "WORLD_SIZE": "1"}, pytest.param({"RANK": None}, marks=long)], ids=str
)
def test_a_world_of_one_is_one_process(
    server: RankServer, inputs: Path, output: Path, variables: Mapping[str, str | None]
) -> None:
    """If it failed, a job script that is run with one process would want a launcher's address."""
    lonely = {"MASTER_ADDR": None, "MASTER_PORT": None, "LOCAL_RANK": None, "LOCAL_WORLD_SIZE": None, **variables}
    (ended,) = server.run(Group(1, command(inputs, output), own_environment={0: lonely}))
    assert (ended.code, ended.err) == (0, "")
    assert output.read_bytes() == (inputs / "one.safetensors").read_bytes()


# -- What is printed ------------------------------------------------------------------------------------------------


def test_one_rank_prints_the_result_and_the_notices(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, everything would be there K times, or a pipe would get K documents."""
    report = output.parent / "report.json"
    arguments = [*command(inputs, output, "--json", "--report", report)]
    arguments.remove("-q")
    ended = server.run(Group(3, arguments))
    assert codes(ended) == [0, 0, 0]
    document = json.loads(ended[0].out)
    assert json.loads(report.read_text()) == document
    assert document["output"] == str(output)
    assert ended[0].err.count("Notice: ") == len(document["notices"]) == 1
    assert [(each.out, each.err) for each in ended[1:]] == [("", "")] * 2
    assert output.read_bytes() == (inputs / "one.safetensors").read_bytes()
    assert sorted(os.listdir(output.parent)) == [output.name, "report.json"]


@pytest.mark.parametrize("failing", [1, pytest.param(0, marks=long)])
def test_an_error_is_one_document_from_rank_0(server: RankServer, inputs: Path, output: Path, failing: int) -> None:
    """If it failed, a program that reads the output could not tell which error document to believe."""
    faults = {failing: [("before fsync", "EIO")]}
    ended = server.run(Group(2, command(inputs, output, "--json"), faults=faults))
    assert json.loads(ended[0].out)["error"]["exit_code"] == ended[0].code == (5 if failing == 0 else 8)
    assert ended[1].out == ""
    assert all(each.err.startswith(f"[rank {rank}] Error: ") for rank, each in enumerate(ended))


def test_a_requirement_that_is_not_met_is_rank_0s(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, every rank would measure, or the others publish."""
    options = ("--eval", "user:measure", "--require", "loss>=1e9", "--json")
    ended = server.run(Group(2, command(inputs, output, *options, refresh=True)))
    assert codes(ended) == [9, 8], ended
    assert json.loads(ended[0].out)["error"]["exit_code"] == 9
    assert ended[1].out == ""
    assert "[rank 1] Error: rank 0 failed: " in ended[1].err
    assert os.listdir(output.parent) == []


def test_rank_0_alone_measures(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, the measuring would cost every rank's time, and fail where the data is on one machine only."""
    ended = server.run(
        Group(
            2,
            command(inputs, output, "--eval", "user:score", "--require", "loss<=1e9", "--json", refresh=True),
            environment={"FAILS_AT": "score"},  # on rank 1
        )
    )
    assert codes(ended) == [0, 0], ended
    assert len(json.loads(ended[0].out)["evaluations"]) == 3


def test_a_report_that_cannot_be_written_stops_all_ranks(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, the others would wait five minutes for rank 0."""
    arguments = command(inputs, output, "--report", output.parent / "nowhere" / "report.json")
    ended = server.run(Group(2, arguments, timeout=2))
    assert codes(ended) == [2, 8], codes(ended)
    assert "--report " in ended[0].err
    assert "rank 0 failed: --report " in ended[1].err


def test_refresh_bn_shares_its_batches(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, the command for one set of weights would run on every rank in full, and each would publish."""
    user = ["--model", "user:make", "--data", "user:data", "--app-dir", inputs]
    arguments = ["refresh-bn", inputs / "0.safetensors", "-q", "--json", *user]
    ended = server.run(Group(2, [*arguments, "-o", output]))
    assert codes(ended) == [0, 0]
    (alone,) = server.run(Group(1, [*arguments, "-o", output.parent / "alone.safetensors"]))
    many, one = json.loads(ended[0].out), json.loads(alone.out)
    assert many["batch_norm"] == one["batch_norm"]
    assert (ended[1].out, ended[1].err) == ("", "")
    values, expected = load_file(output), load_file(output.parent / "alone.safetensors")
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)


@long
def test_a_dry_run_prints_once_and_writes_nothing(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, checking a command on many ranks would say everything many times."""
    ended = server.run(Group(2, command(inputs, output, "--dry-run")))
    assert codes(ended) == [0, 0]
    assert ended[0].out.count("average") >= 1
    assert (ended[1].out, ended[1].err) == ("", "")
    assert os.listdir(output.parent) == []


def test_sweep_is_refused_with_ranks(server: RankServer, inputs: Path, tmp_path: Path) -> None:
    """If it failed, every rank would do the whole sweep."""
    arguments = ["sweep", *sources_of(inputs), "--model", "user:make", "--eval", "user:score", "--app-dir", inputs]
    ended = server.run(Group(2, [*arguments, "--bn", "keep", "--maximize", "loss"]))
    assert codes(ended) == [2, 2]
    for rank, each in enumerate(ended):
        assert each.err == f"[rank {rank}] Error: sweep: runs in one process only. Start it without torchrun.\n"


def test_a_refused_sweep_prints_one_document(server: RankServer, inputs: Path) -> None:
    """If it failed, a program that reads the output would get as many documents as there are ranks."""
    ended = server.run(Group(2, ["sweep", *sources_of(inputs), "--json"]))
    assert json.loads(ended[0].out)["error"]["exit_code"] == 2
    assert ended[1].out == ""


def test_an_unknown_option_is_an_error_of_a_rank_too(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, lines of several ranks could not be told apart."""
    ended = server.run(Group(2, command(inputs, output, "--nonsense")))
    assert codes(ended) == [2, 2]
    assert all(f"[rank {rank}] Error: No such option" in each.err for rank, each in enumerate(ended))


# -- Order of things ------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("rank-0-publishes")
def test_rank_0_publishes_after_every_rank_has_synced(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path
) -> None:
    """If it failed, a power cut could keep the output's name, and lose what another rank wrote."""
    logs = {name: tmp_path / name for name in ("fsync", "link", "replace")}
    faults = {
        rank: [(f"{'before' if name == 'link' else 'after'} {name}", f"log {path}") for name, path in logs.items()]
        for rank in range(3)
    }
    assert codes(server.run(Group(3, command(inputs, output), faults=faults))) == [0, 0, 0]
    synced = [line.split() for line in logs["fsync"].read_text().splitlines()]
    ((published, by),) = [line.split() for line in logs["link"].read_text().splitlines()]
    assert by == "0"
    assert {rank for moment, rank in synced if int(moment) < int(published)} == {"0", "1", "2"}
    assert {rank for moment, rank in synced if int(moment) > int(published)} == {"0"}  # the folder
    assert not logs["replace"].exists()


# -- torchrun -------------------------------------------------------------------------------------------------------


def torchrun(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    try:
        return subprocess.run(
            [*launch, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False, env=environment
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"it did not end: {error.stderr!r}")


DIES_ONCE = """
import os, sys
sys.path.insert(0, os.environ["TESTS"])
from system.faults.rank_runs import _interfere
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    _interfere([("in write", "kill"), ("before mean", "kill")])
from ckpt_avg.cli.main import main
main()
"""


@pytest.mark.guarantee("restarted-group")
@long
def test_a_group_that_torchrun_restarts_begins_afresh(inputs: Path, output: Path, tmp_path: Path) -> None:
    """If it failed, one machine that breaks down would need a human."""
    (tmp_path / "dies.py").write_text(DIES_ONCE)
    tests = str(Path(__file__).parents[2])
    arguments = ["--max-restarts=1", tmp_path / "dies.py", *command(inputs, output)]
    done = torchrun(*arguments, TESTS=tests)
    assert done.returncode == 0, done.stderr
    assert f"rank 1 {CLOSED}" in done.stderr  # in the first attempt
    assert done.stdout.count("wrote ") == 1
    assert output.read_bytes() == (inputs / "one.safetensors").read_bytes()
    assert os.listdir(output.parent) == [output.name]


def test_torchrun_gives_the_bytes_of_one_process(inputs: Path, output: Path) -> None:
    """If it failed, what the documentation tells users to type would not work."""
    done = torchrun("-m", "ckpt_avg", *command(inputs, output, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] is True
    assert output.read_bytes() == (inputs / "one.safetensors").read_bytes()
    assert os.listdir(output.parent) == [output.name]


@long
def test_torchrun_passes_on_that_a_rank_failed(inputs: Path, output: Path) -> None:
    """If it failed, a job script would go on without an output."""
    done = torchrun("-m", "ckpt_avg", *command(inputs, output, refresh=True), FAILS_AT="data")
    assert done.returncode != 0
    assert "[rank 1] Error: " in done.stderr
    assert "[rank 0] Error: rank 1 failed: " in done.stderr
    assert "broken in data" in done.stderr
    assert done.stdout == ""
    assert os.listdir(output.parent) == []
