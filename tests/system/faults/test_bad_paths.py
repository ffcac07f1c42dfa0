"""Paths, links, indexes and folders that mislead: what is reached, what is refused, and what the user is told."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from formats import test_dcp
from formats.safetensors_bytes import one
from formats.torch_bytes import holding, tensor, weights, write
from system.faults.checkpoints import dcp_folders
from system.faults.refusals import Command, mean, refusal, refusal_of

from ckpt_avg import open_checkpoint
from ckpt_avg.errors import CheckpointFormatError, UsageError
from ckpt_avg.limits import LIMITS, Limits
from ckpt_avg.runs.run_folder import entries_of

AGAIN = "Save or copy the checkpoint again."
INDEX = "model.safetensors.index.json"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = f'{{"weight_map":{{"a":"{A}","b":"{B}"}}}}'


def double(name: str, value: int) -> bytes:
    """A safetensors file of one float64 element; its bytes, written out."""
    data = (value * 2**52).to_bytes(8, "little")  # the bits of 2.0 ** (value − 1023)
    return one('"F64"', "[1]", "[0,8]", name, data)


def sharded(folder: Path, index: str | bytes = MAP) -> Path:
    """A checkpoint folder of two shards, and its index as given; returns the folder."""
    folder.mkdir()
    (folder / A).write_bytes(double("a", 1023))
    (folder / B).write_bytes(double("b", 1024))
    (folder / INDEX).write_bytes(index.encode() if isinstance(index, str) else index)
    return folder


# --- an index ----------------------------------------------------------------------------------------------


@pytest.mark.guarantee("index-damage")
def test_an_index_over_the_limit_is_not_read(in_process: Command, tmp_path: Path) -> None:
    """16 MiB are a hundred times the largest that there is; sparse."""
    folder = sharded(tmp_path / "model")
    os.truncate(folder / INDEX, LIMITS.index + 1)
    assert f"expected a shard index of at most {LIMITS.index:,} bytes, got {LIMITS.index + 1:,}. {AGAIN}" in refusal(
        in_process, folder, folder=tmp_path
    )


# --- links -------------------------------------------------------------------------------------------------


def linked(folder: Path, target: str) -> Path:
    """A sharded folder whose second shard is a link."""
    (sharded(folder) / B).unlink()
    (folder / B).symlink_to(target)
    return folder


@pytest.mark.guarantee("shard-links")
@pytest.mark.parametrize("through", ["a link", "two links", "a folder beside", "blobs of no cache"])
def test_a_shard_that_links_out_of_its_folder_is_refused(in_process: Command, tmp_path: Path, through: str) -> None:
    """A stranger's folder must not read the user's files through a link either."""
    secret = tmp_path / ("blobs" if through == "blobs of no cache" else "model too") / "secret"
    secret.parent.mkdir()
    secret.write_bytes(double("b", 1024))
    folder = linked(tmp_path / "model", "again" if through == "two links" else f"../{secret.parent.name}/secret")
    (folder / "again").symlink_to(secret)
    message = refusal(in_process, folder, folder=tmp_path)
    assert message.startswith(f"{folder / INDEX}: '{B}' is a symbolic link out of the folder, to ")
    assert message.endswith("secret'. Copy the file.")


@pytest.mark.guarantee("shard-links")
def test_the_links_of_the_hubs_cache_are_followed(in_process: Command, tmp_path: Path) -> None:
    """``snapshots/<revision>/<file>`` leads into ``blobs`` next to ``snapshots``, and nowhere else."""
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    (tmp_path / "hub" / "blobs" / "0123").write_bytes(double("b", 1024))
    (tmp_path / "hub" / "snapshots").mkdir()
    folder = linked(tmp_path / "hub" / "snapshots" / "revision", "../../blobs/0123")
    assert mean(in_process, folder, folder=tmp_path)[0] == {"a": [1.0], "b": [2.0]}
    (tmp_path / "hub" / "blobs" / "sub").mkdir()
    (tmp_path / "hub" / "blobs" / "0123").rename(tmp_path / "hub" / "blobs" / "sub" / "0123")
    (folder / B).unlink()
    (folder / B).symlink_to("../../blobs/sub/0123")
    assert "is a symbolic link out of the folder" in refusal(in_process, folder, folder=tmp_path)


@pytest.mark.guarantee("link-loops")
def test_links_in_a_circle_end(in_process: Command, tmp_path: Path) -> None:
    """As a shard, as the weights of a folder, and as the checkpoint itself."""
    folder = linked(tmp_path / "model", B)
    message = refusal(in_process, folder, folder=tmp_path)
    assert message.startswith(f"{folder / INDEX}: '{B}' is a symbolic link that cannot be followed: ")
    assert message.endswith(". Copy the file.")
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    message = refusal_of(in_process, tmp_path / "one", folder=tmp_path, code=2)
    assert message.endswith("broken symbolic link. Check the path.")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").symlink_to("model.safetensors")
    message = refusal_of(in_process, weights, folder=tmp_path)
    assert message.startswith(f"{weights / 'model.safetensors'}: cannot be opened: ")


# --- what is no file ---------------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def in_place_of(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return path


# What stands where a file belongs → how it is called.
NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a FIFO": (fifo, "expected a checkpoint file, got a device, pipe or socket."),
    "a socket": (listening, "cannot be opened: "),
    "a device": (device, "expected a checkpoint file, got a device, pipe or socket."),
    "a folder": (Path.mkdir, "expected a checkpoint file, got a folder."),
}


@pytest.mark.guarantee("not-a-file")
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs, sockets and devices have no path on this system")
@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("where", ["checkpoint", "weights", "shard", "index"])
def test_what_is_no_file_is_refused_without_waiting(in_process: Command, tmp_path: Path, kind: str, where: str) -> None:
    """A FIFO without a writer blocks whoever opens it; a device has no end."""
    make, fact = NO_FILES[kind]
    folder = sharded(tmp_path / "model")
    if where == "checkpoint":
        path = tmp_path / "step_1.safetensors"
        make(path)
        if kind == "a folder":
            message = refusal_of(in_process, path, folder=tmp_path, code=4)
            assert "or checkpoint folders, got none. Name a folder or files with checkpoints." in message
        else:
            assert fact in refusal_of(in_process, path, folder=tmp_path)
        return
    if where == "weights":
        (folder / INDEX).unlink()
    path = folder / {"weights": "model.safetensors", "shard": B, "index": INDEX}[where]
    make(in_place_of(path))
    message = refusal(in_process, folder, folder=tmp_path)
    if kind == "a device" and where == "shard":
        assert "is a symbolic link out of the folder, to '/dev/zero'. Copy the file." in message
    else:
        assert message.startswith(f"{path}: {fact}")


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Gives up root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that anybody may enter, with one for the output that anybody may write to."""
    with tempfile.TemporaryDirectory(prefix="ckpt-avg-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "place of the output").mkdir()
        (folder / "place of the output").chmod(0o777)
        yield folder


@pytest.mark.guarantee("unreadable")
@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="this system keeps no rights as Unix does")
def test_what_may_not_be_read_is_named_with_the_systems_reason(in_process: Command, open_folder: Path) -> None:
    """A file, a shard, a folder of checkpoints, and what such a folder contains."""

    def command(*arguments: object) -> tuple[int, str, str]:
        with as_nobody():
            return in_process(*arguments)

    path = write(open_folder, double("w", 1023), "step_1.safetensors")
    model = sharded(open_folder / "model")
    closed = open_folder / "run"
    closed.mkdir()
    write(closed, double("w", 1023), "step_2.safetensors")
    in_process("check", path, path)  # what is imported late is imported now
    assert mean(in_process, path, folder=open_folder)[0] == {"w": [1.0]}
    for each in (path, model / B, closed):
        each.chmod(0)
    for source, file in ((path, path), (model, model / B)):
        assert refusal(command, source, folder=open_folder).startswith(f"{file}: cannot be opened: Permission denied.")
    message = refusal(command, closed, folder=open_folder, code=2)
    assert message == f"{closed}: cannot be listed: Permission denied. Check its permissions."
    inside = closed / "step_2.safetensors"
    message = refusal(command, inside, folder=open_folder, code=2)
    assert str(inside) in message
    assert "cannot be accessed: " in message
    assert "Permission denied" in message
    assert message.endswith("Check the path.")
    closed.chmod(0o755)


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_line_break_in_a_file_name_makes_no_line_of_its_own(
    in_process: Command, tmp_path: Path, by_hand: bool
) -> None:
    """A stranger's folder could write lines that look like the command's."""
    run = run_of(tmp_path / "run", 9, 10)
    bad = write(run, b"junk", "step_11\nError: all is well.pt")
    message = refusal(in_process, bad if by_hand else run, folder=tmp_path)
    assert "step_11\\nError: all is well.pt" in message


def test_a_path_that_is_too_long_is_shown_once_and_cut(in_process: Command, tmp_path: Path) -> None:
    """Six thousand characters, twice, hide what is said of them."""
    message = refusal(in_process, "x/" * 3000, folder=tmp_path, code=2)
    assert "File name too long" in message
    assert len(message) < 500


@pytest.mark.guarantee("too-few-checkpoints")
def test_a_file_that_goes_while_folders_are_listed_is_said(
    in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer removes its old checkpoints meanwhile: no traceback, and what to do."""
    path = write(tmp_path, double("w", 1023), "step_1.safetensors")

    def gone(path: Path) -> tuple[int, int]:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr("ckpt_avg.runs.discover.identity_of", gone)
    message = refusal(in_process, path, folder=tmp_path, code=2)
    assert message == f"'{path}': No such file or directory. If training still runs, try again."


def test_a_folder_that_goes_while_it_is_listed_is_said(tmp_path: Path) -> None:
    """Between the look at its form and the look at its files."""
    with pytest.raises(UsageError) as caught:
        entries_of(tmp_path / "gone")
    assert str(caught.value) == (
        f"{tmp_path / 'gone'}: cannot be listed: No such file or directory. Check its permissions."
    )


# --- which checkpoints a folder holds ----------------------------------------------------------------------


def run_of(folder: Path, *steps: int) -> Path:
    """A run folder: step N holds the value 2 ** (N − 9)."""
    folder.mkdir()
    for step in steps:
        write(folder, double("w", 1014 + step), f"step_{step}.safetensors")
    return folder


@pytest.mark.guarantee("same-checkpoint-twice")
def test_one_checkpoint_under_several_names_of_a_run_counts_once(in_process: Command, tmp_path: Path) -> None:
    """Links of both kinds and a copy: the mean of 1 and 2 is 1.5 however often 2 stands there."""
    run = run_of(tmp_path / "run", 9, 10)
    (run / "last.safetensors").symlink_to("step_10.safetensors")
    (run / "best.safetensors").hardlink_to(run / "step_10.safetensors")
    write(run, double("w", 1024), "model_best.safetensors")
    found, said = mean(in_process, run, "--verbose", folder=tmp_path)
    assert found == {"w": [1.5]}
    assert "averaged 2 checkpoints: step_9.safetensors, step_10.safetensors" in said
    assert "skipped: 'last.safetensors': the same file as step_10.safetensors" in said
    assert "skipped: 'best.safetensors': the same file as step_10.safetensors" in said
    assert "skipped: 'model_best.safetensors': " in said
    assert "skipped 3 entries (-v lists them with the reasons)" in mean(in_process, run, folder=tmp_path)[1]


PREFERRED = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


@pytest.mark.guarantee("several-formats")
def test_of_several_forms_of_weights_the_first_of_a_fixed_order_is_taken_and_said(
    in_process: Command, tmp_path: Path
) -> None:
    """One safetensors file, shards of them, one torch file, shards of these: as transformers loads them."""
    folder = sharded(tmp_path / "model")
    write(folder, double("w", 1023), PREFERRED[0])
    write(folder, holding(weights(tensor(), "t")), PREFERRED[2])
    write(folder, f'{{"weight_map":{{"t":"{PREFERRED[2]}"}}}}'.encode(), PREFERRED[3])
    expected = ({"w": [1.0]}, {"a": [1.0], "b": [2.0]}, {"t": [1.0, 2.0]})
    for taken, values in enumerate(expected):
        found, said = mean(in_process, folder, folder=tmp_path)
        others = ", ".join(map(repr, PREFERRED[taken + 1 :]))
        assert found == values
        assert (
            f"Notice: {folder}: the folder has other weights, too: '{PREFERRED[taken]}' is read, not {others}" in said
        )
        (folder / PREFERRED[taken]).unlink()


@pytest.mark.guarantee("half-written")
@pytest.mark.parametrize(
    ("name", "missing"),
    [("__0_0.distcp", "no .metadata next to the *.distcp files"), (A, f"no shard index (*.index.json) next to '{A}'")],
)
def test_a_folder_without_the_file_that_is_saved_last_is_refused_by_name(
    in_process: Command, tmp_path: Path, name: str, missing: str
) -> None:
    """In a run it is skipped; named by hand, it must not count as whole."""
    folder = tmp_path / "step_11"
    folder.mkdir()
    write(folder, double("w", 1025), name)
    message = refusal_of(in_process, folder, folder=tmp_path)
    assert message.endswith(f"incomplete: there is {missing}, which is saved last. Copy it again or exclude it.")


@pytest.mark.guarantee("too-few-checkpoints")
def test_the_search_for_checkpoints_is_bounded(
    in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home folder named by mistake is not walked through to its end."""
    for number in range(4):
        (tmp_path / "home" / str(number)).mkdir(parents=True)
    monkeypatch.setattr("ckpt_avg.runs.discover.LIMITS", Limits(folders=3))
    message = refusal(in_process, tmp_path / "home", folder=tmp_path, code=4)
    assert message.endswith("expected checkpoints in the first 3 folders, got none. Name the run folder.")
    assert LIMITS.folders >= 1_000


def test_a_folder_that_is_no_checkpoint_is_not_opened_as_one(tmp_path: Path) -> None:
    """By the API, where nothing has looked for checkpoints before."""
    write(tmp_path, b"x", "notes.txt")
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: expected a checkpoint folder (with model.safetensors, pytorch_model.bin, a shard index, or "
        ".metadata), got one with 'notes.txt'. Name the checkpoint in it."
    )


# --- the metadata of torch.distributed.checkpoint ----------------------------------------------------------


def test_a_part_that_lies_is_refused_by_its_tensors_name(in_process: Command, tmp_path: Path) -> None:
    """Each part is an archive of its own, without a name; a model has thousands of them."""
    folder = test_dcp.save({"w": torch.ones(2)}, tmp_path / "step_1")
    part = folder / "__0_0.distcp"
    size = write(folder, holding(tensor(offset=1)), part.name).stat().st_size
    test_dcp.edit(folder, lambda metadata: setattr(test_dcp.entry(metadata, "w")[1], "length", size))
    message = refusal(in_process, folder, folder=tmp_path)
    assert message.startswith(f"{part}: ")
    assert "expected elements inside a record of 8 bytes, got a view that ends at byte 12." in message
    assert "'w'" in message


@pytest.mark.guarantee("index-damage")
def test_metadata_over_the_limit_is_not_read(in_process: Command, tmp_path: Path) -> None:
    """Sparse, so that nothing of it is on the disk."""
    folder, *_ = dcp_folders(tmp_path)
    os.truncate(folder / ".metadata", LIMITS.pickle + 1)
    message = refusal(in_process, folder, folder=tmp_path)
    assert message == (
        f"{folder}/.metadata: expected metadata of at most {LIMITS.pickle:,} bytes, got {LIMITS.pickle + 1:,}. {AGAIN}"
    )
