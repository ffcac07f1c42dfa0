"""Tensors stored in boxes: any tiling gives back the dense tensor, and anything else is refused."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_avg.checkpoint import tensor_reads as elements
from ckpt_avg.checkpoint.spec import BY_TORCH_NAME, Checkpoint, CheckpointSpec, Part, TensorSpec, contiguous_stride
from ckpt_avg.checkpoint.tensor_reads import read_ranges, stream
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats import dcp_parts as parts
from ckpt_avg.formats.dcp_parts import combine_parts
from ckpt_avg.limits import LIMITS, Limits

Box = tuple[tuple[int, ...], tuple[int, ...]]  # starts, extents
INT = BY_TORCH_NAME["int32"]


def cuts(draw: st.DrawFn, start: tuple[int, ...], shape: tuple[int, ...], left: int) -> list[Box]:
    """Cuts a box in two, again and again, anywhere along any dimension, so that the boxes need not form a grid."""
    axes = [axis for axis, extent in enumerate(shape) if extent > 1]
    if left == 0 or not axes or not draw(st.booleans()):
        return [(start, shape)]
    axis = draw(st.sampled_from(axes))
    at = draw(st.integers(1, shape[axis] - 1))
    head, tail = list(shape), list(shape)
    head[axis], tail[axis] = at, shape[axis] - at
    after = list(start)
    after[axis] += at
    return cuts(draw, start, tuple(head), left - 1) + cuts(draw, tuple(after), tuple(tail), left - 1)


@dataclass(frozen=True)
class Stored:
    """A tensor, and its boxes in two files."""

    values: torch.Tensor
    boxes: list[Part]
    files: tuple[bytes, bytes]


def lay_out(values: torch.Tensor, boxes: list[Box], draw: st.DrawFn | None = None) -> Stored:
    """Writes each box somewhere: in either file, with gaps before it and with strides of its own."""
    files = [bytearray(), bytearray()]
    made = []
    for starts, extents in boxes:
        order = list(range(len(extents)))
        gap, file, spread = 0, 0, 1
        if draw is not None:
            order = draw(st.permutations(order))
            gap, file, spread = draw(st.integers(0, 9)), draw(st.integers(0, 1)), draw(st.sampled_from([1, 1, 3]))
        steps = contiguous_stride(tuple(extents[axis] for axis in order))
        stride = [0] * len(extents)
        for axis, step in zip(order, steps, strict=True):
            stride[axis] = step * spread
        box = values[tuple(slice(a, a + n) for a, n in zip(starts, extents, strict=True))]
        room = prod(extents) * spread
        storage = torch.full((max(room, 1),), -7, dtype=values.dtype)
        torch.as_strided(storage, extents, stride).copy_(box)
        files[file] += b"\xee" * gap
        begin = len(files[file])
        files[file] += storage.numpy().tobytes()
        spec = TensorSpec("", INT, tuple(extents), tuple(stride), file, begin, (begin, storage.nbytes))
        made.append(Part(starts, spec))
    return Stored(values, made, (bytes(files[0]), bytes(files[1])))


@st.composite
def tilings(draw: st.DrawFn) -> Stored:
    shape = draw(st.lists(st.integers(1, 5), max_size=4).map(tuple))
    values = torch.arange(prod(shape), dtype=torch.int32).view(shape)
    boxes = cuts(draw, (0,) * len(shape), shape, 4)
    return lay_out(values, draw(st.permutations(boxes)), draw)


def opened(folder: Path, stored: Stored, tensor: TensorSpec) -> Checkpoint:
    files = []
    for name, contents in zip(("one", "two"), stored.files, strict=True):
        (folder / name).write_bytes(contents)
        files.append(InputFile(folder / name))
    return Checkpoint(CheckpointSpec(folder, "parts", {"w": tensor}), files)


def joined(stored: Stored, shape: tuple[int, ...] | None = None) -> TensorSpec:
    return combine_parts(
        "w", INT, tuple(stored.values.shape) if shape is None else shape, stored.boxes, "here: tensor 'w'"
    )


quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(stored=tilings(), data=st.data())
@quick
@pytest.mark.parametrize("window", [16, 4 * 2**20])
def test_any_range_of_any_tiling_equals_the_dense_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, stored: Stored, data: st.DataObject
) -> None:
    """A wrong element would be a wrong weight without any error."""
    monkeypatch.setattr(elements, "_SPAN", window)
    tensor = joined(stored)
    assert (tensor.name, tensor.dtype, tensor.shape) == ("w", INT, tuple(stored.values.shape))
    flat = stored.values.flatten()
    start = data.draw(st.integers(0, tensor.numel))
    stop = data.draw(st.integers(start, tensor.numel))
    with opened(tmp_path, stored, tensor) as checkpoint:
        ranges = [(tensor, start, stop), (tensor, 0, tensor.numel)]
        found = read_ranges(checkpoint, ranges)
        assert found[0].equal(flat[start:stop])
        assert found[1].equal(flat)
        step = data.draw(st.integers(1, 20))
        assert torch.cat([values for _, values in stream(checkpoint, tensor, step)]).equal(flat)


@given(stored=tilings(), data=st.data())
@quick
def test_a_part_that_is_missing_is_found(stored: Stored, data: st.DataObject) -> None:
    """Its elements would be what happened to be in memory."""
    lost = data.draw(st.integers(0, len(stored.boxes) - 1))
    rest = stored.boxes[:lost] + stored.boxes[lost + 1 :]
    with pytest.raises(CheckpointFormatError) as caught:
        combine_parts("w", INT, tuple(stored.values.shape), rest, "here")
    assert str(caught.value).startswith(
        f"here: expected each of {stored.values.numel():,} elements in exactly one part"
    )
    assert "A shard may be missing" in str(caught.value)


@given(stored=tilings(), data=st.data())
@quick
def test_replicas_count_once(tmp_path: Path, stored: Stored, data: st.DataObject) -> None:
    """Every rank may have saved a part that all of them hold."""
    again = data.draw(st.lists(st.sampled_from(stored.boxes), max_size=3))
    tensor = combine_parts("w", INT, tuple(stored.values.shape), [*stored.boxes, *again], "here")
    with opened(tmp_path, stored, tensor) as checkpoint:
        assert read_ranges(checkpoint, [(tensor, 0, tensor.numel)])[0].equal(stored.values.flatten())


def box(starts: tuple[int, ...], extents: tuple[int, ...]) -> Part:
    return Part(starts, TensorSpec("", INT, extents, contiguous_stride(extents), 0, 0, (0, 0)))


def covered_once(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    """By counting each element."""
    counts = torch.zeros(shape, dtype=torch.int64)
    for starts, extents in boxes:
        counts[tuple(slice(a, a + n) for a, n in zip(starts, extents, strict=True))] += 1
    return bool((counts == 1).all())


@given(data=st.data(), shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
@settings(max_examples=150, deadline=None)
def test_boxes_are_accepted_if_they_cover_each_element_once(data: st.DataObject, shape: tuple[int, ...]) -> None:
    """Overlaps and holes, even where the numbers of elements agree, against a count of every element."""
    boxes: list[Box] = []
    for _ in range(data.draw(st.integers(1, 4))):
        starts = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
        boxes.append(
            (starts, tuple(data.draw(st.integers(1, extent - a)) for a, extent in zip(starts, shape, strict=True)))
        )
    boxes = list(dict.fromkeys(boxes))
    made = [box(starts, extents) for starts, extents in boxes]
    if covered_once(boxes, shape):
        combine_parts("w", INT, shape, made, "here")
    else:
        with pytest.raises(CheckpointFormatError):
            combine_parts("w", INT, shape, made, "here")


def test_an_overlap_that_makes_up_for_a_hole_is_found() -> None:
    """The number of elements is right, and yet one is there twice and another nowhere."""
    with pytest.raises(CheckpointFormatError, match="in exactly one part"):
        combine_parts("w", INT, (4,), [box((0,), (2,)), box((1,), (2,))], "here")
    with pytest.raises(CheckpointFormatError, match="in exactly one part"):
        combine_parts("w", INT, (2, 2), [box((0, 0), (2, 1)), box((0, 0), (1, 2))], "here")


@pytest.mark.parametrize(
    ("starts", "extents"),
    [((3,), (2,)), ((-1,), (2,)), ((4,), (1,)), ((0, 0), (2, 2)), ((0,), (2, 2)), ((0, 0), (2,)), ((), ())],
)
def test_parts_outside_the_shape_are_refused(starts: tuple[int, ...], extents: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointFormatError) as caught:
        combine_parts("w", INT, (4,), [box((0,), (4,)), box(starts, extents)], "here")
    assert str(caught.value).startswith("here: expected parts inside the shape (4,), got one of shape")


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2**40)])
def test_a_tensor_without_elements_needs_no_parts(shape: tuple[int, ...]) -> None:
    for given_parts in ([], [box((0,) * len(shape), shape)]):
        tensor = combine_parts("w", INT, shape, given_parts, "here")
        assert (tensor.shape, tensor.numel, tensor.parts) == (shape, 0, ())


def test_a_scalar_is_one_part() -> None:
    tensor = combine_parts("w", INT, (), [box((), ())], "here")
    assert (tensor.name, tensor.shape, tensor.parts) == ("w", (), ())
    with pytest.raises(CheckpointFormatError):
        combine_parts("w", INT, (), [], "here")


def test_one_part_that_is_the_whole_is_no_tensor_of_parts() -> None:
    """So that it is read through windows of the file, without a copy."""
    tensor = combine_parts("w", INT, (2, 3), [box((0, 0), (2, 3))], "here")
    assert tensor.parts == ()
    assert tensor.is_contiguous


def test_parts_are_never_contiguous_and_are_tied_by_their_bytes() -> None:
    stored = lay_out(torch.arange(6, dtype=torch.int32), [((0,), (3,)), ((3,), (3,))])
    tensor = joined(stored)
    assert not tensor.is_contiguous
    again = combine_parts("again", INT, (6,), stored.boxes, "here")
    other = combine_parts("other", INT, (6,), lay_out(stored.values, [((0,), (2,)), ((2,), (4,))]).boxes, "here")
    spec = CheckpointSpec(Path("x"), "parts", {"w": tensor, "again": again, "other": other})
    assert spec.tied() == [("w", "again")]


def test_many_parts_along_one_dimension_are_joined_at_once() -> None:
    """As many as a large run has ranks, and more: comparing each with each would take minutes."""
    count = 10_000
    rows = [box((row, 0), (1, 3)) for row in range(count)]
    columns = [box((0, column), (3, 1)) for column in range(count)]
    assert len(combine_parts("w", INT, (count, 3), rows, "here").parts) == count
    assert len(combine_parts("w", INT, (3, count), columns, "here").parts) == count


def test_parts_made_to_be_compared_for_ever_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LIMITS", Limits(part_pairs=1_000))
    grid = [box(spot, (1, 1)) for spot in itertools.product(range(60), range(60))]
    with pytest.raises(CheckpointFormatError, match="expected at most 1,000 neighbouring parts"):
        combine_parts("w", INT, (60, 60), grid, "here")
    assert LIMITS.part_pairs >= 1_000_000
