"""Bytes that a pickle holds itself, behind the interface of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_avg.checkpoint.spec import BY_TORCH_NAME, Checkpoint, CheckpointSpec, TensorSpec
from ckpt_avg.checkpoint.tensor_reads import read_ranges
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.in_memory import MemoryFile


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_what_was_added_is_read_back_where_it_was_put(pieces: list[bytes]) -> None:
    """Each piece aligned for any dtype, and none over another; the same object is held once."""
    file = MemoryFile(Path("x"))
    places = [file.add(piece) for piece in pieces]
    for piece, begin in zip(pieces, places, strict=True):
        assert begin % 16 == 0
        assert file.read(begin, len(piece)) == piece
        window = file.map(begin, len(piece))
        assert bytes(window.buffer[window.position : window.position + len(piece)]) == piece
        assert window.offset == begin
    assert file.size == max((begin + len(piece) for piece, begin in zip(pieces, places, strict=True)), default=0)
    again = bytearray(b"xyz")
    assert file.add(again) == file.add(again)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, 5), (4, 1), (5, 0), (2**64, 1)])
def test_nothing_outside_is_read(offset: int, length: int) -> None:
    file = MemoryFile(Path("some/file.pt"))
    file.add(b"abcd")
    for read in (file.read, file.map):
        with pytest.raises(CheckpointFormatError, match=r"some/file\.pt: expected"):
            read(offset, length)


def test_it_stands_in_for_a_file() -> None:
    """Ranges of elements come out of it as out of a mapped file, and stay valid when it is closed."""
    file = MemoryFile(Path("x"))
    file.add(b"\1")
    begin = file.add(torch.arange(6, dtype=torch.int32).numpy().tobytes())
    tensor = TensorSpec("w", BY_TORCH_NAME["int32"], (3, 2), (1, 3), 0, begin, (begin, 24))
    with Checkpoint(CheckpointSpec(Path("x"), "raw", {"w": tensor}), (file,)) as checkpoint:
        checkpoint.check_unchanged()
        (found,) = read_ranges(checkpoint, [(tensor, 0, 6)])
    assert found.tolist() == [0, 3, 1, 4, 2, 5]
