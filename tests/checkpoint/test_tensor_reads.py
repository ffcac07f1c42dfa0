"""Ranges of stored elements, against torch's own strided views."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_avg.checkpoint import tensor_reads as reads
from ckpt_avg.checkpoint.spec import BY_TORCH_NAME, Checkpoint, CheckpointSpec, TensorSpec, contiguous_stride
from ckpt_avg.checkpoint.tensor_reads import Ranges, join_ranges, read_bytes, read_ranges, spans, stream, torch_dtype
from ckpt_avg.engine import _kernel as built
from ckpt_avg.files.input_file import InputFile

needs_kernel = pytest.mark.skipif(built is None, reason="the native engine was not built here")
View = tuple[str, tuple[int, ...], tuple[int, ...], int]  # dtype, shape, stride, offset
DTYPES = ("int8", "int16", "int32", "int64", "complex64", "bool", "float8_e4m3fn", "bfloat16", "uint64")


def make(name: str, dtype: str, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> TensorSpec:
    return TensorSpec(name, BY_TORCH_NAME[dtype], shape, stride, 0, offset, (0, 0))


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements of a storage that a view reaches."""
    return sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True)) + 1 if prod(shape) else 0


def expected(contents: bytes, tensor: TensorSpec) -> torch.Tensor:
    """What torch makes of the same bytes."""
    count = span(tensor.shape, tensor.stride)
    if not count:
        return torch.empty(0, dtype=torch_dtype(tensor.dtype))
    storage = bytearray(contents[tensor.offset : tensor.offset + count * tensor.dtype.itemsize])
    values = torch.frombuffer(storage, dtype=torch_dtype(tensor.dtype))
    # Copied, since a view of one element keeps whatever stride it has.
    return torch.empty(tensor.numel, dtype=values.dtype).copy_(values.as_strided(tensor.shape, tensor.stride).flatten())


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    alike = (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    return alike and found.contiguous().view(torch.uint8).equal(wanted.contiguous().view(torch.uint8))


NOISE = bytes(torch.randint(0, 2, (200_000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).tolist())


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """A file of 200,000 bytes, none of which makes a NaN."""
    path = tmp_path_factory.mktemp("noise") / "raw"
    path.write_bytes(NOISE)
    with Checkpoint(CheckpointSpec(path, "raw", {}), (InputFile(path),)) as checkpoint:
        yield checkpoint


@st.composite
def views(draw: st.DrawFn) -> View:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 6), max_size=4).map(tuple))
    steps = st.one_of(st.integers(0, 9), st.sampled_from([0, 1, 60]))
    stride = draw(st.one_of(st.just(contiguous_stride(shape)), st.tuples(*(steps for _ in shape))))
    return dtype, shape, stride, draw(st.integers(0, 40))


@pytest.mark.parametrize("engine", [pytest.param("native", marks=needs_kernel), "torch"])
@given(view=views(), window=st.sampled_from([16, 200, 4 * 2**20]), data=st.data())
@settings(max_examples=500, deadline=None)
def test_any_range_of_any_view_equals_torch(
    noise: Checkpoint, engine: str, view: View, window: int, data: st.DataObject
) -> None:
    """Any strides (repeated, overlapping, none), any offset, through windows of any size."""
    tensor = make("w", *view)
    start = data.draw(st.integers(0, tensor.numel))
    stop = data.draw(st.integers(start, tensor.numel))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reads, "_SPAN", window)
        patch.setenv("CKPT_AVG_ENGINE", engine)
        (found,) = read_ranges(noise, [(tensor, start, stop)])
    assert same(found, expected(NOISE, tensor)[start:stop])


@given(chosen=st.lists(views(), min_size=1, max_size=8), gap=st.sampled_from([0, 64]), data=st.data())
@settings(max_examples=100, deadline=None)
def test_ranges_are_returned_in_the_order_asked_for(
    noise: Checkpoint, chosen: list[View], gap: int, data: st.DataObject
) -> None:
    """Even if they overlap in the file, and however windows are shared."""
    tensors = [make(str(i), *view[:3], view[3] + data.draw(st.integers(0, 3000))) for i, view in enumerate(chosen)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reads, "_WASTE", gap)
        ranges = [(tensor, 0, tensor.numel) for tensor in tensors]
        found = read_ranges(noise, ranges)
        together = read_bytes(noise, Ranges(ranges))
    assert together == b"".join(values.view(torch.uint8).numpy().tobytes() for values in found)
    for tensor, values in zip(tensors, found, strict=True):
        assert same(values, expected(NOISE, tensor))


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8), data=st.data())
@settings(max_examples=100, deadline=None)
def test_joined_ranges_have_the_elements_of_all(noise: Checkpoint, lengths: list[int], data: st.DataObject) -> None:
    """Tensors that are consecutive, apart, in another order, strided or cut off are joined only where it is right."""
    ranges, offset = [], 0
    for length in lengths:
        offset += data.draw(st.sampled_from([0, 0, 4, 100]))
        tensor = make("w", "int32", (length,), (data.draw(st.sampled_from([1, 1, 1, 2])),), offset)
        start = data.draw(st.sampled_from([0, 0, length - 1]))
        ranges.append((tensor, start, data.draw(st.sampled_from([length, length, start + 1]))))
        offset += 4 * length
    ranges = data.draw(st.sampled_from([ranges, ranges[::-1]]))
    found = torch.frombuffer(read_bytes(noise, join_ranges(ranges)), dtype=torch.int32)
    assert same(found, torch.cat([expected(NOISE, tensor)[start:stop] for tensor, start, stop in ranges]))


def test_consecutive_tensors_are_one_range_and_one_window() -> None:
    """Otherwise many small tensors would cost a call each."""
    tensors = [make("w", "int32", (10,), (1,), 8 + 40 * index) for index in range(100)]
    (joined,) = join_ranges([(tensor, 0, 10) for tensor in tensors])
    assert (joined[0].offset, joined[1:]) == (8, (0, 1000))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_neighbours_in_another_order_are_read_at_once(noise: Checkpoint, order: tuple[int, ...]) -> None:
    """As where a file has its tensors in another order than the output."""
    tensors = [make("w", "int32", (10 + index,), (1,), [8, 48, 92][index]) for index in order]
    ranges = Ranges((tensor, 0, tensor.numel) for tensor in tensors)
    assert [(window.begin, window.end, window.is_filled) for window in ranges.windows] == [(8, 140, True)]
    found = torch.frombuffer(read_bytes(noise, ranges), dtype=torch.int32)
    assert same(found, torch.cat([expected(NOISE, tensor) for tensor in tensors]))


@pytest.mark.parametrize("offset", [0, 1, 3, 4, 4095, 4096, 4097])
def test_large_windows_at_any_offset_equal_torch(noise: Checkpoint, offset: int) -> None:
    """Offsets that no page and no element begins at; valid after the file is closed."""
    tensor = make("w", "int32", (40_000,), (1,), offset)
    with Checkpoint(noise.spec, (InputFile(noise.spec.path),)) as checkpoint:
        (found,) = read_ranges(checkpoint, [(tensor, 5, 39_000)])
    assert same(found, expected(NOISE, tensor)[5:39_000])
    assert found.data_ptr() % found.element_size() == 0, "kernels may rely on aligned elements"


@given(view=views(), step=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_a_stream_yields_each_element_once_and_in_order(noise: Checkpoint, view: View, step: int) -> None:
    tensor = make("w", *view)
    parts = list(stream(noise, tensor, step))
    assert [start for start, _ in parts] == list(range(0, tensor.numel, step))
    values = [part for _, part in parts] or [torch.empty(0, dtype=torch_dtype(tensor.dtype))]
    assert same(torch.cat([part.view(torch.uint8) for part in values]), expected(NOISE, tensor).view(torch.uint8))


def test_a_view_far_wider_than_its_elements_is_read_through_small_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few elements spread over a large file must not bring the whole file into memory."""
    asked = []
    read = InputFile.read

    def recorded(self: InputFile, offset: int, length: int) -> bytes:
        asked.append(length)
        return read(self, offset, length)

    monkeypatch.setattr(InputFile, "read", recorded)
    path = tmp_path / "raw"
    with path.open("wb") as file:
        file.truncate(256 * 2**20)
    tensor = make("w", "float32", (8, 8), (1, 8 * 2**20), 0)
    spec = CheckpointSpec(path, "raw", {"w": tensor})
    with Checkpoint(spec, (InputFile(path),)) as checkpoint:
        assert read_ranges(checkpoint, [(tensor, 0, 64)])[0].tolist() == [0.0] * 64
    assert asked
    assert max(asked) <= 4 * 2**20


def test_small_tensors_far_apart_do_not_share_a_window(tmp_path: Path) -> None:
    """One window over all of them would hold all the bytes between them."""

    def windows(step: int, nbytes: int) -> list[int]:
        ranges = [(make("w", "int8", (nbytes,), (1,), index * step), 0, nbytes) for index in range(1_000)]
        (tmp_path / "raw").touch()
        with Checkpoint(CheckpointSpec(tmp_path, "raw", {}), (InputFile(tmp_path / "raw"),)) as checkpoint:
            return [end - begin for _, begin, end in spans(checkpoint, Ranges(ranges))]

    assert sum(windows(7_000, 4)) < 1_000 * reads._WASTE
    assert len(windows(1_100, 1_000)) == 1
