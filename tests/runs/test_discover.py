"""Sources → checkpoints: natural order, each stored file once, and the reason for each that is skipped."""

from __future__ import annotations

import itertools
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.formats.trainers.name_patterns import SUFFIXES
from ckpt_avg.runs.discover import discover
from ckpt_avg.runs.run_folder import natural_key


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.write_bytes(b"x")
    return paths


def tree(root: Path, *paths: str) -> Path:
    """Makes empty-looking files; a path that ends with a slash is a folder."""
    for path in paths:
        target = root / path
        (target if path.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if not path.endswith("/"):
            target.write_bytes(b"x")
    return root


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def listed(*sources: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the checkpoints, and name → reason of what is skipped."""
    found = discover(sources)
    reasons = {item.path.name: item.reason for item in found.skipped}
    assert len(reasons) == len(found.skipped), "each once"
    return names(found.paths), reasons


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
    assert listed(tmp_path)[0] == ordered


@given(st.lists(st.text(alphabet="ab0123456789_.٣²", max_size=6), unique=True, max_size=6))
def test_the_order_is_total(texts: list[str]) -> None:
    """Any names can be compared, and the order does not depend on the one in which a folder lists them."""
    expected = sorted(texts, key=natural_key)
    for permuted in itertools.islice(itertools.permutations(texts), 24):
        assert sorted(permuted, key=natural_key) == expected


def test_numbers_that_differ_in_leading_zeros_only_have_an_order() -> None:
    assert sorted(["step_1", "step_01"], key=natural_key) == sorted(["step_01", "step_1"], key=natural_key)


def test_named_files_keep_their_order(tmp_path: Path) -> None:
    first, second, third = touch(tmp_path, "step_1.pt", "step_2.pt", "step_3.pt")
    assert discover([third, first, second]).paths == (third, first, second)


def test_a_file_of_any_suffix_can_be_named(tmp_path: Path) -> None:
    (path,) = touch(tmp_path, "weights.model_final")
    assert discover([str(path)]).paths == (path,)


def test_folders_and_files_together(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    touch(folder, "step_2.pt", "step_1.pt")
    (other,) = touch(tmp_path, "other.pt")
    assert discover([other, folder]).paths == (other, folder / "step_1.pt", folder / "step_2.pt")


# --- what a run folder gives -------------------------------------------------------------------------------


def test_each_suffix_is_used_and_others_are_not(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a{suffix}" for suffix in SUFFIXES), "log.txt", "config.json", "events.out", "README")
    found, skipped = listed(tmp_path)
    assert (set(found), skipped) == ({f"a{suffix}" for suffix in SUFFIXES}, {})


STATE = "training state, by its name"
AVERAGE = "an earlier average, by its name"
INCOMPLETE = "incomplete, by its name"
ALIAS = "an alias such as last or best, by its name"
FINAL = "the run's own weights, next to its checkpoints"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, STATE) for name in ("optimizer.pt", "optimizer_0.bin", "scheduler.pt", "rng_state.pth",
          "rng_state_3.pth", "training_args.bin", "scaler.pt", "random_states_0.pkl.pt", "sampler.bin",
          "Optimizer.pt")),
        *((name, AVERAGE) for name in ("average.safetensors", "swa.pt", "SWA.BIN", "valid.acc.ave_10best.pth",
          "avg_10.pt", "model-averaged.ckpt")),
        *((name, INCOMPLETE) for name in ("step_3.pt.tmp", "step_3.safetensors.part", "x.incomplete")),
        ("._step_1.pt", "a hidden file"),  # macOS leaves one for each file on a foreign disk
    ],
)  # fmt: skip
def test_files_that_are_skipped_by_their_name(tmp_path: Path, name: str, reason: str) -> None:
    """In a run folder; any of them may be named. `candidates` looks at what the others contain."""
    touch(tmp_path, name, "step_1.pt", "step_2.pt")
    assert listed(tmp_path) == (["step_1.pt", "step_2.pt"], {name: reason})
    assert names(discover([tmp_path / name]).paths) == [name]


@pytest.mark.parametrize(
    "files",
    [
        ["optimizer_study_epoch_1.pt"],
        ["scheduler-ablation.pt"],
        ["my_optimizer.pt"],
        ["step_1.safetensors", "step_2.pt"],
    ],
)
def test_files_that_are_kept(tmp_path: Path, files: list[str]) -> None:
    """Names that only begin like training state, and damaged files, which must be reported, not silently missing."""
    touch(tmp_path, *files)
    assert listed(tmp_path) == (files, {})


def test_an_empty_file_is_incomplete(tmp_path: Path) -> None:
    touch(tmp_path, "step_1.pt")
    (tmp_path / "step_2.pt").touch()
    assert listed(tmp_path) == (["step_1.pt"], {"step_2.pt": "incomplete: it is empty"})


def test_folders_inside_are_not_searched(tmp_path: Path) -> None:
    tree(tmp_path, "step_1.pt", "folder.pt/step_2.pt", "samples/other.pt")
    assert listed(tmp_path)[0] == ["step_1.pt"]


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


def test_links_in_the_folder_count_once(tmp_path: Path) -> None:
    """Under the real name before a symbolic link, and a name with a number, which gives the place in the run."""
    touch(tmp_path, "step_1.pt", "step_2.pt", "step_10.pt")
    (tmp_path / "last.pt").symlink_to("step_2.pt")
    (tmp_path / "zz.pt").symlink_to(tmp_path / "step_1.pt")
    (tmp_path / "best.pt").hardlink_to(tmp_path / "step_10.pt")
    assert listed(tmp_path) == (
        ["step_1.pt", "step_2.pt", "step_10.pt"],
        {
            "best.pt": "the same file as step_10.pt",
            "last.pt": "the same file as step_2.pt",
            "zz.pt": "the same file as step_1.pt",
        },
    )


def test_a_checkpoint_folder_under_a_second_name_counts_once(tmp_path: Path) -> None:
    for step in (1, 2):
        tree(tmp_path / f"step_{step}", *CHECKPOINT_FOLDERS["DCP"])
    (tmp_path / "latest").symlink_to("step_2")
    (tmp_path / "zz_1").symlink_to("step_1")
    assert listed(tmp_path) == (
        ["step_1", "step_2"],
        {"latest": "the same file as step_2", "zz_1": "the same file as step_1"},
    )


def test_hard_links_under_numbers_and_aliases(tmp_path: Path) -> None:
    """As timm saves them: last, model_best and the milestones are links to checkpoint-N."""
    touch(tmp_path, *(f"checkpoint-{epoch}.pth.tar" for epoch in (8, 9, 10)), "recovery-3-99.pth.tar")
    for alias, epoch in (("last", 10), ("model_best", 8), ("milestone-8", 8)):
        (tmp_path / f"{alias}.pth.tar").hardlink_to(tmp_path / f"checkpoint-{epoch}.pth.tar")
    assert listed(tmp_path) == (
        [f"checkpoint-{epoch}.pth.tar" for epoch in (8, 9, 10)],
        {
            "last.pth.tar": "the same file as checkpoint-10.pth.tar",
            "model_best.pth.tar": "the same file as checkpoint-8.pth.tar",
            "milestone-8.pth.tar": "the same file as checkpoint-8.pth.tar",
            "recovery-3-99.pth.tar": "a recovery file from the middle of an epoch, by its name",
        },
    )


def test_links_to_files_outside_are_checkpoints(tmp_path: Path) -> None:
    """As in a Hugging Face cache, where every file is a link into ``blobs``."""
    (blob,) = touch(tmp_path, "0123")
    (tmp_path / "snapshot").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / "snapshot" / name).symlink_to(blob)
    assert listed(tmp_path / "snapshot") == (["a.safetensors"], {"b.safetensors": "the same file as a.safetensors"})


@pytest.mark.guarantee("link-loops")
def test_broken_links_are_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "step_1.pt")
    (tmp_path / "last.pt").symlink_to("gone.pt")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    broken = dict.fromkeys(("last.pt", "loop.pt"), "a broken symbolic link")
    assert listed(tmp_path) == (["step_1.pt"], broken)


@pytest.mark.parametrize("how", ["path", "other spelling", "symlink", "hard link", "folder"])
def test_the_same_checkpoint_named_twice_is_refused(tmp_path: Path, how: str) -> None:
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
    assert "the same checkpoint is listed twice" in message
    assert str(path) in message
    assert message.endswith("List it once.")


# --- nothing there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gone.pt", "no such file or folder"),
        ("link", "broken symbolic link"),
        ("loop", "broken symbolic link"),
        ("x" * 300, "cannot be accessed: File name too long"),
    ],
)
def test_a_source_that_does_not_exist(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "link").symlink_to("gone.pt")
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(UsageError, tmp_path / name).endswith(f"{problem}. Check the path.")


def test_an_empty_path_is_refused() -> None:
    """It would mean the current folder, where a shell variable was not set."""
    assert "got an empty path" in refusal(UsageError, "")


def test_an_empty_folder(tmp_path: Path) -> None:
    message = refusal(IncompatibleError, tmp_path)
    assert message.startswith(f"{tmp_path}: expected checkpoint files (.safetensors, .pt, ")
    assert message.endswith("got none. Name a folder or files with checkpoints.")


def test_a_folder_of_skipped_files_says_why(tmp_path: Path) -> None:
    touch(tmp_path, "optimizer.pt", "step_1.pt.tmp", "notes.txt")
    message = refusal(IncompatibleError, tmp_path)
    assert f"got none; skipped: 'optimizer.pt' ({STATE}), 'step_1.pt.tmp' ({INCOMPLETE}). " in message
    assert "notes.txt" not in message


def test_a_folder_of_folders_without_a_checkpoint_names_them(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
    message = refusal(IncompatibleError, tmp_path)
    assert "Its folders 'checkpoint-1', 'checkpoint-2', 'checkpoint-10' have none in the first 3 levels" in message


def test_no_sources() -> None:
    with pytest.raises(UsageError, match="sources: got no path"):
        discover([])


# --- checkpoint folders ------------------------------------------------------------------------------------


CHECKPOINT_FOLDERS = {
    "transformers": ("model.safetensors", "trainer_state.json", "optimizer.pt", "rng_state.pth", "training_args.bin"),
    "transformers sharded": ("model.safetensors.index.json", "model-00001-of-00002.safetensors",
                             "model-00002-of-00002.safetensors", "trainer_state.json"),
    "older transformers": ("pytorch_model.bin", "trainer_state.json", "scheduler.pt"),
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


def transformers_run(folder: Path, *steps: int) -> None:
    for step in steps:
        tree(folder / f"checkpoint-{step}", *CHECKPOINT_FOLDERS["transformers"])


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
    assert listed(tmp_path)[0] == ["step_1.pt", "step_2", "step_3.pt"]


def test_the_final_model_next_to_the_checkpoints_is_skipped(tmp_path: Path) -> None:
    """The Trainer saves the last or best once more at the top: it would count double."""
    transformers_run(tmp_path, 500, 1000)
    tree(tmp_path, "model.safetensors", "config.json", "training_args.bin", "trainer_state.json")
    assert listed(tmp_path) == (
        ["checkpoint-500", "checkpoint-1000"],
        {"training_args.bin": STATE, "model.safetensors": FINAL},
    )


@pytest.mark.parametrize("other", ["ema_model.safetensors", "value_head.bin", "custom.pt"])
def test_further_weights_in_a_checkpoint_folder_do_not_make_it_a_run(tmp_path: Path, other: str) -> None:
    """Named itself, it is the checkpoint that it is in its run: the other file must not take its place."""
    for step in (1, 2):
        tree(tmp_path / f"checkpoint-{step}", *CHECKPOINT_FOLDERS["transformers"], other)
    assert listed(tmp_path)[0] == ["checkpoint-1", "checkpoint-2"]
    assert discover([tmp_path / "checkpoint-1"]).paths == (tmp_path / "checkpoint-1",)


def test_a_sharded_final_model_next_to_the_checkpoints_is_skipped(tmp_path: Path) -> None:
    """Its shards are no checkpoints either."""
    transformers_run(tmp_path, 500, 1000)
    tree(tmp_path, *CHECKPOINT_FOLDERS["transformers sharded"])
    found, skipped = listed(tmp_path)
    assert found == ["checkpoint-500", "checkpoint-1000"]
    assert skipped["model.safetensors.index.json"] == FINAL


@pytest.mark.guarantee("half-written")
def test_checkpoint_folders_that_were_not_finished(tmp_path: Path) -> None:
    """In each way that trainers have: with a temporary name, or without the file that is written last."""
    transformers_run(tmp_path, 1, 2)
    tree(tmp_path / "tmp-checkpoint-3", *CHECKPOINT_FOLDERS["transformers"])
    tree(tmp_path / "checkpoint-4.tmp", "model.safetensors")
    tree(tmp_path / "checkpoint-5", "model.safetensors")
    tree(tmp_path / "checkpoint-6", "__0_0.distcp", "__1_0.distcp")
    tree(tmp_path / "checkpoint-7", "model-00001-of-00002.safetensors")
    tree(tmp_path / ".hidden", "notes.txt")
    found, skipped = listed(tmp_path)
    assert found == ["checkpoint-1", "checkpoint-2"]
    assert set(skipped) == {f"checkpoint-{rest}" for rest in ("4.tmp", "5", "6", "7")} | {"tmp-checkpoint-3"}
    assert all(reason.startswith("incomplete") for reason in skipped.values())
    assert "trainer_state.json" in skipped["checkpoint-5"]
    assert ".metadata" in skipped["checkpoint-6"]
    assert "'model-00001-of-00002.safetensors'" in skipped["checkpoint-7"]


def test_folders_are_complete_without_trainer_state_if_none_has_it(tmp_path: Path) -> None:
    """They were saved with save_pretrained, not by the Trainer."""
    for step in (1, 2):
        tree(tmp_path / f"checkpoint-{step}", "model.safetensors", "config.json")
    assert listed(tmp_path)[0] == ["checkpoint-1", "checkpoint-2"]


def test_only_incomplete_checkpoints(tmp_path: Path) -> None:
    tree(tmp_path, "step_1/__0_0.distcp", "step_2.pt.tmp")
    message = refusal(IncompatibleError, tmp_path)
    assert "'step_1' (incomplete: there is no .metadata next to the *.distcp files" in message
    assert "'step_2.pt.tmp' (incomplete, by its name)" in message


@pytest.mark.parametrize("folder", ["tmp-checkpoint-3", "checkpoint-3.tmp", "checkpoint-3.incomplete"])
def test_an_incomplete_folder_is_not_searched_for_checkpoints(tmp_path: Path, folder: str) -> None:
    """The only one of a run that has just begun: what is in it is no checkpoint yet."""
    tree(tmp_path / folder, *CHECKPOINT_FOLDERS["transformers"])
    assert f"'{folder}' (incomplete, by its name)" in refusal(IncompatibleError, tmp_path)


def test_a_refused_folder_is_kept_so_that_it_is_reported(tmp_path: Path) -> None:
    """Left out silently, ZeRO 3 would average the other half of a run."""
    tree(tmp_path / "global_step1", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    tree(tmp_path / "global_step2", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    tree(tmp_path, "latest", "zero_to_fp32.py")
    assert listed(tmp_path)[0] == ["global_step1", "global_step2"]


# --- run folders in folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["checkpoints", "lightning_logs/version_0/checkpoints", "a/b/c"])
def test_checkpoints_in_an_inner_folder_are_found_with_a_note(tmp_path: Path, inner: str) -> None:
    tree(tmp_path, f"{inner}/step_9.pt", f"{inner}/step_10.pt", "config.yaml", "logs/events.out", "optimizer.pt")
    assert listed(tmp_path) == (["step_9.pt", "step_10.pt"], {"optimizer.pt": STATE})
    assert discover(tmp_path).sources[0].notes == (f"the checkpoints are in {tmp_path / inner}",)


def test_the_search_is_three_levels_deep(tmp_path: Path) -> None:
    tree(tmp_path, "a/b/c/d/step_1.pt")
    assert "Its folders 'a' have none" in refusal(IncompatibleError, tmp_path)


@pytest.mark.guarantee("link-loops")
def test_hidden_folders_and_links_back_are_not_searched(tmp_path: Path) -> None:
    """A link may lead back up: the search must end, and find nothing twice."""
    tree(tmp_path, "run/checkpoints/step_1.pt", "run/.cache/old.pt")
    (tmp_path / "run" / "loop").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "again").symlink_to(tmp_path / "run" / "checkpoints")
    assert listed(tmp_path / "run")[0] == ["step_1.pt"]


def test_a_run_folder_may_be_a_link(tmp_path: Path) -> None:
    tree(tmp_path, "real/step_1.pt")
    (tmp_path / "link").symlink_to("real")
    assert discover([tmp_path / "link"]).paths == (tmp_path / "link" / "step_1.pt",)


def test_aliases_that_are_files_of_their_own(tmp_path: Path) -> None:
    touch(tmp_path, "epoch3.pt", "epoch4.pt", "last.pt", "best.pt")
    assert listed(tmp_path) == (["epoch3.pt", "epoch4.pt"], dict.fromkeys(("best.pt", "last.pt"), ALIAS))
    for path in tmp_path.glob("epoch*"):
        path.unlink()
    assert listed(tmp_path)[0] == ["best.pt", "last.pt"]


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
    transformers_run(tmp_path / "out", 500, 1000)
    tree(tmp_path / "out", "model.safetensors", "config.json")
    for source in (tmp_path, tmp_path / "out"):
        found = discover([source])
        assert found.paths == (tmp_path / "out" / "checkpoint-500", tmp_path / "out" / "checkpoint-1000")
        assert found.sources[0].is_run
        assert listed(source)[1]["model.safetensors"] == FINAL
    transformers_run(tmp_path / "other", 500, 1000)
    tree(tmp_path / "other", "model.safetensors", "config.json")
    message = refusal(IncompatibleError, tmp_path)
    assert "got 2 folders with checkpoints: 'other', 'out'. To average one run, name its folder, for example" in message


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


def test_an_alias_next_to_a_folder_of_checkpoints_is_not_the_run(tmp_path: Path) -> None:
    """``best.pt`` at the top would hide the epochs below it, and be copied instead of an average."""
    tree(tmp_path, "run/best.pt", "run/checkpoints/epoch_1.pt", "run/checkpoints/epoch_2.pt")
    assert listed(tmp_path / "run") == (
        ["epoch_1.pt", "epoch_2.pt"],
        {"best.pt": f"{ALIAS}; the run is in checkpoints"},
    )
    assert discover(tmp_path / "run").sources[0].notes == (
        f"the checkpoints are in {tmp_path / 'run' / 'checkpoints'}",
    )


def test_an_alias_next_to_averages_only_is_skipped(tmp_path: Path) -> None:
    """What is left would be a copy of the last checkpoint, not an average."""
    touch(tmp_path, "avg_10.pt", "avg_20.pt", "last.pt")
    message = refusal(IncompatibleError, tmp_path)
    assert f"'avg_10.pt' ({AVERAGE})" in message
    assert f"'last.pt' ({ALIAS})" in message
    touch(tmp_path, "step_3.pt")
    assert listed(tmp_path)[0] == ["step_3.pt"]


def deny(monkeypatch: pytest.MonkeyPatch, method: str, folder: Path) -> None:
    """Makes a folder unreadable, as for any user but root."""
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
def test_an_unreadable_folder_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, below: bool
) -> None:
    """Another user's folder next to the checkpoints must not stop the averaging of the run."""
    tree(tmp_path, *(f"{'checkpoints/' if below else ''}epoch_{epoch}.pt" for epoch in (1, 2)), "theirs/epoch_3.pt")
    deny(monkeypatch, method, tmp_path / "theirs")
    found, skipped = listed(tmp_path)
    assert found == ["epoch_1.pt", "epoch_2.pt"]
    assert skipped["theirs"].startswith("cannot be read: ")
    assert "Permission denied" in skipped["theirs"]


def test_a_junk_metadata_file_does_not_make_a_run_a_checkpoint(tmp_path: Path) -> None:
    touch(tmp_path, ".metadata", "epoch_1.pt", "epoch_2.pt")
    found = discover([tmp_path])
    assert (names(found.paths), found.sources[0].is_run) == (["epoch_1.pt", "epoch_2.pt"], True)
    tree(tmp_path, "__0_0.distcp")
    assert discover([tmp_path / "epoch_1.pt"]).paths == (tmp_path / "epoch_1.pt",)
