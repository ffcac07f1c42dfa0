"""From what a launcher says, or a script's own process group, to ranks that share their work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from system.faults.rank_runs import Ended, Group, rank_server

from ckpt_avg import UsageError, average
from ckpt_avg.distributed.launch import Launch, join_ranks, launch_of, launched_rank

# -- What the launcher says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "0"}, None),
        ({"WORLD_SIZE": "4"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, None),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Launch(3, 4, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Launch(3, 4, 1, 2)),
    ],
    ids=str,
)
def test_a_rank_is_what_torchrun_says(environment: Mapping[str, str], expected: Launch | None) -> None:
    """If it failed, a process of a group would work alone, or a lonely one wait for others."""
    assert launch_of(environment) == expected
    assert launched_rank(environment) == (expected.rank if expected else None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "x"},
        {"RANK": ""},
        {"RANK": "4"},
        {"RANK": "-1"},
        {"RANK": "1.0"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "two"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_RANK": "-1"},
        {"LOCAL_WORLD_SIZE": "0"},
        {"LOCAL_WORLD_SIZE": ""},
    ],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused(wrong: Mapping[str, str]) -> None:
    """If it failed, a broken launcher would give a hang, or a traceback."""
    environment = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **wrong}
    (name, value), *_ = wrong.items()
    with pytest.raises(UsageError) as error:
        launch_of(environment)
    assert str(error.value).startswith("RANK=")
    assert f"{name}={value!r}" in str(error.value)
    assert ": not the numbers of a rank as torchrun sets them. Start all ranks with torchrun;" in str(error.value)
    assert launched_rank(environment) is None  # an error line must not fail for it


def test_a_process_that_was_started_alone_is_the_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it failed, a script for many processes could not be tried with one."""
    monkeypatch.delenv("RANK", raising=False)
    with join_ranks() as ranks:
        assert (ranks.rank, ranks.size) == (0, 1)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("timeout", [0, -1.5, float("nan")])
def test_a_timeout_that_ends_at_once_is_refused(timeout: float) -> None:
    """If it failed, every rank would stop at the first step."""
    with (
        pytest.raises(UsageError, match=f"--rank-timeout: {timeout:g} is out of range. Use more than 0 s"),
        join_ranks(timeout=timeout),
    ):
        pytest.fail("they were joined")


# -- Scripts --------------------------------------------------------------------------------------------------------

BEGIN = """
import json, os, sys
import torch
from torch import distributed
from ckpt_avg import RequirementError, average, join_ranks
RANK, SIZE, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1]

def make_group():
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=RANK, world_size=SIZE)
"""

OWN_GROUPS = """
make_group()
with join_ranks() as ranks:  # the default group
    found = [ranks.rank, ranks.size, ranks.exchange("sum", RANK, sum)]
    average([f"{folder}/0.safetensors", f"{folder}/1.safetensors"], f"{folder}/many.safetensors", ranks=ranks)
pair = distributed.new_group([1, 2])  # every rank makes it, and its members join
if RANK in (1, 2):
    with join_ranks(pair) as ranks:
        found += [ranks.rank, ranks.size, ranks.exchange("sum", RANK, sum)]
one = torch.tensor([1.0])
distributed.all_reduce(one)  # the script's own group still works
distributed.destroy_process_group()
print(json.dumps([*found, one.item()]))
"""

FROM_ENVIRONMENT = """
from torch.utils.data import DistributedSampler
with join_ranks() as ranks:
    found = [ranks.exchange("sum", RANK, sum), list(DistributedSampler(range(6), shuffle=False))]
assert not distributed.is_initialized()
print(json.dumps(found))
"""

AGAIN = """
if os.path.exists(f"{folder}/own"):
    make_group()
for time in range(3):
    with join_ranks() as ranks:
        assert ranks.exchange("sum", 1, sum) == ranks.size
"""

CATCHES = """
with join_ranks() as ranks:
    try:
        average([f"{folder}/0.safetensors", f"{folder}/1.safetensors"], f"{folder}/no.safetensors", ranks=ranks,
                model=lambda: torch.nn.Linear(5, 3), evaluate=lambda model: {"value": 1.0}, require="value>=2")
    except RequirementError as error:
        print("caught")
print("left")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two checkpoints."""
    for number in range(2):
        torch.manual_seed(number)
        save_file(torch.nn.Linear(5, 3).state_dict(), tmp_path / f"{number}.safetensors")
    return tmp_path


def run_script(text: str, size: int, folder: Path, **variables: str | None) -> list[Ended]:
    """Runs a script on so many ranks."""
    script = folder / "script.py"
    script.write_text(BEGIN + text)
    return rank_server().run(Group(size, [folder], script=script, environment=variables, timeout=20))


@pytest.mark.slow
def test_a_scripts_own_groups_can_share_the_work(folder: Path) -> None:
    """If it failed, a training script could not average or refresh with the processes that it has."""
    ended = run_script(OWN_GROUPS, 3, folder)
    assert [each.code for each in ended] == [0, 0, 0], ended
    found = [json.loads(each.out.splitlines()[-1]) for each in ended]
    assert found == [[0, 3, 3, 3.0], [1, 3, 3, 0, 2, 3, 3.0], [2, 3, 3, 1, 2, 3, 3.0]]
    average([folder / "0.safetensors", folder / "1.safetensors"], folder / "one.safetensors")
    assert (folder / "many.safetensors").read_bytes() == (folder / "one.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, {"LOCAL_RANK": None, "LOCAL_WORLD_SIZE": None}], ids=["torchrun", "by hand"])
def test_a_script_joins_by_the_environment_and_leaves_nothing(folder: Path, variables: dict[str, None]) -> None:
    """If it failed, a script would have to make a process group only for this, or find one that it did not make."""
    ended = run_script(FROM_ENVIRONMENT, 2, folder, **variables)
    assert [each.code for each in ended] == [0, 0], ended
    assert [json.loads(each.out) for each in ended] == [[1, [0, 2, 4]], [1, [1, 3, 5]]]


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False], ids=["own group", "environment"])
def test_ranks_can_be_joined_again_and_again(folder: Path, own: bool) -> None:
    """If it failed, a script that averages two runs one after the other would hang at the second."""
    if own:
        (folder / "own").touch()
    ended = run_script(AGAIN, 2, folder)
    assert [each.code for each in ended] == [0, 0], ended


@pytest.mark.slow
def test_a_script_that_catches_an_error_on_one_rank_ends(folder: Path) -> None:
    """If it failed, catching the RequirementError that rank 0 alone raises would leave all ranks waiting for ever."""
    ended = run_script(CATCHES, 2, folder)
    assert ended[0].out.splitlines() == ["caught", "left"]
    assert [each.code for each in ended] == [0, 1]
    assert "RankError: rank 0 failed: " in ended[1].err
