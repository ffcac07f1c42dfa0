"""From what a launcher says, or a script's own process group, to ranks that share their work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from system.faults.rank_runs import Group, RankServer, rank_server

from ckpt_avg import UsageError, average, refresh_batch_norm
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


# -- Scripts --------------------------------------------------------------------------------------------------------

COMMON = """
import json, os, sys
import torch
from torch import distributed, nn
from ckpt_avg import average, join_ranks, refresh_batch_norm

def make():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3), nn.BatchNorm1d(3))

def batches():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 40, generator=generator) * size for size in (4, 7, 3, 9, 5)]

def told(report, model):
    measured = report.statistics.items()
    layers = {name: [each.mean.tolist(), each.variance.tolist(), each.count] for name, each in measured}
    stored = {name: value.tolist() for name, value in model.named_buffers()}
    return {"batches": report.batches, "samples": report.samples, "layers": layers, "stored": stored}

def refresh(ranks, estimator):
    model = make()
    return told(refresh_batch_norm(model, batches(), estimator=estimator, ranks=ranks), model)
"""

OWN_GROUP = """
from script_common import *
RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder = sys.argv[1]
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=RANK, world_size=SIZE)
found = {}
with join_ranks() as ranks:  # the default group
    found["whole"] = [ranks.rank, ranks.size]
    found["pooled"] = refresh(ranks, "pooled")
    found["batch-mean"] = refresh(ranks, "batch-mean")
    result = average([f"{folder}/0.safetensors", f"{folder}/1.safetensors"], f"{folder}/many.safetensors", bn="keep",
                     ranks=ranks)
    found["nbytes"] = result.nbytes
pair = distributed.new_group([1, 2])  # every rank makes it, and its members join
if RANK in (1, 2):
    with join_ranks(pair) as ranks:
        found["part"] = [ranks.rank, ranks.size]
        found["of the part"] = refresh(ranks, "pooled")
one = torch.tensor([1.0])
distributed.all_reduce(one)  # the script's own group still works
found["reduced"] = one.item()
distributed.destroy_process_group()
print(json.dumps(found))
"""

FROM_ENVIRONMENT = """
from script_common import *
with join_ranks() as ranks:
    found = refresh(ranks, "pooled")
assert not distributed.is_initialized()
print(json.dumps(found))
"""

AGAIN = """
from script_common import *
RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
if len(sys.argv) > 1:
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=RANK, world_size=SIZE)
for time in range(3):
    with join_ranks() as ranks:
        assert ranks.exchange("sum", 1, sum) == ranks.size
"""

CATCHES = """
from script_common import *
from ckpt_avg import RequirementError
from safetensors.torch import save_file
folder = sys.argv[1]
with join_ranks() as ranks:
    if ranks.rank == 0:
        for index in range(2):
            save_file(make().state_dict(), f"{folder}/model-{index}")
    ranks.exchange("saved", None)
    try:
        average([f"{folder}/model-0", f"{folder}/model-1"], f"{folder}/no.safetensors", bn="keep",
                model=make, evaluate=lambda model: {"value": 1.0}, require="value>=2", ranks=ranks)
    except RequirementError as error:
        print("caught")
print("left")
"""


@pytest.fixture(scope="module")
def server() -> RankServer:
    """Forks ranks."""
    return rank_server()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, and what the scripts share."""
    common: dict[str, Any] = {}
    (tmp_path / "script_common.py").write_text(COMMON)
    exec(compile(COMMON, "script_common", "exec"), common)
    for number in range(2):
        torch.manual_seed(number)
        save_file(
            {**common["make"]().state_dict(), "big": torch.full((50_000,), float(number))},
            tmp_path / f"{number}.safetensors",
        )
    return tmp_path


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def alone(estimator: str) -> dict[str, Any]:
    """Returns what one process finds."""
    common: dict[str, Any] = {}
    exec(compile(COMMON, "script_common", "exec"), common)
    model = common["make"]()
    found: dict[str, Any] = common["told"](refresh_batch_norm(model, common["batches"](), estimator=estimator), model)
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Asserts that float64 statistics agree to 1e-12 of their scale."""
    assert (found["batches"], found["samples"]) == (expected["batches"], expected["samples"])
    for name, (mean, variance, count) in expected["layers"].items():
        other_mean, other_variance, other_count = found["layers"][name]
        assert other_count == count
        for a, b, v in zip(other_mean, mean, variance, strict=True):
            assert abs(a - b) <= 1e-12 * (abs(b) + v**0.5)
        assert other_variance == pytest.approx(variance, rel=1e-12)


def test_a_scripts_own_groups_can_share_the_work(server: RankServer, folder: Path) -> None:
    """If it failed, a training script could not average or refresh with the processes that it has."""
    ended = server.run(Group(3, [folder], script=script(folder, OWN_GROUP)))
    assert [each.code for each in ended] == [0, 0, 0], ended
    found = [json.loads(each.out.splitlines()[-1]) for each in ended]
    for rank, each in enumerate(found):
        assert each["whole"] == [rank, 3]
        for estimator in ("pooled", "batch-mean"):
            assert_same(each[estimator], alone(estimator))
            assert each[estimator] == found[0][estimator]  # to the last bit
        assert each["reduced"] == 3.0
    assert [each.get("part") for each in found] == [None, [0, 2], [1, 2]]
    for each in found[1:]:
        assert_same(each["of the part"], alone("pooled"))
    sources = [folder / "0.safetensors", folder / "1.safetensors"]
    average(sources, folder / "one.safetensors", bn="keep")
    one, many = ((folder / f"{name}.safetensors").read_bytes() for name in ("one", "many"))
    assert hashlib.sha256(many).digest() == hashlib.sha256(one).digest()
    assert found[0]["nbytes"] == len(one)
    assert load_file(folder / "many.safetensors").keys() == load_file(sources[0]).keys()


@pytest.mark.parametrize("local", [True, False], ids=["torchrun", "by hand"])
def test_a_script_joins_by_the_environment_and_leaves_nothing(server: RankServer, folder: Path, local: bool) -> None:
    """If it failed, a script would have to make a process group only for this, or find one that it did not make."""
    own = {} if local else {rank: {"LOCAL_RANK": None, "LOCAL_WORLD_SIZE": None} for rank in range(2)}
    ended = server.run(Group(2, script=script(folder, FROM_ENVIRONMENT), own_environment=own, finalises=local))
    assert [each.code for each in ended] == [0, 0], ended
    for each in ended:
        assert_same(json.loads(each.out.splitlines()[-1]), alone("pooled"))


@pytest.mark.parametrize("own_group", [True, False], ids=["own group", "environment"])
def test_ranks_can_be_joined_again_and_again(server: RankServer, folder: Path, own_group: bool) -> None:
    """If it failed, a script that averages two runs one after the other would hang at the second."""
    arguments = [folder] if own_group else []
    ended = server.run(Group(2, arguments, script=script(folder, AGAIN), timeout=3))
    assert [each.code for each in ended] == [0, 0], ended


def test_a_script_that_catches_an_error_on_one_rank_ends(server: RankServer, folder: Path) -> None:
    """If it failed, catching the RequirementError that rank 0 alone raises would leave all ranks waiting for ever."""
    ended = server.run(Group(2, [folder], script=script(folder, CATCHES), timeout=4))
    assert ended[0].out.splitlines()[:1] == ["caught"]
    assert [each.code for each in ended] == [0, 1]
    assert "RankError" in ended[1].err
