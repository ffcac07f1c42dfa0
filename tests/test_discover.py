"""Sources → checkpoints: natural order, each stored file once, what is left out named with its reason."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_avg.discover import SUFFIXES, discover, natural_key
from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.spec import METHOD_KEY


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.write_bytes(b"x")
    return paths


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def refusal(kind: type[UsageError | IncompatibleError], *sources: object) -> str:
    with pytest.raises(kind) as caught:
        discover(sources)  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert caught.value.exit_code == {UsageError: 2, IncompatibleError: 4}[kind]
    return str(caught.value)


# --- order -------------------------------------------------------------------------------------------------


def test_the_real_run_is_in_order_of_epochs(run_folder: Path) -> None:
    found = discover([run_folder])
    assert names(found.paths) == [f"epoch_{number}.pt" for number in range(9, 21)]


@pytest.mark.parametrize(
    "ordered",
    [
        ["step_9.pt", "step_10.pt", "step_100.pt"],
        ["epoch=1-step=99.ckpt", "epoch=1-step=100.ckpt", "epoch=2-step=3.ckpt", "epoch=10-step=1.ckpt"],
        ["2.pt", "10.pt", "a.pt"],
        ["a1.pt", "a1b.pt", "a2.pt"],
        ["model-00001.safetensors", "model-00010.safetensors", "model-00100.safetensors"],
        ["v1.9.pt", "v1.10.pt", "v2.0.pt"],
    ],
)
def test_natural_order(tmp_path: Path, ordered: list[str]) -> None:
    touch(tmp_path, *reversed(ordered))
    assert names(discover([tmp_path]).paths) == ordered


@given(st.lists(st.text(alphabet="ab0123456789_.٣²", max_size=6), unique=True, max_size=6))
def test_the_order_is_total(texts: list[str]) -> None:
    """Any names can be compared, and the order does not depend on the one in which a folder lists them."""
    expected = sorted(texts, key=natural_key)
    for permuted in itertools.islice(itertools.permutations(texts), 24):
        assert sorted(permuted, key=natural_key) == expected


def test_numbers_that_differ_in_leading_zeros_only_have_an_order() -> None:
    assert sorted(["step_1", "step_01"], key=natural_key) == sorted(["step_01", "step_1"], key=natural_key)


def test_files_named_by_hand_stay_where_they_were_named(tmp_path: Path) -> None:
    first, second, third = touch(tmp_path, "step_1.pt", "step_2.pt", "step_3.pt")
    assert discover([third, first, second]).paths == (third, first, second)


def test_any_suffix_can_be_named_by_hand(tmp_path: Path) -> None:
    (path,) = touch(tmp_path, "weights.model_final")
    assert discover([str(path)]).paths == (path,)


def test_folders_and_files_together(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    touch(folder, "step_2.pt", "step_1.pt")
    (other,) = touch(tmp_path, "other.pt")
    assert discover([other, folder]).paths == (other, folder / "step_1.pt", folder / "step_2.pt")


# --- what a run folder gives -------------------------------------------------------------------------------


def test_each_suffix_is_taken_and_others_are_not(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a{suffix}" for suffix in SUFFIXES), "log.txt", "config.json", "events.out", "README")
    found = discover([tmp_path])
    assert set(names(found.paths)) == {f"a{suffix}" for suffix in SUFFIXES}
    assert found.skipped == ()


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "optimizer_0.bin", "scheduler.pt", "rng_state.pth", "rng_state_3.pth", "training_args.bin",
     "scaler.pt", "random_states_0.pkl.pt", "sampler.bin", "Optimizer.pt"],
)  # fmt: skip
def test_training_state_beside_the_weights_is_left_out(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, "model.pt")
    found = discover([tmp_path])
    assert names(found.paths) == ["model.pt"]
    assert [(item.path.name, item.reason) for item in found.skipped] == [
        (name, "training state beside the weights, by its name")
    ]


@pytest.mark.parametrize("name", ["optimizer_study_epoch_1.pt", "scheduler-ablation.pt", "my_optimizer.pt"])
def test_weights_whose_name_begins_alike_are_kept(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    assert names(discover([tmp_path]).paths) == [name]


@pytest.mark.parametrize("name", ["step_3.pt.tmp", "step_3.safetensors.part", "x.incomplete"])
def test_half_written_files_are_left_out_and_said(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, "step_2.pt")
    found = discover([tmp_path])
    assert names(found.paths) == ["step_2.pt"]
    assert [(item.path.name, item.reason) for item in found.skipped] == [(name, "half-written, by its name")]


def test_folders_inside_are_not_searched(tmp_path: Path) -> None:
    touch(tmp_path, "step_1.pt")
    (tmp_path / "folder.pt").mkdir()
    touch(tmp_path / "folder.pt", "step_2.pt")
    assert names(discover([tmp_path]).paths) == ["step_1.pt"]


def test_an_earlier_average_is_left_out(tmp_path: Path) -> None:
    """An output of ours in the run folder must not enter the next average; one named by hand may."""
    weights = {"w": torch.ones(2)}
    save_file(weights, tmp_path / "average.safetensors", metadata={"format": "pt", METHOD_KEY: "mean"})
    save_file(weights, tmp_path / "step_1.safetensors", metadata={"format": "pt"})
    save_file(weights, tmp_path / "step_2.safetensors")
    assert METHOD_KEY == "ckpt_avg.method"
    found = discover([tmp_path])
    assert names(found.paths) == ["step_1.safetensors", "step_2.safetensors"]
    assert [(item.path.name, item.reason) for item in found.skipped] == [
        ("average.safetensors", "an earlier average made by ckpt-avg")
    ]
    assert names(discover([tmp_path / "average.safetensors"]).paths) == ["average.safetensors"]


def test_a_damaged_file_is_kept_so_that_it_is_reported(tmp_path: Path) -> None:
    """Leaving it out silently would average fewer checkpoints than the user sees."""
    touch(tmp_path, "step_1.safetensors", "step_2.pt")
    assert names(discover([tmp_path]).paths) == ["step_1.safetensors", "step_2.pt"]


def test_a_pipe_or_socket_in_the_folder_never_blocks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    touch(tmp_path, "step_1.pt")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket must be short
        try:
            listener.bind("socket.safetensors")
        finally:
            os.chdir(here)
        done = threading.Event()

        def look() -> None:
            discover([tmp_path])
            done.set()

        threading.Thread(target=look, daemon=True).start()
        assert done.wait(10)


# --- one checkpoint, several names -------------------------------------------------------------------------


def test_a_symbolic_link_in_the_folder_counts_once(tmp_path: Path) -> None:
    """``last.pt → step_2.pt`` is the usual case; the real file is kept, whatever the order of the names."""
    touch(tmp_path, "step_1.pt", "step_2.pt")
    (tmp_path / "last.pt").symlink_to("step_2.pt")
    (tmp_path / "zz.pt").symlink_to(tmp_path / "step_1.pt")
    found = discover([tmp_path])
    assert names(found.paths) == ["step_1.pt", "step_2.pt"]
    assert [(item.path.name, item.reason) for item in found.skipped] == [
        ("last.pt", "the same file as step_2.pt"),
        ("zz.pt", "the same file as step_1.pt"),
    ]


def test_a_hard_link_in_the_folder_counts_once(tmp_path: Path) -> None:
    touch(tmp_path, "step_2.pt", "step_10.pt")
    (tmp_path / "best.pt").hardlink_to(tmp_path / "step_10.pt")
    found = discover([tmp_path])
    assert names(found.paths) == ["best.pt", "step_2.pt"]
    assert [(item.path.name, item.reason) for item in found.skipped] == [("step_10.pt", "the same file as best.pt")]


def test_links_to_files_outside_are_checkpoints(tmp_path: Path) -> None:
    """As in a Hugging Face cache, where every file is a link into ``blobs``."""
    (blob,) = touch(tmp_path, "0123")
    (tmp_path / "snapshot").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(blob)
    found = discover([tmp_path / "snapshot"])
    assert names(found.paths) == ["a.safetensors"]
    assert [item.reason for item in found.skipped] == ["the same file as a.safetensors"]


def test_links_to_nothing_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "step_1.pt")
    (tmp_path / "last.pt").symlink_to("gone.pt")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    found = discover([tmp_path])
    assert names(found.paths) == ["step_1.pt"]
    assert {item.path.name: item.reason for item in found.skipped} == {
        "last.pt": "a symbolic link to nothing",
        "loop.pt": "a symbolic link to nothing",
    }


@pytest.mark.parametrize("how", ["path", "other spelling", "symlink", "hard link", "folder"])
def test_the_same_checkpoint_named_twice_by_hand_is_refused(tmp_path: Path, how: str) -> None:
    """It would count double."""
    (path,) = touch(tmp_path, "step_1.pt")
    again = tmp_path / "again.pt"
    if how == "path":
        again = path
    elif how == "other spelling":
        again = tmp_path / "x" / ".." / "step_1.pt"
        (tmp_path / "x").mkdir()
    elif how == "symlink":
        again.symlink_to(path)
    elif how == "hard link":
        again.hardlink_to(path)
    else:
        again = tmp_path
    message = refusal(UsageError, path, again)
    assert "the same checkpoint is named twice" in message
    assert str(path) in message
    assert message.endswith("Name it once.")


# --- nothing there -----------------------------------------------------------------------------------------


def test_a_source_that_does_not_exist(tmp_path: Path) -> None:
    message = refusal(UsageError, tmp_path / "gone.pt")
    assert message.startswith(f"{tmp_path / 'gone.pt'}: expected a checkpoint file or a run folder, got nothing there")
    assert message.endswith("Check the path.")


@pytest.mark.parametrize("target", ["gone.pt", "link.pt"])
def test_a_link_to_nothing_or_itself(tmp_path: Path, target: str) -> None:
    (tmp_path / "link.pt").symlink_to(target)
    assert "It is a symbolic link to nothing." in refusal(UsageError, tmp_path / "link.pt")


def test_a_name_longer_than_the_file_system_allows() -> None:
    """The system answers with another error than "not found"; the user gets the same kind of answer."""
    assert "x" * 300 in refusal(UsageError, "x" * 300)


def test_an_empty_folder(tmp_path: Path) -> None:
    message = refusal(IncompatibleError, tmp_path)
    assert message.startswith(f"{tmp_path}: expected checkpoint files (.safetensors, .pt, ")
    assert message.endswith("got none. Name a folder or files that hold some.")


def test_a_folder_of_left_out_files_says_why(tmp_path: Path) -> None:
    touch(tmp_path, "optimizer.pt", "step_1.pt.tmp", "notes.txt")
    message = refusal(IncompatibleError, tmp_path)
    assert "'optimizer.pt' is training state beside the weights, by its name" in message
    assert "'step_1.pt.tmp' is half-written, by its name" in message
    assert "notes.txt" not in message


def test_a_folder_of_folders_says_how_to_name_the_files(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
    message = refusal(IncompatibleError, tmp_path)
    assert "It holds the folders 'checkpoint-1', 'checkpoint-2', 'checkpoint-10'" in message
    assert f"{tmp_path}/*/model.safetensors" in message


def test_no_sources() -> None:
    found = discover([])
    assert (found.paths, found.skipped) == ((), ())


@pytest.mark.parametrize("name", ["swa.safetensors", "swa.pt", "SWA.BIN"])
def test_an_earlier_average_is_known_by_its_metadata_whatever_its_suffix(tmp_path: Path, name: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "step_1.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / name, metadata={METHOD_KEY: "mean"})
    found = discover(tmp_path)
    assert [path.name for path in found.paths] == ["step_1.safetensors"]
    assert [(item.path.name, item.reason) for item in found.skipped] == [(name, "an earlier average made by ckpt-avg")]


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    """macOS leaves a ._ file beside each file on a foreign disk."""
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "._a.safetensors").write_bytes(b"\0\5\26\7")
    assert [path.name for path in discover(tmp_path).paths] == ["a.safetensors"]


def test_an_empty_path_is_refused() -> None:
    """It would mean the current folder, where a shell variable was not set."""
    with pytest.raises(UsageError, match="got an empty one"):
        discover([""])
