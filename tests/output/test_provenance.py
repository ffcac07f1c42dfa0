"""What an output says of where it comes from: complete, reproducible, and readable again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.test_sharded import write
from safetensors import safe_open
from safetensors.torch import save_file

import ckpt_avg
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.output import provenance


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as reader:
        found: dict[str, str] = reader.metadata()
        return found


def sources(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(metadata(path)["ckpt_avg.sources"])
    return found


def test_the_sources_of_the_real_run(tmp_path: Path, run_folder: Path) -> None:
    ckpt_avg.average(run_folder, tmp_path / "out.safetensors", last=2, bn="keep")
    first, last = sources(tmp_path / "out.safetensors")
    assert (first["name"], last["name"], last["epoch"]) == ("epoch_19.pt", "epoch_20.pt", 20)
    assert last["bytes"] == (run_folder / "epoch_20.pt").stat().st_size
    assert last["metrics"]["accuracy"] == pytest.approx(0.99)
    assert re.fullmatch("[0-9a-f]{64}", last["header_sha256"])


def test_keys_are_sorted_and_nothing_tells_when_or_where(tmp_path: Path, run_folder: Path) -> None:
    """If it failed, two runs over the same inputs would give files that differ."""
    contents = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        copies = []
        for name in ("epoch_19.pt", "epoch_20.pt"):
            copies.append(tmp_path / folder / name)
            copies[-1].write_bytes((run_folder / name).read_bytes())
            os.utime(copies[-1], (len(folder), len(folder)))
        ckpt_avg.average(copies, tmp_path / folder / "out.safetensors", bn="keep", threads=len(contents) + 1)
        contents.append((tmp_path / folder / "out.safetensors").read_bytes())
    assert contents[0] == contents[1]
    (length,) = struct.unpack("<Q", contents[0][:8])
    keys = list(json.loads(contents[0][8 : 8 + length])["__metadata__"])
    assert keys == sorted(keys)
    assert str(tmp_path).encode() not in contents[0]


def test_the_digest_of_each_kind_of_header(tmp_path: Path) -> None:
    """Of a safetensors header's JSON, of a torch file's pickle, of an index and the headers that it leads to."""
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    index = write(tmp_path / "sharded", {"w": torch.ones(3)})
    content = (tmp_path / "a.safetensors").read_bytes()
    header = content[8 : 8 + struct.unpack("<Q", content[:8])[0]]
    import zipfile

    pickle = zipfile.ZipFile(tmp_path / "a.pt").read("a/data.pkl")
    old = (tmp_path / "old.pt").read_bytes()
    shard = hashlib.sha256(header).hexdigest()
    expected = {
        "a.safetensors": header,
        "a.pt": pickle,
        "old.pt": old[: len(old) - 8 - 12],
        "sharded": (hashlib.sha256(index.read_bytes()).hexdigest() + shard).encode(),
    }
    for name, digested in expected.items():
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert checkpoint.spec.digest == hashlib.sha256(digested).hexdigest(), name


def test_the_options_that_decide_the_bytes_can_be_read_again(tmp_path: Path) -> None:
    for step in (1, 2):
        torch.save({"ema": {"m.w": torch.ones(3) * step}, "n": step}, tmp_path / f"step_{step}.pt")
    options: dict[str, Any] = {"dtype": "bfloat16", "non_float": "last", "state_key": "ema", "strip_prefix": "m"}
    ckpt_avg.average(tmp_path, tmp_path / "out.safetensors", allow_nonfinite=True, **options)
    found = provenance.recorded_options(metadata(tmp_path / "out.safetensors"))
    assert found == {"allow_nonfinite": True, "ema": False, **options}


def test_names_and_metrics_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    """If it failed, a metric's name in an untrusted checkpoint could stop the run at its end."""
    paths = [tmp_path / os.fsdecode(b"step_%d_\xff.pt" % step) for step in (1, 2)]
    for path in paths:
        torch.save({"model": {"w": torch.ones(2)}, "metrics": {"\ud800loss": 0.5, "é": 1.0}}, path)
    ckpt_avg.average(paths, tmp_path / "out.safetensors")
    assert [source["name"] for source in sources(tmp_path / "out.safetensors")] == [
        "step_1_\\xff.pt",
        "step_2_\\xff.pt",
    ]
    assert ckpt_avg.verify(tmp_path / "out.safetensors", sources=paths).checkpoints == tuple(paths)


def test_no_more_than_some_metrics_are_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        torch.save(
            {"model": {"w": torch.ones(2)}, "metrics": {f"m{n:04}": 1.0 for n in range(5000)}}, tmp_path / f"{step}.pt"
        )
    ckpt_avg.average([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "out.safetensors")
    kept = sources(tmp_path / "out.safetensors")[0].get("metrics", {})
    assert list(kept) == [f"m{n:04}" for n in range(32)]


def test_what_is_recorded_of_very_many_files_can_be_read_again(tmp_path: Path) -> None:
    """If it failed, an output could be refused here that was written here: its header has a great many colons."""
    checkpoint = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, checkpoint)
    options = {"dtype": "keep", "strip_prefix": None}
    many = {f"model-{number:06}.safetensors": "0" * 64 for number in range(150_000)}
    with open_checkpoint(checkpoint) as opened:
        recorded = provenance.make_metadata([opened], options, batch_norm=None, digests=[many])
    save_file({"w": torch.ones(2)}, tmp_path / "out.safetensors", recorded)
    with open_checkpoint(tmp_path / "out.safetensors") as opened:
        assert opened.spec.metadata["ckpt_avg.sources"].count(":") > 150_000


def test_a_source_cannot_plant_digests(tmp_path: Path) -> None:
    """The metadata of a copied file is kept, except what would replace the copy's own digests."""
    planted = {
        "ckpt_avg.header_digest": "sha256:" + "1" * 64,
        "ckpt_avg.data_digest": "x",
        "note": '"ckpt_avg.header_digest":"sha256:',
    }
    save_file({"w": torch.ones(2), "ckpt_avg.header_digest": torch.ones(1)}, tmp_path / "a.safetensors", planted)
    ckpt_avg.average(tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    assert metadata(tmp_path / "out.safetensors")["note"] == planted["note"]
    assert ckpt_avg.verify(tmp_path / "out.safetensors").tensors == 2
