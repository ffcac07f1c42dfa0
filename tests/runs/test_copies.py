"""The same weights in two files are found, whatever else the files contain; nothing else counts as a copy."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.runs import copies
from ckpt_avg.runs.copies import find_copies

State = dict[str, torch.Tensor]


def compared(paths: list[Path]) -> dict[int, int]:
    with ExitStack() as stack:
        return find_copies([stack.enter_context(open_checkpoint(path)) for path in paths])


def write(folder: Path, *states: State) -> list[Path]:
    paths = [folder / f"{index}.pt" for index in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        torch.save(state, path)
    return paths


def base() -> State:
    return {
        "w": torch.arange(12.0).view(3, 4),
        "n": torch.tensor(3),
        "empty": torch.empty(0, 2),
        "half": torch.ones(5).half(),
    }


def test_one_or_none() -> None:
    assert find_copies([]) == {}


def test_each_copy_refers_to_the_first(tmp_path: Path) -> None:
    other = base() | {"n": torch.tensor(4)}
    assert compared(write(tmp_path, base(), other, base(), base(), other)) == {2: 0, 3: 0, 4: 1}


@pytest.mark.parametrize(
    "changed",
    [
        {"w": torch.arange(12.0).view(4, 3)},
        {"w": torch.arange(12.0).view(12)},
        {"w": torch.arange(12, dtype=torch.float64).view(3, 4)},
        {"half": torch.ones(5).bfloat16()},
        {"empty": torch.empty(2, 0)},
        {"n": torch.tensor([3])},
        {"more": torch.ones(1)},
        {"w": -torch.arange(12.0).view(3, 4)},
    ],
    ids=["shape", "rank", "dtype", "half dtype", "empty shape", "scalar", "one more", "sign of zero and others"],
)
def test_what_differs_in_its_header_or_its_bytes_is_no_copy(tmp_path: Path, changed: State) -> None:
    assert compared(write(tmp_path, base(), base() | changed)) == {}
    assert compared(write(tmp_path, base() | changed, base())) == {}


def test_one_tensor_less_is_no_copy(tmp_path: Path) -> None:
    less = base()
    del less["n"]
    assert compared(write(tmp_path, base(), less)) == {}
    renamed = base()
    renamed["m"] = renamed.pop("n")
    assert compared(write(tmp_path, base(), renamed)) == {}


@given(index=st.integers(0, 9_999), bit=st.integers(0, 31))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_bit_anywhere_makes_it_another_checkpoint(tmp_path: Path, index: int, bit: int) -> None:
    """Inside the samples and outside: otherwise a checkpoint would be skipped as a copy."""
    first = torch.arange(10_000, dtype=torch.int32)
    second = first.clone()
    second[index] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    paths = write(tmp_path, {"w": first}, {"w": second})
    assert compared(paths) == {}


def test_only_the_last_of_many_tensors_differs(tmp_path: Path) -> None:
    """More tensors than are sampled."""
    many = {f"w{number:04}": torch.full((3,), float(number)) for number in range(700)}
    for changed in ("w0000", "w0001", "w0698", "w0699"):
        assert compared(write(tmp_path, many, many | {changed: torch.zeros(3) - 1})) == {}
    assert compared(write(tmp_path, many, many)) == {1: 0}


def test_copies_across_formats(tmp_path: Path) -> None:
    """A stream, a zip with another root, safetensors, an old prefix: one and the same weights."""
    torch.save(base(), tmp_path / "a.pt")
    torch.save({"model": base(), "epoch": 3}, tmp_path / "other name.pth")
    torch.save(base(), tmp_path / "stream.pt", _use_new_zipfile_serialization=False)
    save_file(base(), tmp_path / "a.safetensors")
    torch.save({f"module.{name}": value for name, value in base().items()}, tmp_path / "wrapped.pt")
    paths = [tmp_path / name for name in ("a.pt", "other name.pth", "stream.pt", "a.safetensors", "wrapped.pt")]
    assert compared(paths) == {1: 0, 2: 0, 3: 0, 4: 0}


def test_strided_and_tied_tensors(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    first = {"t": whole.view(4, 6).t(), "s": whole[::2], "tied": whole[::2]}
    second = {name: value + 0 for name, value in first.items()}
    other = {"t": (whole + 1).view(4, 6).t(), "s": (whole + 1)[::2], "tied": (whole + 1)[::2]}
    assert compared(write(tmp_path, first, first, other)) == {1: 0}
    assert 0 not in compared(write(tmp_path, first, other, second)).values()


def test_large_tensors_are_compared_to_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, so that memory stays bounded."""
    monkeypatch.setattr(copies, "_BLOCK", 1000)
    asked = []
    read = InputFile.read

    def recorded(self: InputFile, offset: int, length: int) -> bytes:
        asked.append(length)
        return read(self, offset, length)

    first = torch.zeros(5_000)
    last = first.clone()
    last[-1] = 1
    paths = write(tmp_path, {"w": first}, {"w": last}, {"w": first})
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path)) for path in paths]
        monkeypatch.setattr(InputFile, "read", recorded)
        assert find_copies(opened) == {2: 0}
    assert max(asked) <= 1000
    assert sum(asked) > 2 * first.nbytes


def test_little_is_read_to_see_that_checkpoints_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a run of large models twice would double the time of an average."""
    paths = write(tmp_path, *({"w": torch.full((100_000,), float(seed))} for seed in range(4)))
    asked = []
    read = InputFile.read
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path)) for path in paths]
        monkeypatch.setattr(
            InputFile, "read", lambda self, offset, length: (asked.append(length), read(self, offset, length))[1]
        )
        assert find_copies(opened) == {}
    assert sum(asked) < 10_000


def test_a_file_that_shrinks_meanwhile_is_the_documented_error(tmp_path: Path) -> None:
    paths = write(tmp_path, {"w": torch.ones(1000)}, {"w": torch.ones(1000)})
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path)) for path in paths]
        paths[1].write_bytes(paths[1].read_bytes()[:200])
        with pytest.raises(CheckpointFormatError):
            find_copies(opened)
