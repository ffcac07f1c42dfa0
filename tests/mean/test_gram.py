"""The sums of `compare`: against exact fractions, in one pass, the same with any threads."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from mean.inputs import State, every_dtype, mixed_run, save

from ckpt_avg.files import platform
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.mean import gram
from ckpt_avg.mean.blocks import Block
from ckpt_avg.mean.geometry import geometry_of
from ckpt_avg.mean.gram import Sums, measure
from ckpt_avg.mean.value_kinds import plan_of


def sums_of(
    paths: Sequence[Path],
    *,
    threads: int = 2,
    readers: int = 0,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Sums:
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path)) for path in paths]
        plan = plan_of(checkpoints, dtype="keep", non_float="last")
        plan = replace(plan, tensors=tuple(each for each in plan.tensors if each.rule == "mean"))
        groups = {each.name: "all" for each in plan.tensors}
        return measure(checkpoints, plan, groups, threads=threads, readers=readers, progress=progress)


def flat(state: State) -> torch.Tensor:
    """All averaged values of a state, widened."""
    real = [torch.view_as_real(each) if each.is_complex() else each for each in state.values()]
    return torch.cat([each.double().flatten() for each in real if each.is_floating_point()])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_every_dtype_as_numpy_would_compute_it(tmp_path: Path, suffix: str) -> None:
    """Large tensors, many small ones, and complex numbers, whose parts count as two."""
    states = mixed_run(4)
    points = torch.stack([flat(state) for state in states])
    found = geometry_of(sums_of(save(tmp_path, states, suffix)).products["all"])
    mean = points.mean(0)
    close = {"rel": 1e-12}
    assert found.norm == pytest.approx(mean.norm().item(), **close)
    assert found.norms == pytest.approx(points.norm(dim=1).tolist(), **close)
    assert found.to_mean == pytest.approx((points - mean).norm(dim=1).tolist(), **close)
    for i in range(4):
        assert found.distances[i] == pytest.approx((points - points[i]).norm(dim=1).tolist(), **close)
        cosines = torch.cosine_similarity(points, points[i : i + 1]).tolist()
        assert found.cosines[i] == pytest.approx(cosines, rel=1e-12, abs=1e-12)
        centred = torch.cosine_similarity(points - mean, (points - mean)[i : i + 1]).tolist()
        assert found.centred_cosines[i] == pytest.approx(centred, rel=1e-12, abs=1e-12)


def test_float16_and_float8_of_many_magnitudes(tmp_path: Path) -> None:
    states = every_dtype(3, 5000)
    points = torch.stack([flat(state) for state in states])
    found = geometry_of(sums_of(save(tmp_path, states, ".pt")).products["all"])
    assert found.to_mean == pytest.approx((points - points.mean(0)).norm(dim=1).tolist(), rel=1e-12)


def test_a_zero_whose_products_were_rounded_has_no_direction() -> None:
    rows = torch.tensor([[-1.0], [1.0], [1.0]], dtype=torch.float64)
    products = rows @ rows.T
    products[0, 0] -= 1e-15
    assert geometry_of(products).cosines == ((1, 0), (0, 1))


@pytest.mark.parametrize("smaller", [1e-3, 1e-6, 1e-9])
def test_small_differences_of_large_weights_keep_their_digits(tmp_path: Path, smaller: float) -> None:
    """The products of the checkpoints themselves would leave none: their squares agree in 18 digits."""
    generator = torch.Generator().manual_seed(0)
    base = 1000 + torch.randn(3000, generator=generator, dtype=torch.float64)
    states = [{"w": base + smaller * torch.randn(3000, generator=generator, dtype=torch.float64)} for _ in range(3)]
    found = geometry_of(sums_of(save(tmp_path, states)).products["all"])
    for i, j in ((0, 1), (1, 2)):
        exact = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(*(states[k]["w"].tolist() for k in (i, j))))  # noqa: B905
        assert found.distances[i][j] == pytest.approx(math.sqrt(exact), rel=1e-6 if smaller < 1e-8 else 1e-9)


def test_the_plane_of_points_in_a_plane(tmp_path: Path) -> None:
    """Their distances are kept, the mean is in the middle, and the last one is to the right."""
    corners = torch.tensor([[-4.0, 0.0, 0.0], [0.0, 1.0, -1.0], [0.0, -1.0, 1.0], [4.0, 0.0, 0.0]], dtype=torch.float64)
    found = geometry_of(sums_of(save(tmp_path, [{"w": 7 + row} for row in corners])).products["all"])
    assert [x for x, _ in found.plane] == pytest.approx([-4, 0, 0, 4], abs=1e-12)
    assert [abs(y) for _, y in found.plane] == pytest.approx([0, 2**0.5, 2**0.5, 0], abs=1e-12)
    assert found.shares == pytest.approx((32 / 36, 4 / 36))


def test_the_same_with_any_threads_and_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: blocks depend on the number of checkpoints alone, and are added in their order."""
    monkeypatch.setattr(gram, "_READ", 64 * 1024)
    monkeypatch.setattr(gram, "_CHUNK", 8 * 1024)
    paths = save(tmp_path, mixed_run())
    first = sums_of(paths, threads=1)
    for threads, readers in ((2, 0), (5, 3)):
        other = sums_of(paths, threads=threads, readers=readers)
        assert torch.equal(first.products["all"], other.products["all"])
        assert all(torch.equal(each.squares, other.tensors[name].squares) for name, each in first.tensors.items())


def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass, whatever is computed of it; a few samples tell copies and masks beforehand."""
    states = mixed_run()
    paths = save(tmp_path, states)
    read = 0
    real, real_into = platform.read, platform.read_into

    def count(fd: int, length: int, offset: int) -> bytes:
        nonlocal read
        found = real(fd, length, offset)
        read += len(found)
        return found

    def count_into(fd: int, targets: Sequence[memoryview], offset: int) -> int:
        nonlocal read
        done = real_into(fd, targets, offset)
        read += done
        return done

    with ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path)) for path in paths]
        plan = plan_of(checkpoints, dtype="keep", non_float="last")
        plan = replace(plan, tensors=tuple(each for each in plan.tensors if each.rule == "mean"))
        monkeypatch.setattr(platform, "read", count)
        monkeypatch.setattr(platform, "read_into", count_into)
        measure(checkpoints, plan, {each.name: "all" for each in plan.tensors}, threads=2, readers=0)
    assert read == 3 * plan.source_nbytes


def test_nan_and_infinity_are_counted_and_left_out(tmp_path: Path) -> None:
    """They must not make NaN of what the other checkpoints have; the same infinity in all is a constant."""
    states = [{"a": torch.randn(50, 3), "b": torch.randn(9), "mask": torch.full((4,), -math.inf)} for _ in range(4)]
    states[1]["a"][7, 1] = math.nan
    states[1]["b"][2:4] = math.inf
    states[3]["b"][5] = -math.inf
    sums = sums_of(save(tmp_path, states))
    assert sums.nonfinite == {1: {"a": 1, "b": 2}, 3: {"b": 1}}
    found = geometry_of(sums.products["all"], chosen=[0, 2])
    points = torch.stack([flat({name: states[index][name] for name in "ab"}) for index in (0, 2)])
    assert found.distances[0][1] == pytest.approx((points[0] - points[1]).norm().item(), rel=1e-12)
    assert found.norm == pytest.approx(points.mean(0).norm().item(), rel=1e-12)


def test_transposed_tensors_and_checkpoints_of_other_dtypes(tmp_path: Path) -> None:
    """Elements are compared where they are in the tensor, not where they are in the file."""
    values = torch.randn(40, 30)
    first, second, third = {"w": values, "v": values}, {"w": values.T.contiguous().T, "v": values.double()}, {}
    third = {"w": values.bfloat16(), "v": values.half()}
    found = geometry_of(sums_of(save(tmp_path, [first, second, third], ".pt")).products["all"])
    assert found.distances[0][1] == 0
    expected = torch.stack([third[name].double() - values.double() for name in ("w", "v")]).norm().item()
    assert found.distances[0][2] == pytest.approx(expected, rel=1e-12)


def test_many_checkpoints_of_few_elements(tmp_path: Path) -> None:
    """More than a chunk has room for: a chunk then has the least number of elements."""
    points = torch.randn(300, 700, dtype=torch.float64)
    found = geometry_of(sums_of(save(tmp_path, [{"w": row.clone()} for row in points])).products["all"])
    assert found.to_mean == pytest.approx((points - points.mean(0)).norm(dim=1).tolist(), rel=1e-12)


def test_no_products_of_single_tensors_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those with themselves and with the mean: N² numbers for each of many tensors would fill the memory."""
    monkeypatch.setattr(gram, "_CHUNK", 1024)
    monkeypatch.setattr(gram, "_LEAST", 16)
    number, tensors = 50, 200
    states = [{f"w{index}": torch.randn(1) for index in range(tensors)} for _ in range(number)]
    paths = save(tmp_path, states)
    del states
    held = []
    before = bytes_of_tensors()
    sums_of(paths, threads=1, progress=lambda _: held.append(bytes_of_tensors() - before))
    assert len(held) == 1
    assert tensors * 2 * number * 8 < held[0] < tensors * number**2 * 8 / 10


def bytes_of_tensors() -> int:
    """Returns how much memory the tensors of this process have."""
    found = (each.untyped_storage() for each in gc.get_objects() if type(each) is torch.Tensor)
    return sum({each.data_ptr(): each.nbytes() for each in found}.values())


@pytest.fixture
def many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Checkpoints of 100 blocks."""
    monkeypatch.setattr(gram, "_READ", 200)
    monkeypatch.setattr(gram, "_LEAST", 16)
    return save(tmp_path, [{"w": torch.randn(10_000)} for _ in range(2)])


def test_few_blocks_wait_for_a_slow_one(many_blocks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their sums would fill the memory."""
    measure_blocks = gram._Worker.measure
    measured = 0
    meanwhile = []

    def slow_at_first(worker: gram._Worker, blocks: Sequence[Block]) -> Sums:
        nonlocal measured
        if blocks[0].offset == 0:
            time.sleep(0.3)
            meanwhile.append(measured)
        measured += 1
        return measure_blocks(worker, blocks)

    monkeypatch.setattr(gram._Worker, "measure", slow_at_first)
    sums_of(many_blocks, threads=3)
    assert measured == 100
    assert meanwhile[0] <= 8


def test_workers_that_wait_for_one_that_fails_give_up(many_blocks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    measure_blocks = gram._Worker.measure

    def fail_at_first(worker: gram._Worker, blocks: Sequence[Block]) -> Sums:
        if blocks[0].offset == 0:
            time.sleep(0.2)
            raise OSError("no such luck")
        return measure_blocks(worker, blocks)

    monkeypatch.setattr(gram._Worker, "measure", fail_at_first)
    with pytest.raises(OSError, match="no such luck"):
        sums_of(many_blocks, threads=3)
