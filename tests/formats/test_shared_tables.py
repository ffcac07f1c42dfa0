"""Headers that are the same byte for byte are parsed once, and nothing of one file is said of another."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from formats.test_sharded import write
from safetensors.torch import load_file, save_file

import ckpt_avg
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats import safetensors_header as safetensors
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.runs.compatibility import compare

State = dict[str, torch.Tensor]


def state(value: float) -> State:
    return {"module.a": torch.full((3, 2), value), "module.b": torch.full((5,), -value)}


def test_equal_headers_share_their_table_and_no_values(tmp_path: Path) -> None:
    paths = [tmp_path / f"step_{step}.safetensors" for step in (1, 2, 4)]
    for path, value in zip(paths, (1.0, 2.0, 6.0), strict=True):
        save_file(state(value), path, metadata={"format": "pt"})
    with open_checkpoint(paths[0]) as first, open_checkpoint(paths[1]) as second:
        assert first.spec.tensors is second.spec.tensors
        assert (first.spec.path, second.spec.path) == (paths[0], paths[1])
        assert (first.spec.record.step, second.spec.record.step) == (1, 2)
        assert first.spec.prefix == second.spec.prefix == "module."
    ckpt_avg.average(paths, tmp_path / "out.safetensors")
    mean = load_file(tmp_path / "out.safetensors")
    assert torch.equal(mean["a"], torch.full((3, 2), 3.0))
    assert torch.equal(mean["b"], torch.full((5,), -3.0))


def test_a_header_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for number, path in enumerate(paths):
        save_file(state(number), path)
    parsed = []
    parse = safetensors.parse_header
    monkeypatch.setattr(safetensors, "parse_header", lambda file, header: parsed.append(file) or parse(file, header))
    assert ckpt_avg.check(paths).compatible
    assert len(parsed) == 1


def test_what_differs_is_not_shared(tmp_path: Path) -> None:
    plain, marked, longer = (tmp_path / f"{name}.safetensors" for name in ("plain", "marked", "longer"))
    save_file(state(1), plain, metadata={"format": "pt"})
    save_file(state(1), marked, metadata={"format": "pt", "ckpt_avg.method": "mean"})
    save_file({**state(1), "module.b": torch.ones(6)}, longer, metadata={"format": "pt"})
    with open_checkpoint(plain) as a, open_checkpoint(marked) as b, open_checkpoint(longer) as c:
        assert not a.spec.averaged
        assert b.spec.averaged
        assert "ckpt_avg.method" not in a.spec.metadata
        assert not compare([a.spec, c.spec]).compatible
    save_file({"enc.a": torch.ones(2), "enc.b": torch.ones(2)}, plain)
    with open_checkpoint(plain) as a, open_checkpoint(plain, strip_prefix="enc") as b:
        assert list(a.spec.tensors) == ["enc.a", "enc.b"]
        assert list(b.spec.tensors) == ["a", "b"]


@pytest.mark.parametrize("change", [-1, 1])
def test_the_same_header_in_a_file_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    whole, damaged = tmp_path / "whole.safetensors", tmp_path / "damaged.safetensors"
    save_file(state(1), whole)
    content = whole.read_bytes()
    damaged.write_bytes(content[:change] if change < 0 else content + b"\0")
    with open_checkpoint(whole), pytest.raises(CheckpointFormatError, match="damaged"):
        open_checkpoint(damaged)


def test_a_damaged_file_is_refused_each_time_with_its_own_name(tmp_path: Path) -> None:
    save_file(state(1), tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes().replace(b"[3,2]", b"[3,3]")
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointFormatError, match=f"/{name}: tensor"):
            open_checkpoint(tmp_path / name)


def test_no_table_outlives_its_checkpoints(tmp_path: Path) -> None:
    save_file(state(1), tmp_path / "a.safetensors")
    folder = write(tmp_path / "sharded", {"a": torch.ones(2)}, {"b": torch.ones(3)}).parent
    for path in (tmp_path / "a.safetensors", folder):
        with open_checkpoint(path) as checkpoint:
            table = weakref.ref(checkpoint.spec.tensors)
            assert table() is not None
        del checkpoint
        gc.collect()
        assert table() is None


def test_sharded_checkpoints_share_the_whole(tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in (10, 20)]
    for folder, value in zip(folders, (1.0, 4.0), strict=True):
        write(folder, {"a": torch.full((2,), value)}, {"b": torch.full((3,), -value)})
    with open_checkpoint(folders[0]) as first, open_checkpoint(folders[1]) as second:
        assert first.spec.tensors is second.spec.tensors
        assert {tensor.file for tensor in first.spec.tensors.values()} == {0, 1}
    ckpt_avg.average(folders, tmp_path / "out.safetensors")
    mean = load_file(tmp_path / "out.safetensors")
    assert torch.equal(mean["a"], torch.full((2,), 2.5))
    assert torch.equal(mean["b"], torch.full((3,), -2.5))


def test_shards_that_swapped_their_files_do_not_share(tmp_path: Path) -> None:
    first, second = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    write(first, {"a": torch.ones(2)}, {"b": torch.ones(3)})
    write(second, {"b": torch.full((3,), 5.0)}, {"a": torch.full((2,), 3.0)})
    ckpt_avg.average([first, second], tmp_path / "out.safetensors")
    mean = load_file(tmp_path / "out.safetensors")
    assert torch.equal(mean["a"], torch.full((2,), 2.0))
    assert torch.equal(mean["b"], torch.full((3,), 3.0))


def test_an_index_that_lies_about_its_shards_is_refused_beside_an_honest_one(tmp_path: Path) -> None:
    honest, lying = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    for folder in (honest, lying):
        index = write(folder, {"a": torch.ones(2)}, {"b": torch.ones(3)})
    index.write_text(index.read_text().replace('"b"', '"c"'))
    with open_checkpoint(honest), pytest.raises(CheckpointFormatError, match="checkpoint-2"):
        open_checkpoint(lying)
