"""The folders of torch.distributed.checkpoint, as torch writes them and as nobody should; nothing in them runs."""

from __future__ import annotations

import json
import pickle
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from formats.pickles.opcodes import Runs, deep
from formats.reading import assert_same, read, refusal
from formats.test_safetensors_header import REJECTED
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_avg.checkpoint.spec import BY_TORCH_NAME
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.open import open_checkpoint

State = dict[str, torch.Tensor]


def save(contents: dict[str, Any], folder: Path) -> Path:
    """Saves as one process without a process group does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(contents, checkpoint_id=folder, no_dist=True)
    return folder


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 3))


# --- what torch writes -------------------------------------------------------------------------------------


def test_a_flat_state_dict(tmp_path: Path) -> None:
    state = model().state_dict()
    assert_same(read(save(dict(state), tmp_path / "c")), dict(state))


def test_weights_under_a_key_with_an_optimizer(tmp_path: Path) -> None:
    """Moments of the optimizer are no weights, however their names look."""
    net = model()
    optimizer = torch.optim.AdamW(net[2].parameters())
    net[2](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = net.state_dict()
    for key in ("model", "state_dict", "net"):
        contents = {key: state, "optimizer": optimizer.state_dict(), "step": torch.tensor(3), "epoch": 4}
        folder = save(contents, tmp_path / key)
        with open_checkpoint(folder) as checkpoint:
            spec = checkpoint.spec
            assert (spec.format, spec.kind, spec.path) == ("torch DCP", "torch DCP", folder)
            assert spec.state_key == key
        assert_same(read(folder), dict(state))


def test_nested_dicts_keep_their_names(tmp_path: Path) -> None:
    """The flattened names have dots at the seams of dicts as well as inside them."""
    inner = {"block.weight": torch.ones(2), "block.bias": torch.zeros(2)}
    folder = save({"trainer": {"net": inner}, "step": 1}, tmp_path / "c")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.spec.state_key == "trainer.net"
    assert_same(read(folder), inner)


def test_several_state_dicts_are_listed_and_each_can_be_chosen(tmp_path: Path) -> None:
    contents = {"generator": {"w": torch.ones(2)}, "critic": {"w": torch.zeros(3)}}
    folder = save(contents, tmp_path / "c")
    message = refusal(folder)
    assert "expected one state dict, got several: " in message
    assert "'generator'" in message
    assert "'critic'" in message
    for key, state in contents.items():
        assert_same(read(folder, state_key=key), state)


def test_names_that_begin_with_model_need_no_planner_data(tmp_path: Path) -> None:
    """As FSDP through Accelerate saves: flat names, the wrapper in each."""
    state = model().state_dict()
    assert_same(read(save({f"model.{name}": value for name, value in state.items()}, tmp_path / "c")), dict(state))


def test_prefixes_of_wrappers_are_stripped(tmp_path: Path) -> None:
    state = model().state_dict()
    folder = save({"model": {f"_orig_mod.{name}": value for name, value in state.items()}}, tmp_path / "c")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.spec.prefix == "_orig_mod."
    assert_same(read(folder), dict(state))


@pytest.mark.parametrize("name", [name for name in BY_TORCH_NAME if name != "float8_e8m0fnu"])
def test_each_dtype(tmp_path: Path, name: str) -> None:
    values = torch.arange(30, dtype=torch.uint8).view(torch.uint8).repeat(8)
    tensor = values.clone().view(getattr(torch, name)) if name != "bool" else values % 2 == 0
    assert_same(read(save({"w": tensor, "b": torch.ones(1)}, tmp_path / "c")), {"w": tensor, "b": torch.ones(1)})


def test_scalars_empty_and_strided_tensors(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    state = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "hollow": torch.empty(2, 0),
        "turned": whole.view(4, 6).t(),
        "every other": whole[::2],
        "last": whole[20:],
        "count": torch.tensor(7),
    }
    assert_same(read(save(state, tmp_path / "c")), state)


def test_tied_tensors_are_both_there(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    state = {"a": shared, "b": shared}
    assert_same(read(save(state, tmp_path / "c")), state)


def test_a_tensor_larger_than_a_window(tmp_path: Path) -> None:
    state = {"w": torch.rand(1200, 1000), "b": torch.rand(5)}
    assert_same(read(save(state, tmp_path / "c")), state)


def test_a_parameter_is_a_tensor(tmp_path: Path) -> None:
    folder = save(dict(model().named_parameters()), tmp_path / "c")
    assert_same(read(folder), {name: value.detach() for name, value in model().named_parameters()})


def test_only_objects_are_no_weights(tmp_path: Path) -> None:
    assert "contains no named tensors" in refusal(save({"epoch": 3, "args": {"lr": 0.1}}, tmp_path / "c"))


# --- training state next to weights at the root ---

WEIGHTS = {"tok_embeddings.weight": torch.arange(8.0).view(4, 2), "layers.0.upsampler.w": torch.ones(2)}
TORCHTITAN = {
    "optimizer": {
        "state.layers.0.w.exp_avg": torch.rand(2),
        "state.layers.0.w.step": torch.tensor(5.0),
        "param_groups.layers.0.w.lr": 1e-4,
    },
    "lr_scheduler": {"last_epoch": 5},
    "train_state": {"step": torch.tensor(5)},
    "dataloader": {"world_size": 1},
}
MEGATRON = {
    "chained_0.optimizer.state.fp32_param.layers.0.w": torch.rand(2),
    "optimizer.state.exp_avg.module.layers.0.w": torch.rand(2),
    "optimizer.state.step": torch.tensor(5),
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("training", "skipped"),
    [
        (TORCHTITAN, "4 entries without weights skipped: 'optimizer', 'lr_scheduler', 'train_state', 'dataloader'"),
        (MEGATRON, "2 entries without weights skipped: 'chained_0.optimizer', 'optimizer'"),
    ],
    ids=["torchtitan", "Megatron-Core and NeMo"],
)
def test_training_state_next_to_weights_at_the_root_is_skipped(
    tmp_path: Path, training: dict[str, Any], skipped: str, prefix: str
) -> None:
    """Otherwise moments of Adam are averaged, or the whole checkpoint is refused."""
    folder = save({**{prefix + name: value for name, value in WEIGHTS.items()}, **training}, tmp_path / "c")
    assert_same(read(folder), WEIGHTS)
    with open_checkpoint(folder) as checkpoint:
        assert (checkpoint.spec.state_key, checkpoint.spec.prefix) == (None, prefix)
        assert skipped in checkpoint.spec.notes


# --- parts as safetensors ---


def save_as_safetensors(contents: dict[str, Any], folder: Path, threads: int = 1) -> Path:
    filesystem = pytest.importorskip("torch.distributed.checkpoint.filesystem")
    if not hasattr(filesystem, "SerializationFormat"):
        pytest.skip("torch is too old")
    form = filesystem.SerializationFormat.SAFETENSORS
    writer = filesystem.FileSystemWriter(folder, serialization_format=form, thread_count=threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(contents, storage_writer=writer, no_dist=True)
    return folder


@pytest.mark.parametrize("threads", [1, 3])
def test_parts_as_safetensors(tmp_path: Path, threads: int) -> None:
    """Which torch itself writes and cannot load: each file has one safetensors file after its other objects."""
    weights = {
        "w": torch.arange(6.0).view(2, 3),
        "half": torch.ones(2).half(),
        "none": torch.empty(0, 3),
        "n": torch.tensor(2),
    }
    contents = {"model": weights, "epoch": 3, "args": "x" * 5000, "optimizer": {"exp_avg": torch.rand(9)}}
    assert_same(read(save_as_safetensors(contents, tmp_path / "c", threads)), weights)


def test_a_part_that_its_safetensors_lack_is_refused(tmp_path: Path) -> None:
    """A second part of a tensor in one file replaces the first: it must not count for both."""
    folder = save_as_safetensors({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "c")

    def change(metadata: Any) -> None:
        _, info = entry(metadata, "w")
        second = MetadataIndex("w", torch.Size([2, 0]), 1)
        metadata.storage_data[second] = info
        described = metadata.state_dict_metadata["w"]
        described.size = torch.Size([4, 3])
        described.chunks = [chunk((0, 0), (2, 3)), chunk((2, 0), (2, 3))]

    edit(folder, change)
    assert "tensor 'w': its safetensors data lacks the part at (2, 0)" in refusal(folder)


# --- folders that are not whole ----------------------------------------------------------------------------


def saved(tmp_path: Path) -> Path:
    return save({"model": {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}, "step": 3}, tmp_path / "c")


def test_without_metadata_it_is_incomplete(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / ".metadata").unlink()
    assert "incomplete: there is no .metadata next to the *.distcp files" in refusal(folder)


@pytest.mark.guarantee("missing-shards")
def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (shard,) = folder.glob("*.distcp")
    shard.unlink()
    message = refusal(folder)
    assert f"missing: '{shard.name}'" in message
    assert "Copy those of every rank." in message


def test_truncated_anywhere(tmp_path: Path) -> None:
    """A clean refusal at every length, of the metadata and of the file with the tensors."""
    folder = saved(tmp_path)
    for path in (folder / ".metadata", next(folder.glob("*.distcp"))):
        whole = path.read_bytes()
        for length in range(0, len(whole), 31):
            path.write_bytes(whole[:length])
            refusal(folder)
        path.write_bytes(whole)
    assert read(folder)["w"].shape == (2, 3)


def test_a_folder_instead_of_a_file(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (shard,) = folder.glob("*.distcp")
    shard.unlink()
    shard.mkdir()
    assert "expected a checkpoint file, got a folder" in refusal(folder)


def test_nothing_stays_open_after_a_refusal(tmp_path: Path) -> None:
    folder = save({"w": torch.ones(2), "z": torch.ones(3)}, tmp_path / "c")
    edit(folder, lambda metadata: setattr(entry(metadata, "z")[1], "offset", 5))
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    refusal(folder)
    assert before == (len(list(Path("/proc/self/fd").iterdir())) if before else 0)


# --- wrong metadata ---------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    """Changes the real metadata by torch's own classes."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def entry(metadata: Any, name: str) -> tuple[MetadataIndex, Any]:
    return next((index, info) for index, info in metadata.storage_data.items() if index.fqn == name)


def test_the_metadata_that_is_changed_here_is_real(tmp_path: Path) -> None:
    """Written back unchanged it opens: what follows is refused for the change alone."""
    folder = save({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "c")
    edit(folder, lambda metadata: None)
    assert_same(read(folder), {"w": torch.arange(6.0).view(2, 3)})


@pytest.mark.guarantee("no-file-outside")
@pytest.mark.parametrize(
    "name", ["../__0_0.distcp", "/etc/passwd", "..", ".", "", "sub/__0_0.distcp", "a\0b", "C:\\x", "..\\x", "\ud800"]
)
def test_no_file_outside_the_folder_is_reached(tmp_path: Path, name: str) -> None:
    folder = save({"w": torch.ones(2)}, tmp_path / "c")
    (tmp_path / "__0_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    edit(folder, lambda metadata: setattr(entry(metadata, "w")[1], "relative_path", name))
    message = refusal(folder)
    assert "expected the name of a file next to it" in message or "missing" in message
    assert "missing" in message or message.endswith("Don't trust it.")


@pytest.mark.guarantee("shard-links")
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = save({"w": torch.ones(2)}, tmp_path / "c")
    (folder / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link out of the folder" in refusal(folder)


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))


ENDLESS = 10**6000  # Python prints no integer as long

LIES: dict[str, tuple[Callable[[Any], object], str]] = {
    "offset after the end": (lambda m: setattr(entry(m, "w")[1], "offset", 10**9), "got a file of"),
    "negative offset": (lambda m: setattr(entry(m, "w")[1], "offset", -1), "is stored, got something else"),
    "an endless offset": (lambda m: setattr(entry(m, "w")[1], "offset", ENDLESS), "is stored, got something else"),
    "an endless length": (lambda m: setattr(entry(m, "w")[1], "length", ENDLESS), "is stored, got something else"),
    "an endless number as file": (
        lambda m: setattr(entry(m, "w")[1], "relative_path", ENDLESS), "is stored, got something else"),
    "an endless number as name": (
        lambda m: object.__setattr__(entry(m, "w")[0], "fqn", ENDLESS), "is stored, got something else"),
    "a shape of endless numbers": (
        lambda m: setattr(m.state_dict_metadata["w"], "size", (ENDLESS, 3)), "expected a shape"),
    "a chunk at an endless number": (
        lambda m: object.__setattr__(m.state_dict_metadata["w"].chunks[0], "offsets", (ENDLESS, 0)),
        "expected a shape"),
    "a chunk of endless numbers": (
        lambda m: object.__setattr__(m.state_dict_metadata["w"].chunks[0], "sizes", (ENDLESS, 3)), "expected a shape"),
    "length past the end": (lambda m: setattr(entry(m, "w")[1], "length", 10**9), "got a file of"),
    "length of nothing": (lambda m: setattr(entry(m, "w")[1], "length", 0), "expected a zip archive, got 0 bytes"),
    "a float as offset": (lambda m: setattr(entry(m, "w")[1], "offset", 0.0), "is stored, got something else"),
    "a number as file": (lambda m: setattr(entry(m, "w")[1], "relative_path", 3), "is stored, got something else"),
    "another shape": (lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([3, 3])), "in exactly one part"),
    "fewer elements": (lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size([1, 3])), "inside the shape"),
    "no chunks": (lambda m: setattr(m.state_dict_metadata["w"], "chunks", []), "got 0 parts"),
    "a chunk of another size": (
        lambda m: setattr(m.state_dict_metadata["w"], "chunks", [chunk((0, 0), (3, 2))]), "expected F32 (3, 2)"),
    "a chunk elsewhere": (
        lambda m: setattr(m.state_dict_metadata["w"], "chunks", [chunk((1, 0), (2, 3))]), "is not stored anywhere"),
    "two chunks that overlap": (
        lambda m: setattr(m.state_dict_metadata["w"], "chunks", [chunk((0, 0), (2, 3)), chunk((0, 1), (2, 2))]),
        "is not stored anywhere"),
    "another dtype": (
        lambda m: setattr(m.state_dict_metadata["w"], "properties", TensorProperties(dtype=torch.float64)),
        "expected F64 (2, 3)"),
    "no dtype": (
        lambda m: setattr(m.state_dict_metadata["w"], "properties", TensorProperties(dtype=None)), "expected a dtype"),
    "a dtype without a name here": (
        lambda m: setattr(m.state_dict_metadata["w"], "properties", TensorProperties(dtype=torch.complex128)),
        "expected a dtype"),
    "a shape of nonsense": (lambda m: setattr(m.state_dict_metadata["w"], "size", (2, -3)), "expected a shape"),
    "a shape of words": (lambda m: setattr(m.state_dict_metadata["w"], "size", "2x3"), "expected a shape"),
    "an endless shape": (lambda m: setattr(m.state_dict_metadata["w"], "size", (1,) * 100), "expected a shape"),
    "stored nowhere": (lambda m: m.storage_data.clear(), "is not stored anywhere"),
    "transformed": (
        lambda m: setattr(entry(m, "w")[1], "transform_descriptors", ["zstd"]), "compressed or encrypted"),
    "no state": (lambda m: setattr(m, "state_dict_metadata", None), "expected the metadata of"),
    "no storage": (lambda m: setattr(m, "storage_data", [1]), "expected the metadata of"),
    "a number as name": (
        lambda m: m.state_dict_metadata.update({3: m.state_dict_metadata["w"]}), "expected names, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_does_not_fit_the_files_is_refused(tmp_path: Path, lie: str) -> None:
    """Every number in it is a claim of the author; the tensor's own archive decides."""
    folder = save({"w": torch.arange(6.0).view(2, 3)}, tmp_path / "c")
    change, fact = LIES[lie]
    edit(folder, change)
    assert fact in refusal(folder)


def test_two_names_of_one_path_are_refused(tmp_path: Path) -> None:
    """The planner's data says where names stood: it must not put one over the other, nor a dict over a tensor."""
    folder = save({"a": torch.zeros(2), "b": torch.ones(2), "c": torch.ones(3)}, tmp_path / "c")
    for paths, other in (
        ({"a": ("x",), "b": ("x",), "c": ("c",)}, "that of another tensor"),
        ({"a": ("x", "y"), "b": ("x",), "c": ("c",)}, "that of another tensor"),
        ({"a": ("x",), "b": ("x", "y"), "c": ("c",)}, "one inside another tensor"),
    ):
        edit(folder, lambda metadata, paths=paths: setattr(metadata, "planner_data", paths))
        assert f"'b': expected a name of its own, got {other}." in refusal(folder)


@pytest.mark.parametrize(
    "planner", [None, {}, {"w": ()}, {"w": "w"}, {"w": (3,)}, {"w": (None, "w")}, [1], {"w": ("w",) * 100}]
)
def test_odd_data_of_the_planner_is_no_crash(tmp_path: Path, planner: object) -> None:
    folder = save({"w": torch.ones(2), "b": torch.ones(1)}, tmp_path / "c")
    edit(folder, lambda metadata: setattr(metadata, "planner_data", planner))
    try:
        assert set(read(folder)) <= {"w", "b"}
    except CheckpointFormatError as error:
        assert str(error).isprintable()


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("where", ["planner", "fqn", "size", "version"])
def test_endless_values_are_not_shown(tmp_path: Path, where: str) -> None:
    """A message that quotes one would never be finished."""
    folder = save({"w": torch.ones(2)}, tmp_path / "c")

    def change(metadata: Any) -> None:
        if where == "planner":
            metadata.planner_data = {"w": (deep(), "w")}
        elif where == "fqn":
            _, info = entry(metadata, "w")
            metadata.storage_data = {MetadataIndex.__new__(MetadataIndex): info}
            (new,) = metadata.storage_data
            new.__dict__.update(fqn=deep(), offset=None, index=None)
        elif where == "size":
            metadata.state_dict_metadata["w"].size = (deep(),)
        else:
            metadata.version = deep()

    hashing = MetadataIndex.__hash__
    MetadataIndex.__hash__ = lambda self: 1  # type: ignore[method-assign]
    try:
        edit(folder, change)
    finally:
        MetadataIndex.__hash__ = hashing  # type: ignore[method-assign]
    open_or_refuse(folder)


def open_or_refuse(path: Path) -> None:
    try:
        open_checkpoint(path).close()
    except CheckpointFormatError as error:
        assert len(str(error)) < 3000


@pytest.mark.parametrize("where", ["metadata", "planner_data", "storage_data", "state_dict_metadata", "meta.pt"])
def test_nothing_in_the_metadata_runs(tmp_path: Path, where: str) -> None:
    """torch loads ``.metadata`` with a plain pickle.load; here a stranger's folder is only read."""
    folder = save({"w": torch.ones(2)}, tmp_path / "c")
    mark = tmp_path / "ran"
    hostile = Runs(f"touch {mark}")
    if where == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(hostile))
    elif where == "meta.pt":
        torch.save({"global_step": 5, "callbacks": hostile}, folder / "meta.pt")
    else:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        value = getattr(metadata, where)
        setattr(metadata, where, {**value, "x": hostile} if isinstance(value, dict) else hostile)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    open_or_refuse(folder)
    assert not mark.exists()


def test_a_tensor_archive_with_another_object_is_refused(tmp_path: Path) -> None:
    folder = save({"w": torch.ones(2)}, tmp_path / "c")
    torch.save({"w": torch.ones(2)}, folder / "__0_0.distcp")
    size = (folder / "__0_0.distcp").stat().st_size
    edit(folder, lambda m: (setattr(entry(m, "w")[1], "offset", 0), setattr(entry(m, "w")[1], "length", size)))
    assert "expected a plain tensor in '__0_0.distcp', got another object" in refusal(folder)


def test_metadata_by_hand_of_a_tensor_in_two_files(tmp_path: Path) -> None:
    """Two ranks, each with its rows: what one process saves never shows this."""
    whole = torch.arange(20.0).view(5, 4)
    folder = tmp_path / "c"
    folder.mkdir()
    storage: dict[MetadataIndex, Any] = {}
    real = save({"w": torch.ones(2)}, tmp_path / "real")
    info = type(entry(pickle.loads((real / ".metadata").read_bytes()), "w")[1])
    chunks = []
    for rank, (first, last) in enumerate(((0, 3), (3, 5))):
        torch.save(whole[first:last].clone(), folder / f"__{rank}_0.distcp")
        size = (folder / f"__{rank}_0.distcp").stat().st_size
        storage[MetadataIndex("w", torch.Size([first, 0]), rank)] = info(f"__{rank}_0.distcp", 0, size)
        chunks.append(chunk((first, 0), (last - first, 4)))
    described = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([5, 4]), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"w": described}, None, storage)))
    assert_same(read(folder), {"w": whole})
    (folder / "__1_0.distcp").unlink()
    assert "1 file of 2 missing: '__1_0.distcp'" in refusal(folder)
    described.chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"w": described}, None, storage)))
    assert "expected each of 20 elements in exactly one part, got 1 parts with 12 elements" in refusal(folder)


# --- the safetensors layout --------------------------------------------------------------------------------

Shard = dict[str, tuple[torch.Tensor, tuple[int, ...]]]  # name → what this file holds, and where it begins


def write_shards(folder: Path, *shards: Shard, total: int = 1) -> Path:
    """As HuggingFaceStorageWriter names and describes them (torch/distributed/checkpoint/hf_storage.py)."""
    folder.mkdir(exist_ok=True)
    for rank, shard in enumerate(shards, 1):
        info = {name: {"saved_offsets": list(starts)} for name, (_, starts) in shard.items()}
        metadata = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
        name = f"shard-{rank:05}-model-{1:05}-of-{total:05}.safetensors"
        save_file({key: value.clone() for key, (value, _) in shard.items()}, folder / name, metadata=metadata)
    return folder


WHOLE = torch.arange(24.0).view(6, 4)
ONLY = "shard-00001-model-00001-of-00001.safetensors"


def test_safetensors_shards_are_put_together(tmp_path: Path) -> None:
    """Rows in one file, columns in others, and a tensor that only one of them holds."""
    folder = write_shards(
        tmp_path / "c",
        {"w": (WHOLE[:2], (0, 0)), "b": (torch.ones(3), (0,))},
        {"w": (WHOLE[2:, :1], (2, 0))},
        {"w": (WHOLE[2:, 1:], (2, 1)), "n": (torch.tensor(3), ())},
    )
    with open_checkpoint(folder) as checkpoint:
        assert (checkpoint.spec.format, checkpoint.spec.kind) == ("DCP safetensors", "torch DCP")
        assert len(checkpoint.files) == 3
    assert_same(read(folder), {"w": WHOLE, "b": torch.ones(3), "n": torch.tensor(3)})


def test_what_torch_itself_writes_in_this_layout(tmp_path: Path) -> None:
    writer = pytest.importorskip("torch.distributed.checkpoint.hf_storage").HuggingFaceStorageWriter
    state = {"w": WHOLE.clone(), "b": torch.ones(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=writer(path=str(tmp_path / "c"), save_distributed=True), no_dist=True)
    assert list((tmp_path / "c").glob("shard-*.safetensors"))
    assert_same(read(tmp_path / "c"), state)


def test_prefixes_are_stripped_from_safetensors_shards(tmp_path: Path) -> None:
    folder = write_shards(
        tmp_path / "c",
        {"module.w": (WHOLE[:2], (0, 0))},
        {"module.w": (WHOLE[2:], (2, 0)), "module.b": (WHOLE[0], (0,))},
    )
    assert_same(read(folder), {"w": WHOLE, "b": WHOLE[0]})


def test_the_same_part_in_two_shards_counts_once(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "c", {"w": (WHOLE, (0, 0))}, {"w": (WHOLE, (0, 0)), "b": (WHOLE[0], (0,))})
    assert_same(read(folder), {"w": WHOLE, "b": WHOLE[0]})


@pytest.mark.guarantee("missing-shards")
def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "c", *({"w": (WHOLE[row : row + 1], (row, 0))} for row in range(6)))
    (folder / "shard-00003-model-00001-of-00001.safetensors").unlink()
    message = refusal(folder)
    assert "shards are missing: ranks 3 of 6" in message


def test_a_hole_between_the_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "c", {"w": (WHOLE[:2], (0, 0))}, {"w": (WHOLE[3:], (3, 0))})
    assert "expected each of 24 elements in exactly one part, got 2 parts with 20 elements" in refusal(folder)


def test_one_shard_named_by_itself_is_refused(tmp_path: Path) -> None:
    """Taken for a whole checkpoint, it would give a part of each tensor."""
    folder = write_shards(tmp_path / "c", {"w": (WHOLE[:2], (0, 0))}, {"w": (WHOLE[2:], (2, 0))})
    message = refusal(folder / "shard-00001-model-00001-of-00001.safetensors")
    assert f"Name its folder: {folder}" in message


@pytest.mark.parametrize(
    "info",
    ["{", "[]", "[1]", '{"w": []}', '{"w": {}}', '{"w": {"saved_offsets": 3}}', '{"w": {"saved_offsets": [-1, 0]}}',
     '{"w": {"saved_offsets": [0.0, 0]}}', '{"w": {"saved_offsets": [0]}}', '{"w": {"saved_offsets": [0, 0, 0]}}',
     '{"w": {"saved_offsets": ["0", "0"]}}', '{"w": {"saved_offsets": [true, 0]}}', "[" * 100_000,
     '{"w": {"saved_offsets": [' + "9" * 5000 + ", 0]}}", '{"w": {"saved_offsets": [' + "9" * 4000 + ", 0]}}",
     '{"w": {"saved_offsets": [0, ' + "9" * 6000 + "]}}"],
)  # fmt: skip
def test_sharding_info_that_is_none_is_refused(tmp_path: Path, info: str) -> None:
    save_file({"w": WHOLE.contiguous()}, tmp_path / ONLY, metadata={"DCP_SHARDING_INFO": info})
    message = refusal(tmp_path)
    says = (
        f"{ONLY}: {fact}" for fact in ("DCP_SHARDING_INFO: ", "tensor 'w': expected F32 and 2 offsets", "the header: ")
    )
    assert any(each in message for each in says), message


@pytest.mark.guarantee("safetensors-bytes")
@pytest.mark.parametrize(
    ("case", "fact"),
    [
        ("under 8 bytes", "expected 8 bytes at byte 0, got a file of 5 bytes"),
        ("header is a list", "expected a JSON object as header"),
        ("no data at all", "8 bytes missing"),
        ("duplicate tensor", "duplicate key 'w'"),
    ],
)
def test_a_shard_is_held_to_the_rules_of_a_file(tmp_path: Path, case: str, fact: str) -> None:
    """It is opened by its folder, past the look at the first bytes that a file of its own gets."""
    (tmp_path / ONLY).write_bytes(REJECTED[case][0])
    message = refusal(tmp_path)
    assert f"{ONLY}: " in message
    assert fact in message


def test_shards_of_different_dtypes_are_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "c", {"w": (WHOLE[:2], (0, 0))}, {"w": (WHOLE[2:].half(), (2, 0))})
    assert "expected F32 and 2 offsets, got F16" in refusal(folder)


def test_a_state_key_names_nothing_in_safetensors(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "c", {"w": (WHOLE, (0, 0))})
    assert "--state-key model matches nothing" in refusal(folder, state_key="model")
    assert "--ema matches nothing" in refusal(folder, ema=True)


def test_all_shards_of_one_file_of_the_model_missing(tmp_path: Path) -> None:
    """Every rank is there, each tensor of the first file is whole: only the names say that half the model is gone."""
    folder = write_shards(tmp_path / "c", {"w": (WHOLE[:3], (0, 0))}, {"w": (WHOLE[3:], (3, 0))}, total=2)
    assert "shards are missing: files 2 of 2. Copy all shards." in refusal(folder)
    for rank in (1, 2):
        save_file({"b": torch.ones(3)}, folder / f"shard-{rank:05}-model-00002-of-00002.safetensors")
    assert_same(read(folder), {"w": WHOLE, "b": torch.ones(3)})


def test_the_rank_in_a_name_costs_no_memory(tmp_path: Path) -> None:
    """Two hundred thousand here, which a name may exceed five thousandfold."""
    (tmp_path / f"shard-{200_000}-model-00001-of-00001.safetensors").touch()
    tracemalloc.start()
    try:
        refusal(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
