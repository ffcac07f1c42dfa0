"""A model in several files: each tensor out of its own shard, in the order of the index, under one set of names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import read_ranges
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.sharded import is_index

State = dict[str, torch.Tensor]


def write(folder: Path, *shards: State, suffix: str = "safetensors", stem: str = "model") -> Path:
    """Writes shards and their index; returns the index."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        if suffix == "safetensors":
            save_file({key: value.contiguous().clone() for key, value in shard.items()}, folder / name)
        else:
            torch.save(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 3}, "weight_map": weight_map}))
    return index


def values(checkpoint: Checkpoint) -> State:
    tensors = checkpoint.spec.tensors
    found = read_ranges(checkpoint, [(tensor, 0, tensor.numel) for tensor in tensors.values()])
    return {name: part.clone().view(tensors[name].shape) for name, part in zip(tensors, found, strict=True)}


def assert_same(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert torch.equal(found[name], value), name


STATE: State = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor(3),
    "c": torch.ones(4).half(),
    "d": torch.empty(0, 2),
}


def test_what_is_an_index(tmp_path: Path) -> None:
    index = write(tmp_path, STATE)
    assert is_index(index)
    assert not is_index(tmp_path / "gone.index.json")
    (tmp_path / "x.index.json").mkdir()
    assert not is_index(tmp_path / "x.index.json")
    assert not is_index(next(tmp_path.glob("*.safetensors")))


@given(spread=st.lists(st.integers(0, 2), min_size=4, max_size=4), suffix=st.sampled_from(["safetensors", "bin"]))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_spread_over_shards_gives_the_same_tensors(tmp_path: Path, spread: list[int], suffix: str) -> None:
    """A tensor looked for in the wrong file would be other bytes of the right length."""
    for path in tmp_path.iterdir():
        path.unlink()
    shards: list[State] = [{}, {}, {}]
    for name, shard in zip(STATE, spread, strict=True):
        shards[shard][name] = STATE[name]
    used = [shard for shard in shards if shard]
    index = write(tmp_path, *used, suffix=suffix, stem="pytorch_model" if suffix == "bin" else "model")
    for path in (index, tmp_path):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.spec.path == path
            assert checkpoint.spec.format == ("sharded torch zip" if suffix == "bin" else "sharded safetensors")
            assert checkpoint.spec.metadata == {"shards": len(used)}
            assert len(checkpoint.files) == len(used)
            assert_same(values(checkpoint), {name: STATE[name] for shard in used for name in shard})


def test_the_order_is_that_of_the_index(tmp_path: Path) -> None:
    """Not that of the shards: the same model split otherwise has the same order."""
    index = write(tmp_path, {"a": torch.ones(1)}, {"b": torch.ones(2)})
    content = json.loads(index.read_text())
    content["weight_map"] = dict(reversed(content["weight_map"].items()))
    index.write_text(json.dumps(content))
    with open_checkpoint(index) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["b", "a"]


def test_wrappers_come_off_where_all_shards_carry_them(tmp_path: Path) -> None:
    """And not off one shard alone, in which all names happen to carry one."""
    index = write(tmp_path / "all", {"module.a": torch.ones(1)}, {"module.b": torch.ones(2)})
    with open_checkpoint(index) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["a", "b"]
        assert checkpoint.spec.prefix == "module."
    index = write(tmp_path / "one", {"module.a": torch.ones(1)}, {"b": torch.ones(2)})
    with open_checkpoint(index) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["module.a", "b"]
        assert checkpoint.spec.prefix == ""


def test_a_named_prefix_is_taken_off_the_whole(tmp_path: Path) -> None:
    """A shard without any name that carries it is no error."""
    index = write(tmp_path, {"model.a": torch.ones(1)}, {"head": torch.ones(2)})
    with open_checkpoint(index, strip_prefix="model.") as checkpoint:
        assert list(checkpoint.spec.tensors) == ["a", "head"]


def test_the_counter_of_an_averaged_model_may_be_in_any_shard(tmp_path: Path) -> None:
    index = write(tmp_path, {"module.a": torch.ones(1)}, {"n_averaged": torch.tensor(3), "module.b": torch.ones(2)})
    with open_checkpoint(index) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["a", "b"]
        assert "n_averaged" in checkpoint.spec.averaged


def test_tied_tensors_of_one_shard(tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    index = write(tmp_path, {"a": shared, "b": shared}, {"c": torch.arange(3.0)}, suffix="bin", stem="pytorch_model")
    with open_checkpoint(index) as checkpoint:
        assert checkpoint.spec.tied() == [("a", "b")]


def test_tensors_at_one_offset_of_two_shards_are_not_tied(tmp_path: Path) -> None:
    """They begin at the same byte, each of its own file."""
    index = write(tmp_path, {"a": torch.zeros(3)}, {"b": torch.ones(3)})
    with open_checkpoint(index) as checkpoint:
        first, second = checkpoint.spec.tensors.values()
        assert first.offset == second.offset
        assert checkpoint.spec.tied() == []
        assert_same(values(checkpoint), {"a": torch.zeros(3), "b": torch.ones(3)})


def test_shards_with_arrays_in_memory(tmp_path: Path) -> None:
    """Such a shard brings two files, which moves those that follow."""
    one = {"t": torch.ones(2), "n": np.arange(3.0, dtype=np.float32)}
    index = write(
        tmp_path, one, {"u": torch.zeros(3), "m": np.arange(2.0, dtype=np.float32) + 9}, suffix="bin", stem="x"
    )  # type: ignore[arg-type]
    with open_checkpoint(index) as checkpoint:
        assert len(checkpoint.files) == 4
        assert_same(
            values(checkpoint),
            {"t": torch.ones(2), "n": torch.arange(3.0), "u": torch.zeros(3), "m": torch.tensor([9.0, 10.0])},
        )


@pytest.mark.guarantee("missing-shards")
def test_every_missing_shard_is_named_at_once(tmp_path: Path) -> None:
    index = write(tmp_path, *({f"w{number}": torch.ones(1)} for number in range(5)))
    for number in (2, 4):
        (tmp_path / f"model-{number:05}-of-00005.safetensors").unlink()
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith(
        f"{index}: 2 shards of 5 missing: 'model-00002-of-00005.safetensors', 'model-00004-of-00005.safetensors'."
    )


def test_nothing_stays_open_where_the_last_shard_is_damaged(tmp_path: Path) -> None:
    index = write(tmp_path, *({f"w{number}": torch.ones(1)} for number in range(4)))
    (tmp_path / "model-00004-of-00004.safetensors").write_bytes(b"junk")
    before = list(Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").exists() else []
    for _ in range(3):
        with pytest.raises(CheckpointFormatError, match="model-00004-of-00004"):
            open_checkpoint(index)
    assert not before or len(before) == len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "\ud800.safetensors", "x" * 5000 + ".safetensors"])
def test_a_shard_whose_name_no_file_can_have(tmp_path: Path, name: str) -> None:
    """The system answers with errors of its own to such a name; the user must not see them as a crash."""
    index = write(tmp_path, {"a": torch.ones(1)}, {"b": torch.ones(2)})
    content = json.loads(index.read_text())
    content["weight_map"]["b"] = name
    index.write_text(json.dumps(content))
    for path in (index, tmp_path):
        with pytest.raises(CheckpointFormatError) as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{index}: ")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000
