"""One file filled by several ranks: the bytes of one process, and nothing left where one of them fails."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from system.faults.rank_runs import in_threads

from ckpt_avg import OutputError, UserCodeError, average, open_checkpoint
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import NonFiniteError, RankError
from ckpt_avg.mean.blocks import cut_into_blocks
from ckpt_avg.mean.plan import Plan, make_plan
from ckpt_avg.output.shared_output import shared_output
from ckpt_avg.output.unpublished_file import UnpublishedFile

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_any_number_of_ranks_gives_the_bytes_of_one(tmp_path: Path, dtype: torch.dtype) -> None:
    """If it failed, where ranks' shares meet would be seen in the weights."""
    sources = checkpoints(tmp_path, [(300, 211), (7,), (), (5, 0), (90_001,), (3, 5)], dtype)
    same_bytes(tmp_path, sources, (2, 7))


def test_the_real_run_has_the_bytes_of_one_process(tmp_path: Path, run_folder: Path) -> None:
    """If it failed, what ranks publish of a real run would not be what one process does."""
    same_bytes(tmp_path, run_folder, (1, 2, 4), last=8, bn="keep")


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_another_output_dtype_has_the_bytes_of_one_process(tmp_path: Path, run_folder: Path, dtype: str) -> None:
    """If it failed, shares would be cut by the inputs' bytes, not the output's."""
    same_bytes(tmp_path, run_folder, (3,), last=3, bn="keep", dtype=dtype)


def test_one_huge_tensor_is_cut_within(tmp_path: Path) -> None:
    """If it failed, a model that is one tensor would be left to one rank, or cut wrongly."""
    sources = checkpoints(tmp_path, [(1_000_003,)], torch.float32, count=2)
    same_bytes(tmp_path, sources, (2, 4), memory=1 << 20, threads=2)
    with open_checkpoint(sources[0]) as checkpoint:
        plan = make_plan([checkpoint.spec] * 2)
    shares = [plan.share(rank, 4, begin=128) for rank in range(4)]
    assert all(abs(len(share) - 1_000_003) <= PAGE for share in shares)


def test_more_ranks_than_tensors_and_pages_leave_some_without_work(tmp_path: Path) -> None:
    """If it failed, tiny outputs would hang or break on many ranks."""
    same_bytes(tmp_path, checkpoints(tmp_path, [(3,)], torch.float32), (2, 8))
    same_bytes(tmp_path, checkpoints(tmp_path, [(PAGE // 4 * 3,)], torch.float32), (7,))


def test_tensors_without_elements_are_enough(tmp_path: Path) -> None:
    """If it failed, an output without a data section would divide by zero, or hang."""
    same_bytes(tmp_path, checkpoints(tmp_path, [(0,), (3, 0)], torch.float32), (2, 3))


def test_tensors_without_elements_lie_at_the_edges_of_shares(tmp_path: Path) -> None:
    """If it failed, a tensor of no bytes where two shares meet would be written twice, or confuse them."""
    shapes = [(PAGE // 4,), (0,), (PAGE // 4,), (0, 4), (PAGE // 4,)]
    same_bytes(tmp_path, checkpoints(tmp_path, shapes, torch.float32), (2, 3))


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


def test_the_refreshed_real_run_is_that_of_one_process(tmp_path: Path, run_folder: Path, train: Any) -> None:
    """If it failed, the published statistics would depend on how many ranks there were."""
    options = {"last": 8, "model": train.make_model, "data": train.train_loader, "bn_batches": 6}
    average(run_folder, tmp_path / "one.safetensors", **options)
    ends = averaged(3, run_folder, tmp_path / "many.safetensors", **options)
    one, many = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "many.safetensors")
    assert one.keys() == many.keys()
    for name in one:
        if "running" in name:
            torch.testing.assert_close(many[name], one[name], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(many[name], one[name]), name
    assert [end.batch_norm.batches for end in ends] == [6] * 3
    assert [end.batch_norm.samples for end in ends] == [768] * 3


def test_results_are_the_same_on_every_rank(tmp_path: Path, run_folder: Path, train: Any) -> None:
    """If it failed, a script that goes on with the result would go on differently on some ranks."""
    ends = averaged(
        3, run_folder, tmp_path / "a.safetensors", last=2, bn="keep", model=train.make_model, evaluate=train.evaluate
    )
    first = ends[0]
    assert len(first.evaluations) == 2
    for end in ends[1:]:
        assert (end.output, end.written, end.checkpoints, end.nbytes) == (
            first.output,
            first.written,
            first.checkpoints,
            first.nbytes,
        )
        assert end.evaluations == first.evaluations


def test_a_dry_run_writes_nothing_on_any_rank(tmp_path: Path, run_folder: Path) -> None:
    """If it failed, looking would leave a file."""
    ends = averaged(2, run_folder, tmp_path / "a.safetensors", bn="keep", dry_run=True)
    assert [end.written for end in ends] == [False, False]
    assert os.listdir(tmp_path) == []


# -- Shares ---------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 60_000), min_size=1, max_size=6)


def plan_of(folder: Path, lengths: list[int], dtype: torch.dtype) -> Plan:
    save_file({f"t{n}": torch.zeros(length, dtype=dtype) for n, length in enumerate(lengths)}, folder / "plan")
    with open_checkpoint(folder / "plan") as checkpoint:
        return make_plan([checkpoint.spec])


@settings(max_examples=40, deadline=None)
@given(
    shapes,
    st.integers(1, 40),
    st.integers(1, 5000).map(lambda n: 8 * n),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.bool]),
    st.integers(1, 50_000),
)
def test_shares_cover_every_element_once_and_meet_at_pages(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    size: int,
    begin: int,
    dtype: torch.dtype,
    elements: int,
) -> None:
    """If it failed, elements would be left out or computed twice, or two ranks would write to one page."""
    plan = plan_of(tmp_path_factory.getbasetemp(), lengths, dtype)
    shares = [plan.share(rank, size, begin=begin) for rank in range(size)]
    assert shares[0].start == 0
    assert shares[-1].stop == plan.nbytes
    assert all(before.stop == after.start for before, after in itertools.pairwise(shares))
    inner = {share.start for share in shares} - {0, plan.nbytes}
    assert all((begin + bound) % PAGE == 0 for bound in inner)
    assert max(map(len, shares)) <= plan.nbytes / size + PAGE
    found: dict[str, list[tuple[int, int]]] = {tensor.name: [] for tensor in plan.tensors}
    for share in shares:
        covered = 0
        for block in cut_into_blocks(plan, elements, share):
            assert block.numel <= elements
            for tensor, start, stop in block.ranges:
                found[tensor.name].append((start, stop))
                covered += (stop - start) * tensor.dtype.itemsize
        assert covered == len(share)
    for tensor in plan.tensors:
        edges = sorted(found[tensor.name])
        assert [start for start, _ in edges] == [0, *(stop for _, stop in edges)][: len(edges)]
        assert (edges[-1][1] if edges else 0) == tensor.numel


# -- The file -------------------------------------------------------------------------------------------------------


def test_every_rank_writes_into_the_same_file(tmp_path: Path) -> None:
    """If it failed, ranks would each fill a part of a file of their own."""
    barrier = threading.Barrier(3)

    def work(ranks: Ranks) -> None:
        with shared_output(tmp_path / "a", 30, ranks) as file:
            barrier.wait(5)  # until then the first bytes are a mark by which the file is known
            file.write(bytes([ranks.rank]) * 10, 10 * ranks.rank)
            ranks.exchange("written", None)
            assert file.readable_path.read_bytes() == b"\0" * 10 + b"\1" * 10 + b"\2" * 10
            if ranks.is_first:
                file.publish(overwrite=False)
            ranks.exchange("published", None)

    assert in_threads(3, work) == [None] * 3
    assert (tmp_path / "a").read_bytes() == b"\0" * 10 + b"\1" * 10 + b"\2" * 10
    assert os.listdir(tmp_path) == ["a"]


def test_its_name_is_hidden_and_nothing_is_left_without_publishing(tmp_path: Path) -> None:
    """If it failed, a failed run would leave files, or one that looks like an output."""

    def work(ranks: Ranks) -> list[str]:
        with shared_output(tmp_path / "a.safetensors", 30, ranks):
            names = os.listdir(tmp_path)
            ranks.exchange("seen", None)
            return names

    for names in in_threads(3, work):
        assert len(names) == 1
        assert names[0].startswith(".a.safetensors.")
        assert names[0].endswith(".tmp")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_smaller_than_its_mark_is_cut_to_what_is_written(tmp_path: Path, size: int) -> None:
    """If it failed, tiny contents would be followed by bytes of the mark."""

    def work(ranks: Ranks) -> None:
        with shared_output(tmp_path / "a", 8 + size, ranks) as file:
            if ranks.is_first:
                file.write(b"x" * (8 + size), 0)
                file.publish(overwrite=False)
            ranks.exchange("published", None)

    assert in_threads(2, work) == [None, None]
    assert (tmp_path / "a").read_bytes() == b"x" * (8 + size)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_whichever_rank_fails_nothing_is_left(tmp_path: Path, failing: int) -> None:
    """If it failed, each failed run would leave a file as large as the output."""

    def work(ranks: Ranks) -> None:
        with shared_output(tmp_path / "a", 100, ranks):
            if ranks.rank == failing:
                raise UserCodeError("no")
            ranks.exchange("never", None)

    ends = in_threads(3, work)
    assert [type(end) for end in ends] == [UserCodeError if rank == failing else RankError for rank in range(3)]
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_another_one_on_some_rank_is_refused(tmp_path: Path) -> None:
    """If it failed, an output on a machine's own disk would be published with holes."""
    for name in ("shared", "own"):
        (tmp_path / name).mkdir()

    def work(ranks: Ranks) -> None:
        folder = tmp_path / ("own" if ranks.rank == 1 else "shared")
        with shared_output(folder / "a", 100, ranks):
            pytest.fail("it was opened")

    ends = in_threads(3, work)
    assert type(ends[1]) is OutputError
    assert str(ends[1]) == (
        f"{tmp_path / 'own' / 'a'}: the file that rank 0 created beside it cannot be opened here: No such file or "
        "directory. Write to storage that all ranks share."
    )
    assert all(str(ends[rank]).startswith("rank 1 failed: ") for rank in (0, 2))
    assert os.listdir(tmp_path / "own") == os.listdir(tmp_path / "shared") == []


def test_another_file_under_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it failed, a folder that is synchronised late would take a rank's share and lose it."""
    for name in ("shared", "own"):
        (tmp_path / name).mkdir()
    join = UnpublishedFile.join

    def join_copy(file: UnpublishedFile) -> None:
        file.readable_path.write_bytes(b"stale bytes")
        join(file)

    monkeypatch.setattr(UnpublishedFile, "join", join_copy)

    def work(ranks: Ranks) -> None:
        folder = tmp_path / ("own" if ranks.rank == 1 else "shared")
        with shared_output(folder / "a", 100, ranks):
            pytest.fail("it was opened")

    ends = in_threads(2, work)
    assert str(ends[1]) == (
        f"{tmp_path / 'own' / 'a'}: expected the file that rank 0 is writing, got another one on this rank. Write to "
        "storage that all ranks share."
    )
    assert os.listdir(tmp_path / "own") == os.listdir(tmp_path / "shared") == []


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


def test_no_room_is_told_by_rank_0_and_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it failed, the others would wait for a name that never comes."""

    def full(*_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    (tmp_path / "out").mkdir()
    ends = averaged(2, checkpoints(tmp_path, [(9,)], torch.float32), tmp_path / "out" / "a.safetensors")
    assert type(ends[0]) is OutputError
    assert "no room for it" in str(ends[0])
    assert str(ends[1]).startswith("rank 0 failed: ")
    assert os.listdir(tmp_path / "out") == []


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
    # Behind the link only the folder is synced.
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
