"""What `--push-to-hub` refuses before the work begins; tests/system/trainers uploads with huggingface_hub itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import ckpt_avg
from ckpt_avg.errors import UsageError
from ckpt_avg.output.hub import refuse_unusable


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("model", "Write ORG/NAME"),
        ("org/a/b", "Write ORG/NAME"),
        ("org/a b", "Write ORG/NAME"),
        ("org/a--b", "Write ORG/NAME"),
        ("org/-a", "Write ORG/NAME"),
        ("org/a.git", "Write ORG/NAME"),
        ("", "Write ORG/NAME"),
        ("https://huggingface.co/org/model", "Use --push-to-hub org/model."),
    ],
)
def test_what_is_no_name_of_a_repository_is_refused(name: str, advice: str) -> None:
    """If it failed, the Hub would refuse it after the work."""
    with pytest.raises(UsageError, match="is not the name of a repository") as error:
        refuse_unusable(name, print)
    assert advice in str(error.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_without_huggingface_hub_nothing_begins(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'ckpt-avg\[hub\]'"):
        ckpt_avg.average(checkpoint, tmp_path / "release", push_to_hub="org/name")
    assert not (tmp_path / "release").exists()


def test_options_of_a_folder_are_refused_for_a_file(tmp_path: Path, checkpoint: Path) -> None:
    """If it failed, the user would get one file, or a folder called x.safetensors."""
    with pytest.raises(UsageError, match=r"is one file, and --max-shard-size needs a folder\. Use -o .*/x/\."):
        ckpt_avg.average(checkpoint, tmp_path / "x.safetensors", max_shard_size="5GB")
    (tmp_path / "y").touch()
    with pytest.raises(UsageError, match=r"Use -o .*/y-folder/\."):
        ckpt_avg.average(checkpoint, tmp_path / "y", max_shard_size="5GB")
    with pytest.raises(UsageError, match="Add --push-to-hub"):
        ckpt_avg.average(checkpoint, tmp_path / "x", private=True)


@pytest.mark.parametrize(
    ("size", "problem"),
    [("5", "out of range"), (999, "out of range"), ("5 parsecs", "is not a size"), ("9999999TB", "large")],
)
def test_sizes_that_are_none_are_refused(tmp_path: Path, checkpoint: Path, size: str | int, problem: str) -> None:
    with pytest.raises(UsageError, match=f"--max-shard-size.*{problem}"):
        ckpt_avg.average(checkpoint, tmp_path / "x", max_shard_size=size)
