"""Where a run may write: never over a checkpoint, another of its own files, or what it was not told to replace."""

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
from safetensors.torch import save_file

import ckpt_avg
from ckpt_avg.errors import CkptAvgError, OutputError, UsageError
from ckpt_avg.output import paths
from ckpt_avg.output.paths import HTML_MARK, MARK, SideFiles, check_output, checksum_line, checksum_path, json_bytes
from ckpt_avg.runs.discover import discover

Run = Callable[..., tuple[int, str, str]]
JSON = (".json",)
PICTURES = (".png", ".svg", ".pdf")
REPORT = json_bytes({MARK: "0.0.1"})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_file({"w": torch.zeros(2)}, folder / "step_1.safetensors")
    torch.save({"w": torch.ones(2)}, folder / "step_2.pt")
    return folder


# -- check_output ---------------------------------------------------------------------------------------------------


def refusal(path: Path | str, *sources: Path, overwrite: bool = True) -> str:
    """Expects that no output may be written there, and that looking changes nothing; returns the message."""
    with pytest.raises((UsageError, OutputError)) as error:
        check_output(path, discover(sources), overwrite=overwrite)
    return str(error.value)


@pytest.mark.guarantee("output-link")
def test_the_output_is_written_to_where_links_lead(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to("folder/new")
    (tmp_path / "folder").mkdir()
    target = tmp_path.resolve() / "folder" / "new"
    assert check_output(tmp_path / "link", discover(run), overwrite=False) == target
    monkeypatch.chdir(tmp_path / "folder")
    assert check_output("new", discover(run), overwrite=False) == target
    assert not target.exists()


@pytest.mark.guarantee("output-is-input")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["same file", "other spelling", "hard link", "symbolic link", "link to a source"])
@pytest.mark.parametrize("named", ["file", "run folder"])
def test_a_checkpoint_is_never_replaced(tmp_path: Path, run: Path, named: str, kind: str, overwrite: bool) -> None:
    checkpoint, path = run / "step_2.pt", tmp_path / "other"
    if kind == "same file":
        path = checkpoint
    elif kind == "other spelling":
        path = run / ".." / "run" / "step_2.pt"
    elif kind == "hard link":
        path.hardlink_to(checkpoint)
    elif kind == "symbolic link":
        path.symlink_to(checkpoint)
    else:
        checkpoint.rename(path)
        checkpoint.symlink_to(path)
    source = checkpoint if named == "file" else run
    assert refusal(path, source, overwrite=overwrite) == (
        f"{path}: is one of the checkpoints, {checkpoint}. Choose another path."
    )


@pytest.mark.guarantee("output-is-input")
@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"])
def test_no_file_of_a_checkpoint_folder_is_replaced(tmp_path: Path, name: str) -> None:
    """Without its index or its configuration the folder is no model any more."""
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    save_file({"w": torch.zeros(2)}, folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    (folder / "config.json").write_text("{}")
    for source in (folder, index) if name != "config.json" else (folder,):
        assert "is one of the checkpoints" in refusal(folder / name, source)


def test_an_average_in_the_run_folder_may_be_replaced_unless_it_is_named(run: Path) -> None:
    """So a run folder can hold the output of the previous average of it."""
    output = run / "swa.safetensors"
    ckpt_avg.average([run], output)
    assert check_output(output, discover(run), overwrite=True) == output
    assert "is one of the checkpoints" in refusal(output, output, run / "step_2.pt")


@pytest.mark.guarantee("impossible-output", "output-names")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", r"'': is not a file name\. Name a file"),
        ("run/.safetensors", r"\.safetensors': is not a file name\. Name a file"),
        (
            "~/new.safetensors",
            r"~/new\.safetensors: the shell did not expand '~'\. Write the path of the folder in full",
        ),
        ("run/${OUT}/x", r"the shell did not expand '\$\{OUT\}'"),
        ("$OUT/deeper/x", r"the shell did not expand '\$OUT'"),
        ("-", r"-: the output cannot go to stdout\. Name a file"),
        ("new/", r"'new/': is not a file name\. Name a file"),
        ("run", r"run: is a folder\. Name a file, for example swa\.safetensors"),
        ("/dev/null", r"/dev/null: is a device, pipe or socket\. Name a file"),
        ("fifo", r"fifo: is a device, pipe or socket\. Name a file"),
        ("run/step_2.pt/x", r"step_2\.pt/x: .*/run/step_2\.pt is not a folder\. Choose another path"),
        ("run/step_2.pt/new/x", r"step_2\.pt/new/x: .*/run/step_2\.pt is not a folder\. Choose another path"),
        ("loop", r"loop: cannot be used as output: Too many levels of symbolic links\. Choose another path"),
        ("x" * 256, r"x: cannot be used as output: File name too long\. Choose another path"),
    ],
)
def test_a_path_that_can_be_no_file_is_refused(
    tmp_path: Path, run: Path, path: str, says: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    names = sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError, match=says) as error:
        check_output(path, discover(run), overwrite=overwrite)
    assert error.value.exit_code == 2
    assert sorted(os.listdir(tmp_path)) == names


@pytest.mark.guarantee("impossible-output")
@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="descriptors have no paths here")
def test_a_pipe_that_is_open_is_refused(run: Path) -> None:
    """``-o /dev/stdout`` in a pipe: its resolved path is no file that could be made."""
    reading, writing = os.pipe()
    message = f"/dev/fd/{writing}: is a device, pipe or socket. Name a file, for example swa.safetensors."
    assert refusal(f"/dev/fd/{writing}", run) == message
    os.close(reading)
    os.close(writing)


@pytest.mark.guarantee("impossible-output")
@pytest.mark.parametrize(
    ("path", "suffix", "instead"),
    [
        ("best.ckpt", ".ckpt", "best.safetensors"),
        ("new/swa.pth.tar", ".tar", "new/swa.safetensors"),
        ("swa.safetensors.PT", ".PT", "swa.safetensors"),
        ("v1.2.onnx", ".onnx", "v1.2.safetensors"),
        ("a b.bin", ".bin", "'a b.safetensors'"),
        ("link", ".pkl", "real.safetensors"),
        ("model.safetensors.index.json", ".json", "model.safetensors"),
    ],
)
def test_the_suffix_of_another_format_is_refused(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, path: str, suffix: str, instead: str
) -> None:
    """Users would load it with torch.load and, as that fails, with weights_only=False."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("real.pkl")
    message = f"{path}: {suffix} is the suffix of another format, and the output is a safetensors file. Use -o "
    assert refusal(path, run).startswith(message)
    assert refusal(path, run).endswith(f"{instead}.")


@pytest.mark.parametrize("name", ["mean", "swa.v1.2", "x.safetensors.tmp", "pt", ".bin", "a.SAFETENSORS", "~/x", "~x"])
def test_other_names_are_taken(tmp_path: Path, run: Path, name: str) -> None:
    (tmp_path / "~").mkdir()  # somebody wants this folder
    assert check_output(tmp_path / name, discover(run), overwrite=False) == tmp_path / name


@pytest.mark.guarantee("output-folder")
def test_a_missing_folder_is_created_with_the_output_and_not_before(tmp_path: Path, run: Path) -> None:
    """A run that fails must leave nothing, and one that succeeds hours later must not fail for a folder."""
    output = tmp_path / "new" / "deeper" / "swa.safetensors"
    ckpt_avg.average(run, output, dry_run=True)
    nan = tmp_path / "nan.safetensors"
    save_file({"w": torch.full((2,), float("nan"))}, nan)
    with pytest.raises(ckpt_avg.NonFiniteError):
        ckpt_avg.average([nan, run / "step_2.pt"], output)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["nan.safetensors", "run"]
    (tmp_path / "link").symlink_to("new/deeper/linked.safetensors")
    for path in (output, tmp_path / "link"):
        ckpt_avg.average(run, path)
    assert sorted(os.listdir(output.parent)) == ["linked.safetensors", "swa.safetensors"]


@pytest.mark.guarantee("existing-output")
def test_an_existing_file_is_kept_unless_it_may_be_replaced(tmp_path: Path, run: Path) -> None:
    path = tmp_path / "mean.safetensors"
    path.write_text("old")
    assert refusal(path, run, overwrite=False) == (
        f"{path}: exists already. Choose another path, or replace it with --overwrite."
    )
    assert check_output(path, discover(run), overwrite=True) == path
    assert path.read_text() == "old"


@pytest.mark.guarantee("read-only-folder")
def test_a_folder_that_is_not_writable_is_refused(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=r"its folder .* is not writable\. Choose another path") as error:
        check_output(tmp_path / "new", discover(run), overwrite=False)
    assert error.value.exit_code == 5


# -- SideFiles ------------------------------------------------------------------------------------------------------


def checked(path: Path | str, *sources: Path, output: Path | None = None, overwrite: bool = True) -> SideFiles:
    files = SideFiles(sources, output=output, overwrite=overwrite)
    files.check("--report", path, JSON)
    return files


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("contents", [b"{}\n", b""])
def test_a_new_file(tmp_path: Path, run: Path, overwrite: bool, contents: bytes) -> None:
    path = tmp_path / "report.json"
    files = checked(path, run, overwrite=overwrite)
    assert not path.exists(), "the check itself writes nothing"
    files.publish("--report", path, lambda: contents)
    assert path.read_bytes() == contents


def test_a_file_that_was_not_asked_for_is_neither_made_nor_written(tmp_path: Path, run: Path) -> None:
    """Without --plot nothing is drawn."""
    files = SideFiles([run], output=None, overwrite=False)
    files.check("--plot", None, PICTURES)
    files.publish("--plot", None, lambda: pytest.fail("made"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_document_is_json_that_ends_with_a_line_break() -> None:
    document = {"a": [1, None], "ä": "\u2028"}
    assert json_bytes(document).endswith(b"}\n")
    assert json.loads(json_bytes(document)) == document


@pytest.mark.guarantee("no-clobber")
def test_a_file_that_appears_during_the_work_is_kept(tmp_path: Path, run: Path) -> None:
    """The work between the check and the end may take hours: another run's report must not be lost."""
    path = tmp_path / "report.json"
    files = checked(path, run, overwrite=False)
    path.write_text("theirs")
    with pytest.raises(OutputError, match="Only this file is missing"):
        files.publish("--report", path, lambda: b"ours")
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
    SideFiles([run], output=None, overwrite=False).check("--plot", path, suffixes)


@pytest.mark.parametrize("path", ["a.jpg", "a", "a.png.gz", "png", ".png", "a.", "run.png/", "a.json", ""])
def test_another_suffix_is_refused_with_those_that_are_known(path: str, run: Path) -> None:
    """Found before hours of work; a hidden file ``.png`` has no suffix."""
    with pytest.raises(UsageError) as caught:
        SideFiles([run], output=None, overwrite=False).check("--plot", path, PICTURES)
    assert str(caught.value) == (
        f"--plot {path}: expected a name that ends in .png or .svg or .pdf, for example --plot plot.png."
    )


def test_the_name_of_a_shard_index_is_refused(tmp_path: Path, run: Path) -> None:
    """The next run over the folder would take a report of that name for a checkpoint."""
    with pytest.raises(UsageError, match="shard index"):
        checked(tmp_path / "model.safetensors.index.json", run)


def test_a_report_does_not_replace_an_average_in_the_run_folder(run: Path) -> None:
    """An output may replace last week's average; a report that replaces it has lost a model."""
    ckpt_avg.average([run], run / "swa.safetensors", device="cpu")
    before = (run / "swa.safetensors").read_bytes()
    with pytest.raises(UsageError):
        checked(run / "swa.safetensors", run)
    assert (run / "swa.safetensors").read_bytes() == before


@pytest.mark.parametrize("path", ["swa.json", "./swa.json", "run/../swa.json", "link.json"])
def test_the_output_itself_is_refused(tmp_path: Path, run: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the path is written, even if there is no such file yet."""
    (tmp_path / "link.json").symlink_to("swa.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"--report {path}: is the path of the output"):
        checked(path, run, output=tmp_path / "swa.json")


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_options_with_one_path(tmp_path: Path, run: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two files would be lost, after all the work is done."""
    monkeypatch.chdir(tmp_path)
    files = SideFiles([run], output=None, overwrite=overwrite)
    files.check("--report", "a.png", PICTURES)
    with pytest.raises(UsageError, match=r"--plot \./a\.png: is the path of --report"):
        files.check("--plot", "./a.png", PICTURES)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("old", "replaced"),
    [
        (json_bytes({MARK: "0.0.1", "output": "swa.safetensors"}), True),
        (HTML_MARK + b"<html>", True),
        (b"<!DOCTYPE html>\n<html>", False),
        (json_bytes({"output": "swa.safetensors", MARK: "0.0.1"}), False),
        (b'{"loss": 0.5}', False),
        (b"", False),
    ],
)
def test_an_earlier_report_is_replaced_and_no_other_file(
    tmp_path: Path, run: Path, overwrite: bool, old: bytes, replaced: bool
) -> None:
    """A job that runs again reports again; a trainer's metrics.json is not lost for a name that was typed wrongly."""
    path = tmp_path / "report.json"
    path.write_bytes(old)
    if replaced:
        checked(path, run, overwrite=overwrite).publish("--report", path, lambda: b"new")
    else:
        with pytest.raises(OutputError, match="exists already, and is not a report of ckpt-avg"):
            checked(path, run, overwrite=overwrite)
    assert path.read_bytes() == (b"new" if replaced else old)


def test_a_report_that_became_another_file_during_the_work_is_kept(tmp_path: Path, run: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(REPORT)
    files = checked(path, run)
    path.write_bytes(b"theirs")
    with pytest.raises(OutputError, match="is kept"):
        files.publish("--report", path, lambda: b"ours")
    assert path.read_bytes() == b"theirs"


@pytest.mark.parametrize("bad", ["folder", "below a file", "exists", "suffix", "checkpoint"])
def test_messages_name_the_option_and_the_path(tmp_path: Path, run: Path, bad: str) -> None:
    """There are more paths on the command line: the message must say which one it is about."""
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "exists.json").write_text("")
    torch.save({"w": torch.ones(2)}, run / "step_3.json")
    path, says = {
        "folder": (tmp_path / "folder.json", "is a folder"),
        "below a file": (tmp_path / "exists.json" / "y.json", "is not a folder"),
        "exists": (tmp_path / "exists.json", "exists already"),
        "suffix": (tmp_path / "a.txt", "expected a name"),
        "checkpoint": (run / "step_3.json", "is one of the checkpoints"),
    }[bad]
    with pytest.raises((UsageError, OutputError)) as caught:
        checked(path, run / "step_2.pt", run / "step_3.json", overwrite=bad != "exists")
    assert str(caught.value).startswith(f"--report {path}: ")
    assert says in str(caught.value)
    assert "output" not in str(caught.value)


def test_a_symbolic_link_is_followed_and_stays(tmp_path: Path, run: Path) -> None:
    """As for the output."""
    (tmp_path / "real.json").write_bytes(REPORT)
    (tmp_path / "report.json").symlink_to("real.json")
    checked(tmp_path / "report.json", run).publish("--report", tmp_path / "report.json", lambda: b"new")
    assert (tmp_path / "report.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def test_a_relative_path_is_fixed_at_the_check(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """User code that changes the current folder does not move the report."""
    monkeypatch.chdir(tmp_path)
    files = checked("report.json", run)
    monkeypatch.chdir(run)
    files.publish("--report", "report.json", lambda: b"x")
    assert (tmp_path / "report.json").exists()


def test_a_full_disk_leaves_the_old_file_and_no_litter(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(REPORT)
    files = checked(path, run)

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"--report: .*Only this file is missing"):
        files.publish("--report", path, lambda: b"new")
    monkeypatch.undo()
    assert path.read_bytes() == REPORT
    assert sorted(each.name for each in tmp_path.iterdir()) == ["report.json", "run"]


# -- OUT.sha256 -----------------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def digests_of_sources(output: Path) -> list[object]:
    with safe_open(output, framework="pt") as reader:
        return [source.get("sha256") for source in json.loads(reader.metadata()["ckpt_avg.sources"])]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
@pytest.mark.parametrize("name", ["out.safetensors", "a b", "back\\slash", "new\nline", "-c", os.fsdecode(b"\xff")])
def test_sha256sum_accepts_the_output_and_finds_damage(tmp_path: Path, run: Path, name: str) -> None:
    output = tmp_path / name
    result = ckpt_avg.average(run, output, sha256=True)
    assert result.sha256 == hashlib.sha256(output.read_bytes()).hexdigest()
    check = ["sha256sum", "--strict", "-c", "--", f"./{name}.sha256"]
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    output.write_bytes(output.read_bytes()[:-1])
    assert subprocess.run(check, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_the_line_is_that_of_sha256sum() -> None:
    assert checksum_line("a.safetensors", "ab") == b"ab  a.safetensors\n"
    assert checksum_line("a\\b\nc", "ab") == b"\\ab  a\\\\b\\nc\n"


def test_the_sources_are_digested_too(tmp_path: Path, run: Path, output: Path) -> None:
    ckpt_avg.average(run, tmp_path / "plain.safetensors")
    ckpt_avg.average(run, output, sha256=True)
    expected = [{path.name: hashlib.sha256(path.read_bytes()).hexdigest()} for path in sorted(run.iterdir())]
    assert digests_of_sources(output) == expected
    assert digests_of_sources(tmp_path / "plain.safetensors") == [None, None]


def test_an_existing_checksum_is_kept_and_nothing_is_written(run: Path, output: Path, in_process: Run) -> None:
    checksum_path(output).write_text("mine")
    code, _, err = in_process("average", run, "-o", output, "--sha256")
    assert code == 5
    assert f"--sha256: {output}.sha256: exists already" in err
    assert checksum_path(output).read_text() == "mine"
    assert not output.exists()
    assert in_process("average", run, "-o", output, "--sha256", "--overwrite")[0] == 0
    assert checksum_path(output).read_text() != "mine"


def test_a_checksum_of_an_earlier_output_is_pointed_out(run: Path, output: Path) -> None:
    """If it failed, `sha256sum -c` would fail later, and nobody would know why."""
    ckpt_avg.average(run, output, sha256=True)
    result = ckpt_avg.average(run, output, overwrite=True)
    assert any("out.safetensors.sha256 belongs to an earlier output" in notice for notice in result.notices)


def test_a_checkpoint_with_the_name_of_the_checksum_is_not_replaced(run: Path, output: Path, in_process: Run) -> None:
    checkpoint = (run / "step_2.pt").rename(checksum_path(output))
    before = checkpoint.read_bytes()
    sources = (checkpoint, run / "step_1.safetensors")
    code, _, err = in_process("average", *sources, "-o", output, "--sha256", "--overwrite")
    assert code == 2
    assert "--sha256" in err
    assert "is one of the checkpoints" in err
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("link_to", "says"),
    [("out.safetensors", "is a link to the output"), ("report.json", "is the path of the checksum")],
)
def test_a_checksum_is_not_written_through_a_link(
    run: Path, output: Path, in_process: Run, link_to: str, says: str
) -> None:
    """If it failed, the checksum would replace the output or the report that was just published, with exit 0."""
    report = output.with_name("report.json")
    checksum_path(output).symlink_to(output.with_name(link_to))
    options = ("--report", report) if link_to == "report.json" else ()
    code, _, err = in_process("average", run, "-o", output, "--sha256", "--overwrite", *options)
    assert code == 2
    assert says in err
    assert not output.exists()


def test_if_the_checksum_cannot_be_written_the_output_is_published(
    run: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OutputError("no space.")

    monkeypatch.setattr(paths, "publish_bytes", fail)
    with pytest.raises(CkptAvgError, match=r"--sha256: no space\. The output itself is published"):
        ckpt_avg.average(run, output, sha256=True)
    assert ckpt_avg.verify(output).tensors == 1


def test_a_dry_run_reads_and_writes_no_checksum(tmp_path: Path, run: Path, output: Path) -> None:
    result = ckpt_avg.average(run, output, sha256=True, dry_run=True)
    assert (result.sha256, result.data_digest) == (None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
