"""Sources → checkpoints: natural order, each stored file once, what is left out named with its reason."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.formats.trainers.any_script import SUFFIXES
from ckpt_avg.runs.discover import Discovery, discover
from ckpt_avg.runs.run_folder import natural_key


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.write_bytes(b"x")
    return paths


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def reasons(found: Discovery) -> dict[str, str]:
    """Name → why it was left out."""
    made = {item.path.name: item.reason for item in found.skipped}
    assert len(made) == len(found.skipped), "each is told once"
    return made


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


@pytest.mark.guarantee("natural-order")
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
def test_incomplete_files_are_left_out_and_said(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, "step_2.pt")
    found = discover([tmp_path])
    assert names(found.paths) == ["step_2.pt"]
    assert [(item.path.name, item.reason) for item in found.skipped] == [(name, "incomplete, by its name")]


def test_folders_inside_are_not_searched(tmp_path: Path) -> None:
    touch(tmp_path, "step_1.pt")
    (tmp_path / "folder.pt").mkdir()
    touch(tmp_path / "folder.pt", "step_2.pt")
    assert names(discover([tmp_path]).paths) == ["step_1.pt"]


@pytest.mark.parametrize(
    "name", ["average.safetensors", "swa.pt", "SWA.BIN", "valid.acc.ave_10best.pth", "avg_10.pt", "model-averaged.ckpt"]
)
def test_an_earlier_average_is_left_out_by_its_name(tmp_path: Path, name: str) -> None:
    """It must not enter the next average; one named by hand may. What it holds is looked at in the survey."""
    touch(tmp_path, name, "step_1.pt", "step_2.pt")
    found = discover([tmp_path])
    assert names(found.paths) == ["step_1.pt", "step_2.pt"]
    assert reasons(found) == {name: "an earlier average, by its name"}
    assert names(discover([tmp_path / name]).paths) == [name]


def test_a_damaged_file_is_kept_so_that_it_is_reported(tmp_path: Path) -> None:
    """Leaving it out silently would average fewer checkpoints than the user sees."""
    touch(tmp_path, "step_1.safetensors", "step_2.pt")
    assert names(discover([tmp_path]).paths) == ["step_1.safetensors", "step_2.pt"]


@pytest.mark.guarantee("not-a-file")
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
    """Under the name that has a number, so that its place in the run is known."""
    touch(tmp_path, "step_2.pt", "step_10.pt")
    (tmp_path / "best.pt").hardlink_to(tmp_path / "step_10.pt")
    found = discover([tmp_path])
    assert names(found.paths) == ["step_2.pt", "step_10.pt"]
    assert reasons(found) == {"best.pt": "the same file as step_10.pt"}


def test_links_to_files_outside_are_checkpoints(tmp_path: Path) -> None:
    """As in a Hugging Face cache, where every file is a link into ``blobs``."""
    (blob,) = touch(tmp_path, "0123")
    (tmp_path / "snapshot").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(blob)
    found = discover([tmp_path / "snapshot"])
    assert names(found.paths) == ["a.safetensors"]
    assert [item.reason for item in found.skipped] == ["the same file as a.safetensors"]


@pytest.mark.guarantee("link-loops")
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
    assert message.startswith(f"{tmp_path / 'gone.pt'}: no such file or folder")
    assert message.endswith("Check the path.")


@pytest.mark.parametrize("target", ["gone.pt", "link.pt"])
def test_a_link_to_nothing_or_itself(tmp_path: Path, target: str) -> None:
    (tmp_path / "link.pt").symlink_to(target)
    assert "link.pt: broken symbolic link. Check the path." in refusal(UsageError, tmp_path / "link.pt")


def test_a_name_longer_than_the_file_system_allows() -> None:
    """The system answers with another error than "not found"; the user gets the same kind of answer."""
    assert refusal(UsageError, "x" * 300).endswith("cannot be accessed: File name too long. Check the path.")


def test_an_empty_folder(tmp_path: Path) -> None:
    message = refusal(IncompatibleError, tmp_path)
    assert message.startswith(f"{tmp_path}: expected checkpoint files (.safetensors, .pt, ")
    assert message.endswith("got none. Name a folder or files with checkpoints.")


def test_a_folder_of_left_out_files_says_why(tmp_path: Path) -> None:
    touch(tmp_path, "optimizer.pt", "step_1.pt.tmp", "notes.txt")
    message = refusal(IncompatibleError, tmp_path)
    assert "'optimizer.pt' is training state beside the weights, by its name" in message
    assert "'step_1.pt.tmp' is incomplete, by its name" in message
    assert "notes.txt" not in message


def test_a_folder_of_folders_without_a_checkpoint_names_them(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
    message = refusal(IncompatibleError, tmp_path)
    assert "Its folders 'checkpoint-1', 'checkpoint-2', 'checkpoint-10' have none in the first 3 levels" in message


def test_no_sources() -> None:
    found = discover([])
    assert (found.paths, found.skipped) == ((), ())


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    """macOS leaves a ._ file beside each file on a foreign disk."""
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "._a.safetensors").write_bytes(b"\0\5\26\7")
    assert [path.name for path in discover(tmp_path).paths] == ["a.safetensors"]


def test_an_empty_path_is_refused() -> None:
    """It would mean the current folder, where a shell variable was not set."""
    with pytest.raises(UsageError, match="got an empty path"):
        discover([""])


# --- checkpoint folders ------------------------------------------------------------------------------------


def tree(root: Path, *paths: str) -> Path:
    """Makes empty-looking files; a path that ends with a slash is a folder."""
    for path in paths:
        target = root / path
        (target if path.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if not path.endswith("/"):
            target.write_bytes(b"x")
    return root


CHECKPOINT_FOLDERS = {
    "transformers": ("model.safetensors", "trainer_state.json", "optimizer.pt", "rng_state.pth", "training_args.bin"),
    "transformers sharded": ("model.safetensors.index.json", "model-00001-of-00002.safetensors",
                             "model-00002-of-00002.safetensors", "trainer_state.json"),
    "transformers of old": ("pytorch_model.bin", "trainer_state.json", "scheduler.pt"),
    "old and sharded": ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "trainer_state.json"),
    "diffusers": ("diffusion_pytorch_model.safetensors", "config.json"),
    "PEFT": ("adapter_model.safetensors", "adapter_config.json"),
    "accelerate": ("model.safetensors", "optimizer.bin", "random_states_0.pkl"),
    "FSDP through accelerate": ("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp",
                                "optimizer_0/.metadata", "random_states_0.pkl"),
    "DCP": (".metadata", "__0_0.distcp", "__1_0.distcp"),
    "Lightning FSDP": (".metadata", "__0_0.distcp", "meta.pt"),
    "DCP safetensors": ("shard-00001-model-00001-of-00001.safetensors",),
    "DeepSpeed": ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    "DeepSpeed with latest": ("latest", "zero_to_fp32.py", "global_step10/mp_rank_00_model_states.pt"),
    "Megatron": ("mp_rank_00/model_optim_rng.pt",),
}  # fmt: skip


@pytest.mark.parametrize("form", CHECKPOINT_FOLDERS)
def test_a_checkpoint_folder_is_one_checkpoint(tmp_path: Path, form: str) -> None:
    """Not as many as it has files, nor its optimizer another one; named itself, or found in a run."""
    for step in (9, 10):
        tree(tmp_path / "run" / f"checkpoint-{step}", *CHECKPOINT_FOLDERS[form])
    (itself,) = discover([tmp_path / "run" / "checkpoint-9"]).paths
    assert itself == tmp_path / "run" / "checkpoint-9"
    assert not discover([itself]).sources[0].is_run
    found = discover([tmp_path / "run"])
    assert names(found.paths) == ["checkpoint-9", "checkpoint-10"]
    assert found.sources[0].is_run
    assert found.skipped == ()


def test_checkpoint_folders_and_files_of_one_run(tmp_path: Path) -> None:
    tree(tmp_path, "step_1.pt", "step_3.pt", *(f"step_2/{name}" for name in CHECKPOINT_FOLDERS["DCP"]))
    assert names(discover([tmp_path]).paths) == ["step_1.pt", "step_2", "step_3.pt"]


def test_the_final_model_beside_the_checkpoints_is_none_of_them(tmp_path: Path) -> None:
    """The Trainer saves the last or best once more at the top: it would count double."""
    for step in (500, 1000):
        tree(tmp_path / f"checkpoint-{step}", *CHECKPOINT_FOLDERS["transformers"])
    tree(tmp_path, "model.safetensors", "config.json", "training_args.bin", "trainer_state.json")
    found = discover([tmp_path])
    assert names(found.paths) == ["checkpoint-500", "checkpoint-1000"]
    assert reasons(found) == {
        "training_args.bin": "training state beside the weights, by its name",
        "model.safetensors": "the weights of the whole run beside its checkpoints: one of them, or the final",
    }


@pytest.mark.parametrize("other", ["ema_model.safetensors", "value_head.bin", "custom.pt"])
def test_further_weights_in_a_checkpoint_folder_do_not_make_it_a_run(tmp_path: Path, other: str) -> None:
    """Named itself, it is the checkpoint that it is in its run: the other file must not take its place."""
    for step in (1, 2):
        tree(tmp_path / f"checkpoint-{step}", *CHECKPOINT_FOLDERS["transformers"], other)
    assert names(discover([tmp_path]).paths) == ["checkpoint-1", "checkpoint-2"]
    assert discover([tmp_path / "checkpoint-1"]).paths == (tmp_path / "checkpoint-1",)


def test_a_sharded_final_model_beside_the_checkpoints(tmp_path: Path) -> None:
    """Its shards are no checkpoints either."""
    for step in (500, 1000):
        tree(tmp_path / f"checkpoint-{step}", *CHECKPOINT_FOLDERS["transformers"])
    tree(tmp_path, *CHECKPOINT_FOLDERS["transformers sharded"])
    found = discover([tmp_path])
    assert names(found.paths) == ["checkpoint-500", "checkpoint-1000"]
    assert "model.safetensors.index.json" in reasons(found)


@pytest.mark.guarantee("half-written")
def test_checkpoint_folders_that_were_not_finished(tmp_path: Path) -> None:
    """Each way in which trainers leave one: under a name for the time being, or without what is written last."""
    for step in (1, 2):
        tree(tmp_path / f"checkpoint-{step}", *CHECKPOINT_FOLDERS["transformers"])
    tree(tmp_path / "tmp-checkpoint-3", *CHECKPOINT_FOLDERS["transformers"])
    tree(tmp_path / "checkpoint-4.tmp", "model.safetensors")
    tree(tmp_path / "checkpoint-5", "model.safetensors")
    tree(tmp_path / "checkpoint-6", "__0_0.distcp", "__1_0.distcp")
    tree(tmp_path / "checkpoint-7", "model-00001-of-00002.safetensors")
    tree(tmp_path / ".hidden", "notes.txt")
    found = discover([tmp_path])
    assert names(found.paths) == ["checkpoint-1", "checkpoint-2"]
    told = reasons(found)
    assert set(told) == {f"checkpoint-{rest}" for rest in ("4.tmp", "5", "6", "7")} | {"tmp-checkpoint-3"}
    assert all(reason.startswith("incomplete") for reason in told.values())
    assert "trainer_state.json" in told["checkpoint-5"]
    assert ".metadata" in told["checkpoint-6"]
    assert "'model-00001-of-00002.safetensors'" in told["checkpoint-7"]


def test_folders_without_trainer_state_are_whole_where_none_has_it(tmp_path: Path) -> None:
    """They were saved with save_pretrained, not by the Trainer."""
    for step in (1, 2):
        tree(tmp_path / f"checkpoint-{step}", "model.safetensors", "config.json")
    assert names(discover([tmp_path]).paths) == ["checkpoint-1", "checkpoint-2"]


def test_only_incomplete_checkpoints(tmp_path: Path) -> None:
    tree(tmp_path, "step_1/__0_0.distcp", "step_2.pt.tmp")
    message = refusal(IncompatibleError, tmp_path)
    assert "'step_1' is incomplete: there is no .metadata next to the *.distcp files" in message
    assert "'step_2.pt.tmp' is incomplete, by its name" in message


@pytest.mark.parametrize("folder", ["tmp-checkpoint-3", "checkpoint-3.tmp", "checkpoint-3.incomplete"])
def test_a_incomplete_folder_is_not_searched_for_checkpoints(tmp_path: Path, folder: str) -> None:
    """The only one of a run that has just begun: what is in it is no checkpoint yet."""
    tree(tmp_path / folder, *CHECKPOINT_FOLDERS["transformers"])
    assert f"'{folder}' is incomplete, by its name" in refusal(IncompatibleError, tmp_path)


def test_a_refused_folder_is_kept_so_that_it_is_reported(tmp_path: Path) -> None:
    """Left out silently, ZeRO 3 would average the other half of a run."""
    tree(tmp_path / "global_step1", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    tree(tmp_path / "global_step2", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    tree(tmp_path, "latest", "zero_to_fp32.py")
    assert names(discover([tmp_path]).paths) == ["global_step1", "global_step2"]


# --- run folders in folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["checkpoints", "lightning_logs/version_0/checkpoints", "a/b/c"])
def test_checkpoints_in_a_folder_inside_are_found_and_that_is_said(tmp_path: Path, inner: str) -> None:
    tree(tmp_path, f"{inner}/step_9.pt", f"{inner}/step_10.pt", "config.yaml", "logs/events.out", "optimizer.pt")
    found = discover([tmp_path])
    assert names(found.paths) == ["step_9.pt", "step_10.pt"]
    assert found.sources[0].notes == (f"the checkpoints are in {tmp_path / inner}",)
    assert reasons(found) == {"optimizer.pt": "training state beside the weights, by its name"}


def test_checkpoints_too_deep_are_not_looked_for(tmp_path: Path) -> None:
    tree(tmp_path, "a/b/c/d/step_1.pt")
    assert "Its folders 'a' have none" in refusal(IncompatibleError, tmp_path)


def test_several_runs_are_listed_and_none_is_taken(tmp_path: Path) -> None:
    """Two runs are never mixed."""
    tree(tmp_path, "version_0/checkpoints/a.pt", "version_1/checkpoints/a.pt", "version_10/checkpoints/a.pt")
    message = refusal(IncompatibleError, tmp_path)
    assert "expected the checkpoints of one run, got 3 folders with checkpoints" in message
    assert "'version_0', 'version_1', 'version_10'" in message
    assert message.endswith("Name one of them.")


def test_folders_of_the_first_level_go_before_those_inside(tmp_path: Path) -> None:
    tree(tmp_path, "step_1.pt", "samples/other.pt")
    assert names(discover([tmp_path]).paths) == ["step_1.pt"]


@pytest.mark.guarantee("link-loops")
def test_hidden_folders_and_links_are_not_searched(tmp_path: Path) -> None:
    """A link may lead back up: the search must end, and find nothing twice."""
    tree(tmp_path, "run/checkpoints/step_1.pt", "run/.cache/old.pt")
    (tmp_path / "run" / "loop").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "again").symlink_to(tmp_path / "run" / "checkpoints")
    found = discover([tmp_path / "run"])
    assert names(found.paths) == ["step_1.pt"]


def test_a_checkpoint_folder_under_a_second_name_counts_once(tmp_path: Path) -> None:
    for step in (1, 2):
        tree(tmp_path / f"step_{step}", *CHECKPOINT_FOLDERS["DCP"])
    (tmp_path / "latest").symlink_to("step_2")
    (tmp_path / "zz_1").symlink_to("step_1")
    found = discover([tmp_path])
    assert names(found.paths) == ["step_1", "step_2"]
    assert reasons(found) == {"latest": "the same file as step_2", "zz_1": "the same file as step_1"}


def test_a_run_folder_may_be_a_link(tmp_path: Path) -> None:
    tree(tmp_path, "real/step_1.pt")
    (tmp_path / "link").symlink_to("real")
    assert discover([tmp_path / "link"]).paths == (tmp_path / "link" / "step_1.pt",)


def test_hard_links_under_numbers_and_aliases(tmp_path: Path) -> None:
    """As timm leaves them: last, model_best and the milestones are checkpoint-N once more."""
    touch(tmp_path, *(f"checkpoint-{epoch}.pth.tar" for epoch in (8, 9, 10)), "recovery-3-99.pth.tar")
    for alias, epoch in (("last", 10), ("model_best", 8), ("milestone-8", 8)):
        (tmp_path / f"{alias}.pth.tar").hardlink_to(tmp_path / f"checkpoint-{epoch}.pth.tar")
    found = discover([tmp_path])
    assert names(found.paths) == [f"checkpoint-{epoch}.pth.tar" for epoch in (8, 9, 10)]
    assert reasons(found) == {
        "last.pth.tar": "the same file as checkpoint-10.pth.tar",
        "model_best.pth.tar": "the same file as checkpoint-8.pth.tar",
        "milestone-8.pth.tar": "the same file as checkpoint-8.pth.tar",
        "recovery-3-99.pth.tar": "a recovery file from the middle of an epoch, by its name",
    }


def test_aliases_that_are_files_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path, "epoch3.pt", "epoch4.pt", "last.pt", "best.pt")
    found = discover([tmp_path])
    assert names(found.paths) == ["epoch3.pt", "epoch4.pt"]
    assert set(reasons(found)) == {"last.pt", "best.pt"}
    for path in tmp_path.glob("epoch*"):
        path.unlink()
    assert names(discover([tmp_path]).paths) == ["best.pt", "last.pt"]


def test_an_empty_file_is_incomplete(tmp_path: Path) -> None:
    touch(tmp_path, "step_1.pt")
    (tmp_path / "step_2.pt").touch()
    assert reasons(discover([tmp_path])) == {"step_2.pt": "incomplete: it is empty"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list any folder")
def test_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    tree(tmp_path, "step_1/model.safetensors")
    (tmp_path / "step_1").chmod(0)
    try:
        assert "cannot be listed" in refusal(UsageError, tmp_path)
    finally:
        (tmp_path / "step_1").chmod(0o700)


# --- runs that look like checkpoints, checkpoints that look like runs --------------------------------------


def test_the_parent_of_a_run_with_a_final_model_leads_to_its_checkpoints(tmp_path: Path) -> None:
    """Taken for a checkpoint for the sake of its final model, the run would be one checkpoint, and not averaged."""
    for step in (500, 1000):
        tree(tmp_path / "out" / f"checkpoint-{step}", *CHECKPOINT_FOLDERS["transformers"])
    tree(tmp_path / "out", "model.safetensors", "config.json")
    for source in (tmp_path, tmp_path / "out"):
        found = discover([source])
        assert found.paths == (tmp_path / "out" / "checkpoint-500", tmp_path / "out" / "checkpoint-1000")
        assert found.sources[0].is_run
        assert "beside its checkpoints" in reasons(found)["model.safetensors"]
    for step in (500, 1000):
        tree(tmp_path / "other" / f"checkpoint-{step}", *CHECKPOINT_FOLDERS["transformers"])
    tree(tmp_path / "other", "model.safetensors", "config.json")
    assert "got 2 folders with checkpoints: 'other', 'out'. Name one of them." in refusal(IncompatibleError, tmp_path)


@pytest.mark.parametrize("folders", [("bert", "gpt"), ("snapshots/rev1", "snapshots/rev2")])
@pytest.mark.parametrize("form", ["diffusers", "PEFT", "transformers sharded", "accelerate"])
def test_models_without_a_step_in_their_names_are_no_run(tmp_path: Path, folders: tuple[str, ...], form: str) -> None:
    """Two models of a zoo, or two revisions of the hub's cache: nothing says that one training made both."""
    for folder in folders:
        tree(tmp_path / folder, *CHECKPOINT_FOLDERS[form])
    source = (tmp_path / folders[0]).parent
    message = refusal(IncompatibleError, source)
    assert message.startswith(f"{source}: expected the checkpoints of one run, got 2 folders with checkpoints: ")
    assert all(repr(Path(folder).name) in message for folder in folders)
    refusal(IncompatibleError, tmp_path)


def test_an_alias_beside_a_folder_of_checkpoints_is_not_the_run(tmp_path: Path) -> None:
    """``best.pt`` at the top would hide the epochs below it, and be copied instead of an average."""
    tree(tmp_path, "run/best.pt", "run/checkpoints/epoch_1.pt", "run/checkpoints/epoch_2.pt")
    found = discover([tmp_path / "run"])
    assert names(found.paths) == ["epoch_1.pt", "epoch_2.pt"]
    assert reasons(found) == {"best.pt": "last, best or the like, by its name; the run is in checkpoints"}
    assert found.sources[0].notes == (f"the checkpoints are in {tmp_path / 'run' / 'checkpoints'}",)


def test_an_alias_beside_averages_alone_is_not_taken(tmp_path: Path) -> None:
    """What is left would be a copy of the last checkpoint, not an average."""
    touch(tmp_path, "avg_10.pt", "avg_20.pt", "last.pt")
    message = refusal(IncompatibleError, tmp_path)
    assert "'avg_10.pt' is an earlier average, by its name" in message
    assert "'last.pt' is last, best or the like by its name" in message
    touch(tmp_path, "step_3.pt")
    assert names(discover([tmp_path]).paths) == ["step_3.pt"]


def deny(monkeypatch: pytest.MonkeyPatch, method: str, folder: Path) -> None:
    """Refuses to look into a folder, as the system does to any user but root."""
    if method == "is_dir":
        is_dir = Path.is_dir

        def checked(self: Path, **options: bool) -> bool:
            if self == folder:
                raise PermissionError(13, "Permission denied", str(self))
            return is_dir(self, **options)

        monkeypatch.setattr(Path, "is_dir", checked)
    else:
        listdir = os.listdir

        def listed(path: Any = ".") -> list[Any]:
            if not isinstance(path, int) and Path(os.fsdecode(path)) == folder:
                raise PermissionError(13, "Permission denied", str(path))
            return listdir(path)

        monkeypatch.setattr(os, "listdir", listed)


@pytest.mark.guarantee("unreadable")
@pytest.mark.parametrize("method", ["is_dir", "listdir"])
@pytest.mark.parametrize("below", [False, True])
def test_a_folder_that_may_not_be_looked_into_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, below: bool
) -> None:
    """Somebody else's folder beside the checkpoints must not keep the run from being averaged."""
    tree(tmp_path, *(f"{'checkpoints/' if below else ''}epoch_{epoch}.pt" for epoch in (1, 2)), "theirs/epoch_3.pt")
    deny(monkeypatch, method, tmp_path / "theirs")
    found = discover([tmp_path])
    assert names(found.paths) == ["epoch_1.pt", "epoch_2.pt"]
    assert reasons(found)["theirs"].startswith("cannot be looked into: ")
    assert "Permission denied" in reasons(found)["theirs"]


def test_a_junk_file_of_metadata_beside_checkpoints_makes_no_checkpoint_of_their_folder(tmp_path: Path) -> None:
    touch(tmp_path, ".metadata", "epoch_1.pt", "epoch_2.pt")
    found = discover([tmp_path])
    assert (names(found.paths), found.sources[0].is_run) == (["epoch_1.pt", "epoch_2.pt"], True)
    tree(tmp_path, "__0_0.distcp")
    assert discover([tmp_path / "epoch_1.pt"]).paths == (tmp_path / "epoch_1.pt",)


def test_a_stray_shard_beside_checkpoints_is_none_of_them(tmp_path: Path) -> None:
    touch(tmp_path, "model-00001-of-00002.safetensors", "epoch_1.pt", "epoch_2.pt")
    assert names(discover([tmp_path]).paths) == ["epoch_1.pt", "epoch_2.pt"]
