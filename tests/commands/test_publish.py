"""The output of several ranks: the bytes of one process, and nothing left if one of them fails."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands.user_modules import data, make, score, trained
from safetensors.torch import load_file, save_file
from system.faults.rank_runs import in_threads

from ckpt_avg import OutputError, average
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import NonFiniteError, RankError

PAGE = 64 * 1024


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def averaged(size: int, sources: Any, output: Path, **options: Any) -> list[Any]:
    """Averages on so many ranks, in threads; returns how each ended."""
    return in_threads(size, lambda ranks: average(sources, output, ranks=ranks, **options))


def same_bytes(tmp_path: Path, sources: Any, sizes: tuple[int, ...], **options: Any) -> None:
    """Asserts that the output is the same on any number of ranks, and that nothing else is left."""
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    average(sources, folder / "one.safetensors", **options)
    for size in sizes:
        output = folder / "many.safetensors"
        ends = averaged(size, sources, output, **options)
        assert not any(isinstance(end, BaseException) for end in ends), ends
        assert sha(output) == sha(folder / "one.safetensors"), f"{size} ranks"
        assert sorted(os.listdir(folder)) == ["many.safetensors", "one.safetensors"]
        output.unlink()
    (folder / "one.safetensors").unlink()


def checkpoints(folder: Path, shapes: list[tuple[int, ...]], dtype: torch.dtype, count: int = 3) -> list[Path]:
    """Writes checkpoints of random tensors."""
    paths = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            f"t{index}": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for index, shape in enumerate(shapes)
        }
        paths.append(folder / f"{number}.safetensors")
        save_file(tensors, paths[-1])
    return paths


# -- The same bytes -------------------------------------------------------------------------------------------------


MIXED = [(300, 211), (7,), (), (5, 0), (90_001,), (3, 5)]
QUARTER = (PAGE // 4,)
CASES: dict[str, tuple[list[tuple[int, ...]], torch.dtype, tuple[int, ...], dict[str, Any]]] = {
    **{f"{dtype}": (MIXED, dtype, (2, 7), {}) for dtype in (torch.float32, torch.bfloat16, torch.float64)},
    # Shares are cut by the output's bytes, not the inputs'.
    "float16 to float64": (MIXED, torch.float16, (3,), {"dtype": "float64"}),
    "float32 to bfloat16": (MIXED, torch.float32, (3,), {"dtype": "bfloat16"}),
    "one huge tensor": ([(1_000_003,)], torch.float32, (2, 4), {"memory": 1 << 20, "threads": 2}),
    "more ranks than elements": ([(3,)], torch.float32, (2, 8), {}),
    "more ranks than pages": ([(PAGE // 4 * 3,)], torch.float32, (7,), {}),
    "no elements": ([(0,), (3, 0)], torch.float32, (2, 3), {}),
    "empty tensors between shares": ([QUARTER, (0,), QUARTER, (0, 4), QUARTER], torch.float32, (2, 3), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_gives_the_bytes_of_one(tmp_path: Path, case: str) -> None:
    """If it failed, the borders between ranks' shares would show in the weights, or small outputs would hang."""
    shapes, dtype, sizes, options = CASES[case]
    same_bytes(tmp_path, checkpoints(tmp_path, shapes, dtype), sizes, **options)


def test_the_real_run_has_the_bytes_of_one_process(tmp_path: Path, run_folder: Path) -> None:
    same_bytes(tmp_path, run_folder, (1, 2), last=3, bn="keep")


def test_a_sharded_folder_has_the_bytes_of_one_process(tmp_path: Path) -> None:
    """If it failed, ranks would read other shards than they fill."""
    folders = []
    for number in range(2):
        folder = tmp_path / f"checkpoint-{number + 1}"
        folder.mkdir()
        weight_map = {}
        for shard in range(3):
            name = f"model-{shard + 1:05}-of-00003.safetensors"
            tensor = torch.randn(40_000 + shard, generator=torch.Generator().manual_seed(number * 10 + shard))
            save_file({f"w{shard}": tensor}, folder / name)
            weight_map[f"w{shard}"] = name
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        folders.append(folder)
    same_bytes(tmp_path, folders, (2, 4))


def test_integers_and_bools_have_the_bytes_of_one_process(tmp_path: Path) -> None:
    """If it failed, what is copied rather than averaged would be copied by no rank."""
    for number in range(2):
        tensors = {
            "w": torch.full((50_000,), float(number)),
            "ids": torch.arange(30_000),
            "mask": torch.arange(100_001) % 3 == 0,
        }
        save_file(tensors, tmp_path / f"{number}.safetensors")
    same_bytes(tmp_path, [tmp_path / "0.safetensors", tmp_path / "1.safetensors"], (3,))


@pytest.mark.slow
def test_the_refreshed_real_run_is_that_of_one_process(tmp_path: Path, run_folder: Path, train: Any) -> None:
    """If it failed, the published statistics would depend on how many ranks there were."""
    options = {"last": 2, "model": train.make_model, "data": train.train_loader, "bn_batches": 3}
    average(run_folder, tmp_path / "one.safetensors", **options)
    ends = averaged(3, run_folder, tmp_path / "many.safetensors", **options)
    one, many = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "many.safetensors")
    assert one.keys() == many.keys()
    for name in one:
        if "running" in name:
            torch.testing.assert_close(many[name], one[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(many[name], one[name]), name
    assert [end.batch_norm.batches for end in ends] == [3] * 3
    assert [end.batch_norm.samples for end in ends] == [384] * 3


def test_checkpoints_are_refreshed_by_all_ranks_together(tmp_path: Path) -> None:
    """If it failed, ranks would wait for each other, measure on a part of the data, or go on with different results."""
    for seed in range(3):
        torch.save(trained(seed), tmp_path / f"step_{seed}.pt")
    options: dict[str, Any] = {"model": make, "data": data, "evaluate": score, "eval_repeats": 2, "device": "cpu"}
    options |= {"include": "step*", "evaluate_all": True, "require": "loss<=last+1e9"}
    one = average(tmp_path, tmp_path / "one.safetensors", **options)
    ends = averaged(2, tmp_path, tmp_path / "many.safetensors", **options)
    for end in ends:
        same = replace(end, data_digest=None, batch_norm=None, notices=())
        assert same == replace(ends[0], data_digest=None, batch_norm=None, notices=())
    assert [each.name for each in ends[1].evaluations] == [each.name for each in one.evaluations]
    for found, expected in zip(ends[1].evaluations, one.evaluations, strict=True):
        assert found.samples.keys() == expected.samples.keys()
        assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5)


def test_a_dry_run_writes_nothing_on_any_rank(tmp_path: Path, run_folder: Path) -> None:
    """If it failed, looking would leave a file."""
    ends = averaged(2, run_folder, tmp_path / "a.safetensors", bn="keep", dry_run=True)
    assert [end.written for end in ends] == [False, False]
    assert os.listdir(tmp_path) == []


# -- Failures, and the order of publishing ----------------------------------------------------------------------------


def test_nan_in_one_ranks_share_stops_all(tmp_path: Path) -> None:
    """If it failed, NaN that only one rank sees would be published, or the others would not say why they stop."""
    sources = checkpoints(tmp_path, [(100_000,)], torch.float32)
    tensors = load_file(sources[1])
    tensors["t0"][-1] = float("nan")
    save_file(tensors, sources[1])
    (tmp_path / "out").mkdir()
    ends = averaged(3, sources, tmp_path / "out" / "a.safetensors")
    assert type(ends[2]) is NonFiniteError
    for rank in (0, 1):
        assert isinstance(ends[rank], RankError)
        assert str(ends[rank]).startswith(f"rank 2 failed: {str(ends[2]).removesuffix('.')}. ")
    assert os.listdir(tmp_path / "out") == []


def test_a_full_disk_on_rank_0_is_an_error_on_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it failed, the others would wait for a name that never comes."""

    def full(*_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    (tmp_path / "out").mkdir()
    ends = averaged(2, checkpoints(tmp_path, [(9,)], torch.float32), tmp_path / "out" / "a.safetensors")
    assert type(ends[0]) is OutputError
    assert "not enough space" in str(ends[0])
    assert str(ends[1]).startswith("rank 0 failed: ")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.guarantee("rank-0-publishes")
def test_all_ranks_sync_before_rank_0_alone_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it failed, a power cut could keep the name of a file whose bytes were lost, or two ranks would publish."""
    log: list[tuple[str, int]] = []
    names = {f"rank-{rank}": rank for rank in range(3)}

    def logging(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            result = real(*arguments, **keywords)
            log.append((name, names[threading.current_thread().name]))
            return result

        return call

    for name in ("fsync", "link"):
        monkeypatch.setattr(os, name, logging(name, getattr(os, name)))
    sources = checkpoints(tmp_path, [(100_000,)], torch.float32)

    def work(ranks: Ranks) -> None:
        threading.current_thread().name = f"rank-{ranks.rank}"
        average(sources, tmp_path / "a.safetensors", ranks=ranks)

    assert in_threads(3, work) == [None] * 3
    assert [rank for name, rank in log if name == "link"] == [0]
    before = log[: log.index(("link", 0))]
    assert {rank for name, rank in before if name == "fsync"} == {0, 1, 2}
    # After the link only the folder is synced.
    assert log[log.index(("link", 0)) + 1 :] == [("fsync", 0)]


def test_overwriting_replaces_the_old_output_once(tmp_path: Path) -> None:
    """If it failed, --overwrite would not work with ranks, or leave the hidden name."""
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "a.safetensors"
    output.write_bytes(b"old")
    sources = checkpoints(tmp_path, [(50_000,)], torch.float32)
    assert [type(end) for end in averaged(2, sources, output)] == [OutputError, OutputError]
    assert output.read_bytes() == b"old"
    averaged(2, sources, output, overwrite=True)
    average(sources, tmp_path / "one.safetensors")
    assert sha(output) == sha(tmp_path / "one.safetensors")
    assert os.listdir(tmp_path / "out") == ["a.safetensors"]
