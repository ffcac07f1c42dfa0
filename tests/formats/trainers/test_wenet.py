"""WeNet: the YAML file next to the weights."""

from __future__ import annotations

from pathlib import Path

import layouts
from formats.reading import Command, listed

from ckpt_avg import open_checkpoint


def test_metrics_are_losses_and_no_settings(tmp_path: Path) -> None:
    """``accum_grad`` and other settings in the same file offered as metrics."""
    saved = layouts.wenet(tmp_path).checkpoints[0]
    with open_checkpoint(saved.path) as checkpoint:
        assert set(checkpoint.spec.record.metrics) == {"cv_loss", "loss", "acc", "loss_ctc"}


def test_the_yaml_runs_nothing(tmp_path: Path, in_process: Command) -> None:
    """A tag that names a function, as PyYAML's unsafe loader would call it."""
    (tmp_path / "run").mkdir()
    run = layouts.wenet(tmp_path / "run")
    evil = f"!!python/object/apply:os.system ['touch {tmp_path / 'touched'}']"
    path = run.checkpoints[0].path.with_suffix(".yaml")
    path.write_text(f"cv_loss: {evil}\nevil: {evil}\n" + path.read_text())
    (run.folder / "9.yaml").write_bytes(b"\xff\xfe\0: [\n" + b"[" * 100_000)
    listed(in_process, run.folder)
    assert not (tmp_path / "touched").exists()
