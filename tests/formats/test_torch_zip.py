"""The torch.save reader: gives the tensors that torch.load gives, and refuses others with the reason."""

from __future__ import annotations

import argparse
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats.reading import assert_as_torch_loads, refusal
from formats.torch_bytes import PICKLE, RECORD, Member, archive, write
from torch import nn

from ckpt_avg.checkpoint.tensor_reads import stream
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
    """The tensors of an optimizer next to the weights are not weights."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(4, 2, 3, 3)).sum().backward()
    optimizer.step()
    contents = {"epoch": 7, key: net.state_dict(), "optimizer": optimizer.state_dict(), "best": 0.5, "done": False}
    checkpoint = assert_as_torch_loads(saved(tmp_path, contents), key)
    assert checkpoint.spec.metadata == {"epoch": 7, "best": 0.5, "done": False}


def test_arbitrary_objects_next_to_the_weights(tmp_path: Path) -> None:
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
def test_any_honest_key_next_to_the_weights(tmp_path: Path, key: Any) -> None:
    """Optimizers and trainers key their state by more than strings."""
    for protocol in (2, 4):
        assert_as_torch_loads(
            saved(tmp_path, {"model": {"w": torch.ones(1)}, "x": {key: 1}}, pickle_protocol=protocol),
            "model",
        )


def test_entries_without_a_tensor_are_skipped_with_a_note(tmp_path: Path) -> None:
    checkpoint = assert_as_torch_loads(saved(tmp_path, {"w": torch.ones(1), "extra_state": None, "n": 3}))
    assert checkpoint.spec.notes == ("2 entries without weights skipped: 'extra_state', 'n'",)


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
        parts = [part.clone() for _, part in stream(checkpoint, checkpoint.spec.tensors["w"], 700_001)]
    assert torch.equal(torch.cat(parts), torch.load(path)["w"].flatten())


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


QUANTISED = "Average the checkpoints before quantisation."
DENSE = "Save tensor.to_dense()."
DTYPE = "Save it in a dtype that safetensors has, such as float32 or complex64."
KINDS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), f"a quantized tensor. {QUANTISED}"),
    "sparse": (lambda: torch.eye(3).to_sparse(), f"a sparse tensor. {DENSE}"),
    "sparse csr": (lambda: torch.eye(3).to_sparse_csr(), f"a sparse tensor. {DENSE}"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "a nested tensor. Save its parts, tensor.unbind(), or a padded tensor."),
    "complex128": (
        lambda: torch.ones(3, dtype=torch.complex128),
        "a complex128 tensor, which safetensors cannot store. Save tensor.to(torch.complex64)."),
    "complex32": (lambda: torch.ones(3, dtype=torch.complex32), f"complex32 tensor. {DTYPE}"),
    "float4": (
        lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), f"float4_e2m1fn_x2 tensor. {DTYPE}"),
    "conjugated": (
        lambda: torch.ones(3, dtype=torch.complex64).conj(),
        "a lazily conjugated or negated tensor. Save tensor.resolve_conj().resolve_neg()."),
    "subclass": (
        lambda: torch.ones(3).as_subclass(Tagged),
        f"a tensor subclass ({Tagged.__module__}.Tagged). Save a plain tensor (for example tensor.dequantize()"),
    "meta": (
        lambda: torch.ones(3, device="meta"),
        "a tensor on the meta device, without data. Load the weights before you save them."),
    "uninitialised": (
        nn.UninitializedParameter, "an uninitialised parameter. Run the model once before you save it."),
}  # fmt: skip
if not hasattr(torch, "float4_e2m1fn_x2"):
    del KINDS["float4"]  # torch 2.7 has no such dtype


@pytest.mark.guarantee("odd-tensors")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_plain_elements_are_refused_by_kind_and_name(tmp_path: Path, kind: str) -> None:
    make, fact = KINDS[kind]
    message = refusal(saved(tmp_path, {"state_dict": {"fine": torch.ones(1), "layer.w": make()}}))
    assert "tensor 'layer.w': expected a plain tensor, got" in message
    assert fact in message


@pytest.mark.guarantee("odd-tensors")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_unusual_tensors_outside_the_state_dict_do_no_harm(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, {"state_dict": {"w": torch.ones(2)}, "cache": [KINDS[kind][0]()]})
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["w"]


@pytest.mark.guarantee("pickled-modules")
@pytest.mark.parametrize("key", [None, "model", "net"])
def test_a_whole_module_opens_as_its_state_dict(tmp_path: Path, key: str | None) -> None:
    """Names, order and bits are those that ``state_dict()`` gives, and nothing of the module is imported or run."""
    net = model()
    net.register_buffer("passing", torch.ones(1), persistent=False)
    net[0].register_parameter("none", None)
    path = saved(tmp_path, net if key is None else {"epoch": 3, key: net})
    assert "passing" not in net.state_dict()
    assert_as_torch_loads(path, key)


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("a\0b", "tensor 'a\\x00b': its name has a NUL character"),
        ("__metadata__", "tensor '__metadata__': safetensors reserves this name for its metadata"),
        ("x" * (LIMITS.name + 1), "expected a name of at most 4,096 bytes, got 4,097"),
        ("\ud800", r"tensor '\ud800': its name has a lone surrogate, so it is not text"),
    ],
)
def test_names_that_safetensors_cannot_hold_are_refused(tmp_path: Path, name: str, fact: str) -> None:
    assert f"{fact}. Rename the tensor." in refusal(saved(tmp_path, {name: torch.ones(1)}))


@pytest.mark.guarantee("torchscript")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    message = refusal(path, NoWeightsError)
    assert "expected weights, got a TorchScript program" in message
    assert "torch.save(torch.jit.load(path).state_dict(), new_path)" in message


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
        (tarfile.TarInfo("tensors").tobuf(), ("the tar archive of torch before 0.1.10", "Load it with torch")),
        (tarfile.TarInfo("epoch_1.pt").tobuf(), ("a tar archive", "Unpack it (tar xf checkpoint.pt)")),
        (b"BZh91AY" + b"\0" * 20, ("a bzip2 file", "Unpack it first")),
        (b"\xfd7zXZ\0" + b"\0" * 20, ("an xz file", "Unpack it first")),
    ],
    ids=[
        "lfs",
        "html",
        "xml",
        "empty",
        "two bytes",
        "text",
        "gzip",
        "zstd",
        "hdf5",
        "gguf",
        "numpy",
        "torch tar",
        "tar",
        "bzip2",
        "xz",
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path: Path, content: bytes, facts: tuple[str, ...]) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    message = refusal(path)
    assert "expected a safetensors file or one written by torch.save, got" in message
    for fact in facts:
        assert fact in message


# --- the archive -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [[b"docs/readme.txt", b"a.csv"], [b"a/data.pkl", b"b/data.pkl"]], ids=["no", "two"])
def test_a_zip_without_one_pickle(tmp_path: Path, members: list[bytes]) -> None:
    message = refusal(write(tmp_path, archive(*(Member(name, PICKLE.data) for name in members), RECORD)))
    shown = ", ".join(repr(name.decode()) for name in members)
    assert f"expected a zip written by torch.save, got one with {shown}, 'a/data/0'. Name a checkpoint file." in message


@pytest.mark.guarantee("byte-order")
@pytest.mark.parametrize("order", [b"little", b"big", b"", b"littlest", b"x" * 99])
def test_byte_order(tmp_path: Path, order: bytes) -> None:
    path = write(tmp_path, archive(PICKLE, Member(b"a/byteorder", order), RECORD))
    if order == b"little":
        open_checkpoint(path).close()
    else:
        message = refusal(path)
        assert "expected little-endian tensors, got another byte order" in message
        assert "Save it again on a little-endian machine (torch.load converts)." in message


@pytest.mark.guarantee("byte-order")
def test_torch_records_the_byte_order_where_it_is_looked_for(tmp_path: Path) -> None:
    """The record as torch itself writes it, not as this file imagines it."""
    assert torch.serialization.get_default_load_endianness() is None
    with zipfile.ZipFile(saved(tmp_path, {"w": torch.ones(2)})) as zipped:
        assert zipped.read("checkpoint/byteorder") == b"little"


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
