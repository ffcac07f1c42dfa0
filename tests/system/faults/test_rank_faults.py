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
from system.faults.rank_runs import Ended, Group, RankServer, free_port, rank_server

from ckpt_avg import average

pytestmark = pytest.mark.slow

PUBLISHED_OR_NOT = "The output path is unchanged, or complete if it was already published."
CLOSED = "was lost: its connection was closed"
long = pytest.mark.campaign
SOON = 10.0  # seconds in which ranks must have ended, on a machine that does other things too

MODULE = """
import os, signal, time
import torch
from torch import nn

RANK = os.environ["RANK"]

def fail(where):
    if os.environ.get("FAILS_AT") == where and RANK == os.environ.get("FAILING", "1"):
        if "KILLS" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
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
            if "PAUSE" in os.environ:
                pause()
            fail("loader")
        yield torch.full((4, 300), float(number)) + torch.arange(4.0)[:, None]

def pause():
    # Until all ranks are here; then rank 0 says so. If the fault is of this rank, it happens next.
    path = os.environ["PAUSE"]
    open(path + RANK, "w").close()
    while not all(os.path.exists(path + rank) for rank in "01"):
        time.sleep(0.01)
    if RANK == "0":
        open(path, "w").close()
    if RANK != os.environ.get("FAILING"):
        time.sleep(30)

def forward_batch(model, batch):
    fail("forward")
    model(batch)

def score(model):
    fail("score")
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


def own_folders(inputs: Path, tmp_path: Path) -> list[Path]:
    """Returns a copy of the inputs for each of two ranks."""
    ignored = shutil.ignore_patterns("one.safetensors")
    return [Path(shutil.copytree(inputs, tmp_path / f"rank{rank}", ignore=ignored)) for rank in range(2)]


def assert_stopped(ended: Sequence[Ended], failed: int, cause: str, output: Path, *, code: int) -> None:
    """Asserts that one rank failed with a code and a message, that the others name it, and that nothing is there."""
    for rank, each in enumerate(ended):
        assert each.code == (code if rank == failed else 8), (rank, each)
        assert f"[rank {rank}] Error: " in each.err
        assert cause.lower() in each.err.lower()
        assert each.out == ""
        if rank != failed:
            assert f"[rank {rank}] Error: rank {failed} failed: " in each.err
            assert each.err.endswith(f"{PUBLISHED_OR_NOT}\n")
        assert each.seconds < SOON
    assert os.listdir(output.parent) == []


# -- A rank that fails ----------------------------------------------------------------------------------------------


@pytest.mark.guarantee("rank-fails")
@pytest.mark.parametrize(
    ("where", "cause"),
    [
        ("import", "--model user:make: importing user failed: ValueError: broken in import"),
        ("model", "ValueError: broken in model"),
        ("loader", "the dataloader raised at batch 4: ValueError: broken in loader"),
        ("forward", "the model raised at batch 2 (a tensor of shape [4, 300]): ValueError: broken in forward"),
    ],
)
def test_code_of_the_user_that_fails_on_one_rank_only(
    server: RankServer, inputs: Path, output: Path, where: str, cause: str
) -> None:
    """If it failed, what is wrong on one machine would hang all others, or be reported by none."""
    group = Group(3, command(inputs, output, refresh=True), environment={"FAILS_AT": where})
    assert_stopped(server.run(group), 1, cause, output, code=7)


@pytest.mark.guarantee("output-folder")
def test_ranks_write_into_a_folder_that_rank_0_creates(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, ranks could not write where one process can, or leave an empty folder if one of them fails."""
    new = output.parent / "new" / output.name
    ended = server.run(Group(2, command(inputs, new), faults={1: [("before fsync", "EIO")]}))
    assert codes(ended) == [8, 5]
    assert os.listdir(output.parent) == []
    assert codes(server.run(Group(2, command(inputs, new)))) == [0, 0]
    assert new.read_bytes() == (inputs / "one.safetensors").read_bytes()


@pytest.mark.guarantee("rank-fails")
@pytest.mark.parametrize(
    ("what", "cause", "code"),
    [
        ("missing", "no such file or folder", 2),
        ("cut off", "1.safetensors: ", 3),
        ("not a checkpoint", "1.safetensors: ", 3),
        ("another shape", "don't fit together", 4),
    ],
)
def test_checkpoints_that_are_wrong_on_one_rank_only(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path, what: str, cause: str, code: int
) -> None:
    """If it failed, a disk that is wrong on one machine would hang the others, or spoil the output."""
    folders = own_folders(inputs, tmp_path)
    bad = folders[1] / "1.safetensors"
    if what == "missing":
        bad.unlink()
    elif what == "cut off":
        os.truncate(bad, 1000)
    elif what == "not a checkpoint":
        bad.write_bytes(b"hello" * 100)
    else:
        save_file({"w": torch.ones(3)}, bad)
    arguments = ["average", "0.safetensors", "1.safetensors", "-o", output, "-q", "--bn", "keep"]
    ended = server.run(Group(2, arguments, own={rank: {"folder": folders[rank]} for rank in range(2)}))
    assert_stopped(ended, 1, cause, output, code=code)


@pytest.mark.parametrize(
    ("failing", "point", "action", "cause"),
    [
        (0, "before posix_fallocate", "ENOSPC", "not enough space"),
        (0, "before fsync", "EIO", "fsync failed"),
        (1, "in write", "ENOSPC", "No space left on device"),
        (2, "before fsync", "EIO", "fsync failed"),
        (0, "before link", "EEXIST", "was created by something else during the run, and is kept"),
    ],
)
def test_a_disk_that_fails_on_one_rank(
    server: RankServer, inputs: Path, output: Path, failing: int, point: str, action: str, cause: str
) -> None:
    """If it failed, bytes that one machine could not write would be published, or the others wait for ever."""
    ended = server.run(Group(3, command(inputs, output), faults={failing: [(point, action)]}))
    assert_stopped(ended, failing, cause, output, code=5)


# -- A rank that is killed ------------------------------------------------------------------------------------------

STEPS = ["request", "files", "header", "output", "output created", "output opened", "mean"]
POINTS = [f"{moment} {step}" for step in STEPS for moment in ("before", "after")]
# Before the first step some may still be joining, and after the mean rank 0 may have published.
POINTS = [*POINTS[1:-1], "in write"]


def assert_lost(ended: Sequence[Ended], killed: int) -> None:
    """Asserts that one rank was killed, and that the others say so soon."""
    for rank, each in enumerate(ended):
        assert each.code == (-signal.SIGKILL if rank == killed else 8), (rank, each)
        if rank != killed:
            # If the store was in rank 0, torch complains before.
            assert each.err.endswith(f"[rank {rank}] Error: rank {killed} {CLOSED}. {PUBLISHED_OR_NOT}\n")
            assert each.seconds < SOON


@pytest.mark.guarantee("no-hang")
@pytest.mark.parametrize(
    ("killed", "point"),
    [
        (1, "after request"),
        (1, "after output"),
        (1, "in write"),
        (1, "before statistics"),
        (0, "before output"),
        (0, "after output"),
        (0, "in write"),
        (0, "before statistics"),
        (0, "before link"),
        (0, "after link"),
        (0, "before done"),
    ],
)
def test_a_rank_that_is_killed_stops_the_others(
    server: RankServer, inputs: Path, output: Path, killed: int, point: str
) -> None:
    """If it failed, the others would hang, leave a hidden file, publish some statistics, or unpublish the output."""
    arguments = command(inputs, output, refresh="statistics" in point)
    assert_lost(server.run(Group(3, arguments, faults={killed: [(point, "kill")]})), killed)
    assert os.listdir(output.parent) == ([output.name] if point in ("after link", "before done") else [])
    if output.exists():
        assert output.read_bytes() == (inputs / "one.safetensors").read_bytes()


def test_rank_0_that_is_killed_as_soon_as_it_has_joined(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, the others, some of which may still be joining, would hang."""
    ended = server.run(Group(3, command(inputs, output), faults={0: [("before request", "kill")]}))
    assert codes(ended) == [-signal.SIGKILL, 8, 8]
    for rank in (1, 2):
        assert "rank 0 was lost: " in ended[rank].err or "the ranks could not be connected" in ended[rank].err
        assert ended[rank].seconds < SOON


def test_a_rank_that_is_killed_when_its_work_is_done_spoils_nothing(
    server: RankServer, inputs: Path, output: Path
) -> None:
    """If it failed, a complete output would be reported as a failure by the rank that published it."""
    faults = {1: [("before done", "sleep 1"), ("before done", "kill")]}
    ended = server.run(Group(3, command(inputs, output), faults=faults))
    assert codes(ended)[:2] == [0, -signal.SIGKILL]
    assert output.read_bytes() == (inputs / "one.safetensors").read_bytes()
    assert os.listdir(output.parent) == [output.name]


@pytest.mark.parametrize("point", ["before link", "before replace", "after statistics"])
def test_a_rank_that_is_killed_while_rank_0_finishes(
    server: RankServer, inputs: Path, output: Path, point: str
) -> None:
    """If it failed, rank 0 would blame the output for what another rank did, with another exit code."""
    refresh = point == "after statistics"
    options = {"before link": [], "before replace": ["--overwrite"], "after statistics": ["--eval", "user:score"]}[
        point
    ]
    step = "after statistics" if refresh else "after mean"
    arguments = command(inputs, output, *options, refresh=refresh)
    ended = server.run(Group(3, arguments, faults={1: [(step, "kill")], 0: [(point, "sleep 1.5")]}))
    if ended[0].code == 0:
        assert os.listdir(output.parent) == [output.name]
    else:
        assert_lost(ended, 1)
        assert os.listdir(output.parent) == []


def test_all_ranks_that_are_killed_leave_a_hidden_file_at_most(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, something would be at the output's own path."""
    marker = output.parent.parent / "marker"
    faults = {0: [("before mean", f"mark {marker}"), ("before mean", "sleep 9")]}
    group = Group(3, command(inputs, output), faults=faults, marker=marker, signal=signal.SIGKILL, struck=range(3))
    assert codes(server.run(group)) == [-signal.SIGKILL] * 3
    (left,) = os.listdir(output.parent)
    assert left.startswith(".mean.safetensors.")
    assert left.endswith(".tmp")
    assert codes(server.run(Group(2, command(inputs, output)))) == [0, 0]
    assert os.listdir(output.parent) == [output.name]


def test_ranks_that_wait_for_one_that_never_joins_hear_the_launcher(
    server: RankServer, inputs: Path, output: Path
) -> None:
    """If it failed, ranks would ignore the launcher's SIGTERM until it kills them."""
    faults = {1: [("start", "sleep 1"), ("start", "kill")]}
    ended = server.run(Group(3, command(inputs, output), faults=faults, terminates=True, timeout=8))
    assert ended[1].code == -signal.SIGKILL
    assert all(ended[rank].code in (8, 143) for rank in (0, 2)), ended


@pytest.mark.guarantee("no-hang")
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("killed", [0, 1, 2])
@pytest.mark.parametrize("round_", range(3))
@long
def test_a_kill_at_any_step_leaves_nothing_or_all(
    server: RankServer, inputs: Path, output: Path, point: str, killed: int, round_: int
) -> None:
    """The same, for every rank and step, and again."""
    ended = server.run(Group(3, command(inputs, output), faults={killed: [(point, "kill")]}))
    assert_lost(ended, killed)
    assert all(name.endswith(".tmp") for name in os.listdir(output.parent) if name != output.name)


@pytest.mark.guarantee("no-hang")
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_noticed(server: RankServer, inputs: Path, output: Path, frozen: int) -> None:
    """If it failed, one process that hangs would hang all of them for ever, or the others blame each other."""
    arguments = command(inputs, output, "--rank-timeout", 1.5)
    ended = server.run(Group(3, arguments, faults={frozen: [("before mean", "stop")]}))
    assert codes(ended) == [8, 8, 8]  # it too, once it goes on
    for rank in {0, 1, 2} - {frozen}:
        # If the store is in rank 0, torch complains before.
        assert ended[rank].err.endswith(
            f"[rank {rank}] Error: rank {frozen} was lost: it gave no sign of life for 1.5 s. {PUBLISHED_OR_NOT}\n"
        )
        assert ended[rank].seconds < SOON
    assert os.listdir(output.parent) == []


# -- Signals --------------------------------------------------------------------------------------------------------


def struck(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path, number: int, ranks: Sequence[int], **options: Any
) -> list[Ended]:
    """Sends a signal to ranks that run the user's loader."""
    pause = tmp_path / "pause"
    arguments = command(inputs, output, refresh=True)
    environment = {"PAUSE": str(pause)}
    return server.run(
        Group(2, arguments, environment=environment, marker=pause, signal=number, struck=ranks, **options)
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_to_all_ranks_gives_its_own_code(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path, number: int, code: int
) -> None:
    """If it failed, a job that a scheduler or the user ends would look like a fault."""
    ended = struck(server, inputs, output, tmp_path, number, [0, 1])
    assert codes(ended) == [code, code]
    assert all(f"[rank {rank}] Error: " in ended[rank].err for rank in range(2))
    assert all(each.seconds < SOON for each in ended)
    assert os.listdir(output.parent) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_the_other(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path, number: int
) -> None:
    """If it failed, the other would go on for hours without it, or never end."""
    ended = struck(server, inputs, output, tmp_path, number, [1], terminates=True)
    assert ended[1].code == {signal.SIGTERM: 143, signal.SIGINT: 130}[signal.Signals(number)]
    assert ended[0].code in (8, 143)
    assert os.listdir(output.parent) == []


@pytest.mark.parametrize("killed", [0, 1])
def test_a_launchers_sigterm_after_another_rank_died_gives_that_cause(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path, killed: int
) -> None:
    """If it failed, logs of the ranks that are left would say that they were terminated, and not why."""
    ended = struck(server, inputs, output, tmp_path, signal.SIGKILL, [killed], terminates=True)
    assert_lost(ended, killed)
    assert os.listdir(output.parent) == []


def test_a_launchers_sigterm_that_comes_while_a_rank_stops_gives_that_cause(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path
) -> None:
    """If it failed, whether logs say why would depend on the launcher's speed."""
    marker = tmp_path / "marker"
    point = "before destroy_process_group"
    faults = {1: [("before mean", "EIO")], 0: [(point, f"mark {marker}"), (point, "sleep 2")]}
    ended = server.run(Group(2, command(inputs, output), faults=faults, marker=marker, struck=[0]))
    assert ended[0].code == 8, ended
    assert "[rank 0] Error: rank 1 failed: " in ended[0].err
    assert os.listdir(output.parent) == []


# -- Ranks that were started differently ----------------------------------------------------------------------------


@pytest.mark.guarantee("ranks-agree")
@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("arguments", 8, "rank 1 has other arguments or versions than rank 0: dtype 'bfloat16', not 'keep'. "),
        ("command", 8, "rank 1 has other arguments or versions than rank 0: "),
        ("bytes", 3, "1.safetensors: rank 1 has another file than rank 0. "),
        ("selection", 3, "rank 1 has other checkpoints than rank 0: '1.safetensors', not '0.safetensors', "),
    ],
)
def test_a_rank_that_was_started_differently_is_named_on_all(
    server: RankServer, inputs: Path, output: Path, tmp_path: Path, what: str, code: int, message: str
) -> None:
    """If it failed, the output would be of two kinds, or two machines' different copies of a run be mixed."""
    folders = own_folders(inputs, tmp_path)
    arguments = {rank: ["average", ".", "-o", output, "-q", "--bn", "keep"] for rank in range(2)}
    if what == "arguments":
        arguments[1] += ["--dtype", "bfloat16"]
    elif what == "command":
        arguments[1] = ["refresh-bn", "0.safetensors", "-o", output, "--model", "user:make", "--data", "user:data"]
    elif what == "bytes":
        path = folders[1] / "1.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    else:
        (folders[1] / "0.safetensors").unlink()
    own = {rank: {"folder": folders[rank], "arguments": arguments[rank]} for rank in range(2)}
    ended = server.run(Group(2, own=own))
    assert codes(ended) == [code, code], ended
    for rank, each in enumerate(ended):
        assert each.err.startswith(f"[rank {rank}] Error: {message}")
    assert os.listdir(output.parent) == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', LOCAL_RANK="),
        ({"MASTER_ADDR": None}, "MASTER_ADDR=None, MASTER_PORT="),
        ({"MASTER_PORT": "x"}, "MASTER_PORT='x': not the address of rank 0 as torchrun sets it."),
    ],
)
def test_variables_that_make_no_sense_are_refused(
    server: RankServer, inputs: Path, output: Path, variables: Mapping[str, str | None], message: str
) -> None:
    """If it failed, a broken launcher, or what another program left behind, would give a hang or a traceback."""
    ended = server.run(Group(2, command(inputs, output), environment=variables))
    assert codes(ended) == [2, 2], ended
    for each in ended:
        assert message in each.err
        assert "Start all ranks with torchrun; for a single process unset RANK and WORLD_SIZE." in each.err
    assert os.listdir(output.parent) == []


@pytest.mark.parametrize("variables", [{"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": None}], ids=str)
def test_a_world_of_one_is_one_process(
    server: RankServer, inputs: Path, output: Path, variables: Mapping[str, str | None]
) -> None:
    """If it failed, a job script that is run with one process would want a launcher's address."""
    lonely = {"MASTER_ADDR": None, "MASTER_PORT": None, "LOCAL_RANK": None, "LOCAL_WORLD_SIZE": None, **variables}
    (ended,) = server.run(Group(1, command(inputs, output), environment=lonely))
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
    assert document.items() <= json.loads(report.read_text()).items()
    assert document["output"] == str(output)
    assert ended[0].err.count("Notice: ") == len(document["notices"]) == 2  # BatchNorm; weights at random
    assert [(each.out, each.err) for each in ended[1:]] == [("", "")] * 2
    assert output.read_bytes() == (inputs / "one.safetensors").read_bytes()
    assert sorted(os.listdir(output.parent)) == [output.name, "report.json"]
    ended = server.run(Group(2, command(inputs, output, "--overwrite", "--dry-run")))
    assert ended[0].out.startswith("would average")
    assert [(each.code, each.out, each.err) for each in ended[1:]] == [(0, "", "")]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_one_document_from_rank_0(server: RankServer, inputs: Path, output: Path, failing: int) -> None:
    """If it failed, a program that reads the output could not tell which error document to believe."""
    faults = {failing: [("before fsync", "EIO")]}
    ended = server.run(Group(2, command(inputs, output, "--json"), faults=faults))
    assert json.loads(ended[0].out)["error"]["exit_code"] == ended[0].code == (5 if failing == 0 else 8)
    assert ended[1].out == ""
    assert all(each.err.startswith(f"[rank {rank}] Error: ") for rank, each in enumerate(ended))


def test_rank_0_alone_measures(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, the measuring would cost every rank's time, and fail where the data is on one machine only."""
    options = ("--eval", "user:score", "--json", "--require")
    group = Group(2, command(inputs, output, *options, "loss<=1e9", refresh=True), environment={"FAILS_AT": "score"})
    ended = server.run(group)  # it would fail on rank 1
    assert codes(ended) == [0, 0], ended
    assert len(json.loads(ended[0].out)["evaluations"]) == 4
    output.unlink()
    ended = server.run(Group(2, command(inputs, output, *options, "loss>=1e9", refresh=True)))
    assert codes(ended) == [9, 8], ended
    assert json.loads(ended[0].out)["error"]["exit_code"] == 9
    assert ended[1].out == ""
    assert "[rank 1] Error: rank 0 failed: " in ended[1].err
    assert os.listdir(output.parent) == []


def test_a_report_that_cannot_be_written_stops_all_ranks(server: RankServer, inputs: Path, output: Path) -> None:
    """If it failed, the others would wait for rank 0."""
    arguments = command(inputs, output, "--report", inputs / "user.py" / "report.json")
    assert_stopped(server.run(Group(2, arguments)), 0, "--report ", output, code=2)


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


def test_a_refused_command_line_is_one_document_and_a_labelled_line_of_each_rank(
    server: RankServer, inputs: Path, output: Path
) -> None:
    """If it failed, every rank would do a whole sweep, or lines of several ranks could not be told apart."""
    ended = server.run(Group(2, ["sweep", *sources_of(inputs), "--bn", "keep", "--eval", "user:score", "--json"]))
    assert codes(ended) == [2, 2]
    assert json.loads(ended[0].out)["error"]["exit_code"] == 2
    assert ended[1].out == ""
    for rank, each in enumerate(ended):
        assert each.err == f"[rank {rank}] Error: sweep: runs in one process only. Start it without torchrun.\n"
    ended = server.run(Group(2, command(inputs, output, "--nonsense")))
    assert codes(ended) == [2, 2]
    assert all(each.err.startswith(f"[rank {rank}] Error: ") for rank, each in enumerate(ended))


# -- torchrun -------------------------------------------------------------------------------------------------------


def torchrun(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    try:
        return subprocess.run(
            [*launch, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, env=environment
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


@pytest.mark.guarantee("restarted-group", "same-bytes")
def test_a_group_that_torchrun_restarts_begins_afresh(inputs: Path, output: Path, tmp_path: Path) -> None:
    """If it failed, one machine that breaks down would need a human, or torchrun's ranks write other bytes."""
    (tmp_path / "dies.py").write_text(DIES_ONCE)
    tests = str(Path(__file__).parents[2])
    done = torchrun("--max-restarts=1", tmp_path / "dies.py", *command(inputs, output), TESTS=tests)
    assert done.returncode == 0, done.stderr
    assert f"[rank 0] Error: rank 1 {CLOSED}" in done.stderr  # in the first attempt
    assert done.stdout.count("wrote ") == 1
    assert output.read_bytes() == (inputs / "one.safetensors").read_bytes()
    assert os.listdir(output.parent) == [output.name]


@pytest.mark.guarantee("no-hang")
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_torchrun_stops_says_which_one_was_killed(
    inputs: Path, output: Path, tmp_path: Path, failing: int
) -> None:
    """If it failed, ranks that are busy in the user's code when torchrun stops them would not say why."""
    variables = {"PAUSE": str(tmp_path / "pause"), "FAILS_AT": "loader", "FAILING": str(failing), "KILLS": "yes"}
    done = torchrun("-m", "ckpt_avg", *command(inputs, output, refresh=True), **variables)
    assert done.returncode != 0
    assert f"[rank {1 - failing}] Error: rank {failing} {CLOSED}. {PUBLISHED_OR_NOT}" in done.stderr
    assert "exitcode  : -9 " in done.stderr
    assert done.stdout == ""
    assert os.listdir(output.parent) == []
