"""A model in several files: each tensor out of its own shard, in the order of the index, under one set of names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
from formats.reading import Command, assert_same, read, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import adam, save, tokens
from safetensors.torch import save_file

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.sharded import is_index

State = Mapping[str, torch.Tensor]


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
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
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
        assert list(read(path)) == [name for shard in used for name in shard]
        assert_same(read(path), STATE)


def test_the_order_is_that_of_the_index(tmp_path: Path) -> None:
    """Not that of the shards: the same model split otherwise has the same order."""
    index = write(tmp_path, {"a": torch.ones(1)}, {"b": torch.ones(2)})
    content = json.loads(index.read_text())
    content["weight_map"] = dict(reversed(content["weight_map"].items()))
    index.write_text(json.dumps(content))
    with open_checkpoint(index) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["b", "a"]


def test_the_suffix_of_a_shard_does_not_matter(tmp_path: Path) -> None:
    index = write(tmp_path, {"a": torch.ones(1)}, {"b": torch.ones(2)})
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "second")
    index.write_text(index.read_text().replace(shard.name, "second"))
    assert_same(read(tmp_path), {"a": torch.ones(1), "b": torch.ones(2)})


def test_prefixes_of_wrappers_are_stripped_if_all_shards_have_them(tmp_path: Path) -> None:
    """Not if all names of one shard alone have them."""
    index = write(tmp_path / "all", {"module.a": torch.ones(1)}, {"module.b": torch.ones(2)})
    with open_checkpoint(index) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["a", "b"]
        assert checkpoint.spec.prefix == "module."
    index = write(tmp_path / "one", {"module.a": torch.ones(1)}, {"b": torch.ones(2)})
    with open_checkpoint(index) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["module.a", "b"]
        assert checkpoint.spec.prefix == ""


def test_a_given_prefix_is_stripped_from_all_shards(tmp_path: Path) -> None:
    """A shard without any name that has it is no error."""
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
    assert_same(read(index), {"a": torch.zeros(3), "b": torch.ones(3)})


@pytest.mark.guarantee("missing-shards")
def test_every_missing_shard_is_named_at_once(tmp_path: Path) -> None:
    index = write(tmp_path, *({f"w{number}": torch.ones(1)} for number in range(5)))
    for number in (2, 4):
        (tmp_path / f"model-{number:05}-of-00005.safetensors").unlink()
    missing = "'model-00002-of-00005.safetensors', 'model-00004-of-00005.safetensors'"
    assert refusal(tmp_path) == f"{index}: 2 shards of 5 missing: {missing}. Copy them next to the index."


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
        message = refusal(path)
        assert message.startswith(f"{index}: ")
        assert ("cannot be the name of a file" in message) == ("x" in name)


# --- an index and its shards that don't fit ---


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A good folder of two shards, and its index."""
    folder = tmp_path / "model"
    folder.mkdir()
    return folder, layouts.sharded(folder, tokens(1))


OUTSIDE = ["../secret.safetensors", "{absolute}", "..\\secret.safetensors", "a/../../secret.safetensors", "..", ".", "",
           "./../secret.safetensors", "secret.safetensors\0", "C:\\secret.safetensors", "\\\\host\\s.safetensors",
           "file://{absolute}", "~/secret.safetensors"]  # fmt: skip


@pytest.mark.guarantee("no-file-outside")
@pytest.mark.parametrize("shard", OUTSIDE)
def test_an_index_reaches_no_file_outside_its_folder(
    shards: tuple[Path, dict[str, Any]], tmp_path: Path, shard: str
) -> None:
    """A downloaded index reads a file of the user's own."""
    folder, index = shards
    secret = tmp_path / "secret.safetensors"
    save_file({"lm_head.weight": torch.rand(6, 4)}, secret)
    index["weight_map"]["lm_head.weight"] = shard.format(absolute=secret)
    layouts.write_index(folder, index)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'model.safetensors.index.json'}: expected the name of a file next to it, ")
    assert message.endswith("Don't trust it.")


FIRST, SECOND = layouts.shard_names("model", "safetensors", 2)
WEIGHT_MAP = dict(zip(tokens(1), (FIRST, SECOND, FIRST, SECOND), strict=True))
NO_INDEX, NO_MAP = "expected a shard index in JSON, got other text: ", "expected a shard index {"
NO_NAME = "expected file names in weight_map, got other values"
OTHER = "expected safetensors shards, as its own name says, got "
BROKEN: dict[str, tuple[object, str]] = {
    "a tensor that its shard lacks": ({"weight_map": WEIGHT_MAP | {"extra.weight": FIRST}}, "lacks 'extra.weight'"),
    "a tensor in the other shard": (
        {"weight_map": WEIGHT_MAP | {"model.embed.weight": SECOND}}, "lacks 'model.embed.weight'"),
    "a tensor that the index does not list": (
        {"weight_map": dict(list(WEIGHT_MAP.items())[:3])}, "contains 'lm_head.weight', which the index does not list"),
    "a .bin shard in a safetensors index": (
        {"weight_map": WEIGHT_MAP | {"lm_head.weight": "pytorch_model.bin"}}, f"{OTHER}'pytorch_model.bin'"),
    "an optimizer as a shard": (
        {"weight_map": WEIGHT_MAP | {"exp_avg": "optimizer.pt"}}, "optimizer.pt: expected a state dict, got"),
    "the index itself": (
        {"weight_map": WEIGHT_MAP | {"lm_head.weight": "model.safetensors.index.json"}}, "got something else"),
    "no weight_map": ({"metadata": {}}, NO_MAP),
    "an empty weight_map": ({"weight_map": {}}, NO_MAP),
    "a list": ([], NO_MAP),
    "a weight_map that is a list": ({"weight_map": [FIRST]}, NO_MAP),
    "a number as file": ({"weight_map": WEIGHT_MAP | {"lm_head.weight": 1}}, NO_NAME),
    "nothing as file": ({"weight_map": WEIGHT_MAP | {"lm_head.weight": None}}, NO_NAME),
    "a list as file": ({"weight_map": WEIGHT_MAP | {"lm_head.weight": [FIRST]}}, NO_NAME),
    "no JSON": ("weight_map: {}", f"{NO_INDEX}Expecting value"),
    "nothing": ("", f"{NO_INDEX}Expecting value"),
    "cut off": (json.dumps({"weight_map": WEIGHT_MAP})[:-20], NO_INDEX),
    "deep": ("[" * 100_000, NO_INDEX),
    "a huge number": ('{"weight_map": ' + "9" * 100_000 + "}", f"{NO_INDEX}Exceeds the limit"),
    "an odd name": ({"weight_map": WEIGHT_MAP | {"lm_head.weight": "-"}}, "1 shard of 3 missing: '-'"),
    "a name of two lines": (
        {"weight_map": WEIGHT_MAP | {"lm_head.weight": "nul\n.safetensors"}}, r"of 3 missing: 'nul\n.safetensors'"),
    "a lone surrogate": ('{"weight_map": {"\\ud800": "' + FIRST + '"}}', ""),
}  # fmt: skip


@pytest.mark.guarantee("index-damage")
@pytest.mark.parametrize("change", BROKEN)
def test_an_index_that_does_not_fit_its_shards_is_refused(shards: tuple[Path, dict[str, Any]], change: str) -> None:
    """Otherwise the average would silently lack a tensor."""
    folder, index = shards
    assert index["weight_map"] == WEIGHT_MAP
    save(tokens(2), folder / "pytorch_model.bin")
    save(adam(), folder / "optimizer.pt")
    content, fact = BROKEN[change]
    layouts.write_index(folder, content)
    message = refusal(folder)
    assert str(folder) in message
    assert fact in message


@pytest.mark.guarantee("index-damage")
@pytest.mark.parametrize("content", [b"\xff\xfe{}", b'{"weight_map": {"\xff": "a"}}', b"\0" * 64])
def test_an_index_that_is_no_text_is_refused(shards: tuple[Path, dict[str, Any]], content: bytes) -> None:
    (shards[0] / "model.safetensors.index.json").write_bytes(content)
    assert NO_INDEX in refusal(shards[0])


@pytest.mark.guarantee("index-damage")
def test_a_tensor_in_two_shards_is_refused(shards: tuple[Path, dict[str, Any]]) -> None:
    """Which of the two is averaged depends on the order of reading."""
    folder, index = shards
    second = index["weight_map"]["model.layers.0.weight"]
    both = {name: tensor for name, tensor in tokens(1).items() if index["weight_map"][name] == second}
    save_file({**both, "model.embed.weight": torch.rand(6, 4)}, folder / second)
    assert refusal(folder).endswith(
        f"the shard '{second}' and another one both contain 'model.embed.weight'. Save or copy the checkpoint again."
    )


def test_a_shard_that_is_no_file_is_refused(shards: tuple[Path, dict[str, Any]]) -> None:
    folder, index = shards
    shard = folder / index["weight_map"]["lm_head.weight"]
    shard.unlink()
    shard.mkdir()
    assert shard.name in refusal(folder)


def test_shards_without_their_index_are_refused(tmp_path: Path, in_process: Command) -> None:
    """Each shard counted as a checkpoint of a run."""
    layouts.sharded(tmp_path, tokens(1))
    (tmp_path / "model.safetensors.index.json").unlink()
    code, _, errors = in_process("average", tmp_path, "-o", tmp_path / "o.safetensors", "--bn", "keep")
    assert code in (3, 4), errors


@pytest.mark.guarantee("shard-links")
def test_links_inside_the_folder_are_followed(shards: tuple[Path, dict[str, Any]]) -> None:
    folder, index = shards
    name = index["weight_map"]["lm_head.weight"]
    (folder / name).rename(folder / "stored")
    (folder / name).symlink_to("stored")
    assert_same(read(folder), tokens(1))


@pytest.mark.parametrize("make", [layouts.lfs_pointer, layouts.html_page])
def test_a_shard_that_is_no_checkpoint_is_named(
    shards: tuple[Path, dict[str, Any]], make: Callable[[Path], Path]
) -> None:
    """A clone without git-lfs: the index is there, and the shards are pointers."""
    folder, index = shards
    name = index["weight_map"]["lm_head.weight"]
    make(folder / name)
    assert name in refusal(folder)
