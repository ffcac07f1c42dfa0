"""The stream of torch before 1.6: the tensors that torch.load gives, at any protocol, and nothing behind them runs."""

from __future__ import annotations

import io
import pickle
import struct
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ckpt_avg.checkpoint.spec import BY_TORCH_NAME
from ckpt_avg.checkpoint.tensor_reads import stream
from ckpt_avg.errors import CheckpointFormatError, NoWeightsError
from ckpt_avg.formats import torch_legacy as torch_stream
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.pickles import unpickler as pickle_specs
from ckpt_avg.formats.torch_legacy import matches

MAGIC = 0x1950A86A20F9469CFC6C


def saved(folder: Path, contents: Any, **options: Any) -> Path:
    path = folder / "checkpoint.pt"
    torch.save(contents, path, _use_new_zipfile_serialization=False, **options)
    return path


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_as_torch_loads(path: Path, key: str | None = None) -> None:
    expected = torch.load(path, weights_only=False)
    expected = expected if key is None else expected[key]
    expected = expected.state_dict() if isinstance(expected, nn.Module) else expected
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.format == "torch stream"
        assert checkpoint.spec.state_key == key
        assert list(checkpoint.spec.tensors) == list(expected)
        for name, value in expected.items():
            tensor = checkpoint.spec.tensors[name]
            assert (getattr(torch, tensor.dtype.torch_name), tensor.shape) == (value.dtype, tuple(value.shape)), name
            parts = [part.clone() for _, part in stream(checkpoint, tensor, 1000)]
            assert bits(torch.cat(parts) if parts else torch.empty(0, dtype=value.dtype)) == bits(value), name


def refusal(path: Path, kind: type[CheckpointFormatError] = CheckpointFormatError) -> str:
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 3000
    return message


class Block(nn.Module):
    """Parameters, buffers of both kinds, nothing in places, a tied tensor, modules in modules."""

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
    assert_as_torch_loads(path, "model")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.metadata == {"epoch": 3, "loss": 0.5}
        assert (checkpoint.spec.record.epoch, dict(checkpoint.spec.record.metrics)) == (3, {"loss": 0.5})


UNTYPED = [name for name in BY_TORCH_NAME if name.startswith("float8") or name in ("uint16", "uint32", "uint64")]


@pytest.mark.parametrize("name", UNTYPED)
def test_dtypes_without_storages_of_their_own_are_refused(tmp_path: Path, name: str) -> None:
    """They lie in untyped storages, which torch's own reader of this stream does not know either."""
    path = saved(tmp_path, {"w": torch.zeros(8, dtype=torch.uint8).view(getattr(torch, name))})
    with pytest.raises(AttributeError, match="dtype"):
        torch.load(path, weights_only=False)
    refusal(path)


@pytest.mark.parametrize("name", [name for name in BY_TORCH_NAME if name not in UNTYPED])
def test_each_dtype(tmp_path: Path, name: str) -> None:
    values = torch.arange(240, dtype=torch.int64).to(torch.uint8)
    tensor = values % 2 == 0 if name == "bool" else values.view(getattr(torch, name))
    assert_as_torch_loads(saved(tmp_path, {"before": torch.ones(3), "w": tensor, "behind": torch.ones(2).half()}))


def test_tied_and_strided_tensors_scalars_and_empty_ones(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    state = {
        "a": whole, "b": whole, "turned": whole.view(4, 6).t(), "every other": whole[::2], "last": whole[20:],
        "spread": torch.tensor(2.0).expand(5), "scalar": torch.tensor(3), "empty": torch.empty(0, 4),
        "none of it": whole[24:],
    }  # fmt: skip
    path = saved(tmp_path, state)
    assert_as_torch_loads(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.tied() == [("a", "b")]


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
    names=st.sampled_from(["float32", "float64", "int64", "uint8", "bfloat16", "complex64", "bool"]),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shapes(tmp_path: Path, shapes: list[list[int]], names: str) -> None:
    """Each storage lies right behind the one before it: one wrong length would shift all that follow."""
    state = {str(index): torch.ones(shape).cumsum(0).to(getattr(torch, names)) if shape else torch.ones(())
             for index, shape in enumerate(shapes)}  # fmt: skip
    assert_as_torch_loads(saved(tmp_path, state))


@pytest.mark.parametrize("key", [None, "model", "net"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_whole_module(tmp_path: Path, key: str | None, protocol: int) -> None:
    """As torch 0.x and 1.x saved models, with the source text of their classes beside the names."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = Block()
        path = saved(tmp_path, block if key is None else {key: block, "epoch": 1}, pickle_protocol=protocol)
    assert_as_torch_loads(path, key)


def test_parameters_on_their_own(tmp_path: Path) -> None:
    assert_as_torch_loads(saved(tmp_path, {"w": nn.Parameter(torch.ones(3))}))


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
        assert_as_torch_loads(saved(tmp_path, state))


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


def test_bytes_behind_the_end(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.ones(2)})
    path.write_bytes(path.read_bytes() + b"\0")
    assert "got 1 byte more" in refusal(path)


@given(position=st.integers(0, 2000), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_is_refused_or_changes_no_place(tmp_path: Path, position: int, value: int) -> None:
    """The documented exception, or a checkpoint whose tensors lie inside the file: never another exception."""
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


class Stream:
    """The five pickles and the storages behind them, each to be replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        source = io.BytesIO(path.read_bytes())
        self.parts: list[bytes] = []
        for _ in range(5):
            begin = source.tell()
            for code, _, _ in __import__("pickletools").genops(source):
                if code.name == "STOP":
                    break
            end = source.tell()
            source.seek(begin)
            self.parts.append(source.read(end - begin))
        self.storages = source.read()

    def write(self, **changed: bytes) -> Path:
        names = ("magic", "version", "machine", "contents", "keys")
        parts = [changed.get(name, part) for name, part in zip(names, self.parts, strict=True)]
        self.path.write_bytes(b"".join(parts) + changed.get("storages", self.storages))
        return self.path


@pytest.fixture
def layout(tmp_path: Path) -> Stream:
    found = Stream(saved(tmp_path, {"w": torch.arange(4.0), "b": torch.ones(2)}))
    assert pickle.loads(found.parts[0]) == MAGIC
    found.write()
    assert_as_torch_loads(found.path)
    return found


def test_another_version(layout: Stream) -> None:
    for version in (1000, None, "1001", [1001]):
        assert "expected version 1001 of torch's stream, got" in refusal(layout.write(version=pickle.dumps(version, 2)))


def test_tensors_of_a_big_endian_machine(layout: Stream) -> None:
    """Read as they lie, every weight would be another number."""
    machine = {"protocol_version": 1001, "little_endian": False, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    assert "expected little-endian tensors" in refusal(layout.write(machine=pickle.dumps(machine, 2)))
    machine["little_endian"] = True
    layout.write(machine=pickle.dumps(machine, 2))
    assert_as_torch_loads(layout.path)


NO_LIST, UNKNOWN = "expected a list of storage keys, each once", "got one that is of unknown size"


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda keys: keys[:1], "got 16 bytes more"),
        (lambda keys: keys[::-1], "expected 2 elements, got 4"),
        (lambda keys: [*keys, keys[0]], NO_LIST),
        (lambda keys: [*keys, "another"], UNKNOWN),
        (lambda keys: [*keys[:1], 3], NO_LIST),
        (tuple, NO_LIST),
        (lambda keys: None, NO_LIST),
        (lambda keys: [], "got 40 bytes more"),
    ],
)
def test_keys_that_do_not_fit_are_refused(layout: Stream, change: Callable[[list[str]], object], fact: str) -> None:
    """Their order alone says which bytes are whose."""
    keys = change(pickle.loads(layout.parts[4]))
    assert fact in refusal(layout.write(keys=pickle.dumps(keys, 2)))


def test_an_order_of_keys_that_fits_decides_whose_bytes_are_whose(tmp_path: Path) -> None:
    """Storages of one size: torch reads them by the order of the keys, and so must this."""
    layout = Stream(saved(tmp_path, {"a": torch.zeros(2), "b": torch.ones(2)}))
    keys = pickle.loads(layout.parts[4])
    layout.write(keys=pickle.dumps(keys[::-1], 2))
    assert_as_torch_loads(layout.path)


@pytest.mark.parametrize("count", [0, 3, 5, -1, 2**62])
def test_a_storage_of_another_length(layout: Stream, count: int) -> None:
    message = refusal(layout.write(storages=struct.pack("<q", count) + layout.storages[8:]))
    assert "elements, got" in message


@pytest.mark.parametrize("kind", ["quantized", "complex128"])
def test_storages_without_plain_elements_are_refused_by_kind(tmp_path: Path, kind: str) -> None:
    """What lies behind them cannot be found, so the whole file is refused, and says why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = (
            torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8) if kind == "quantized" else torch.ones(3) + 0j
        )
        odd = odd if kind == "quantized" else odd.to(torch.complex128)
        path = saved(tmp_path, {"w": torch.ones(2), "odd": odd})
    message = refusal(path)
    assert kind in message
    assert "torch.save(torch.load(path, weights_only=True), new_path)" in message


@pytest.mark.usefixtures("in_time")
def test_a_version_that_would_take_for_ever_to_show(layout: Stream) -> None:
    """A few bytes of pickle whose text has 2³⁰ parts and more: the message must not quote them."""
    value: object = ()
    for _ in range(40):
        value = (value, value)
    refusal(layout.write(version=pickle.dumps(value, 2)))


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (self.command,)


@pytest.mark.guarantee("old-torch-files")
@pytest.mark.parametrize("part", ["version", "machine", "contents", "keys"])
def test_nothing_in_any_of_its_pickles_runs(tmp_path: Path, layout: Stream, part: str) -> None:
    mark = tmp_path / "ran"
    layout.write(**{part: pickle.dumps(Runs(f"touch {mark}"), 2)})
    try:
        open_checkpoint(layout.path).close()
    except CheckpointFormatError as error:
        assert str(error).isprintable()
    assert not mark.exists()


def test_an_object_without_weights(tmp_path: Path) -> None:
    assert "holds no named tensors" in refusal(saved(tmp_path, {"epoch": 3}), NoWeightsError)


class Storage:
    """Stands for a storage, of which only what refers to it is saved."""


class Claim:
    """A tensor of a storage with as many elements as its author says."""

    def __reduce__(self) -> tuple[object, ...]:
        return torch._utils._rebuild_tensor_v2, (Storage(), 0, (4,), (1,), False, OrderedDict())


def claiming(numel: int, kind: object = torch.FloatStorage, view: object = None) -> bytes:
    """The pickle of one tensor whose storage has a number of elements, a type, and is perhaps a view of another."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", kind, "0", "cpu", numel, view) if isinstance(value, Storage) else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"w": Claim()})
    return stream.getvalue()


@pytest.mark.parametrize("numel", [10**6000, 2**63, 2**62, 5], ids=["endless", "2**63", "2**62", "5"])
def test_a_storage_that_claims_an_endless_size(layout: Stream, numel: int) -> None:
    """Beyond 4,300 digits Python refuses even to print it, with an error of its own."""
    whole = struct.pack("<q4f", 4, 0, 1, 2, 3)
    keys = pickle.dumps(["0"], 2)
    layout.write(contents=claiming(4), keys=keys, storages=whole)
    with open_checkpoint(layout.path) as checkpoint:
        assert checkpoint.spec.tensors["w"].shape == (4,)
    message = refusal(layout.write(contents=claiming(numel), keys=keys, storages=whole))
    assert "storage '0': expected" in message


@pytest.mark.parametrize(
    ("claim", "fact"),
    [
        ({"view": ("1", 0, 2)}, "got one that is a view of a storage, as torch 0.3 saved it"),
        ({"kind": torch.UntypedStorage}, "a tensor of the pickle refers to no storage"),
    ],
    ids=["view", "untyped"],
)
def test_storages_of_other_kinds_are_refused(layout: Stream, claim: dict[str, Any], fact: str) -> None:
    message = refusal(layout.write(contents=claiming(4, **claim), keys=pickle.dumps(["0"], 2)))
    assert fact in message


@pytest.mark.parametrize("code", [pickle.EMPTY_SET, pickle.EMPTY_DICT, pickle.EMPTY_LIST])
def test_empty_containers_count_for_many_operations(
    layout: Stream, monkeypatch: pytest.MonkeyPatch, code: bytes
) -> None:
    """Each takes a hundred times the memory of its one byte, so thirty million of them would take gigabytes."""
    monkeypatch.setattr(pickle_specs._Counted, "left", 300_000)
    begin, end = b"\x80\x04](", b"e."
    for few in (code * 14_000, pickle.NONE * 290_000):
        assert "holds no named tensors" in refusal(
            layout.write(contents=begin + few + end, keys=pickle.dumps([]), storages=b""), NoWeightsError
        )
    for many in (code * 16_000, pickle.NONE * 310_000):
        message = refusal(layout.write(contents=begin + many + end))
        assert "expected at most 30,000,000 operations in the pickle, got more" in message


@pytest.mark.slow
@pytest.mark.guarantee("pickle-bombs")
def test_millions_of_empty_sets_hit_the_limit(layout: Stream) -> None:
    """At the real limit: a file of 1.6 MB is refused before it has taken half a gigabyte."""
    message = refusal(layout.write(contents=b"\x80\x04](" + pickle.EMPTY_SET * 1_600_000 + b"e."))
    assert "expected at most 30,000,000 operations in the pickle, got more" in message


def test_a_stream_with_an_endless_line_is_refused_in_bounded_time(tmp_path: Path) -> None:
    """A name without an end, gathered byte by byte: the time grows with the square of its length."""
    head = saved(tmp_path, {}).read_bytes()[:20]
    path = tmp_path / "old.pt"
    times = []
    for length in (100_000, 800_000):
        path.write_bytes(head + b"\x80\x02c" + b"a" * length)
        begin = time.process_time()
        refusal(path)
        times.append(time.process_time() - begin)
    assert times[1] < 20 * max(times[0], 0.05)
