"""icefall: exports among the checkpoints."""

from __future__ import annotations

from pathlib import Path

import layouts
from formats.reading import Command, listed, names


def test_an_export_among_the_checkpoints_does_not_undo_their_order(tmp_path: Path, in_process: Command) -> None:
    """A file without a step, as icefall's export.py leaves one: --last then takes it, or others than the last."""
    trained = [saved.path.name for saved in layouts.icefall(tmp_path).checkpoints]
    layouts.save({"model": layouts.state(98)}, tmp_path / "pretrained.pt")
    layouts.torchscript(tmp_path / "jit_script.pt")
    assert names(listed(in_process, tmp_path)["checkpoints"]) == trained
