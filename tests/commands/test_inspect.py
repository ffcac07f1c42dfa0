"""What a path contains, even if it cannot be averaged: what to do about each file, and no error for a folder."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ckpt_avg import average, inspect
from ckpt_avg.checkpoint.spec import METHOD_KEY
from ckpt_avg.cli.inspect_text import inspection_text
from ckpt_avg.commands.inspect import Inspection
from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, UsageError

InProcess = Callable[..., tuple[int, str, str]]


def seen(found: Inspection) -> dict[str, str]:
    made = dict(found.seen)
    assert len(made) == len(found.seen)
    return made


def unprepared(folder: Path) -> Path:
    """A folder of failed downloads: nothing in it can be averaged."""
    folder.mkdir(exist_ok=True)
    (folder / "model.ckpt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")
    (folder / "page.pt").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (folder / "notes.bin").write_bytes(b"just some text, no weights")
    (folder / "zipped.pth").write_bytes(b"\x1f\x8b\x08\x00" + b"\0" * 20)
    with zipfile.ZipFile(folder / "other.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    return folder


# --- one checkpoint ----------------------------------------------------------------------------------------


def test_one_file(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    contents = {
        "model": {f"module.{name}": value for name, value in net.state_dict().items()},
        "epoch": 3, "global_step": 70, "val_loss": 0.5, "note": "x", "optimizer": {"param_groups": [{"lr": 0.1}]},
    }  # fmt: skip
    torch.save(contents, tmp_path / "a.pt")
    found = inspect(tmp_path / "a.pt")
    assert found.checkpoint is not None
    assert (found.listed, found.seen, found.needed) == ((), (), "")
    assert found.to_dict() == {
        "path": str(tmp_path / "a.pt"),
        "format": "torch zip",
        "kind": None,
        "keys": ["model", "epoch", "global_step", "val_loss", "note", "optimizer"],
        "state_key": "model",
        "prefix": "module.",
        "step": 70,
        "epoch": 3,
        "metrics": {"val_loss": 0.5},
        "learning_rate": 0.1,
        "averaged": None,
        "bytes": 9 * 4 + 4 * 3 * 4 + 8,
        "dtypes": ["F32", "I64"],
        "metadata": {"epoch": 3, "global_step": 70, "val_loss": 0.5, "note": "x"},
        "batch_norm_layers": ["1"],
        "tied": [],
        "notes": ["'module.' stripped from every name"],
        "tensors": [
            {
                "name": name,
                "dtype": {torch.float32: "F32", torch.int64: "I64"}[value.dtype],
                "shape": list(value.shape),
                "stride": list(value.stride()),
                "offset": found.checkpoint.tensors[name].offset,
                "parts": 1,
            }
            for name, value in net.state_dict().items()
        ],
    }
    text = inspection_text(found)
    rows = [line.split() for line in text.splitlines()]
    assert ["0.weight", "F32", "3×2"] in rows
    assert ["1.num_batches_tracked", "I64", "scalar"] in rows
    for line in (
        f"{tmp_path / 'a.pt'}: torch zip",
        "keys: 'model', 'epoch', 'global_step', 'val_loss', 'note', 'optimizer'",
        "state dict: under 'model'",
        "prefix stripped: 'module.'",
        "recorded: step 70, epoch 3, val_loss 0.5, learning rate 0.1",
        "1 layer with running statistics: '1'",
        "note: 'module.' stripped from every name",
    ):
        assert line in text.splitlines()


def test_keys_are_shown_for_every_file_that_has_some(tmp_path: Path) -> None:
    """A tensor next to the state dict (the state of a generator) does not make the file a bare state dict."""
    torch.save({"model": {"w": torch.ones(1)}, "rng_state": torch.get_rng_state(), "epoch": 1}, tmp_path / "a.pt")
    found = inspect(tmp_path / "a.pt")
    assert found.checkpoint is not None
    assert found.checkpoint.keys == ("model", "rng_state", "epoch")
    torch.save({"w": torch.ones(1)}, tmp_path / "b.pt")
    bare = inspect(tmp_path / "b.pt").checkpoint
    assert bare is not None
    assert bare.keys == ()


def test_an_average_and_tied_tensors_are_shown(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "swa.safetensors", metadata={METHOD_KEY: "mean"})
    assert "already an average: ckpt-avg made it" in inspection_text(inspect(tmp_path / "swa.safetensors"))
    shared = torch.ones(2)
    torch.save({"a": shared, "b": shared}, tmp_path / "tied.pt")
    found = inspect(tmp_path / "tied.pt")
    assert found.to_dict()["tied"] == [["a", "b"]]
    assert "tied: 'a' = 'b'" in inspection_text(found)


def test_a_checkpoint_folder_is_one_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 5, "epoch": 1.5, "log_history": []}))
    found = inspect(folder)
    assert found.checkpoint is not None
    document = found.to_dict()
    assert (document["path"], document["kind"], document["step"], document["epoch"]) == (
        str(folder),
        "HF Trainer",
        5,
        1,
    )


@pytest.mark.parametrize("content", [b"", b"junk", b"<html>", b"version https://git-lfs"])
def test_one_file_that_cannot_be_read_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(
        CheckpointFormatError, match=r"a\.pt: expected a safetensors file or one written by torch\.save"
    ):
        inspect(tmp_path / "a.pt")


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        inspect(tmp_path / "gone")


# --- a run folder ------------------------------------------------------------------------------------------


def run(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for epoch in (9, 10):
        contents = {
            "model": {"w": torch.full((2,), float(epoch)), "b": torch.ones(1)},
            "epoch": epoch,
            "loss": 1 / epoch,
        }
        torch.save(contents, folder / f"epoch_{epoch}.pt")
    torch.save(torch.load(folder / "epoch_10.pt"), folder / "epoch_10_copy.pt")
    (folder / "epoch_11.pt").write_bytes(b"PK\3\4 cut off")
    (folder / "optimizer.pt").write_bytes(b"x")
    return folder


def test_a_run_folder_is_a_table(tmp_path: Path) -> None:
    found = inspect(run(tmp_path / "run"))
    assert found.checkpoint is None
    assert [each.spec.path.name for each in found.listed] == ["epoch_9.pt", "epoch_10.pt"]
    assert [each.record.epoch for each in found.listed] == [9, 10]
    assert [name for name, _ in found.unreadable] == ["epoch_11.pt"]
    assert {item.path.name: item.reason for item in found.skipped} == {
        "optimizer.pt": "training state, by its name",
        "epoch_10_copy.pt": "the same weights as epoch_10.pt, judging by samples",
    }
    assert (found.seen, found.needed) == ((), "")
    lines = inspection_text(found).splitlines()
    assert lines[:4] == [
        "each: size 12 bytes; tensors 2; dtypes F32; state dict model; format torch zip",
        "checkpoint   epoch  loss",
        "epoch_9.pt   9      0.111111",
        "epoch_10.pt  10     0.1",
    ]
    assert any(line.startswith("cannot be read: ") and "epoch_11.pt" in line for line in lines)
    assert "skipped: 'epoch_10_copy.pt': the same weights as epoch_10.pt, judging by samples" in lines


def test_a_table_of_one_row_has_every_column_that_says_something(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"model": {"w": torch.ones(2)}}, folder / "a.pt")
    assert [line.split() for line in inspection_text(inspect(folder)).splitlines()] == [
        ["checkpoint", "size", "tensors", "dtypes", "state", "dict", "format"],
        ["a.pt", "8", "bytes", "1", "F32", "model", "torch", "zip"],
    ]


def test_a_run_folder_as_json(tmp_path: Path, in_process: InProcess) -> None:
    folder = run(tmp_path / "run")
    code, out, err = in_process("inspect", folder, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert set(document) == {"path", "checkpoints", "unreadable", "skipped", "seen", "needed", "notes"}
    assert document == inspect(folder).to_dict()
    assert [each["tensors"] for each in document["checkpoints"]] == [2, 2]
    assert document["checkpoints"][0]["metrics"] == {"loss": 1 / 9}
    assert list(document["unreadable"]) == ["epoch_11.pt"]
    assert {Path(item["path"]).name for item in document["skipped"]} == {"optimizer.pt", "epoch_10_copy.pt"}


def test_what_a_copy_records_is_shown(tmp_path: Path) -> None:
    """By the table the user chooses: it must show what the selection will see."""
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    torch.save({"model": {"w": torch.ones(2)}, "epoch": 4, "val_loss": 0.5}, tmp_path / "a_copy.pt")
    (only,) = inspect(tmp_path).listed
    assert (only.record.epoch, dict(only.record.metrics)) == (4, {"val_loss": 0.5})
    (shown,) = inspect(tmp_path).to_dict()["checkpoints"]
    assert (shown["epoch"], shown["metrics"]) == (4, {"val_loss": 0.5})


def test_checkpoints_in_an_inner_folder_are_noted(tmp_path: Path) -> None:
    run(tmp_path / "checkpoints")
    found = inspect(tmp_path)
    assert found.notes == (f"the checkpoints are in {tmp_path / 'checkpoints'}",)
    assert inspection_text(found).startswith(f"note: the checkpoints are in {tmp_path / 'checkpoints'}\n")


# --- a selection -------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Ten checkpoints with a step and a loss that falls, and one that cannot be read."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in range(1, 11):
        contents = {"model": {"w": torch.full((2,), float(step))}, "global_step": 100 * step, "loss": 1 / step}
        if step == 4:
            del contents["loss"]
        torch.save(contents, folder / f"step_{step}.pt")
    return folder


SELECTIONS: list[dict[str, Any]] = [
    {"last": 3},
    {"every": 4},
    {"from_step": 300, "to_step": 700},
    {"min_interval": 250},
    {"last": 3, "every": 2, "exclude": "step_1*"},
    {"best": 2, "metric": "loss", "mode": "min"},
    {"include": ["step_1.pt", "step_4.pt", "step_8.pt"], "best": 1, "mode": "max"},
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_what_inspect_selects_is_what_average_uses(many: Path, tmp_path: Path, selection: dict[str, Any]) -> None:
    every, found = inspect(many), inspect(many, **selection)
    chosen = [each.spec.path for each in found.listed if not each.skipped_by]
    assert tuple(chosen) == average(many, tmp_path / "out.safetensors", **selection).checkpoints
    assert len(chosen) < 10
    assert not every.selects
    assert all(not each.skipped_by for each in every.listed)


def test_each_skipped_checkpoint_names_the_option(many: Path, in_process: InProcess) -> None:
    """The first that skips it, in the order in which the options apply."""
    options = ("--exclude", "step_1.pt", "--from-step", 300, "--every", 2, "--last", 3, "--best", 1, "--mode", "min")
    code, out, err = in_process("inspect", many, *options)
    assert (code, err) == (0, "")
    table = {line.split()[0]: " ".join(line.split()[1:4]) for line in out.splitlines() if line.startswith("step_")}
    assert table == {
        "step_2.pt": "no: --from-step 300",
        "step_3.pt": "no: --every 2",
        "step_4.pt": "no: --last 3",
        "step_5.pt": "no: --every 2",
        "step_6.pt": "no: --best 1",
        "step_7.pt": "no: --every 2",
        "step_8.pt": "no: --best 1",
        "step_9.pt": "no: --every 2",
        "step_10.pt": "yes 1000 0.1",
    }
    assert "selected: 1 of 9 checkpoints" in out.splitlines()
    assert "skipped: 'step_1.pt': --exclude step_1.pt" in out.splitlines()
    document = json.loads(in_process("inspect", many, *options, "--json")[1])
    assert [each["skipped_by"] for each in document["checkpoints"]][4:] == [
        "--best 1", "--every 2", "--best 1", "--every 2", None,
    ]  # fmt: skip


def test_a_checkpoint_without_the_metric_is_told_from_a_worse_one(many: Path) -> None:
    reasons = {each.spec.name: each.skipped_by for each in inspect(many, best=8, metric="loss", mode="min").listed}
    assert reasons["step_4.pt"].endswith("is not recorded")
    assert reasons["step_1.pt"].endswith("8")


@pytest.mark.python_words
def test_python_callers_read_the_keyword(many: Path) -> None:
    assert inspect(many, last=3).listed[0].skipped_by == "last=3"


def test_a_selected_checkpoint_that_cannot_be_read_is_noted(many: Path) -> None:
    (many / "step_10.pt").write_bytes(b"PK\3\4 cut off")
    note = "step_10.pt: is selected, but cannot be read, so average would stop"
    assert note in inspect(many, last=2).notes
    assert note not in inspect(many, from_step=100).notes


@pytest.mark.parametrize("selection", [{"last": 11}, {"best": 1, "mode": "max", "metric": "acc"}, {"include": "x*"}])
def test_a_selection_that_average_refuses_is_refused(many: Path, selection: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError) as refused:
        average(many, many.parent / "out.safetensors", **selection)
    with pytest.raises(IncompatibleError) as caught:
        inspect(many, **selection)
    assert str(caught.value) == str(refused.value)


def test_several_paths_are_one_run(many: Path, in_process: InProcess) -> None:
    """As average takes them: in the order of their steps."""
    paths = [many / f"step_{step}.pt" for step in (9, 2, 7)]
    found = inspect(paths, last=2)
    assert [each.spec.name for each in found.listed] == ["step_2.pt", "step_7.pt", "step_9.pt"]
    assert [bool(each.skipped_by) for each in found.listed] == [True, False, False]
    assert found.path == many
    assert in_process("inspect", *paths, "--last", 2)[0] == 0


# --- folders that nobody prepared --------------------------------------------------------------------------


def test_each_file_of_an_unprepared_folder_is_described_with_what_to_do(tmp_path: Path) -> None:
    folder = unprepared(tmp_path / "download")
    found = inspect(folder)
    assert found.listed == ()
    described = seen(found)
    assert set(described) == {"model.ckpt", "page.pt", "notes.bin", "zipped.pth", "other.pt"}
    assert "a Git LFS pointer. Fetch the file: git lfs pull." in described["model.ckpt"]
    assert "an HTML or XML page, probably a failed download" in described["page.pt"]
    assert "something else (first bytes b'just som')" in described["notes.bin"]
    assert "a gzip file. Unpack it first." in described["zipped.pth"]
    assert "expected a zip written by torch.save, got one with 'a.txt'" in described["other.pt"]
    assert found.needed
    text = inspection_text(found)
    assert f"cannot be read: {folder / 'model.ckpt'}: expected" in text
    assert text.endswith(f"{folder}: no checkpoint could be read (see the errors above)")


@pytest.mark.guarantee("torchscript")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_files_of_other_kinds_are_described(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.jit")
    with tarfile.open(tmp_path / "model.nemo", "w") as archive:
        archive.addfile(tarfile.TarInfo("weights"), io.BytesIO())
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\0" * 20)
    (tmp_path / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 20)
    (tmp_path / "README.md").write_bytes(b"x" * 1234)
    (tmp_path / "empty").mkdir()
    described = seen(inspect(tmp_path))
    assert "a TorchScript program" in described["model.jit"]
    assert "a NeMo archive. Unpack it (tar xf model.nemo)" in described["model.nemo"]
    assert "a GGUF file" in described["model.gguf"]
    assert "an HDF5 file" in described["model.h5"]
    assert described["README.md"] == "not a checkpoint, by its name; 1,234 bytes"
    assert described["empty"] == "a folder with 0 entries"


@pytest.mark.guarantee("torchscript")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_folder_of_torchscript_alone(tmp_path: Path) -> None:
    """By its suffix a checkpoint, but without weights."""
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.pt")
    found = inspect(tmp_path)
    assert found.listed == ()
    assert "expected weights, got a TorchScript program" in "\n".join(
        [*seen(found).values(), *dict(found.unreadable).values()]
    )
    assert found.needed


def test_an_empty_folder(tmp_path: Path, in_process: InProcess) -> None:
    assert inspect(tmp_path).seen == ()
    code, out, err = in_process("inspect", tmp_path)
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path}: expected checkpoint files ")
    assert out.endswith("got none. Name a folder or files with checkpoints.\n")


def test_a_folder_of_several_runs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(tmp_path / name)
    found = inspect(tmp_path)
    assert "2 folders with checkpoints: 'one', 'two'" in found.needed
    assert set(seen(found)) == {"one", "two"}


def test_each_part_of_a_checkpoint_is_described(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"w": torch.ones(2)}, tmp_path / f"step_1_rank_{rank}.pt")
    found = inspect(tmp_path)
    assert "part of a checkpoint" in found.needed
    assert all("part of a checkpoint" in seen(found)[f"step_1_rank_{rank}.pt"] for rank in range(2))


def test_pipes_and_links_are_described_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "gone.pt").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    described = seen(inspect(tmp_path))
    assert set(described) == {"pipe.pt", "gone.pt", "loop"}
    assert all("pipe" in what or "link" in what for what in described.values())


def test_a_folder_of_a_great_many_files_is_cut(tmp_path: Path) -> None:
    for number in range(130):
        (tmp_path / f"{number}.txt").touch()
    found = inspect(tmp_path)
    assert len(found.seen) == 101
    assert found.seen[-1] == ("…", "and 30 more")


def test_names_and_contents_are_shown_escaped(tmp_path: Path, in_process: InProcess) -> None:
    """Nothing of a stranger's file reaches the terminal as a control character."""
    red = "\x1b[31mred\n"
    torch.save({"model": {red: torch.ones(1)}, red: red, "val\x1b": 0.5}, tmp_path / f"{red}.pt")
    torch.save({"model": {red: torch.zeros(1)}}, tmp_path / "b.pt")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / f"{red}.pt").write_bytes(red.encode())
    for path in (tmp_path, tmp_path / "b.pt", tmp_path / "sub"):
        for arguments in ([path], [path, "--json"]):
            _, out, err = in_process("inspect", *arguments)
            assert "\x1b" not in out + err
            assert "Traceback" not in err


def test_reading_options_reach_each_checkpoint(tmp_path: Path) -> None:
    for number in (1, 2):
        contents = {"model": {"net.w": torch.ones(1) * number}, "ema": {"net.w": torch.ones(2) * number}}
        torch.save(contents, tmp_path / f"{number}.pt")
    options: list[tuple[dict[str, Any], str | None, list[str], tuple[int, ...]]] = [
        ({}, "model", ["net.w"], (1,)),
        ({"ema": True}, "ema", ["net.w"], (2,)),
        ({"state_key": "ema"}, "ema", ["net.w"], (2,)),
        ({"strip_prefix": "net."}, "model", ["w"], (1,)),
    ]
    for given, key, names, shape in options:
        for spec in (inspect(tmp_path / "1.pt", **given).checkpoint, inspect(tmp_path, **given).listed[0].spec):
            assert spec is not None
            assert spec.state_key == key
            assert list(spec.tensors) == names
            assert next(iter(spec.tensors.values())).shape == shape
    with pytest.raises(UsageError):
        inspect(tmp_path, ema=True, state_key="model")


HOSTILE = "\x1b[31m\rstep"


@pytest.mark.parametrize("as_json", [False, True])
def test_names_of_files_are_shown_escaped_wherever_inspect_names_one(
    tmp_path: Path, in_process: InProcess, as_json: bool
) -> None:
    """In the table, among skipped and unreadable files, and in the notes on where the checkpoints are."""
    folder = tmp_path / "\x1b[2Jruns" / "\rinside"
    folder.mkdir(parents=True)
    for step in (1, 2):
        torch.save({"model": {"w": torch.full((2,), float(step))}}, folder / f"{HOSTILE}_{step}.pt")
    torch.save({"model": {"w": torch.full((2,), 2.0)}}, folder / f"{HOSTILE}_2_copy.pt")
    (folder / f"{HOSTILE}_3.pt").write_bytes(b"junk")
    (folder / f"{HOSTILE}_4.pt.tmp").write_bytes(b"junk")
    (folder / f"{HOSTILE}_5").mkdir()
    for path in (
        folder,
        folder.parent,
        folder / f"{HOSTILE}_1.pt",
        folder / f"{HOSTILE}_3.pt",
        folder / f"{HOSTILE}_5",
    ):
        _, out, err = in_process("inspect", path, *(["--json"] if as_json else []))
        assert "step" in out + err
        assert not set("\x1b\r") & set(out + err)
        assert "Traceback" not in err
