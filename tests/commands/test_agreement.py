"""Before they begin, ranks compare what they were asked for, and what they see of the files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from system.faults.rank_runs import in_threads

import ckpt_avg.commands.agreement
from ckpt_avg import CheckpointFormatError, open_checkpoint
from ckpt_avg.checkpoint.spec import CheckpointSpec
from ckpt_avg.commands.agreement import agree_on_files, agree_on_request
from ckpt_avg.commands.requests import AverageRequest, options_of
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import RankError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.progress import Progress

# -- Arguments ------------------------------------------------------------------------------------------------------


# What makes each argument below valid.
BASE: dict[str, Any] = {
    "sources": ["run"],
    "output": "swa.safetensors",
    "best": 1,
    "metric": "accuracy",
    "mode": "max",
    "weighting": "ema",
    "half_life": 100,
    "model": torch.nn.Identity,
    "evaluate": print,
}


# What makes some of them valid, instead of the weighting above, on every rank.
BASES: dict[str, dict[str, Any]] = {
    "log_step": {"log": "results.csv"},
    "weighting": {"weighting": "linear", "half_life": None},
    "width": {"weighting": "power", "width": 0.2, "half_life": None},
    "weights": {"weighting": None, "half_life": None, "weights": [0.25, 0.75]},
    "normalize": {"weighting": None, "half_life": None, "weights": [0.25, 0.75]},
    "private": {"push_to_hub": "org/name"},
}


def request(**others: Any) -> AverageRequest:
    """What `average` is asked for with these arguments."""
    return AverageRequest(**BASE | others)


def compared(**others: Any) -> list[Any]:
    """Lets three ranks agree, the last of which was given other arguments; returns how each ended."""
    base = next((BASES[name] for name in others if name in BASES), {})

    def work(ranks: Ranks) -> None:
        agree_on_request(ranks, request(**base | (others if ranks.rank == 2 else {})))

    return in_threads(3, work)


OTHER: dict[str, Any] = {
    "sources": ["another run"],
    "output": "other.safetensors",
    "last": 3,
    "every": 2,
    "from_step": 1,
    "to_step": 1,
    "min_interval": 100,
    "best": 2,
    "metric": "loss",
    "mode": "min",
    "log": "metrics.csv",
    "log_step": "epoch",
    "include": ("*.pt",),
    "exclude": ["*.pt"],
    "at_lr_minima": True,
    "keep_order": True,
    "weighting": "cosine",
    "weighting_by": "index",
    "half_life": "100%",
    "width": 0.1,
    "weights": {"a.pt": 0.25, "b.pt": 0.75},
    "normalize": True,
    "state_key": "model",
    "strip_prefix": "model.",
    "dtype": "bfloat16",
    "non_float": "last",
    "allow_nonfinite": True,
    "model": torch.nn.Linear,
    "data": list,
    "forward_batch": print,
    "bn": "keep",
    "bn_batches": 3,
    "bn_estimator": "batch-mean",
    "amp": "bfloat16",
    "evaluate": len,
    "evaluate_all": True,
    "eval_repeats": 2,
    "require": ("loss<=last",),
    "split": "test",
    "sha256": True,
    "max_shard_size": "5GB",
    "push_to_hub": "org/name",
    "private": True,
    "overwrite": True,
    "dry_run": True,
}
HOW = {
    "device": "cpu",
    "io": "pread",
    "threads": 7,
    "memory": 1 << 20,
    "readers": 3,
    "progress": Progress(),
    "ranks": Ranks(),
}


def test_every_argument_either_decides_bytes_or_does_not() -> None:
    """If it failed, a new argument would be tried by none of the tests below."""
    assert OTHER.keys() | HOW.keys() == {option.name for _, option in options_of(AverageRequest)} - {"ema"}


@pytest.mark.parametrize("name", OTHER)
def test_another_argument_on_one_rank_is_refused_on_all_and_named(name: str) -> None:
    """If it failed, ranks would fill parts of one file with different averages."""
    ends = compared(**{name: OTHER[name]})
    assert all(isinstance(end, RankError) for end in ends)
    for end in ends:
        assert str(end).startswith(f"rank 2 has other arguments or versions than rank 0: {name} ")
        assert str(end).endswith("Start all ranks with the same command.")


def test_arguments_that_decide_no_byte_may_differ() -> None:
    """If it failed, machines of different kinds could not work together."""
    assert compared(**HOW) == [None] * 3


@pytest.mark.parametrize(
    "same",
    [
        {"sources": [Path("run")]},
        {"sources": ("run",)},
        {"output": Path("swa.safetensors")},
        {"forward_batch": None},
        {"half_life": "100"},
        {"half_life": 100.0},
        {"weights": "0.25,75e-2"},
        {"include": []},
    ],
    ids=str,
)
def test_other_spellings_of_the_same_arguments_agree(same: dict[str, Any]) -> None:
    """If it failed, a script that builds its arguments in two ways would be refused."""
    assert compared(**same) == [None] * 3


def test_objects_are_compared_by_name_not_by_identity() -> None:
    """If it failed, a model, a loader or a list of batches, another in each process, would be refused."""

    def work(ranks: Ranks) -> None:
        for data in (iter([1]), [torch.ones(2)] * (1 + ranks.rank)):
            mine = {"model": torch.nn.Linear(2, 2), "data": data, "evaluate": partial(max, ranks.rank)}
            agree_on_request(ranks, request(**mine))

    assert in_threads(2, work) == [None, None]


@pytest.mark.parametrize("which", ["ckpt_avg", "torch"])
def test_other_versions_are_refused(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it failed, an old installation on one machine would fill its part in another way."""
    name = f"version of {which}"

    class Altered(Ranks):
        """Rank 1 says that it runs another version."""

        def exchange(self, step: str, value: Any, answer: Callable[..., Any] = bool) -> Any:
            return super().exchange(step, value | ({name: "0.0.1"} if self.rank == 1 else {}), answer)

    monkeypatch.setattr("ckpt_avg.distributed.ranks.Ranks", Altered)
    ends = in_threads(2, lambda ranks: agree_on_request(ranks, request()))
    for end in ends:
        assert isinstance(end, RankError)
        mine = (ckpt_avg if which == "ckpt_avg" else torch).__version__
        assert str(end).startswith(f"rank 1 has other arguments or versions than rank 0: {name} '0.0.1', not {mine!r}.")


def test_arguments_of_any_kind_can_be_sent() -> None:
    """If it failed, an argument that is wrong on all ranks would be a crash, not an error that names it."""
    odd = {"every": 2**70, "state_key": "\udcff", "include": {"a"}, "split": "\x00", "sources": {"a", "b"}}
    assert in_threads(2, lambda ranks: agree_on_request(ranks, request(**odd))) == [None, None]


# -- Files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A checkpoint as another machine sees it: under a path of its own."""

    spec: CheckpointSpec
    files: tuple[InputFile, ...]


def see(folder: Path, names: list[str]) -> list[Seen]:
    """Opens a machine's files, and says that they lie in /data."""
    opened = [open_checkpoint(folder / name) for name in names]
    return [Seen(replace(each.spec, path=Path("/data") / each.spec.path.name), tuple(each.files)) for each in opened]


def agreed(first: list[Seen], other: list[Seen]) -> list[Any]:
    """Lets three ranks agree on files, the second of which sees others."""
    return in_threads(3, lambda ranks: agree_on_files(ranks, other if ranks.rank == 1 else first))  # type: ignore[arg-type]


@pytest.fixture
def views(tmp_path: Path, run_folder: Path) -> tuple[Path, Path]:
    """Two machines' folders, with the same three checkpoints of the real run."""
    for machine in ("one", "other"):
        (tmp_path / machine).mkdir()
        for epoch in (18, 19, 20):
            shutil.copy(run_folder / f"epoch_{epoch}.pt", tmp_path / machine)
    return tmp_path / "one", tmp_path / "other"


NAMES = ["epoch_18.pt", "epoch_19.pt", "epoch_20.pt"]
ADVICE = "Put the checkpoints on storage that all ranks share, or copy them."


def test_copies_of_the_files_agree(views: tuple[Path, Path]) -> None:
    """If it failed, checkpoints could not be copied to each machine."""
    assert agreed(see(views[0], NAMES), see(views[1], NAMES)) == [None] * 3


def test_another_file_of_the_same_shape_is_refused_and_named(views: tuple[Path, Path]) -> None:
    """If it failed, the output would be made of two runs."""
    shutil.copy(views[1] / "epoch_18.pt", views[1] / "epoch_19.pt")
    ends = agreed(see(views[0], NAMES), see(views[1], NAMES))
    for end in ends:
        assert type(end) is CheckpointFormatError
        assert str(end) == f"/data/epoch_19.pt: rank 1 has another file than rank 0. {ADVICE}"


@pytest.mark.parametrize("names", [NAMES[:2], NAMES[1:], NAMES[::-1]], ids=["fewer", "others", "order"])
def test_another_selection_is_refused_and_listed(views: tuple[Path, Path], names: list[str]) -> None:
    """If it failed, a folder that is still being copied would be averaged in part."""
    ends = agreed(see(views[0], NAMES), see(views[1], names))
    for end in ends:
        assert type(end) is CheckpointFormatError
        assert str(end).startswith("rank 1 has other checkpoints than rank 0: ")
        assert all(f"/data/{name}" in str(end) for name in names)
        assert " not '/data/epoch_18.pt', '/data/epoch_19.pt', '/data/epoch_20.pt'. " in str(end)


def write_both(folder: Path, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **metadata: str) -> None:
    for machine, tensors in (("one", one), ("other", other)):
        (folder / machine).mkdir()
        save_file(tensors, folder / machine / "a", metadata=metadata)


def assert_refused(folder: Path, name: str = "a") -> None:
    ends = agreed(see(folder / "one", [name]), see(folder / "other", [name]))
    assert [type(end) for end in ends] == [CheckpointFormatError] * 3
    assert str(ends[0]).startswith(f"/data/{name}: ")


@pytest.mark.parametrize("where", [0, 0.5, 1])
@pytest.mark.parametrize("elements", [0, 1, 100, 5000, 250_000])
def test_one_bit_in_a_file_of_up_to_a_megabyte_is_seen(tmp_path: Path, elements: int, where: float) -> None:
    """If it failed, small checkpoints that differ would be mistaken for the same."""
    tensors = {"w": torch.arange(elements, dtype=torch.float32), "b": torch.ones(2)}
    write_both(tmp_path, tensors, tensors)
    contents = bytearray((tmp_path / "one" / "a").read_bytes())
    data = 8 + int.from_bytes(contents[:8], "little")
    contents[data + int(where * (len(contents) - data - 1))] ^= 1
    (tmp_path / "other" / "a").write_bytes(contents)
    assert_refused(tmp_path)


@pytest.mark.parametrize(("samples", "metadata"), [(256, {}), (1, {"a": "long header" * 1000})], ids=["one", "many"])
def test_another_training_step_of_a_large_file_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int, metadata: dict[str, str]
) -> None:
    """If it failed, a checkpoint of another step would be mistaken for the same; also one of very many shards."""
    monkeypatch.setattr("ckpt_avg.commands.agreement._SAMPLES", samples)
    values = torch.arange(3_000_000, dtype=torch.float64)
    write_both(tmp_path, {"w": values}, {"w": values + 1e-3}, **metadata)
    assert_refused(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.zeros(4, 3), "y": torch.zeros(4)},
        {"w": torch.zeros(3, 4), "x": torch.zeros(4)},
        {"w": torch.zeros(4, 3), "x": torch.zeros(4, dtype=torch.int32)},
        {"w": torch.zeros(4, 3), "x": torch.zeros(2, 2)},
    ],
    ids=["name", "shape", "dtype", "another shape of equal size"],
)
def test_another_header_is_refused(tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
    """If it failed, ranks would have different plans for one file."""
    write_both(tmp_path, {"w": torch.zeros(4, 3), "x": torch.zeros(4)}, other)
    assert_refused(tmp_path)


def test_every_shard_is_compared(tmp_path: Path) -> None:
    """If it failed, one shard that is missing its last write would go unnoticed among hundreds."""
    index: dict[str, str] = {}
    for machine in ("one", "other"):
        (tmp_path / machine / "c").mkdir(parents=True)
        for shard in range(100):
            name = f"model-{shard + 1:05}-of-00100.safetensors"
            index[f"w{shard}"] = name
            value = 7.0 if (machine, shard) == ("other", 93) else 1.0
            save_file({f"w{shard}": torch.full((3,), value)}, tmp_path / machine / "c" / name)
        (tmp_path / machine / "c" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_refused(tmp_path, "c")


def test_a_single_rank_reads_nothing_for_it(monkeypatch: pytest.MonkeyPatch, run_folder: Path) -> None:
    """If it failed, every run would read a megabyte of each checkpoint twice."""
    with open_checkpoint(run_folder / "epoch_20.pt") as checkpoint:
        monkeypatch.setattr(InputFile, "read", lambda *_: pytest.fail("it was read"))
        agree_on_files(Ranks(), [checkpoint])


def test_names_that_are_no_text_agree(tmp_path: Path) -> None:
    """If it failed, a file name in an old encoding could not be averaged by several ranks."""
    path = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "a")
    os.rename(tmp_path / "a", path)
    seen = see(tmp_path, [path.name])
    assert agreed(seen, seen) == [None] * 3
