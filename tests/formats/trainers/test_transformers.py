"""transformers' Trainer and the hub: checkpoint folders with one file or with shards."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import layouts
import pytest
from formats.reading import Command, assert_same, averaged, check_saved, listed, mean, names, read, refusal
from layouts import save, tokens
from safetensors.torch import save_file

from ckpt_avg import open_checkpoint

FORMS = ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json"]
STEPS = ["checkpoint-500", "checkpoint-1000", "checkpoint-1500"]


@pytest.mark.parametrize("form", FORMS)
def test_a_run(tmp_path: Path, in_process: Command, form: str) -> None:
    """Shards are one checkpoint; the optimizer next to them is none; steps are in order. An index opens, too."""
    (tmp_path / "run").mkdir()
    run = layouts.hf_trainer(tmp_path / "run", form=form)
    for saved in run.checkpoints:
        check_saved(saved, "HF Trainer")
        assert_same(read(saved.path / form), saved.raw)
    shown = listed(in_process, run.folder)
    assert names(shown["checkpoints"]) == STEPS
    assert [entry["step"] for entry in shown["checkpoints"]] == [500, 1000, 1500]
    metrics = [entry["metrics"] for entry in shown["checkpoints"]]
    assert metrics == [{"eval_loss": 2.5}, {"eval_loss": 1.75}, {"eval_loss": 2.0}]  # not eval_runtime
    assert_same(averaged(in_process, run.folder), mean([each.raw for each in run.checkpoints]))


def test_the_final_model_beside_the_checkpoints_is_none_of_them(tmp_path: Path, in_process: Command) -> None:
    """trainer.save_model() at the end puts the weights of the last or best checkpoint into the run folder itself."""
    run = layouts.hf_trainer(tmp_path)
    save_file(dict(run.checkpoints[-1].raw), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "trainer_state.json").write_text((run.checkpoints[-1].path / "trainer_state.json").read_text())
    save(None, tmp_path / "training_args.bin")
    shown = listed(in_process, tmp_path)
    assert names(shown["checkpoints"]) == STEPS
    assert "model.safetensors" in names(shown["skipped"])


def test_with_deepspeed(tmp_path: Path, in_process: Command) -> None:
    """The gathered weights are next to DeepSpeed's own folder; without them, stage 3 is refused."""
    run = layouts.hf_trainer(tmp_path)
    for saved in run.checkpoints:
        layouts.deepspeed(saved.path, stage=3)
        shutil.rmtree(saved.path / "global_step90")
        check_saved(saved, "HF Trainer")
    for saved in run.checkpoints:
        (saved.path / "model.safetensors").unlink()
        assert "zero_to_fp32" in refusal(saved.path)
    code, _, errors = in_process("average", tmp_path, "-o", tmp_path / "o.safetensors")
    assert code == 3, errors
    assert "zero_to_fp32" in errors


@pytest.mark.parametrize(
    ("stem", "suffix"),
    [("pytorch_model", "bin"), ("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin")],
)
def test_folders_of_other_writers(tmp_path: Path, stem: str, suffix: str) -> None:
    layouts.sharded(tmp_path, tokens(1), stem=stem, suffix=suffix, count=3)
    assert_same(read(tmp_path), tokens(1))


def test_one_shard_is_the_whole_without_an_index(tmp_path: Path) -> None:
    """The names are transformers', which does not make its Trainer the writer."""
    save_file(tokens(1), tmp_path / "model-00001-of-00001.safetensors")
    assert_same(read(tmp_path), tokens(1))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.spec.kind is None


def test_weights_in_both_formats_are_one_checkpoint(tmp_path: Path) -> None:
    """The same weights twice in one folder: the safetensors file is taken."""
    save_file(tokens(1), tmp_path / "model.safetensors")
    save(tokens(2), tmp_path / "pytorch_model.bin")
    assert_same(read(tmp_path), tokens(1))


def hub_cache(root: Path, files: Mapping[str, bytes]) -> Path:
    """The cache of huggingface_hub: a snapshot of links into a folder of blobs."""
    model = root / "models--org--name"
    snapshot = model / "snapshots" / ("0123abcd" * 5)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123abcd" * 5)
    for number, (name, content) in enumerate(files.items()):
        blob = f"{number:064x}"
        (model / "blobs" / blob).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


@pytest.mark.parametrize("count", [1, 2])
def test_the_cache_of_the_hub_is_read(tmp_path: Path, count: int) -> None:
    """Its shards are links that leave the folder of the snapshot."""
    source = tmp_path / "source"
    source.mkdir()
    if count == 1:
        save_file(tokens(1), source / "model.safetensors")
    else:
        layouts.sharded(source, tokens(1))
    (source / "config.json").write_text("{}")
    snapshot = hub_cache(tmp_path, {path.name: path.read_bytes() for path in sorted(source.iterdir())})
    assert_same(read(snapshot), tokens(1))
    for path in snapshot.glob("model.safetensors*"):
        assert_same(read(path), tokens(1))
