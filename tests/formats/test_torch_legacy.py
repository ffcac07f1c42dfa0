"""The stream of torch before 1.6: the tensors that torch.load gives, at any protocol, and no code in it runs."""

from __future__ import annotations

import contextlib
import functools
import pickle
import struct
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.pickles.opcodes import Runs, deep, named, proto, sequence, text, whole
from formats.reading import assert_as_torch_loads, read, refusal
from formats.torch_bytes import DAMAGED, DISTRUST, FLOATS, OLD, number, old, state, storage, tensor, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ckpt_avg.checkpoint.spec import BY_TORCH_NAME
from ckpt_avg.checkpoint.tensor_reads import stream
from ckpt_avg.errors import CheckpointFormatError, NoWeightsError
from ckpt_avg.formats import torch_legacy as torch_stream
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.pickles import unpickler
from ckpt_avg.formats.torch_legacy import matches

as_torch_loads = functools.partial(assert_as_torch_loads, form="torch stream")


def saved(folder: Path, contents: Any, **options: Any) -> Path:
    path = folder / "checkpoint.pt"
    torch.save(contents, path, _use_new_zipfile_serialization=False, **options)
    return path


class Block(nn.Module):
    """Parameters, buffers of both kinds, entries that are None, a tied tensor, modules in modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.inner = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("passing", torch.ones(2), persistent=False)
        self.register_parameter("none", None)
        self.tied = self.inner[1]
        self.nothing: nn.Module | None = None


# --- what torch writes -------------------------------------------------------------------------------------


@pytest.mark.guarantee("old-torch-files")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_checkpoint_at_each_protocol(tmp_path: Path, protocol: int) -> None:
    contents = {"model": nn.Linear(3, 2).state_dict(), "epoch": 3, "loss": 0.5, "名": [1, None]}
    path = saved(tmp_path, contents, pickle_protocol=protocol)
    as_torch_loads(path, "model")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.metadata == {"epoch": 3, "loss": 0.5}
        assert (checkpoint.spec.record.epoch, dict(checkpoint.spec.record.metrics)) == (3, {"loss": 0.5})


UNTYPED = [name for name in BY_TORCH_NAME if name.startswith("float8") or name in ("uint16", "uint32", "uint64")]


@pytest.mark.parametrize("name", UNTYPED)
def test_dtypes_without_storages_of_their_own_are_refused(tmp_path: Path, name: str) -> None:
    """They have untyped storages, which torch's own reader of this stream does not know either."""
    path = saved(tmp_path, {"w": torch.zeros(8, dtype=torch.uint8).view(getattr(torch, name))})
    with pytest.raises(AttributeError, match="dtype"):
        torch.load(path, weights_only=False)
    refusal(path)


@pytest.mark.parametrize("name", [name for name in BY_TORCH_NAME if name not in UNTYPED])
def test_each_dtype(tmp_path: Path, name: str) -> None:
    values = torch.arange(240, dtype=torch.int64).to(torch.uint8)
    tensor = values % 2 == 0 if name == "bool" else values.view(getattr(torch, name))
    as_torch_loads(saved(tmp_path, {"before": torch.ones(3), "w": tensor, "after": torch.ones(2).half()}))


def test_tied_and_strided_tensors_scalars_and_empty_ones(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    state = {
        "a": whole, "b": whole, "turned": whole.view(4, 6).t(), "every other": whole[::2], "last": whole[20:],
        "spread": torch.tensor(2.0).expand(5), "scalar": torch.tensor(3), "empty": torch.empty(0, 4),
        "none of it": whole[24:],
    }  # fmt: skip
    path = saved(tmp_path, state)
    as_torch_loads(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.tied() == [("a", "b")]


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    names=st.sampled_from(["float32", "float64", "int64", "uint8", "bfloat16", "complex64", "bool"]),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shapes(tmp_path: Path, shapes: list[list[int]], names: str) -> None:
    """Each storage follows the previous one: one wrong length would shift all that follow."""
    state = {str(index): torch.ones(shape).cumsum(0).to(getattr(torch, names)) if shape else torch.ones(())
             for index, shape in enumerate(shapes)}  # fmt: skip
    as_torch_loads(saved(tmp_path, state))


@pytest.mark.parametrize("key", [None, "model", "net"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_whole_module(tmp_path: Path, key: str | None, protocol: int) -> None:
    """As torch 0.x and 1.x saved models, with the source text of their classes."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = Block()
        path = saved(tmp_path, block if key is None else {key: block, "epoch": 1}, pickle_protocol=protocol)
    as_torch_loads(path, key)


def test_parameters_on_their_own(tmp_path: Path) -> None:
    as_torch_loads(saved(tmp_path, {"w": nn.Parameter(torch.ones(3))}))


def test_a_stream_is_known_by_its_first_bytes_alone(tmp_path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        content = saved(tmp_path, {"w": torch.ones(1)}, pickle_protocol=protocol).read_bytes()
        assert matches(content[:512])
        assert not matches(content[2:512])
    assert not matches(b"")
    assert not matches(pickle.dumps(3))
    for name in ("weights.safetensors", "weights", "weights.zip"):
        with open_checkpoint(saved(tmp_path, {"w": torch.ones(1)}).rename(tmp_path / name)) as checkpoint:
            assert checkpoint.spec.format == "torch stream"


def test_a_pickle_longer_than_a_block_of_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"layer.{number}.weight": torch.full((2,), float(number)) for number in range(300)}
    for block in (1, 7, 4096):
        monkeypatch.setattr(torch_stream, "_BLOCK", block)
        as_torch_loads(saved(tmp_path, state))


# --- damage ------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("old-torch-files")
def test_truncated_anywhere(tmp_path: Path) -> None:
    """A clean refusal at every length; none of them may be read as a smaller checkpoint."""
    path = saved(tmp_path, {"model": {"w": torch.arange(20.0), "b": torch.ones(3)}, "epoch": 2})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refusal(path)
    path.write_bytes(whole[:-1])
    assert "1 byte missing. It is truncated: copy it again." in refusal(path)


@given(position=st.integers(0, 2000), value=st.integers(0, 255))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_is_refused_or_the_tensors_stay_inside(tmp_path: Path, position: int, value: int) -> None:
    """The documented exception, or a checkpoint whose tensors are inside the file: never another exception."""
    path = saved(tmp_path, {"model": {"w": torch.arange(6.0), "b": torch.ones(3).half()}, "epoch": 2})
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        with open_checkpoint(path) as checkpoint:
            for tensor in checkpoint.spec.tensors.values():
                for _ in stream(checkpoint, tensor):
                    pass
    except CheckpointFormatError as error:
        assert str(error).isprintable()


ELEMENTS = "storage '0': expected 2 elements, got"
PLAIN = "storage '0': expected a plain storage, got one that is "

LISTED = f"expected a list of storage keys, each once. {DAMAGED}"
UNKNOWN = "storage '2': expected a plain storage, got one that is of unknown size, so those after it cannot be found."


def shown(value: object) -> bytes:
    return pickle.dumps(value, 2)


LIES: dict[str, tuple[bytes, str]] = {
    **{
        f"version {value!r}": (old(version=shown(value)), f"expected version 1001 of torch's stream, got {value!r}. ")
        for value in (1000, None, "1001", [1001])
    },
    "a big-endian machine": (
        old(machine=shown({"little_endian": False})),
        "expected little-endian tensors, got another byte order. Save it again on a little-endian machine",
    ),
    "a key too few": (old(keys=shown(["0"])), "expected the file to end after the last storage, got 12 bytes more."),
    "keys in another order": (old(keys=shown(["1", "0"])), "storage '1': expected 1 elements, got 2."),
    "a key twice": (old(keys=shown(["0", "1", "0"])), LISTED),
    "a key of no storage": (old(keys=shown(["0", "1", "2"])), UNKNOWN),
    "a number as key": (old(keys=shown(["0", 3])), LISTED),
    "a tuple of keys": (old(keys=shown(("0", "1"))), LISTED),
    "no keys": (old(keys=shown(None)), LISTED),
    "an empty list of keys": (old(keys=shown([])), "expected the file to end after the last storage, got 28"),
    **{
        f"a storage of {count} elements": (
            old(storages=struct.pack("<q", count) + OLD["storages"][8:]), f"{ELEMENTS} {count:,}. {DAMAGED}")
        for count in (0, 3, 5, -1, 2**62)
    },
    "an endless claim": (old(numel=number(10**6000)), "storage '0': expected fewer than 2⁶³ elements."),
    "a claim of 2^63": (old(numel=number(2**63)), f"storage '0': expected fewer than 2⁶³ elements. {DAMAGED}"),
    "a claim of 2^62": (old(numel=number(2**62)), f"storage '0': expected {2**62:,} elements, got 2."),
    "a claim of 5": (old(numel=whole(5)), "storage '0': expected 5 elements, got 2."),
    "a quantized storage": (
        old(named("torch", "QInt8Storage")),
        f"{PLAIN}a quantized tensor, so those after it cannot be found. Save it again: "
        "torch.save(torch.load(path, weights_only=True), new_path).",
    ),
    "a complex128 storage": (old(named("torch", "ComplexDoubleStorage")), f"{PLAIN}a complex128 tensor"),
    "an untyped storage": (old(named("torch", "UntypedStorage")), "a tensor of the pickle refers to no storage"),
    "a view as torch 0.3 saved it": (old(view=sequence(text("1"), b"K\0", b"K\2")), f"{PLAIN}a view of a storage"),
    "truncated in a storage": (old()[:-3], "storage '1': 3 bytes missing. It is truncated: copy it again."),
    "no storages": (old(storages=b""), "expected 8 bytes at byte"),
    "a byte after the last": (old() + b"\0", "got 1 byte more. The file is damaged: save or copy it again."),
    "truncated in a pickle": ((OLD["magic"] + OLD["version"])[:-1], "the pickle is truncated"),
    "hostile": (old(machine=proto(named("os", "system") + b"NR")), f"without a tuple of arguments. {DISTRUST}"),
}  # fmt: skip


def test_the_unchanged_stream_is_read(tmp_path: Path) -> None:
    """As torch reads it: only the order of the keys tells which storage is which."""
    path = write(tmp_path, old())
    assert torch.load(path)["w"].tolist() == read(path)["w"].tolist() == [1, 2]
    contents = proto(state(*((text(key), tensor(storage(FLOATS, text(key), whole(2), b"N"))) for key in "01")))
    storages = struct.pack("<q2fq2f", 2, 1, 2, 2, 3, 4)
    for keys, first in ((["0", "1"], [1, 2]), (["1", "0"], [3, 4])):
        write(tmp_path, old(contents=contents, keys=shown(keys), storages=storages))
        assert torch.load(path)["0"].tolist() == read(path)["0"].tolist() == first


@pytest.mark.guarantee("byte-order", "old-torch-files")
@pytest.mark.parametrize("case", LIES)
def test_a_stream_that_contradicts_itself_is_refused(tmp_path: Path, case: str) -> None:
    """Each storage follows the one before it: one wrong length would shift all that follow."""
    content, fact = LIES[case]
    assert fact in refusal(write(tmp_path, content))


@pytest.mark.usefixtures("in_time")
def test_a_version_with_endless_text_is_refused_in_time(tmp_path: Path) -> None:
    """A few bytes of pickle whose text has 2³⁰ parts and more: the message must not quote them."""
    refusal(write(tmp_path, old(version=shown(deep()))))


@pytest.mark.guarantee("old-torch-files")
@pytest.mark.parametrize("part", ["version", "machine", "contents", "keys"])
def test_nothing_in_any_of_its_pickles_runs(tmp_path: Path, part: str) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path, old(**{part: shown(Runs(f"touch {mark}"))}))
    with contextlib.suppress(CheckpointFormatError):
        open_checkpoint(path).close()
    assert not mark.exists()


def test_an_object_without_weights(tmp_path: Path) -> None:
    assert "contains no named tensors" in refusal(saved(tmp_path, {"epoch": 3}), NoWeightsError)


OPERATIONS = "expected at most 30,000,000 operations in the pickle, got more"


@pytest.mark.parametrize("code", [pickle.EMPTY_SET, pickle.EMPTY_DICT, pickle.EMPTY_LIST])
def test_empty_containers_count_for_many_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: bytes
) -> None:
    """Each takes a hundred times the memory of its one byte, so thirty million of them would take gigabytes."""
    monkeypatch.setattr(unpickler._Counted, "left", 30_000)

    def contents(items: bytes) -> Path:
        return write(tmp_path, old(contents=proto(b"](" + items + b"e", 4), keys=shown([]), storages=b""))

    for few in (code * 1_400, pickle.NONE * 29_000):
        assert "contains no named tensors" in refusal(contents(few), NoWeightsError)
    for many in (code * 1_600, pickle.NONE * 31_000):
        assert OPERATIONS in refusal(contents(many))


@pytest.mark.slow
@pytest.mark.guarantee("pickle-bombs")
def test_millions_of_empty_sets_hit_the_limit(tmp_path: Path) -> None:
    """At the real limit: a file of 1.6 MB is refused before it needs half a gigabyte."""
    sets = proto(b"](" + pickle.EMPTY_SET * 1_600_000 + b"e", 4)
    assert OPERATIONS in refusal(write(tmp_path, old(contents=sets)))


def test_a_stream_with_an_endless_line_is_refused_in_bounded_time(tmp_path: Path) -> None:
    """A name without an end, gathered byte by byte: the time grows with the square of its length."""
    times = []
    for length in (100_000, 800_000):
        path = write(tmp_path, OLD["magic"] + b"\x80\x02c" + b"a" * length)
        begin = time.process_time()
        refusal(path)
        times.append(time.process_time() - begin)
    assert times[1] < 20 * max(times[0], 0.05)
