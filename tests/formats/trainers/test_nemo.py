"""NeMo: archives are skipped in a run folder, and refused by name."""

from __future__ import annotations

import gzip
from pathlib import Path

import layouts
from formats.reading import Command, assert_same, listed, read, refusal


def test_an_archive_is_named_with_the_way_to_unpack_it(tmp_path: Path, in_process: Command) -> None:
    layouts.nemo(tmp_path / "model.nemo")
    layouts.save(layouts.state(1), tmp_path / "epoch_1.ckpt")
    (skipped,) = listed(in_process, tmp_path)["skipped"]
    for said in (skipped["reason"], refusal(tmp_path / "model.nemo")):
        assert "NeMo archive" in said
        assert "tar xf" in said


def test_a_name_does_not_make_an_archive(tmp_path: Path) -> None:
    """The first bytes decide."""
    assert "an HTML or XML page" in refusal(layouts.html_page(tmp_path / "model.nemo"))
    path = layouts.save(layouts.state(1), tmp_path / "weights.nemo")
    assert_same(read(path), layouts.state(1))
    assert "a gzip file" in refusal(gzipped(tmp_path / "weights.pt"))
    assert "a NeMo archive" in refusal(gzipped(tmp_path / "other.nemo"))


def gzipped(path: Path) -> Path:
    path.write_bytes(gzip.compress(b"x" * 100))
    return path
