"""`check`: the checkpoints that `average` would use, compared by their headers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_avg import average, check
from ckpt_avg.errors import CheckpointFormatError, CkptAvgError, IncompatibleError, UsageError

A = {"w": torch.ones(2, 3), "b": torch.ones(2), "n": torch.tensor(1)}


def write(folder: Path, *contents: dict[str, torch.Tensor]) -> None:
    for number, tensors in enumerate(contents):
        save_file(tensors, folder / f"step_{number}.safetensors")


def test_check_uses_the_checkpoints_that_average_uses(tmp_path: Path) -> None:
    """With ``--last``, a copy that only one of them skips would move the choice of the other."""
    for name, value in (("step_1", 1.0), ("step_2", 2.0), ("step_3", 3.0), ("step_3_copy", 3.0)):
        save_file({"w": torch.full((3,), value)}, tmp_path / f"{name}.safetensors")
    averaged = average([tmp_path], tmp_path / "out.safetensors", last=2, dry_run=True).checkpoints
    assert [path.name for path in averaged] == ["step_2.safetensors", "step_3.safetensors"]
    assert check([tmp_path], last=2).checkpoints == tuple(map(str, averaged))


def test_check_selects_as_average_does(tmp_path: Path) -> None:
    write(tmp_path, {"old": torch.ones(1)}, A, {"odd": torch.ones(1)}, {name: value + 1 for name, value in A.items()})
    assert not check([tmp_path]).compatible
    for options in ({"every": 2, "last": 2}, {"include": ["step_[13]*"]}, {"exclude": ["step_[02].*"]}):
        report = check([tmp_path], **options)  # type: ignore[arg-type]
        assert report.compatible
        assert len(report.checkpoints) == 2


def test_check_passes_the_state_key_on(tmp_path: Path) -> None:
    for number in (1, 2):
        torch.save({"a": {"w": torch.ones(number)}, "b": {"w": torch.ones(2)}}, tmp_path / f"{number}.pt")
    assert check([tmp_path], state_key="b").compatible
    assert not check([tmp_path], state_key="a").compatible


@pytest.mark.parametrize(
    ("options", "kind", "code"),
    [
        ({"last": 9}, IncompatibleError, 4),
        ({"last": 0}, UsageError, 2),
        ({"include": ["nothing"]}, IncompatibleError, 4),
        ({"state_key": "model"}, CheckpointFormatError, 3),
    ],
)
def test_what_cannot_be_checked(
    tmp_path: Path, options: dict[str, object], kind: type[CkptAvgError], code: int
) -> None:
    write(tmp_path, A, A)
    with pytest.raises(kind) as caught:
        check([tmp_path], **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == code
