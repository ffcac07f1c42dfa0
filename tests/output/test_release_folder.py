"""`release_folder`: one folder that appears complete, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from system.faults.rank_runs import in_threads
from system.faults.tracing import refuse_or_skip

from ckpt_avg import average, refresh_weights, soup
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import OutputError, RankError, UsageError, UserCodeError
from ckpt_avg.files import platform
from ckpt_avg.output.release_folder import release_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoint folders with a configuration and a vocabulary."""
    for step in (100, 200, 300):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"w": torch.full((4,), float(step))}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "bert"}')
        (folder / "vocab.txt").write_text("a\nb\n")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return tmp_path / "run"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The output, in a folder of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "release"


FILES = ["README.md", "config.json", "model.safetensors", "vocab.txt"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_published_folder_is_complete_and_alone(run: Path, target: Path) -> None:
    result = average(run, f"{target}/")
    assert sorted(os.listdir(target)) == FILES
    assert result.files == ("model.safetensors", "README.md", "config.json", "vocab.txt")
    assert os.listdir(target.parent) == ["release"]
    assert torch.equal(load_file(target / "model.safetensors")["w"], torch.full((4,), 200.0))


@pytest.mark.parametrize("exchanges", [True, False], ids=["one step", "two steps"])
def test_an_older_output_is_replaced_as_a_whole(
    run: Path, target: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the system cannot exchange two folders; the file that only the older one has goes."""
    average(run, f"{target}/", sha256=True)
    if not exchanges:
        monkeypatch.setattr(platform, "exchange", lambda *paths: False)
    average(run, f"{target}/", last=2, overwrite=True)
    assert sorted(os.listdir(target)) == FILES
    assert os.listdir(target.parent) == ["release"]
    assert torch.equal(load_file(target / "model.safetensors")["w"], torch.full((4,), 250.0))


def test_if_the_second_of_two_steps_fails_the_older_output_is_put_back(
    run: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average(run, f"{target}/")
    before = contents(target)
    monkeypatch.setattr(platform, "exchange", lambda *paths: False)
    real: Callable[..., None] = os.rename
    steps = iter([None, OSError(errno.EIO, "Input/output error")])

    def rename(*paths: object) -> None:
        if error := next(steps, None):
            raise error
        real(*paths)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OutputError, match="publishing failed: Input/output error"):
        average(run, f"{target}/", last=2, overwrite=True)
    assert contents(target) == before
    assert os.listdir(target.parent) == ["release"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_an_unpublished_folder_vanishes_after_any_exception(target: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), release_folder(target / "deep" / "release") as folder:
        folder.add("2_Dense/config.json", 2, [b"{}"])
        raise error
    assert os.listdir(target.parent) == []


def test_the_mode_of_an_empty_folder_is_kept(run: Path, target: Path) -> None:
    """A team's folder with the group's bit stays one."""
    target.mkdir()
    target.chmod(0o2770)
    average(run, target)
    assert target.stat().st_mode & 0o7777 == 0o2770


def test_what_a_killed_run_left_goes_with_the_next_run_and_what_lives_stays(run: Path, target: Path) -> None:
    with release_folder(target) as alive:
        alive.add("config.json", 2, [b"{}"])
        dead = alive.path.with_name(alive.path.name[:-16] + "0" * 12 + ".tmp")
        dead.mkdir()
        (dead / "model.safetensors").write_bytes(b"half")
        average(run, f"{target}/")
        assert sorted(os.listdir(target.parent)) == sorted([alive.path.name, "release"])


def test_of_two_runs_the_second_is_refused(run: Path, target: Path) -> None:
    with release_folder(target) as slow:
        slow.add("model.safetensors", 4, [b"slow"])
        average(run, f"{target}/")
        before = contents(target)
        with pytest.raises(OutputError, match="exists already"):
            slow.publish(["model.safetensors"], overwrite=False)
        (target / "notes.md").write_text("mine")
        with pytest.raises(OutputError, match=r"contains 'notes\.md', which ckpt-avg did not write"):
            slow.publish(["model.safetensors"], overwrite=True)
    assert contents(target) == {**before, "notes.md": b"mine"}


@pytest.mark.parametrize("kind", ["a file", "a full folder"])
def test_what_appears_between_the_look_and_the_rename_is_kept(
    target: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., None] = os.rename

    def rename(*paths: Path) -> None:
        if kind == "a file":
            target.write_text("mine")
        elif not target.exists():
            target.mkdir()
            (target / "mine").write_text("mine")
        real(*paths)

    monkeypatch.setattr(os, "rename", rename)
    said = "something was put there during the run, and is kept"
    with pytest.raises(OutputError, match=said), release_folder(target) as folder:
        folder.add("model.safetensors", 4, [b"data"])
        folder.publish(["model.safetensors"], overwrite=False)
    assert os.listdir(target.parent) == ["release"]
    assert (target if kind == "a file" else target / "mine").read_text() == "mine"


def test_all_ranks_write_to_one_folder_and_rank_0_publishes_it(target: Path) -> None:
    def work(ranks: Ranks) -> str:
        with release_folder(target, ranks) as folder:
            (folder.path / f"{ranks.rank}").touch()
            ranks.exchange("written", None)
            if ranks.is_first:
                folder.publish(["0", "1", "2"], overwrite=False)
            ranks.exchange("published", None)
        return str(folder.path)

    names = in_threads(3, work)
    assert len(set(names)) == 1
    assert sorted(os.listdir(target)) == ["0", "1", "2"]
    assert os.listdir(target.parent) == ["release"]


@pytest.mark.parametrize("failing", [0, 1])
def test_if_a_rank_fails_nothing_is_left(target: Path, failing: int) -> None:
    def work(ranks: Ranks) -> None:
        with release_folder(target, ranks) as folder:
            if ranks.is_first:
                folder.add("config.json", 2, [b"{}"])
            if ranks.rank == failing:
                raise UserCodeError("no")
            ranks.exchange("written", None)

    for rank, error in enumerate(in_threads(2, work)):
        assert isinstance(error, UserCodeError if rank == failing else RankError)
    assert os.listdir(target.parent) == []


# -- The other commands that write an output, and paths that cannot be one --------------------------------------------


def test_refresh_and_soup_write_folders_too(tmp_path: Path) -> None:
    states = []
    for step in (1, 2):
        net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        states.append(net.state_dict())
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file(states[-1], tmp_path / f"checkpoint-{step}" / "model.safetensors")
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    options: Any = {
        "model": lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)),
        "data": lambda: [torch.randn(8, 2)],
    }
    refreshed = refresh_weights(tmp_path / "checkpoint-2", f"{tmp_path}/refreshed/", **options)
    assert refreshed.files == ("model.safetensors", "README.md", "config.json")
    found = load_file(refreshed.output / "model.safetensors")
    assert torch.equal(found["0.weight"], states[1]["0.weight"])
    assert not torch.equal(found["1.running_mean"], states[1]["1.running_mean"])
    measured: Any = {**options, "evaluate": lambda model: {"loss": 1.0}, "minimize": "loss"}
    paths = sorted(tmp_path.glob("checkpoint-*"))
    chosen = soup(paths, f"{tmp_path}/soup/", **measured)
    assert chosen.average.files == refreshed.files
    assert len(chosen.kept) == 2


@pytest.mark.parametrize(
    ("output", "error", "said"),
    [
        ("run/", UsageError, "contains the checkpoint"),
        ("run/checkpoint-100/", UsageError, r"is one of the checkpoints\. Leave it out of them"),
        ("run/checkpoint-100/release/", UsageError, "is in the checkpoint"),
        ("file/", UsageError, "is no folder"),
        ("file/release/", UsageError, "file is not a folder"),
        ("swa.safetensors/", UsageError, r"ends in /, so it is a folder\. For a file, use -o swa\.safetensors"),
        ("~/release/", UsageError, "the shell did not expand '~'"),
        ("here/", UsageError, r"is the current folder, or contains it.*Use -o here/release/"),
        ("full/", OutputError, r"is not empty: it contains 'notes\.md'\. Choose another folder, or name a file in it"),
        ("full", OutputError, r"is not empty: it contains 'notes\.md'\. Choose another folder, or name a file in it"),
        ("deep/", OutputError, r"is not empty: it contains 'a'\. Choose another folder"),
        ("ours/", OutputError, r"exists already\. Choose another folder, or replace it with --overwrite"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_path_that_cannot_be_the_folder_is_refused_at_once(
    run: Path,
    tmp_path: Path,
    output: str,
    error: type[Exception],
    said: str,
    dry_run: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here", "full", "ours"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "full" / "notes.md").write_text("mine")
    for name in ("b", "c"):
        (tmp_path / "deep" / "a" / name).mkdir(parents=True)
    average(run, "ours")
    before = contents(tmp_path)
    if output == "here/":
        monkeypatch.chdir(tmp_path / "here")
        output = "../here/"
        said = said.replace("here/release", r"\.\./here/release")
    with pytest.raises(error, match=said):
        average(run, output, dry_run=dry_run)
    assert contents(tmp_path) == before


def test_a_current_folder_that_was_removed_is_in_nobody_s_way(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert average(run, f"{tmp_path}/release/").written


@pytest.mark.parametrize("name", ["out", "out put"])
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_point_is_refused_at_once(run: Path, tmp_path: Path, name: str, kind: str) -> None:
    """It cannot be renamed over: found before hours of work, also if it is a part of the same file system."""
    target, elsewhere = tmp_path / name, tmp_path / "elsewhere"
    target.mkdir()
    elsewhere.mkdir()
    options = ["-t", "tmpfs", "tmpfs"] if kind == "tmpfs" else ["--bind", str(elsewhere)]
    try:
        subprocess.run(["mount", *options, str(target)], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        refuse_or_skip("mount", f"needs a mount: {error}")
    try:
        said = r"is a mount point, so it cannot be replaced in one step\. Use -o .*release/"
        with pytest.raises(UsageError, match=said):
            average(run, target)
        average(run, f"{target}/release/")
        assert sorted(os.listdir(target / "release")) == FILES
    finally:
        subprocess.run(["umount", str(target)], check=True)


@pytest.mark.parametrize("other", ["notes.md", "logs/events", ".hidden", "empty/", "link", "model2.safetensors"])
def test_overwrite_replaces_nothing_that_was_not_written_here(run: Path, target: Path, other: str) -> None:
    average(run, f"{target}/")
    path = target / other
    if other.endswith("/"):
        path.mkdir()
    elif other == "link":
        path.symlink_to(run)
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    said = f"is not empty: it contains {other!r}, which ckpt-avg did not write. Move it away"
    with pytest.raises(OutputError, match=re.escape(said)):
        average(run, f"{target}/", overwrite=True)
    assert path.is_symlink() or path.exists()


def test_overwrite_needs_weights_that_record_the_folder(run: Path, target: Path) -> None:
    """Files of the same names that another program wrote are not ours."""
    average(run, f"{target}/")
    save_file({"w": torch.ones(4)}, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match="is not empty: it contains"):
        average(run, f"{target}/", overwrite=True)


def test_a_link_to_an_empty_folder_is_followed(run: Path, target: Path, tmp_path: Path) -> None:
    target.mkdir()
    (tmp_path / "link").symlink_to(target)
    average(run, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(target)) == FILES


def test_a_dry_run_names_the_files_and_writes_nothing(run: Path, target: Path) -> None:
    result = average(run, f"{target}/", dry_run=True, sha256=True)
    assert result.files == ("model.safetensors", "README.md", "SHA256SUMS", "config.json", "vocab.txt")
    assert not result.written
    assert os.listdir(target.parent) == []


def test_sha256sum_finds_every_file_as_it_was_written(run: Path, target: Path) -> None:
    result = average(run, f"{target}/", sha256=True)
    lines = (target / "SHA256SUMS").read_text().splitlines()
    listed = {line[66:]: line[:64] for line in lines}
    files = {name: data for name, data in contents(target).items() if name != "SHA256SUMS"}
    assert listed == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert result.sha256 == hashlib.sha256((target / "SHA256SUMS").read_bytes()).hexdigest()
    assert not (target.parent / "release.sha256").exists()
