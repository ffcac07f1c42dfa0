"""OUT.sha256: what `sha256sum -c` understands, published like the output, and never instead of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import ckpt_avg
from ckpt_avg.errors import OutputError
from ckpt_avg.output.checksum import checksum_line, checksum_path

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"step_{step}.pt" for step in (1, 2)]
    for path, value in zip(paths, (1.0, 3.0), strict=True):
        torch.save({"w": torch.full((5,), value)}, path)
    return paths


def sources_of(output: Path) -> list[dict[str, object]]:
    with safe_open(output, framework="pt") as reader:
        found: list[dict[str, object]] = json.loads(reader.metadata()["ckpt_avg.sources"])
        return found


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
@pytest.mark.parametrize("name", ["out.safetensors", "a b", "back\\slash", "new\nline", "-c", os.fsdecode(b"\xff")])
def test_sha256sum_finds_the_output_whole(tmp_path: Path, inputs: list[Path], name: str) -> None:
    output = tmp_path / name
    result = ckpt_avg.average(inputs, output, sha256=True)
    assert result.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    check = ["sha256sum", "--strict", "-c", "--", f"./{name}.sha256"]
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    output.write_bytes(output.read_bytes()[:-1])
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_the_line_is_that_of_sha256sum() -> None:
    assert checksum_line("a.safetensors", "ab") == b"ab  a.safetensors\n"
    assert checksum_line("a\\b\nc", "ab") == b"\\ab  a\\\\b\\nc\n"


def test_the_sources_are_digested_too(tmp_path: Path, inputs: list[Path]) -> None:
    ckpt_avg.average(inputs, tmp_path / "plain.safetensors")
    ckpt_avg.average(inputs, tmp_path / "out.safetensors", sha256=True)
    found = [source["sha256"] for source in sources_of(tmp_path / "out.safetensors")]
    assert found == [{path.name: hashlib.sha256(path.read_bytes()).hexdigest()} for path in inputs]
    assert all("sha256" not in source for source in sources_of(tmp_path / "plain.safetensors"))


def test_an_existing_checksum_is_kept_and_nothing_is_written(
    tmp_path: Path, inputs: list[Path], in_process: Run
) -> None:
    output = tmp_path / "out.safetensors"
    checksum_path(output).write_text("mine")
    code, _, err = in_process("average", *inputs, "-o", output, "--sha256")
    assert code == 5
    assert "--sha256" in err
    assert "out.safetensors.sha256: exists already" in err
    assert checksum_path(output).read_text() == "mine"
    assert not output.exists()
    assert in_process("average", *inputs, "-o", output, "--sha256", "--overwrite")[0] == 0
    assert checksum_path(output).read_text() != "mine"


def test_a_checksum_of_an_earlier_output_is_pointed_out(tmp_path: Path, inputs: list[Path]) -> None:
    """If it failed, `sha256sum -c` would fail later, and nobody would know why."""
    output = tmp_path / "out.safetensors"
    ckpt_avg.average(inputs, output, sha256=True)
    result = ckpt_avg.average(inputs, output, overwrite=True)
    assert any("out.safetensors.sha256 is of an earlier output" in notice for notice in result.notices)


def test_a_checkpoint_of_that_name_is_not_replaced(tmp_path: Path, inputs: list[Path], in_process: Run) -> None:
    taken = checksum_path(tmp_path / "out.safetensors")
    inputs[0].rename(taken)
    before = taken.read_bytes()
    arguments = ("average", taken, inputs[1], "-o", tmp_path / "out.safetensors", "--sha256", "--overwrite")
    code, _, err = in_process(*arguments)
    assert code == 2
    assert "one of the checkpoints" in err
    assert taken.read_bytes() == before


def test_a_link_to_the_output_is_not_written_through(tmp_path: Path, inputs: list[Path], in_process: Run) -> None:
    """If it failed, the checksum would replace the output that was just published, with exit 0."""
    output = tmp_path / "out.safetensors"
    checksum_path(output).symlink_to(output)
    code, _, err = in_process("average", *inputs, "-o", output, "--sha256", "--overwrite")
    assert code == 2
    assert "got a link to the output" in err
    assert not output.exists()


def test_a_report_does_not_take_the_checksums_path(tmp_path: Path, inputs: list[Path], in_process: Run) -> None:
    checksum_path(tmp_path / "out.safetensors").symlink_to(tmp_path / "report.json")
    arguments = ("average", *inputs, "-o", tmp_path / "out.safetensors", "--sha256", "--overwrite")
    code, _, err = in_process(*arguments, "--report", tmp_path / "report.json")
    assert code == 2
    assert "the checksum's own path" in err


def test_where_the_checksum_fails_the_output_stands(
    tmp_path: Path, inputs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.safetensors"
    from ckpt_avg.output import checksum

    def fail(*_: object) -> None:
        raise OutputError("no room.")

    monkeypatch.setattr(checksum, "atomic_output", fail)
    with pytest.raises(OutputError, match=r"--sha256: no room\. All else was done: the output is published"):
        ckpt_avg.average(inputs, output, sha256=True)
    assert ckpt_avg.verify(output).tensors == 1


def test_a_dry_run_reads_and_writes_none(tmp_path: Path, inputs: list[Path]) -> None:
    result = ckpt_avg.average(inputs, tmp_path / "out.safetensors", sha256=True, dry_run=True)
    assert (result.sha256, result.data_digest) == (None, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1.pt", "step_2.pt"]
