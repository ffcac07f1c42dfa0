"""NeMo: archives are skipped in a run folder, and refused by name."""

from __future__ import annotations

from pathlib import Path

import layouts
from formats.reading import Command, listed, refusal


def test_an_archive_is_named_with_the_way_to_unpack_it(tmp_path: Path, in_process: Command) -> None:
    layouts.nemo(tmp_path / "model.nemo")
    layouts.save(layouts.state(1), tmp_path / "epoch_1.ckpt")
    (skipped,) = listed(in_process, tmp_path)["skipped"]
    for said in (skipped["reason"], refusal(tmp_path / "model.nemo")):
        assert "NeMo archive" in said
        assert "tar xf" in said
