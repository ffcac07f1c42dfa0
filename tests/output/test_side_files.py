"""Reports and pictures: never over a checkpoint, the output or each other, and whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_avg import average
from ckpt_avg.errors import OutputError, UsageError
from ckpt_avg.output.side_files import SideFiles, as_bytes

JSON = (".json",)
PICTURES = (".png", ".svg", ".pdf")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_file({"w": torch.zeros(2)}, folder / "step_1.safetensors")
    torch.save({"w": torch.ones(2)}, folder / "step_2.pt")
    return folder


def checked(path: Path | str, *sources: Path, beside: Path | str | None = None, overwrite: bool = True) -> SideFiles:
    files = SideFiles(sources, beside=beside, overwrite=overwrite)
    files.check("--report", path, JSON)
    return files


def write(path: Path, contents: bytes, *sources: Path, overwrite: bool = True) -> None:
    checked(path, *sources, overwrite=overwrite).publish("--report", lambda: contents)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_file(tmp_path: Path, run: Path, overwrite: bool) -> None:
    path = tmp_path / "report.json"
    files = checked(path, run, overwrite=overwrite)
    assert not path.exists(), "the check itself writes nothing"
    files.publish("--report", lambda: b"{}\n")
    assert path.read_bytes() == b"{}\n"


def test_what_was_not_asked_for_is_neither_made_nor_written(tmp_path: Path, run: Path) -> None:
    """Without --plot nothing is drawn."""
    files = SideFiles([run], beside=None, overwrite=False)
    files.check("--plot", None, PICTURES)
    files.publish("--plot", lambda: pytest.fail("made"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_empty_file_can_be_published(tmp_path: Path, run: Path) -> None:
    write(tmp_path / "empty.json", b"", run)
    assert (tmp_path / "empty.json").read_bytes() == b""


def test_a_document_is_json_in_a_line_based_file() -> None:
    assert as_bytes({"a": [1, None], "ä": "\u2028"}).endswith(b"}\n")
    assert json.loads(as_bytes({"a": [1, None], "ä": "\u2028"})) == {"a": [1, None], "ä": "\u2028"}


def test_an_existing_file_is_kept_unless_asked(tmp_path: Path, run: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(OutputError, match="--overwrite"):
        checked(path, run, overwrite=False)
    assert path.read_text() == "old"
    write(path, b"new", run)
    assert path.read_text() == "new"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, run: Path) -> None:
    """Between the check and the end lie hours: another run's report must not go."""
    path = tmp_path / "report.json"
    files = checked(path, run, overwrite=False)
    path.write_text("theirs")
    with pytest.raises(OutputError, match="All else was done"):
        files.publish("--report", lambda: b"ours")
    assert path.read_text() == "theirs"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["report.json", "run"]


@pytest.mark.parametrize(
    ("path", "suffixes"),
    [("a.json", JSON), ("a.JSON", JSON), ("a b.c.json", JSON), ("x.Png", PICTURES), (".x.svg", PICTURES)],
)
def test_a_suffix_in_any_case(
    path: str, suffixes: tuple[str, ...], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    SideFiles([run], beside=None, overwrite=False).check("--plot", path, suffixes)


@pytest.mark.parametrize("path", ["a.jpg", "a", "a.png.gz", "png", ".png", "a.", "run.png/", "a.json", ""])
def test_another_suffix_is_refused_with_those_that_are_known(path: str, run: Path) -> None:
    """Found before hours of work; a hidden file ``.png`` has no suffix."""
    with pytest.raises(UsageError) as caught:
        SideFiles([run], beside=None, overwrite=False).check("--plot", path, PICTURES)
    assert str(caught.value) == f"--plot {path}: expected a name that ends in .png or .svg or .pdf."


@pytest.mark.parametrize("kind", ["weights", "an average of ours"])
def test_a_checkpoint_is_never_replaced(run: Path, kind: str) -> None:
    """Whatever its suffix is, and however it is spelt."""
    checkpoint = run / "step_3.json"
    if kind == "weights":
        torch.save({"w": torch.ones(2)}, checkpoint)
    else:
        average([run], checkpoint, device="cpu")
    before = checkpoint.read_bytes()
    for path in (checkpoint, run / ".." / "run" / "step_3.json"):
        with pytest.raises(UsageError, match="one of the checkpoints"):
            checked(path, run / "step_2.pt", checkpoint)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_nor_by_way_of_a_link(tmp_path: Path, run: Path, link: str) -> None:
    path = tmp_path / "report.json"
    (path.symlink_to if link == "symbolic" else path.hardlink_to)(run / "step_2.pt")
    with pytest.raises(UsageError, match="one of the checkpoints"):
        checked(path, run)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_nor_a_file_of_a_checkpoint_folder(tmp_path: Path, name: str) -> None:
    """Without its index or its configuration a folder is no model any more."""
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    (folder / name).write_text("{}")
    with pytest.raises(UsageError):
        checked(folder / name, folder)
    assert (folder / name).read_text() == "{}"


def test_the_name_of_a_shard_index_is_refused(tmp_path: Path, run: Path) -> None:
    """A report of that name would be taken for a checkpoint by the next run over the folder."""
    with pytest.raises(UsageError, match="shard index"):
        checked(tmp_path / "model.safetensors.index.json", run)


def test_an_average_in_the_run_folder_is_no_place_for_a_report(run: Path) -> None:
    """The output may replace last week's average; a report that replaces it has lost a model."""
    average([run], run / "swa.safetensors", device="cpu")
    before = (run / "swa.safetensors").read_bytes()
    with pytest.raises(UsageError):
        checked(run / "swa.safetensors", run)
    assert (run / "swa.safetensors").read_bytes() == before


@pytest.mark.parametrize("spelling", ["swa.json", "./swa.json", "run/../swa.json"])
def test_the_output_itself(tmp_path: Path, run: Path, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the path is spelt, also while there is no such file yet."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"--report {spelling}: is the output's own path"):
        checked(spelling, run, beside=tmp_path / "swa.json")


def test_a_link_to_the_output(tmp_path: Path, run: Path) -> None:
    (tmp_path / "report.json").symlink_to(tmp_path / "swa.safetensors")
    with pytest.raises(UsageError, match="the output's own path"):
        checked(tmp_path / "report.json", run, beside=tmp_path / "swa.safetensors")


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_options_with_one_path(tmp_path: Path, run: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two files would be lost, after all the work is done."""
    monkeypatch.chdir(tmp_path)
    files = SideFiles([run], beside=None, overwrite=overwrite)
    files.check("--report", "a.png", PICTURES)
    with pytest.raises(UsageError, match=r"--plot \./a\.png: is --report's own path"):
        files.check("--plot", "./a.png", PICTURES)


def test_a_folder(tmp_path: Path, run: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UsageError, match="a folder"):
        checked(tmp_path / "folder.json", run)


def test_a_folder_that_does_not_exist(tmp_path: Path, run: Path) -> None:
    """Found before hours of work, not after."""
    with pytest.raises(UsageError, match="does not exist"):
        checked(tmp_path / "reports" / "a.json", run)


@pytest.mark.parametrize("bad", ["folder", "no folder", "exists", "suffix", "checkpoint"])
def test_messages_name_the_option_and_the_path(tmp_path: Path, run: Path, bad: str) -> None:
    """Beside the output there are two more paths on the command line: the message must say which is meant."""
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "exists.json").write_text("")
    torch.save({"w": torch.ones(2)}, run / "step_3.json")
    path = {
        "folder": tmp_path / "folder.json",
        "no folder": tmp_path / "x" / "y.json",
        "exists": tmp_path / "exists.json",
        "suffix": tmp_path / "a.txt",
        "checkpoint": run / "step_3.json",
    }[bad]
    with pytest.raises((UsageError, OutputError)) as caught:
        checked(path, run / "step_2.pt", run / "step_3.json", overwrite=bad != "exists")
    assert str(caught.value).startswith("--report")
    assert str(path) in str(caught.value)


def test_a_refusal_over_a_checkpoint_does_not_speak_of_the_output(run: Path) -> None:
    torch.save({"w": torch.ones(2)}, run / "step_3.json")
    with pytest.raises(UsageError) as caught:
        checked(run / "step_3.json", run / "step_3.json")
    assert "the output is" not in str(caught.value)


def test_a_symbolic_link_is_followed_and_stays(tmp_path: Path, run: Path) -> None:
    """As for the output."""
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "report.json").symlink_to("real.json")
    write(tmp_path / "report.json", b"new", run)
    assert (tmp_path / "report.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def test_a_relative_path_is_fixed_at_the_check(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """User code that changes the current folder does not move the report."""
    monkeypatch.chdir(tmp_path)
    files = checked("report.json", run)
    monkeypatch.chdir(run)
    files.publish("--report", lambda: b"x")
    assert (tmp_path / "report.json").exists()


def test_a_full_disk_leaves_the_old_file_and_no_litter(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    files = checked(path, run)

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"--report: .*All else was done"):
        files.publish("--report", lambda: b"new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["report.json", "run"]
