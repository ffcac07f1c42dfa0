"""The torch.save reader: gives the tensors that torch.load gives, and refuses archives that lie, saying how."""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import read_ranges, stream
from ckpt_avg.errors import CheckpointFormatError, NoWeightsError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats import torch_zip
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.limits import LIMITS

# --- what torch.save writes --------------------------------------------------------------------------------


def saved(folder: Path, contents: Any, **options: Any) -> Path:
    path = folder / "checkpoint.pt"
    torch.save(contents, path, **options)
    return path


def elements(checkpoint: Checkpoint, name: str, count: int) -> torch.Tensor:
    """A tensor's elements, streamed ``count`` at a time."""
    tensor = checkpoint.spec.tensors[name]
    parts = [values.clone() for _, values in stream(checkpoint, tensor, count)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=getattr(torch, tensor.dtype.torch_name))


def bits(tensor: torch.Tensor) -> bytes:
    """All bytes of a tensor, in row-major order."""
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_as_torch_loads(path: Path, key: str | None = None, *, given: str | None = None) -> Checkpoint:
    """Every tensor has the dtype, shape and bits that torch.load gives; returns the checkpoint, closed."""
    expected = torch.load(path, weights_only=False)
    for part in key.split(".") if key else ():
        expected = expected[part]
    expected = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    with open_checkpoint(path, state_key=given) as checkpoint:
        assert checkpoint.spec.format == "torch zip"
        assert checkpoint.spec.state_key == key
        assert list(checkpoint.spec.tensors) == list(expected)
        for name, value in expected.items():
            spec = checkpoint.spec.tensors[name]
            assert getattr(torch, spec.dtype.torch_name) == value.dtype
            assert spec.shape == tuple(value.shape)
            for count in (3, 1024):
                assert bits(elements(checkpoint, name, count)) == bits(value), name
        return checkpoint


def refusal(path: Path, kind: type[CheckpointFormatError] = CheckpointFormatError, **options: Any) -> str:
    """Opens a file that must be refused; returns the message, once its class, code and path are as promised."""
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(path, **options)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert caught.value.exit_code == 3
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 4000
    return message


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))


def test_a_plain_state_dict(tmp_path: Path) -> None:
    checkpoint = assert_as_torch_loads(saved(tmp_path, model().state_dict()))
    assert checkpoint.spec.notes == ()
    assert checkpoint.spec.metadata == {}


def test_the_real_run(run_folder: Path) -> None:
    for name in ("epoch_9.pt", "epoch_20.pt"):
        assert_as_torch_loads(run_folder / name, "model")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_each_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    contents = {"state_dict": {**model().state_dict(), "日本語": torch.arange(3)}, "epoch": 3, "big": 2**70}
    checkpoint = assert_as_torch_loads(saved(tmp_path, contents, pickle_protocol=protocol), "state_dict")
    assert checkpoint.spec.metadata == {"epoch": 3, "big": 2**70}


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_the_common_wrapper_keys(tmp_path: Path, key: str) -> None:
    """An optimizer beside the weights, which holds tensors of its own, is not taken for them."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(4, 2, 3, 3)).sum().backward()
    optimizer.step()
    contents = {"epoch": 7, key: net.state_dict(), "optimizer": optimizer.state_dict(), "best": 0.5, "done": False}
    checkpoint = assert_as_torch_loads(saved(tmp_path, contents), key)
    assert checkpoint.spec.metadata == {"epoch": 7, "best": 0.5, "done": False}


def test_a_nested_state_key_with_dots(tmp_path: Path) -> None:
    """Dots part the levels, and a key that itself holds dots is found too."""
    path = saved(tmp_path, {"model": {"ema": {"w": torch.ones(2)}, "raw": {"w": torch.zeros(2)}}, "epoch": 1})
    assert_as_torch_loads(path, "model.ema", given="model.ema")
    assert_as_torch_loads(path, "model.raw", given="model.raw")
    path = saved(tmp_path, {"a.b": {"c": {"w": torch.ones(2)}}, "a": {"w": torch.zeros(2)}})
    with open_checkpoint(path, state_key="a.b.c") as checkpoint:
        assert checkpoint.spec.state_key == "a.b.c"
        assert bits(elements(checkpoint, "w", 9)) == bits(torch.ones(2))


def test_the_only_mapping_of_names_to_tensors_is_taken_and_said(tmp_path: Path) -> None:
    path = saved(tmp_path, {"trainer": {"net": {"w": torch.ones(2)}, "lr": 0.1}, "step": 5})
    checkpoint = assert_as_torch_loads(path, "trainer.net")
    assert checkpoint.spec.notes == ("the weights are under 'trainer.net', the only dict of named tensors",)


def test_arbitrary_objects_beside_the_weights(tmp_path: Path) -> None:
    contents = {
        "state_dict": {"w": torch.ones(3)},
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(x=[1])),
        "loss": np.float64(0.5),
        "curve": np.arange(5.0),
        "module": model(),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "path": Path("x"),
        "set": {1, "a", (2, 3)},
        "frozen": frozenset({b"x"}),
        "bytes": bytearray(b"abc"),
        "complex": 1 + 2j,
        "slice": slice(1, 2),
        "range": range(3),
        "type": OrderedDict,
        "counter": OrderedDict(a=1),
    }
    for protocol in (2, 4, 5):
        checkpoint = assert_as_torch_loads(saved(tmp_path, contents, pickle_protocol=protocol), "state_dict")
        assert checkpoint.spec.metadata == {"loss": 0.5}, "a numpy scalar is a number like any other"
        assert checkpoint.spec.record.metrics == {"loss": 0.5}
        assert checkpoint.spec.keys == tuple(contents)


@pytest.mark.parametrize(
    "key",
    [
        3,
        1.5,
        None,
        b"x",
        (1, "a"),
        (1, (2, 3)),
        frozenset({1}),
        torch.float32,
        (torch.float32, "cpu"),
        OrderedDict,
        torch.device("cpu"),
        nn.Linear,
        torch.Size([2]),
    ],
    ids=str,
)
def test_any_honest_key_beside_the_weights(tmp_path: Path, key: Any) -> None:
    """Optimizers and trainers key their state by more than strings."""
    for protocol in (2, 4):
        assert_as_torch_loads(
            saved(tmp_path, {"model": {"w": torch.ones(1)}, "x": {key: 1}}, pickle_protocol=protocol), "model"
        )


def test_entries_without_a_tensor_are_left_out_and_said(tmp_path: Path) -> None:
    checkpoint = assert_as_torch_loads(saved(tmp_path, {"w": torch.ones(1), "extra_state": None, "n": 3}))
    assert checkpoint.spec.notes == ("2 entries without a tensor left out: 'extra_state', 'n'",)


@pytest.mark.guarantee("tied-tensors")
def test_tied_tensors_keep_both_names(tmp_path: Path) -> None:
    """Two names of one tensor are both read and reported as tied; a mere view of it is not."""
    weight = torch.arange(6.0).view(2, 3)
    contents = {"embedding": weight, "head": weight, "row": weight[1], "other": weight.clone(), "none": weight[:0]}
    checkpoint = assert_as_torch_loads(saved(tmp_path, contents))
    assert checkpoint.spec.tied() == [("embedding", "head")]
    tensors = checkpoint.spec.tensors
    assert tensors["embedding"].storage == tensors["row"].storage != tensors["other"].storage


@pytest.mark.guarantee("expanded-views")
def test_views_and_strides(tmp_path: Path) -> None:
    base = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5)
    contents = {
        "whole": base,
        "row": base[1, 2, 3],
        "column": base[:, :, :, 2],
        "steps": base[::2, 1:, ::3, 1::2],
        "transposed": base.transpose(0, 3),
        "permuted": base.permute(3, 1, 0, 2),
        "channels last": base.contiguous(memory_format=torch.channels_last),
        "expanded": torch.arange(3.0).view(3, 1).expand(3, 4),
        "scalar expanded": torch.tensor(2.0).expand(2, 3),
        "overlapping": torch.arange(6.0).as_strided((4, 3), (1, 1)),
        "diagonal": torch.eye(4).diagonal(),
        "bytes": torch.arange(64, dtype=torch.uint8)[3:].view(61),
        "transposed bf16": torch.arange(12.0).view(3, 4).bfloat16().t(),
    }
    checkpoint = assert_as_torch_loads(saved(tmp_path, contents))
    for name, value in contents.items():
        spec = checkpoint.spec.tensors[name]
        assert spec.stride == value.stride()
        assert spec.is_contiguous == value.is_contiguous()


def test_a_strided_tensor_larger_than_a_window(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.arange(3_000_000, dtype=torch.int32).view(3, 1000, 1000).permute(2, 0, 1)})
    with open_checkpoint(path) as checkpoint:
        found = elements(checkpoint, "w", 700_001)
    assert bits(found) == bits(torch.load(path)["w"])


DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "complex64", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
]


@pytest.mark.parametrize("protocol", [2, 5])
def test_each_dtype(tmp_path: Path, protocol: int) -> None:
    """Contiguous, strided, offset, 0-d and zero-size, in every dtype that can be averaged or copied."""
    contents = {}
    for name in DTYPES:
        dtype = getattr(torch, name)
        raw = torch.arange(12 * dtype.itemsize, dtype=torch.uint8)
        values = ((raw % 3) > 0) if name == "bool" else raw.view(dtype)
        contents |= {
            name: values,
            f"{name} transposed": values.view(3, 4).t(),
            f"{name} offset": values[5:],
            f"{name} scalar": values[7],
            f"{name} none": values[:0],
        }
    assert_as_torch_loads(saved(tmp_path, contents, pickle_protocol=protocol))


@pytest.mark.guarantee("empty-tensors")
def test_scalar_and_zero_size(tmp_path: Path) -> None:
    contents = {"scalar": torch.tensor(3.5), "none": torch.empty(0), "thin": torch.empty(4, 0, 2), "n": torch.tensor(2)}
    checkpoint = assert_as_torch_loads(saved(tmp_path, contents))
    assert checkpoint.spec.tensors["scalar"].shape == ()
    assert checkpoint.spec.tied() == []


def test_parameters_buffers_and_attributes(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2))
    tagged = nn.Parameter(torch.full((2,), 2.0))
    tagged.tag = "x"
    plain = torch.full((2,), 3.0)
    plain.note = {"a": 1}
    grown = torch.full((2,), 4.0, requires_grad=True)
    buffer = nn.Buffer(torch.full((2,), 5.0))
    contents = {"parameter": parameter, "tagged": tagged, "plain": plain, "grown": grown, "buffer": buffer}
    for protocol in (2, 4):
        assert_as_torch_loads(saved(tmp_path, contents, pickle_protocol=protocol))


def test_names_are_data(tmp_path: Path) -> None:
    names = ["", " ", "é", "日本語", "\U0001f9e0", "../x", "\x1b[31m", "a\nb", '"']
    for protocol in (2, 4):
        contents = {name: torch.ones(1) for name in names}
        assert_as_torch_loads(saved(tmp_path, contents, pickle_protocol=protocol))


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "weights")
    assert_as_torch_loads(tmp_path / "weights")
    path = (tmp_path / "weights").rename(tmp_path / "weights.safetensors")
    assert list(open_checkpoint(path).spec.tensors) == ["w"]


# --- kinds that are refused --------------------------------------------------------------------------------


class Tagged(torch.Tensor):
    """A tensor subclass."""


def unusual(kind: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        makers = {
            "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "sparse": lambda: torch.eye(3).to_sparse(),
            "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
            "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "complex128": lambda: torch.ones(3, dtype=torch.complex128),
            "complex32": lambda: torch.ones(3, dtype=torch.complex32),
            "float4": lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
            "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
            "subclass": lambda: torch.ones(3).as_subclass(Tagged),
            "meta": lambda: torch.ones(3, device="meta"),
            "uninitialised": nn.UninitializedParameter,
        }
        return makers[kind]()


@pytest.mark.guarantee("odd-tensors")
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("quantized", "a quantized tensor"),
        ("sparse", "a sparse tensor"),
        ("sparse csr", "a sparse tensor"),
        ("nested", "a nested tensor"),
        ("complex128", "a complex128 tensor"),
        ("complex32", "complex32"),
        ("float4", "float4_e2m1fn_x2"),
        ("conjugated", "conjugated"),
        ("subclass", "a tensor subclass (Tagged)"),
        ("meta", "meta device"),
        ("uninitialised", "an uninitialised parameter"),
    ],
)
def test_tensors_without_plain_elements_are_refused_by_kind_and_name(tmp_path: Path, kind: str, named: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved(tmp_path, {"state_dict": {"fine": torch.ones(1), "layer.w": unusual(kind)}})
    message = refusal(path)
    assert "'layer.w'" in message
    assert "expected a plain tensor" in message
    assert named.replace("(Tagged)", f"({Tagged.__module__}.Tagged)") in message


@pytest.mark.parametrize(
    "kind", ["quantized", "sparse", "sparse csr", "nested", "complex128", "subclass", "meta", "uninitialised"]
)
def test_unusual_tensors_beside_the_state_dict_do_no_harm(tmp_path: Path, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved(tmp_path, {"state_dict": {"w": torch.ones(2)}, "cache": [unusual(kind)]})
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["w"]


@pytest.mark.parametrize(
    ("contents", "facts"),
    [
        (argparse.Namespace(w=torch.ones(1)), ("class 'argparse.Namespace'", "save model.state_dict() instead")),
        ({"model": argparse.Namespace(w=torch.ones(1))}, ("'model'", "class 'argparse.Namespace'", "state_dict()")),
        (torch.ones(2), ("expected a state dict", "a single tensor without a name")),
        ([torch.ones(2)], ("expected a state dict", "type list")),
        ({}, ("expected a state dict", "an empty dict")),
        ({"epoch": 3, "lr": 0.1}, ("expected a state dict", "'epoch', 'lr'", "no named tensors")),
        ({0: torch.ones(1)}, ("expected a state dict", "the keys 0")),
    ],
    ids=["namespace", "namespace in a dict", "tensor", "list", "empty", "no tensors", "number"],
)
def test_files_without_a_state_dict_are_refused(tmp_path: Path, contents: Any, facts: tuple[str, ...]) -> None:
    """By a class of their own, so that a run folder can leave them out where other files hold weights."""
    message = refusal(saved(tmp_path, contents), NoWeightsError)
    for fact in facts:
        assert fact in message


@pytest.mark.guarantee("tensor-keys")
@pytest.mark.parametrize("key", [0, b"w"])
def test_tensors_under_keys_that_are_no_text_are_refused(tmp_path: Path, key: object) -> None:
    """There are weights, so that leaving the file out of a run would be wrong."""
    assert f"expected tensor names, got the key {key!r}" in refusal(
        saved(tmp_path, {"v": torch.ones(1), key: torch.ones(1)})
    )


def test_tensors_inside_a_list_are_refused(tmp_path: Path) -> None:
    message = refusal(saved(tmp_path, {"w": torch.ones(1), "v": [torch.ones(1)]}))
    assert "the file: 'v': expected a plain tensor, got tensors inside a list." in message


@pytest.mark.guarantee("tensor-keys")
def test_of_one_name_twice_in_a_dict_the_last_counts(tmp_path: Path) -> None:
    """As Python itself reads it, and torch.load."""
    raw = pickled({"v": view(shape=(1,), stride=(1,))["w"], "w": view(offset=1, shape=(1,), stride=(1,))["w"]})
    twice = raw.replace(b"\x01\0\0\0v", b"\x01\0\0\0w")
    assert twice != raw
    archive(tmp_path / "a.pt", {"a/data.pkl": twice, "a/version": b"3\n", "a/data/0": DATA})
    assert torch.load(tmp_path / "a.pt")["w"].tolist() == [1]
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert elements(checkpoint, "w", 4).tolist() == [1]


@pytest.mark.guarantee("pickled-modules")
@pytest.mark.parametrize("key", [None, "model", "net"])
def test_a_whole_module_opens_as_its_state_dict(tmp_path: Path, key: str | None) -> None:
    """Names, order and bits are those that ``state_dict()`` gives, and nothing of the module is imported or run."""
    net = model()
    net.register_buffer("passing", torch.ones(1), persistent=False)
    net[0].register_parameter("none", None)
    path = saved(tmp_path, net if key is None else {"epoch": 3, key: net})
    expected = net.state_dict()
    assert "passing" not in expected
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.format == "torch zip"
        assert checkpoint.spec.state_key == key
        assert list(checkpoint.spec.tensors) == list(expected)
        for name, value in expected.items():
            assert bits(elements(checkpoint, name, 1024)) == bits(value), name


def test_several_state_dicts_are_listed_and_none_is_taken(tmp_path: Path) -> None:
    path = saved(tmp_path, {"generator": {"w": torch.ones(1)}, "nets": {"critic": {"w": torch.ones(1)}}})
    message = refusal(path)
    assert "expected one state dict, got several: 'generator', 'nets.critic'" in message
    assert "--state-key generator" in message
    assert_as_torch_loads(path, "nets.critic", given="nets.critic")


def test_a_wrong_state_key_is_answered_with_the_keys(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": {"w": torch.ones(1)}, "epoch": 2})
    message = refusal(path, state_key="ema")
    assert "expected the key 'ema'" in message
    assert "'model', 'epoch'" in message
    message = refusal(path, state_key="epoch")
    assert "key 'epoch': expected a state dict, got" in message
    assert message.endswith(" int.")


@pytest.mark.parametrize("name", ["a\0b", "__metadata__", "x" * (LIMITS.name + 1), "\ud800"])
def test_names_that_safetensors_cannot_hold_are_refused(tmp_path: Path, name: str) -> None:
    message = refusal(saved(tmp_path, {name: torch.ones(1)}))
    assert f"tensor {name!r}"[:40].rstrip("'") in message
    assert "Rename the tensor." in message


@pytest.mark.guarantee("torchscript")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    message = refusal(path, NoWeightsError)
    assert "expected weights, got a TorchScript program" in message
    assert "torch.save(torch.jit.load(path).state_dict(), new_path)" in message


def test_the_old_stream_opens_by_its_first_bytes(tmp_path: Path) -> None:
    """What ``torch.save`` wrote before 1.6; test_torch_stream.py looks at it closely."""
    state = model().state_dict()
    with open_checkpoint(saved(tmp_path, state, _use_new_zipfile_serialization=False)) as checkpoint:
        assert checkpoint.spec.format == "torch stream"
        assert list(checkpoint.spec.tensors) == list(state)
        for name, value in state.items():
            assert bits(elements(checkpoint, name, 3)) == bits(value), name


def test_a_tar_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "old.pth.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("tensors"), io.BytesIO())
    assert "a tar archive" in refusal(path)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", ("a Git LFS pointer", "git lfs pull")),
        (b"<!DOCTYPE html><html>404</html>", ("an HTML or XML page", "Download the file again")),
        (b"\n  <?xml version='1.0'?><Error/>", ("an HTML or XML page",)),
        (b"", ("an empty file", "Copy or save it again")),
        (b"PK", ("2 bytes",)),
        (b"not a checkpoint at all", ("something else", "b'not a ch'")),
        (b"\x1f\x8b\x08\x00" + b"\0" * 20, ("a gzip file", "Unpack it first")),
        (b"\x28\xb5\x2f\xfd" + b"\0" * 20, ("a Zstandard file", "Unpack it first")),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 20, ("an HDF5 file", "torch.save or safetensors")),
        (b"GGUF\3\0\0\0" + b"\0" * 20, ("a GGUF file", "quantized")),
        (b"\x93NUMPY\1\0" + b"\0" * 20, ("a numpy file", "a dict of named tensors")),
    ],
    ids=["lfs", "html", "xml", "empty", "two bytes", "text", "gzip", "zstd", "hdf5", "gguf", "numpy"],
)
def test_other_files_are_refused_by_what_they_are(tmp_path: Path, content: bytes, facts: tuple[str, ...]) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    message = refusal(path)
    assert "expected a safetensors file or one written by torch.save, got" in message
    for fact in facts:
        assert fact in message


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    archive(path, {"docs/readme.txt": b"hello", "a.csv": b"1"})
    message = refusal(path)
    assert "expected a zip written by torch.save, got one with 'docs/readme.txt', 'a.csv'" in message


# --- archives and pickles that lie -------------------------------------------------------------------------


def archive(path: Path, members: dict[str, bytes], **compression: int) -> None:
    """Writes a zip as the standard library does, members in order."""
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(zipfile.ZipInfo(name), content, compression.get(name.rsplit("/", 1)[-1].split(".")[0]))


@dataclass(frozen=True)
class Storage:
    """A record, as the pickle claims it to be."""

    key: Any = "0"
    numel: Any = 6
    kind: Any = torch.FloatStorage
    tag: Any = "storage"


class Rebuilt:
    """A tensor, as the pickle claims it to be."""

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any) -> None:
        self.arguments = (storage, offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return (value.tag, value.kind, value.key, "cpu", value.numel) if isinstance(value, Storage) else None


def pickled(contents: Any, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol).dump(contents)
    return stream.getvalue()


DATA = np.arange(6, dtype="<f4").tobytes()


def claim(path: Path, contents: Any, record: bytes = DATA, **members: bytes) -> Path:
    """Writes an archive whose pickle holds ``contents`` and whose only record is ``record``."""
    extra = {f"a/{name}": content for name, content in members.items()}
    archive(path, {"a/data.pkl": pickled(contents), **extra, "a/data/0": record})
    return path


def view(offset: Any = 0, shape: Any = (2, 3), stride: Any = (3, 1), **storage: Any) -> dict[str, Rebuilt]:
    return {"w": Rebuilt(Storage(**storage), offset, shape, stride)}


def test_an_archive_made_by_hand_is_read_before_it_is_spoilt(tmp_path: Path) -> None:
    """The lies below differ from this archive in one thing each."""
    path = claim(tmp_path / "a.pt", view(), byteorder=b"little")
    with open_checkpoint(path) as checkpoint:
        assert bits(elements(checkpoint, "w", 4)) == DATA


@pytest.mark.guarantee("storage-bounds")
@pytest.mark.parametrize(
    ("contents", "facts"),
    [
        (view(offset=1), ("tensor 'w'", "inside a record of 24 bytes", "ends at byte 28")),
        (view(shape=(2, 4)), ("tensor 'w'", "inside a record of 24 bytes", "ends at byte 28")),
        (view(stride=(4, 1)), ("tensor 'w'", "inside a record of 24 bytes", "ends at byte 28")),
        (view(offset=5, stride=(-3, -1)), ("tensor 'w'", "strides", "(-3, -1)")),
        (view(offset=-1), ("tensor 'w'", "offset -1")),
        (view(shape=(-2, 3)), ("tensor 'w'", "(-2, 3)")),
        (view(stride=(1,)), ("tensor 'w'", "shape (2, 3)", "stride (1,)")),
        (view(shape=(1,) * 65, stride=(1,) * 65), ("expected a shape or stride of at most 64 integers, got 65",)),
        (view(shape=(2**62, 2**62), stride=(0, 0)), ("tensor 'w'", "overflows 63 bits", "Save it again")),
        (view(shape=(10**6, 10**6), stride=(0, 0)), ("tensor 'w'", "an expanded view of 4,000,000,000,000 bytes")),
        (view(shape=(2**63, 1)), ("tensor 'w'", str(2**63))),
        (view(shape=(10**5000, 1)), ("tensor 'w'",)),
        (view(stride=(3, 10**5000)), ("tensor 'w'",)),
        (view(offset=10**5000), ("tensor 'w'",)),
        (view(numel=10**5000), ("tensor 'w'",)),
        (view(shape=(0, 2**62, 2**62), stride=(1, 1, 1)), ("tensor 'w'",)),
        (view(numel=5), ("tensor 'w'", "expected a record of 20 bytes", "got 24")),
        (view(numel=7), ("tensor 'w'", "expected a record of 28 bytes", "got 24")),
        (view(kind=torch.DoubleStorage), ("tensor 'w'", "expected a record of 48 bytes", "got 24")),
        (view(key="1"), ("tensor 'w'", "expected the record '1'", "got none")),
        (view(key="../data.pkl"), ("tensor 'w'", "expected the record '../data.pkl'", "got none")),
        (view(key=0), ("a storage of the pickle has no known type, name or size",)),
        (view(numel=-6), ("a storage of the pickle has no known type, name or size",)),
        (view(numel=True), ("storage",)),
        (view(numel=6.0), ("storage",)),
        (view(kind=OrderedDict), ("storage",)),
        (view(kind="FloatStorage"), ("storage",)),
        (view(tag="module"), ("storage",)),
        (view(shape="23"), ("expected a tuple of integers as shape or stride, got 'str'",)),
        (view(shape=(2.0, 3)), ("shape or stride",)),
        (view(shape=(True, 3)), ("shape or stride",)),
        (view(shape=None), ("shape or stride",)),
        (view(offset=None), ("storage",)),
        ({"w": Rebuilt(None, 0, (1,), (1,))}, ("a tensor of the pickle refers to no storage", "Don't trust this file")),
    ],
)
def test_tensors_that_lie_about_their_storage(tmp_path: Path, contents: Any, facts: tuple[str, ...]) -> None:
    """No view reaches outside its record, none expands without bound, and no number is too long to be told."""
    message = refusal(claim(tmp_path / "a.pt", contents))
    for fact in facts:
        assert fact in message


def test_what_stands_beside_the_weights_cannot_break_the_message(tmp_path: Path) -> None:
    """Numbers too long to print, in keys that only get listed: the documented exception, or none."""
    huge = 10**5000
    for contents in ({**view(), huge: 1}, {"model": view(), huge: 1}):
        with contextlib.suppress(CheckpointFormatError), open_checkpoint(claim(tmp_path / "a.pt", contents)) as opened:
            assert list(opened.spec.tensors) == ["w"]
    refusal(claim(tmp_path / "a.pt", {huge: 1}), NoWeightsError)


def test_names_from_the_pickle_are_shown_escaped(tmp_path: Path) -> None:
    """Control characters in keys and class names never reach the terminal."""
    red = "\x1b[31m\n"
    refusal(claim(tmp_path / "a.pt", {red: view(), "other": view()}))
    refusal(claim(tmp_path / "a.pt", {"model": {"w": view()["w"], red: view()}}))
    hostile = pickled({"state_dict": {"w": torch.ones(1).as_subclass(Tagged)}})
    hostile = hostile.replace(f"{Tagged.__module__}\nTagged".encode(), b"\x1b[31m\nTa\x1bgged")
    archive(tmp_path / "b.pt", {"a/data.pkl": hostile})
    refusal(tmp_path / "b.pt")


@pytest.mark.guarantee("byte-order")
@pytest.mark.parametrize(
    ("order", "accepted"), [(b"little", True), (b"big", False), (b"", False), (b"littlest", False), (b"x" * 99, False)]
)
def test_byte_order(tmp_path: Path, order: bytes, accepted: bool) -> None:
    path = claim(tmp_path / "a.pt", view(), byteorder=order)
    if accepted:
        open_checkpoint(path).close()
    else:
        message = refusal(path)
        assert "expected little-endian tensors, got another byte order" in message
        assert "Save it again" in message


@pytest.mark.guarantee("byte-order")
def test_a_torch_file_of_big_endian_tensors(tmp_path: Path) -> None:
    """The record as torch itself writes it, not as this file imagines it."""
    before = torch.serialization.get_default_load_endianness()
    path = saved(tmp_path, {"w": torch.ones(2)})
    with zipfile.ZipFile(path) as zipped:
        members = {info.filename: zipped.read(info) for info in zipped.infolist()}
    assert members["checkpoint/byteorder"] == b"little"
    assert before is None
    members["checkpoint/byteorder"] = b"big"
    archive(path, members)
    assert "byte order" in refusal(path)


def test_two_pickles_in_one_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    archive(path, {"a/data.pkl": pickled(view()), "b/data.pkl": pickled(view()), "a/data/0": DATA, "b/data/0": DATA})
    assert "expected a zip written by torch.save" in refusal(path)


def test_a_pickle_over_the_limit(tmp_path: Path) -> None:
    """Refused before one byte of it is read."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2), "text": "x" * LIMITS.part_pickle}, path)
    with InputFile(path) as file:
        torch_zip.read_contents(file)
        with pytest.raises(CheckpointFormatError) as caught:
            torch_zip.read_contents(file, is_part=True)
    message = str(caught.value)
    assert f"expected a pickle of at most {LIMITS.part_pickle:,} bytes" in message
    assert "Save only the state dict." in message


class Layout:
    """Where the parts of an archive lie, so that single fields can be changed."""

    FIELDS: ClassVar[dict[str, dict[str, tuple[int, int]]]] = {  # (offset, bytes)
        "local": {
            **{"flags": (6, 2), "method": (8, 2), "crc": (14, 4), "packed": (18, 4), "size": (22, 4), "name": (30, 1)}
        },
        "central": {
            **{"flags": (8, 2), "method": (10, 2), "crc": (16, 4), "packed": (20, 4), "size": (24, 4)},
            **{"name length": (28, 2), "extra length": (30, 2), "disk": (34, 2), "header": (42, 4), "name": (46, 1)},
        },
        "end": {
            **{"disk": (4, 2), "start disk": (6, 2), "here": (8, 2), "count": (10, 2)},
            **{"length": (12, 4), "start": (16, 4)},
        },
    }

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = bytearray(path.read_bytes())
        self.end = len(self.content) - 22
        assert self.content[self.end :][:4] == b"PK\5\6"
        count, length, position = struct.unpack_from("<HII", self.content, self.end + 10)
        self.start, self.length = position, length
        self.central: dict[str, int] = {}
        self.local: dict[str, int] = {}
        for _ in range(count):
            sizes = struct.unpack_from("<HHH", self.content, position + 28)
            name = self.content[position + 46 : position + 46 + sizes[0]].decode()
            self.central[name] = position
            self.local[name] = struct.unpack_from("<I", self.content, position + 42)[0]
            position += 46 + sum(sizes)

    def set(self, part: str, field: str, value: int, member: str = "a/data/0") -> None:
        base = {"end": self.end, "central": self.central[member], "local": self.local[member]}[part]
        offset, width = self.FIELDS[part][field]
        self.content[base + offset : base + offset + width] = value.to_bytes(width, "little")

    def write(self) -> Path:
        self.path.write_bytes(self.content)
        return self.path


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(claim(tmp_path / "a.pt", view(), version=b"3\n"))


DAMAGED = "The file is damaged: save or copy it again."


@pytest.mark.guarantee("zip-structure")
@pytest.mark.parametrize(
    ("part", "field", "value", "facts"),
    [
        ("both", "flags", 1, ("member 'a/data/0' is encrypted",)),
        ("central", "flags", 1, ("member 'a/data/0' is encrypted",)),
        ("local", "flags", 1, ("member 'a/data/0'", "local header contradicts the directory")),
        ("both", "method", 8, ("member 'a/data/0' is compressed, which torch.save never does",)),
        ("central", "method", 8, ("member 'a/data/0' is compressed",)),
        ("local", "method", 8, ("member 'a/data/0'", "local header contradicts")),
        ("both", "method", 99, ("member 'a/data/0' is compressed",)),
        ("local", "crc", 1, ("member 'a/data/0'", "local header contradicts")),
        ("central", "crc", 1, ("member 'a/data/0'", "local header contradicts")),
        ("local", "size", 20, ("member 'a/data/0'", "local header contradicts")),
        ("local", "packed", 20, ("member 'a/data/0'", "local header contradicts")),
        ("central", "packed", 20, ("member 'a/data/0' is compressed",)),
        ("central", "size", 20, ("member 'a/data/0' is compressed",)),
        ("local", "name", ord("b"), ("member 'a/data/0'", "local header contradicts")),
        ("central", "name", ord("b"), ("member 'b/data/0'", "local header contradicts")),
        ("central", "name", 0xFF, ("is not UTF-8",)),
        ("central", "header", 10**6, ("member 'a/data/0'", "outside the archive")),
        ("central", "header", 2**32 - 2, ("member 'a/data/0'", "outside the archive")),
        ("central", "header", 2**32 - 1, ("zip64 sizes are missing",)),
        ("central", "header", 0, ("'a/data/0'", "contradicts")),
        ("central", "header", 7, ("'a/data/0'", "outside the archive")),
        ("central", "disk", 1, ("split over several disks",)),
        ("central", "name length", 9, ("directory",)),
        ("central", "name length", 0xFFFF, ("the directory is damaged",)),
        ("central", "extra length", 5, ("the directory",)),
        ("end", "disk", 1, ("split over several disks",)),
        ("end", "start disk", 1, ("split over several disks",)),
        ("end", "here", 1, ("split over several disks",)),
        ("end", "length", 10, ("expected the directory to end at byte",)),
        ("end", "start", 0, ("expected the directory to end at byte",)),
        ("end", "start", 2**32 - 1, ("directory",)),
        ("end", "length", 2**32 - 1, ("directory of at most 268,435,456 bytes", "4,294,967,295")),
    ],
)
def test_one_changed_field_is_found(layout: Layout, part: str, field: str, value: int, facts: tuple[str, ...]) -> None:
    for each in ("local", "central") if part == "both" else (part,):
        layout.set(each, field, value)
    message = refusal(layout.write())
    assert message.endswith(DAMAGED)
    for fact in facts:
        assert fact in message


@pytest.mark.parametrize("count", [0, 1, 2, 4, 0xFFFF])
def test_a_wrong_count_of_members(layout: Layout, count: int) -> None:
    layout.set("end", "here", count)
    layout.set("end", "count", count)
    message = refusal(layout.write())
    assert ("the directory is longer than it says" if count < 3 else "the directory is shorter than it says") in message


@pytest.mark.parametrize("size", [25, 10**6, 2**32 - 2])
def test_a_member_larger_than_the_file(layout: Layout, size: int) -> None:
    for part in ("local", "central"):
        layout.set(part, "size", size)
        layout.set(part, "packed", size)
    message = refusal(layout.write())
    assert "member 'a/data/0' is outside the archive" in message


@pytest.mark.guarantee("zip-cut")
def test_truncated_anywhere(layout: Layout) -> None:
    whole = bytes(layout.content)
    for end in range(len(whole)):
        layout.content = bytearray(whole[:end])
        message = refusal(layout.write())
        if 8 <= end < 22:
            assert f"expected a zip archive, got {end} bytes of one" in message
        if end >= 22:
            assert "expected the zip directory at the end of the file" in message
            assert "probably truncated" in message


@pytest.mark.guarantee("zip-cut")
def test_a_real_file_truncated(tmp_path: Path, run_folder: Path) -> None:
    whole = (run_folder / "epoch_20.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for end in (30, 512, 4096, len(whole) // 2, len(whole) - 23, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert "probably truncated" in refusal(path)


def test_bytes_after_the_archive(layout: Layout) -> None:
    layout.content += b"\0"
    assert "expected the zip directory at the end" in refusal(layout.write())


def test_a_comment_is_refused(layout: Layout) -> None:
    """A comment may itself look like the end of another archive."""
    layout.content[-2:] = (22).to_bytes(2, "little")
    layout.content += layout.content[-22:-2] + b"\0\0"
    message = refusal(layout.write())
    assert "directory" in message


@pytest.mark.guarantee("zip-structure")
@pytest.mark.parametrize("prefix", [b"junk", b"PK\3\4junk", b"PK\3\4" + b"\0" * 60])
@pytest.mark.parametrize("adjusted", [False, True])
def test_bytes_before_the_archive(layout: Layout, prefix: bytes, adjusted: bool) -> None:
    """A self-extracting archive, or one behind another file's header, with and without corrected offsets."""
    if adjusted:
        for member in layout.central:
            layout.set("central", "header", layout.local[member] + len(prefix), member)
        layout.set("end", "start", layout.start + len(prefix))
    layout.content[:0] = prefix
    message = refusal(layout.write())
    if prefix.startswith(b"PK"):
        expected = f"expected the archive at byte 0, got its first member at byte {len(prefix)}"
        assert (expected if adjusted else "expected the directory to end at byte") in message
    else:
        assert "something else (first bytes b'junkPK" in message


@pytest.mark.guarantee("zip-structure")
def test_duplicate_members(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    archive(path, {"a/data.pkl": pickled(view()), "a/data/0": DATA, "a/data/1": DATA})
    path.write_bytes(path.read_bytes().replace(b"a/data/1", b"a/data/0"))
    message = refusal(path)
    assert "member 'a/data/0' appears twice" in message
    assert message.endswith(DAMAGED)


@pytest.mark.guarantee("zip-structure")
def test_one_member_listed_twice(tmp_path: Path) -> None:
    """Two directory entries for one place: the same bytes under two names or one."""
    path = tmp_path / "a.pt"
    archive(path, {"a/data.pkl": pickled(view()), "a/data/0": DATA, "a/data/1": DATA})
    layout = Layout(path)
    layout.set("central", "header", layout.local["a/data/0"], "a/data/1")
    assert "contradicts" in refusal(layout.write())


@pytest.mark.guarantee("zip-structure")
def test_a_member_inside_another(tmp_path: Path) -> None:
    """A complete local header hidden in another member's bytes."""
    path = tmp_path / "a.pt"
    archive(path, {"a/data/0": DATA})
    inner = path.read_bytes()[: 30 + len("a/data/0") + len(DATA)]
    archive(path, {"a/data.pkl": pickled(view()), "a/outer": b"\0" * 10 + inner, "a/data/0": DATA})
    layout = Layout(path)
    layout.set("central", "header", layout.local["a/outer"] + 30 + len("a/outer") + 10)
    message = refusal(layout.write())
    assert "member 'a/data/0' overlaps the one before it" in message


def test_a_compressed_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    archive(path, {"a/data.pkl": pickled(view()), "a/data/0": DATA}, data=zipfile.ZIP_DEFLATED)
    assert "is compressed, which torch.save never does" in refusal(path)


@pytest.mark.guarantee("zip-structure")
def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    bomb = b"\0" * 50_000_000
    archive(path, {"a/data.pkl": pickled(view(numel=len(bomb) // 4)), "a/data/0": bomb}, **{"0": zipfile.ZIP_DEFLATED})
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    try:
        message = refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert "member 'a/data/0' is compressed" in message


# --- zip64 -------------------------------------------------------------------------------------------------


def zip64(path: Path, members: dict[str, tuple[int, dict[int, bytes]]]) -> None:
    """Writes members of (size, {position: bytes}), all else zeros, with 64-bit sizes throughout; sparse."""
    directory = b""
    with path.open("wb") as file:
        for name, (size, pieces) in members.items():
            header, raw = file.tell(), name.encode()
            wide = struct.pack("<HHQQ", 1, 16, size, size)
            file.write(struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, *[2**32 - 1] * 2, len(raw), len(wide)))
            file.write(raw + wide)
            start = file.tell()
            for position, piece in pieces.items():
                file.seek(start + position)
                file.write(piece)
            file.seek(start + size)
            wide = struct.pack("<HHQQQ", 1, 24, size, size, header)
            sizes = [0, *[2**32 - 1] * 2, len(raw), len(wide), 0, 0, 0, 0, 2**32 - 1]
            directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, *sizes) + raw + wide
        at = file.tell()
        file.write(directory)
        end, count = file.tell(), len(members)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), at))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, *[2**32 - 1] * 2, 0))


@pytest.mark.guarantee("zip64")
def test_over_four_gib(tmp_path: Path) -> None:
    """A record over 4 GiB, and a pickle whose offset needs 64 bits; torch reads the same bytes."""
    path, numel = tmp_path / "big.pt", 2**32 + 10
    contents = {
        "w": Rebuilt(Storage(numel=numel, kind=torch.ByteStorage), 0, (numel,), (1,)),
        "tail": Rebuilt(Storage(numel=numel, kind=torch.ByteStorage), numel - 4, (2, 2), (1, 2)),
    }
    raw = pickled(contents)
    zip64(
        path,
        {
            "a/version": (2, {0: b"3\n"}),
            "a/data/0": (numel, {0: b"\1\2", 2**31: b"\5", numel - 4: b"\6\7\x08\x09"}),
            "a/data.pkl": (len(raw), {0: raw}),
        },
    )
    if path.stat().st_blocks * 512 > 2**28:
        path.unlink()
        pytest.skip("this file system keeps no holes")
    expected = torch.load(path, mmap=True)
    with open_checkpoint(path) as checkpoint:
        spec = checkpoint.spec.tensors["w"]
        assert spec.shape == (numel,)
        for start, stop in ((0, 3), (2**31 - 1, 2**31 + 2), (2**32 - 2, numel)):
            found = read_ranges(checkpoint, [(spec, start, stop)])[0]
            assert found.tolist() == expected["w"][start:stop].tolist()
        assert elements(checkpoint, "tail", 3).tolist() == expected["tail"].flatten().tolist() == [6, 8, 7, 9]


def small_zip64(path: Path) -> bytearray:
    raw = pickled(view())
    zip64(path, {"a/data.pkl": (len(raw), {0: raw}), "a/data/0": (24, {0: DATA})})
    return bytearray(path.read_bytes())


@pytest.mark.guarantee("zip64")
def test_zip64_fields_are_read(tmp_path: Path) -> None:
    """The archive that the next test spoils is sound."""
    path = tmp_path / "a.pt"
    small_zip64(path)
    with open_checkpoint(path) as checkpoint:
        assert bits(elements(checkpoint, "w", 4)) == DATA


@pytest.mark.parametrize(
    ("position", "value", "fact"),
    [
        (-42 + 8, 2**63, "zip64 directory record is outside the archive"),
        (-42 + 8, 2**64 - 1, "zip64 directory record is outside the archive"),
        (-42 + 8, 0, "zip64 directory record is not where the archive says"),
        (-42 - 56 + 24, 2**40, "split over several disks"),
        (-42 - 56 + 40, 2**40, "directory of at most"),
        (-42 - 56 + 40, 2**64 - 1, "directory of at most"),
        (-42 - 56 + 48, 2**63, "expected the directory to end at byte"),
    ],
)
def test_zip64_records_that_lie(tmp_path: Path, position: int, value: int, fact: str) -> None:
    path = tmp_path / "a.pt"
    content = small_zip64(path)
    at = len(content) + position
    content[at : at + 8] = struct.pack("<Q", value)
    path.write_bytes(content)
    assert fact in refusal(path)


def test_zip64_counts_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    content = small_zip64(path)
    at = len(content) - 22 - 20 - 56 + 24
    content[at : at + 16] = struct.pack("<QQ", 2**40, 2**40)
    path.write_bytes(content)
    assert "1,099,511,627,776 members" in refusal(path)


@pytest.mark.guarantee("zip-structure")
@pytest.mark.parametrize("size", [25, 2**40, 2**63, 2**64 - 1])
def test_zip64_sizes_that_lie(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.pt"
    content = small_zip64(path)
    wide = struct.pack("<QQ", 24, 24)
    assert content.count(wide) == 2
    path.write_bytes(content.replace(wide, struct.pack("<QQ", size, size)))
    assert "member 'a/data/0' is outside the archive" in refusal(path)
