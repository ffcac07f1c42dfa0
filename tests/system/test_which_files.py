"""docs/which-files.md: every layout of its table, built as its trainer writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from ckpt_avg import CkptAvgError, average, inspect
from ckpt_avg.errors import PartError

PAGE = (Path(__file__).parents[2] / "docs" / "which-files.md").read_text()
Write = Callable[[Path], object]
Files = dict[str, "Write | str"]


def values(path: Path) -> dict[str, torch.Tensor]:
    """Weights that no other path has."""
    seed = int.from_bytes(str(path.relative_to(path.parents[3])).encode(), "big") % 9973
    return {"w": torch.full((3,), float(seed)), "b": torch.full((1,), seed / 2)}


def weights(**recorded: Any) -> Write:
    """A state dict; with what a script records next to it."""

    def write(path: Path) -> None:
        if path.suffix == ".safetensors":
            save_file(values(path), path, {key: str(value) for key, value in recorded.items()})
        else:
            torch.save({"model": values(path), **recorded} if recorded else values(path), path)

    return write


def shards(*names: str) -> Write:
    """An index, and the shards that it names."""

    def write(index: Path) -> None:
        for number, name in enumerate(names):
            save_file({f"w{number}": values(index)["w"] + number}, index.with_name(name))
        index.write_text(json.dumps({"weight_map": {f"w{number}": name for number, name in enumerate(names)}}))

    return write


def distributed(path: Path) -> None:
    """A folder of torch.distributed.checkpoint."""
    dcp.save(values(path), storage_writer=dcp.FileSystemWriter(path), no_dist=True)


def optimizer(path: Path) -> None:
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}, path)


def other(path: Path) -> None:
    """A torch file without weights."""
    torch.save({"rng": {"seed": 1}, "seen": 3}, path)


def flat(path: Path) -> None:
    torch.save({"_fsdp_wrapped_module._flat_param": values(path)["w"]}, path)


def flags(path: Path) -> None:
    """Tensors that are none of the model's."""
    torch.save({"mean": torch.ones(3)}, path)


def text(content: str = "{}") -> Write:
    return lambda path: path.write_text(content)


def each(names: Sequence[object], files: Files, pattern: str) -> Files:
    """The same files for each checkpoint; the pattern makes the name of its folder."""
    return {f"{pattern.format(name)}/{path}": write for name in names for path, write in files.items()}


@dataclass(frozen=True)
class Layout:
    """Files of a run folder, and what is averaged of them, in order, or what the refusal says."""

    files: Files
    used: Sequence[str] | None = None
    refused: str = ""
    exit_code: int = 3
    skipped: dict[str, str] = field(default_factory=dict)
    notice: str = ""
    sources: Sequence[str] = ("",)
    options: dict[str, Any] = field(default_factory=dict)


W = weights()
MODULES = {"modules.json": text("[]"), "1_Pooling/config.json": text()}
SPEECHBRAIN: Files = {"counter.ckpt": text("1"), "brain.ckpt": text("loss: 1"), "optimizer.ckpt": optimizer}
RANKS = "of the framework that trained the model"
SEVERAL = "expected the checkpoints of one run, got 2 folders with checkpoints"

LAYOUTS: dict[str, Layout] = {
    # --- folders ---
    "sentence-transformers model": Layout(
        MODULES | {"model.safetensors": W, "2_Dense/model.safetensors": W}, [""],
        notice="'model.safetensors' is read, not '2_Dense'",
    ),
    "sentence-transformers run": Layout(
        each((500, 1000), MODULES | {"model.safetensors": W, "2_Dense/model.safetensors": W}, "checkpoint-{}"),
        ["checkpoint-500", "checkpoint-1000"], notice="not '2_Dense'",
    ),
    "older sentence-transformers": Layout(
        each((500, 1000), MODULES | {"0_Transformer/pytorch_model.bin": W, "2_Dense/pytorch_model.bin": W}, "model-{}"),
        ["model-500", "model-1000"], notice="'0_Transformer/pytorch_model.bin' is read, not '2_Dense'",
    ),
    "weights next to weights": Layout(
        each((1, 2), {"model.safetensors": W, "value_head.safetensors": W, "adapter_model.safetensors": W,
                      "non_lora_trainables.bin": W, "optimizer.pt": optimizer}, "checkpoint-{}"),
        ["checkpoint-1", "checkpoint-2"],
        notice="not 'adapter_model.safetensors', 'non_lora_trainables.bin', 'value_head.safetensors'",
    ),
    "Accelerate with two models": Layout(
        each((1, 2), {"model.safetensors": W, "model_1.safetensors": W, "random_states_0.pkl": other}, "state_{}"),
        ["state_1", "state_2"], notice="not 'model_1.safetensors'", sources=("state_1", "state_2"),
    ),
    "diffusers": Layout(
        each((500, 1000), {"unet/diffusion_pytorch_model.safetensors": W, "optimizer.bin": optimizer}, "checkpoint-{}"),
        ["checkpoint-500", "checkpoint-1000"],
    ),
    "diffusers with EMA": Layout(
        each((500, 1000), {f"{name}/diffusion_pytorch_model.safetensors": W for name in ("unet", "unet_ema")},
             "checkpoint-{}"),
        ["checkpoint-500", "checkpoint-1000"], notice="not 'unet_ema'",
    ),
    "diffusers with --ema": Layout(
        each((500, 1000), {f"{name}/diffusion_pytorch_model.safetensors": W for name in ("unet", "unet_ema")},
             "checkpoint-{}"),
        ["checkpoint-500", "checkpoint-1000"], notice="already an average", options={"ema": True},
    ),
    "diffusers with two networks": Layout(
        each((500, 1000), {"unet/model.safetensors": W, "text_encoder/model.safetensors": W}, "checkpoint-{}"),
        refused="several models: 'text_encoder', 'unet'. `average` takes all of them with -o FOLDER/. Or name "
        "one of each checkpoint: {}/checkpoint-*/text_",
    ),
    "one network of each checkpoint": Layout(
        each((500, 1000), {"unet/pytorch_model.bin": W, "vae/pytorch_model.bin": W}, "checkpoint-{}"),
        ["checkpoint-500/unet", "checkpoint-1000/unet"], notice="in the order of their steps, not as given",
        sources=("checkpoint-1000/unet", "checkpoint-500/unet"),
    ),
    "OLMo": Layout(
        each((1000, 20000), {"model.pt": W, "optim.pt": optimizer, "train.pt": other, "config.yaml": text()},
             "step{}-unsharded"),
        ["step1000-unsharded", "step20000-unsharded"],
    ),
    "OLMo-core": Layout(
        each((1000, 20000), {"model_and_optim": distributed, "train/rank0.pt": other, "config.json": text()}, "step{}"),
        ["step1000", "step20000"],
    ),
    "LeRobot": Layout(
        each(("010000", "020000"), {"pretrained_model/model.safetensors": W, "training_state/rng_state.safetensors": W},
             "checkpoints/{}") | {"checkpoints/last": "020000"},
        ["checkpoints/010000", "checkpoints/020000"], skipped={"last": "the same file as 020000"},
    ),
    "Open-Sora": Layout(
        each((100, 200), {"model/model.safetensors": W, "ema.pt": W, "master.safetensors": W, "optimizer/a.bin": W},
             "epoch0-global_step{}"),
        ["epoch0-global_step100", "epoch0-global_step200"], notice="not 'ema.pt', 'master.safetensors'",
    ),
    "nanotron": Layout(
        each((10, 20), {"checkpoint_metadata.json": text(), "optimizer/o.safetensors": W,
                        "model/w_pp-rank-0-of-1_tp-rank-0-of-1.safetensors": W}, "{}"),
        refused="nanotron stores each tensor in a file of its own",
    ),
    "BasicSR": Layout(
        {"models/net_g_5000.pth": W, "models/net_g_10000.pth": W, "training_states/5000.state": optimizer},
        ["models/net_g_5000.pth", "models/net_g_10000.pth"],
    ),
    "SwAV": Layout(
        {"checkpoints/ckp-0.pth": W, "checkpoints/ckp-25.pth": W, "checkpoint.pth.tar": W, "queue0.pth": W},
        ["checkpoints/ckp-0.pth", "checkpoints/ckp-25.pth"],
        skipped={"queue0.pth": "training state", "checkpoint.pth.tar": "alias"},
    ),
    "litgpt": Layout(
        each((100, 200), {"lit_model.pth": W, "model_config.yaml": text()}, "step-000{}") | {"final/lit_model.pth": W},
        ["step-000100", "step-000200"], skipped={"final": "alias"},
    ),
    "NeMo 2": Layout(
        each((500, 1000), {"weights": distributed, "context/io.json": text()}, "m--val_loss=1.5-step={}")
        | {"m--val_loss=1.2-step=1500/weights": distributed, "m--val_loss=1.2-step=1500-unfinished": text()},
        ["m--val_loss=1.5-step=500", "m--val_loss=1.5-step=1000"],
        skipped={"m--val_loss=1.2-step=1500": "incomplete"},
    ),
    "verl on one process": Layout(
        each((10, 20), {"actor/model_world_size_1_rank_0.pt": W, "actor/optim_world_size_1_rank_0.pt": optimizer},
             "global_step_{}"),
        ["global_step_10", "global_step_20"],
    ),
    "resumed Lightning run": Layout(
        {f"version_{version}/checkpoints/epoch={epoch}.ckpt": W for version in (0, 1) for epoch in (2 * version, 3)},
        refused=SEVERAL + ": 'version_0/checkpoints', 'version_1/checkpoints'. To average one run, name its folder, "
        "for example {}/version_0/checkpoints. If they are of one training, name them all: {}/version_*/checkpoints",
        exit_code=4,
    ),
    "resumed Lightning run, both named": Layout(
        {f"version_{version}/epoch={2 * version + number}.ckpt": W for version in (0, 1) for number in (0, 1)},
        ["version_0/epoch=0.ckpt", "version_0/epoch=1.ckpt", "version_1/epoch=2.ckpt", "version_1/epoch=3.ckpt"],
        notice="not as given", sources=("version_1", "version_0"),
    ),
    "Lightning run resumed in the middle": Layout(
        {"v0/epoch=0.ckpt": W, "v0/epoch=1.ckpt": W, "v1/epoch=1.ckpt": W, "v1/epoch=2.ckpt": W},
        ["v0/epoch=0.ckpt", "v0/epoch=1.ckpt", "v1/epoch=1.ckpt", "v1/epoch=2.ckpt"], sources=("v0", "v1"),
        notice="several checkpoints have the same step, and all are used: 'v0/epoch=1.ckpt', 'v1/epoch=1.ckpt'",
    ),
    "folders of digits": Layout({"90/model.pt": W, "100/model.pt": W}, refused="name them all: {}/[0-9]*", exit_code=4),
    "folders of digits, listed": Layout(
        {"90/model.pt": W, "100/model.pt": W}, ["90/model.pt", "100/model.pt"], sources=("100", "90"),
        notice="not as given",
    ),
    "two models": Layout(
        each(("bert", "gpt"), {"model.safetensors": W}, "{}"),
        refused=SEVERAL + ": 'bert', 'gpt'. If they are of one training, name them all: {}/bert {}/gpt", exit_code=4,
    ),
    "Hugging Face cache": Layout(
        {"blobs/aa": W, "blobs/bb": W, "refs/main": text("11aa"),
         "snapshots/11aa/pytorch_model.bin": "../../blobs/aa", "snapshots/22bb/pytorch_model.bin": "../../blobs/bb"},
        refused=SEVERAL + ": 'snapshots/11aa', 'snapshots/22bb'. If they are of one training, name them all: "
        "{}/snapshots/11aa {}/snapshots/22bb", exit_code=4,
    ),
    "Hugging Face revisions": Layout(
        {"blobs/aa": W, "blobs/bb": W, "refs/main": text("22bb"), "refs/step90": text("22bb"),
         "refs/step100": text("11aa"),
         "snapshots/11aa/pytorch_model.bin": "../../blobs/aa", "snapshots/22bb/pytorch_model.bin": "../../blobs/bb"},
        ["snapshots/22bb", "snapshots/11aa"], sources=("snapshots/11aa", "snapshots/22bb"), notice="not as given",
    ),
    "folders of settings": Layout(
        {"lr=0.1,steps=1000/last.pt": W, "lr=0.01,steps=1000/last.pt": W}, refused=SEVERAL, exit_code=4,
    ),
    "linked inner folder": Layout(
        {"../data/step_9.pt": W, "../data/step_10.pt": W, "checkpoints": "../data", "config.yaml": text()},
        ["checkpoints/step_9.pt", "checkpoints/step_10.pt"], notice="the checkpoints are in",
    ),
    "folders of other weights": Layout(
        {"step_1.pt": W, "step_2.pt": W, "ema/step_1.pt": W, "export/best/model.safetensors": W, "logs/x.txt": text()},
        ["step_1.pt", "step_2.pt"], skipped={"ema": "another model or run", "export": "another model or run"},
    ),
    "index with any names": Layout(
        each((1, 2), {"model.safetensors.index.json": shards(*(f"{name}.safetensors" for name in (
            "shard_1", "final", "last", "optimizer", "layers-0", "step_5")))}, "checkpoint-{}"),
        ["checkpoint-1", "checkpoint-2"],
    ),
    "index of any name": Layout({"weights.safetensors.index.json": shards("1.safetensors", "2.safetensors")}, [""]),
    # --- suffixes ---
    "SlowFast": Layout({f"checkpoint_epoch_{epoch:05}.pyth": W for epoch in (9, 10)},
                       ["checkpoint_epoch_00009.pyth", "checkpoint_epoch_00010.pyth"]),
    "unusual suffixes": Layout({"1.tar": W, "2.model": W, "3.chkpt": W, "4.t7": W, "vocab.model": text("a b"),
                                "notes.docx": text("PK\3\4")}, ["1.tar", "2.model", "3.chkpt", "4.t7"]),
    "no suffix": Layout({"g_00005000": W, "g_00010000": W, "g_00015000": text(""), "do_00010000": optimizer},
                        ["g_00005000", "g_00010000"],
                        skipped={"g_00015000": "it is empty", "do_00010000": "no weights"}),
    "no suffix, damaged": Layout({"g_00005000": W, "g_00010000": text("\0\0")}, refused="g_00010000: expected"),
    "backups and downloads": Layout(
        {"epoch_1.pt": W, "epoch_2.pt": W, "epoch_2.pt.bak": W, "epoch_3.pt.crdownload": W, "epoch_3.pt.tmp.12": W},
        ["epoch_1.pt", "epoch_2.pt"],
        skipped={"epoch_2.pt.bak": "backup", "epoch_3.pt.crdownload": "incomplete", "epoch_3.pt.tmp.12": "incomplete"},
    ),
    "Stable-Baselines3": Layout({"policy_64.pt": W, "policy_128.pt": W, "rl_model_64_steps.zip": text("PK\3\4")},
                                ["policy_64.pt", "policy_128.pt"], skipped={"rl_model_64_steps.zip": "a zip archive"}),
    "other formats": Layout({"a.h5": text("x"), "b.onnx": text("x")}, exit_code=4,
                            refused="'a.h5' (no checkpoint, by its first bytes: HDF5, as Keras writes it)"),
    # --- parts ---
    "ranks": Layout({"rank0.safetensors": W, "rank1.safetensors": W}, refused=RANKS),
    "ranks of one step": Layout({"model_final.rank_0.pth": W, "model_final.rank_1.pth": W}, refused=RANKS),
    "ranks, one included": Layout({"m_rank_0.pt": W, "m_rank_1.pt": W}, refused=RANKS, options={"include": "*_0.pt"}),
    "ranks, listed": Layout({"m_part1.pt": W, "m_part2.pt": W}, refused=RANKS, sources=("m_part2.pt", "m_part1.pt")),
    "tensor and pipeline parallel": Layout({"pytorch_model_tp_0_pp_0.bin": W, "pytorch_model_tp_1_pp_0.bin": W},
                                           refused="'pytorch_model_tp_1_pp_0.bin' is next to it"),
    "expert parallel": Layout({"m_tp0_ep0.pt": W, "m_tp0_ep1.pt": W}, refused=RANKS),
    "one of two": Layout({"ckpt-00000-of-00002.pt": W}, refused=RANKS),
    "FSDP ranks in step folders": Layout(
        each((10, 20), {f"actor/model_world_size_2_rank_{rank}.pt": W for rank in (0, 1)}, "global_step_{}"),
        refused=RANKS,
    ),
    "Composer ranks": Layout({"ep1-ba100-rank0.pt": W, "ep1-ba100-rank1.pt": W}, refused=RANKS),
    "audiocraft ranks": Layout({"checkpoint_10.th": W, "checkpoint_10.th.1": W}, refused=RANKS),
    "AllenNLP ranks": Layout({f"model_state_e1_b0_w{rank}.th": W for rank in (0, 1)}, refused=RANKS),
    "older torchtune": Layout({f"hf_model_000{part}_0.pt": W for part in (1, 2)}, refused=RANKS),
    "ranks of several steps": Layout({f"step_{step}_rank_{rank}.pt": W for step in (1, 2) for rank in (0, 1)},
                                     refused=RANKS),
    "ranks among checkpoints": Layout({"rank_0.pt": W, "rank_1.pt": W, "step_1.pt": W, "step_2.pt": W},
                                      refused="To average the others, add --exclude rank_0.pt."),
    "one rank of each step": Layout({f"step_{step}_rank0.pt": W for step in (1, 2, 10)},
                                    [f"step_{step}_rank0.pt" for step in (1, 2, 10)]),
    "flat parameters": Layout({"step_1.pt": flat, "step_2.pt": flat}, refused="flat parameters of FSDP"),
    "DeepSpeed experts": Layout(
        each((1, 2), {"mp_rank_00_model_states.pt": W, **{f"layer_0_expert_{expert}_mp_rank_00_model_states.pt": W
                                                          for expert in (0, 1)}}, "global_step{}"),
        refused="DeepSpeed stores each expert of a mixture in a file of its own",
    ),
    "DeepSpeed experts, listed": Layout(
        each((1, 2), {f"{part}mp_rank_00_model_states.pt": W for part in ("", "layer_0_expert_0_")}, "global_step{}"),
        refused="stores each expert", sources=[f"global_step{step}/mp_rank_00_model_states.pt" for step in (1, 2)],
    ),
    "GPT-NeoX pipeline": Layout(
        each((1, 2), {"layer_00-model_00-model_states.pt": W, "layer_02-model_00-model_states.pt": W}, "global_step{}"),
        refused="DeepSpeed's pipeline parallelism stores each layer in a file of its own",
    ),
    "Megatron folders": Layout(
        each((0, 1), {"model_optim_rng.pt": W}, "iter_0000001/tp_rank_00_pp_rank_00{}"),
        refused="split among 2 Megatron tensor- or pipeline-parallel ranks",
    ),
    "folders of ranks, listed": Layout(
        {f"rank_{rank}/step_1.pt": W for rank in (0, 1)}, exit_code=3,
        sources=[f"rank_{rank}/step_1.pt" for rank in (0, 1)], refused="are parts of one checkpoint, by their names",
    ),
    "ranks that are not neighbours": Layout({f"model_rank{rank}.pt": W for rank in (0, 8)}, exit_code=3,
                                            refused="are parts of one checkpoint, by their names"),
    "folders of ranks": Layout(each((0, 1), {"model.pt": W}, "rank_{}"), refused=RANKS),
    "zarr": Layout({"iter_0000001/decoder.weight/.zarray": text(), "iter_0000001/common.pt": other,
                    "iter_0000001/decoder.weight/0.0": text("x")}, refused="in the zarr format"),
    # --- series, averages, what went wrong ---
    "icefall after a bad loss": Layout(
        {"epoch-1.pt": weights(epoch=1), "epoch-2.pt": weights(epoch=2), "bad-model-0.pt": W,
         "batch-1b4e28ba-2fa1-11d2-883f-0016d3cca427.pt": other}, ["epoch-1.pt", "epoch-2.pt"],
        skipped={"bad-model-0.pt": "something went wrong", "batch-1b4e28ba-2fa1-11d2-883f-0016d3cca427.pt": "a batch"},
    ),
    "AllenNLP": Layout(
        {f"{state}_state_e{epoch}_b0.th": W for state in ("model", "training") for epoch in (1, 10)} | {"best.th": W},
        ["model_state_e1_b0.th", "model_state_e10_b0.th"],
        skipped={"best.th": "alias", **dict.fromkeys(("training_state_e1_b0.th", "training_state_e10_b0.th"), "state")},
    ),
    "after a crash": Layout(
        {"step_100.pt": W, "step_200.pt": W, "nan_step_150.pt": W, "crash_160.pt": W, "last_batch_180.pt": W},
        ["step_100.pt", "step_200.pt"],
        skipped={"nan_step_150.pt": "went wrong", "crash_160.pt": "went wrong", "last_batch_180.pt": "a batch"},
    ),
    "fine-tuning": Layout({"model_1000.pt": W, "model_2000.pt": W, "pretrained_model_125000.safetensors": W},
                          ["model_1000.pt", "model_2000.pt"],
                          skipped={"pretrained_model_125000.safetensors": "pretrained weights"}),
    "kohya": Layout(
        {f"lora-00000{epoch}.safetensors": weights(ss_epoch=epoch, ss_steps=100 * epoch) for epoch in (1, 2)}
        | {"lora.safetensors": weights(ss_epoch=3, ss_steps=300), "lora-000001-state/model.safetensors": W},
        ["lora-000001.safetensors", "lora-000002.safetensors", "lora.safetensors"],
        skipped={"lora-000001-state": "training state"},
    ),
    "a last file without a number": Layout(
        {"lora_100.safetensors": W, "lora_200.safetensors": W, "lora_300.safetensors": W, "lora.safetensors": W},
        [f"lora_{step}.safetensors" for step in (100, 200, 300)], skipped={"lora.safetensors": "no step or epoch"},
        notice="skipped, because no step or epoch is recorded in them, unlike in the others: 'lora.safetensors'",
    ),
    "other tensors among the checkpoints": Layout(
        {"step_1.pt": W, "step_2.pt": W, "normalizer.pt": flags, "predictions.pt": flags}, ["step_1.pt", "step_2.pt"],
        skipped={"normalizer.pt": "no step or epoch", "predictions.pt": "the same weights"},
    ),
    "swa_object_detection": Layout({f"swa_epoch_{epoch}.pth": W for epoch in (1, 2, 12)} | {"swa_model_12.pth": W},
                                   [f"swa_epoch_{epoch}.pth" for epoch in (1, 2, 12)],
                                   skipped={"swa_model_12.pth": "an earlier average"}),
    "averages of epochs alone": Layout({f"avg_epoch_{epoch}.pth": W for epoch in (2, 12)},
                                       ["avg_epoch_2.pth", "avg_epoch_12.pth"], notice="these are averages"),
    "averages, included": Layout({"epoch_1.pt": W, "avg_10.pt": W, "avg_20.pt": W}, ["avg_10.pt", "avg_20.pt"],
                                 options={"include": "avg_*"}),
    "averages alone, included": Layout({"avg_10.pt": W, "avg_20.pt": W}, ["avg_10.pt", "avg_20.pt"],
                                       options={"include": "avg_*"}),
    "averages alone": Layout({"avg_10.pt": W, "avg_20.pt": W}, exit_code=4, refused="--include PATTERN uses what"),
    "averages matched by chance": Layout({"epoch-1.pt": W, "epoch-2.pt": W, "epoch-2-avg-1.pt": W},
                                         ["epoch-1.pt", "epoch-2.pt"], options={"include": "epoch-*"},
                                         skipped={"epoch-2-avg-1.pt": "an earlier average"}),
    "folds": Layout({"fold_0.pt": W, "fold_1.pt": W}, exit_code=4,
                    refused="expected one series of checkpoints, got several: 'fold_0*', 'fold_1*'. Select one"),
    "seeds": Layout({"model_seed_1.pt": weights(epoch=5), "model_seed_2.pt": weights(epoch=7)}, exit_code=4,
                    refused="got several: 'model_seed_1*', 'model_seed_2*'"),
    "training in stages": Layout({f"stage{stage}_step_{stage}00.pt": W for stage in (1, 2)}, exit_code=4,
                                 refused="got several: 'stage1_step_*', 'stage2_step_*'"),
    "several averages of each step": Layout(
        {f"{ema}.{step}.pt": weights(step=step) for ema in (0, 1) for step in (2, 4)}, exit_code=4,
        refused="got several with the same steps: '0.*', '1.*'",
    ),
    "k-diffusion": Layout({f"run_{step:08}.pth": weights(step=step) for step in (1000, 20000)},
                          ["run_00001000.pth", "run_00020000.pth"]),
    "agents at their steps": Layout(
        {f"agent_{step}.pt": W for step in (500, 1000, 9500, 10000)}, ["agent_9500.pt", "agent_10000.pt"],
        sources=[f"agent_{step}.pt" for step in (10000, 1000, 500, 9500)], options={"last": 2},
        notice="the checkpoints are in the order of their steps, not as given",
    ),
    "runs at their steps": Layout({f"run-{step}.pt": W for step in (1000, 2000)}, ["run-1000.pt", "run-2000.pt"]),
    "numbered runs": Layout({f"run_{number}.pt": W for number in (1, 2)}, exit_code=4,
                            refused="got several: 'run_1*', 'run_2*'"),
    "folds, included": Layout({"fold_0.pt": W, "fold_1.pt": W}, ["fold_0.pt", "fold_1.pt"],
                              notice="of different trainings: fold_0, fold_1", options={"include": "fold_*"}),
    "folds, listed": Layout({"fold_0.pt": W, "fold_1.pt": W}, ["fold_1.pt", "fold_0.pt"],
                            notice="of different trainings: fold_0, fold_1", sources=("fold_1.pt", "fold_0.pt")),
    "folders of folds, listed": Layout(
        {f"fold_{fold}/model.pt": W for fold in (0, 1)}, ["fold_0/model.pt", "fold_1/model.pt"],
        sources=[f"fold_{fold}/model.pt" for fold in (0, 1)], notice="of different trainings: fold_0, fold_1",
    ),
    # --- order ---
    "steps as a shell sorts them": Layout(
        {f"step_{step}.pt": W for step in (1, 9, 10, 11)}, ["step_9.pt", "step_10.pt", "step_11.pt"],
        notice="the checkpoints are in the order of their steps, not as given",
        sources=[f"step_{step}.pt" for step in (1, 10, 11, 9)], options={"last": 3},
    ),
    "the last one with --keep-order": Layout(
        {f"step_{step}.pt": W for step in (9, 10, 11)}, ["step_10.pt", "step_11.pt"],
        sources=[f"step_{step}.pt" for step in (10, 11, 9)], options={"last": 2, "keep_order": True},
    ),
    "a step without a record": Layout(
        {f"step_{step}.pt": weights(**({"step": 100 * step} if step < 5 else {})) for step in range(1, 6)},
        ["step_4.pt", "step_5.pt"], notice="the steps of step_5.pt are known from the names alone", options={"last": 2},
    ),
    "WeNet without one table": Layout(
        {f"{epoch}.pt": W for epoch in range(11)} | {f"{epoch}.yaml": text(f"epoch: {epoch}\nstep: {epoch}000\n")
                                                     for epoch in range(10)},
        ["9.pt", "10.pt"], notice="no step or epoch is recorded in 10.pt, unlike the others", options={"last": 2},
    ),
    "a number among recorded steps": Layout(
        {f"ckpt_{number}.pt": weights(step=100 * number) for number in (1, 2, 3)} | {"ckpt_4.pt": W},
        ["ckpt_3.pt", "ckpt_4.pt"], notice="ordered by the numbers in their names", options={"last": 2},
    ),
    # --- metrics ---
    "SpeechBrain": Layout(
        {f"CKPT+2024-05-0{day}+10-20-30+00/{name}": write for day, wer in ((1, "9.5"), (2, "-7.25e-1"), (3, "8"))
         for name, write in {**SPEECHBRAIN, "model.ckpt": W, "CKPT.yaml": text(f"# meta\nWER: {wer}\n")}.items()},
        ["CKPT+2024-05-02+10-20-30+00", "CKPT+2024-05-03+10-20-30+00"],
        options={"best": 2, "metric": "WER", "mode": "min"},
    ),
    "SpeechBrain without a model.ckpt": Layout(
        each((1, 2), {**SPEECHBRAIN, "wav2vec2.ckpt": W, "CKPT.yaml": text("WER: 3")}, "CKPT+2024-05-0{}+10-20-30+00"),
        ["CKPT+2024-05-01+10-20-30+00", "CKPT+2024-05-02+10-20-30+00"],
    ),
    "Ray": Layout(
        {"checkpoint_000000/checkpoint.pt": W, "checkpoint_000001/checkpoint.pt": W, "params.pkl": text("x"),
         "result.json": text(
             '{"training_iteration": 10, "loss": 1.0, "checkpoint_dir_name": "checkpoint_000000", "config": {}}\n'
             '{"training_iteration": 20, "loss": 0.5, "checkpoint_dir_name": "checkpoint_000001"}\n{"cut')},
        ["checkpoint_000001"], options={"best": 1, "metric": "loss", "mode": "min"}, skipped={"params.pkl": "a pickle"},
    ),
    "older Ray": Layout(
        {"checkpoint_000010/model.pth": W, "checkpoint_000020/model.pth": W,
         "progress.csv": text("loss,training_iteration\n0.5,10\n0.25,20\n")},
        ["checkpoint_000010"], options={"best": 1, "mode": "max", "from_step": 10},
    ),
    "ignite": Layout({f"best_model_{step}_val_loss=-0.{loss}.pt": W for step, loss in ((5, 3452), (10, 41), (7, 2))},
                     ["best_model_5_val_loss=-0.3452.pt", "best_model_10_val_loss=-0.41.pt"],
                     options={"best": 2, "metric": "val_loss", "mode": "min"}),
    "Keras": Layout({"weights.05-0.34.pt": W, "weights.12--1.2e-03.pt": W}, ["weights.12--1.2e-03.pt"],
                    options={"best": 1, "metric": "score", "mode": "min"}),
    "metrics without a sign of equality": Layout(
        {"epoch12-val_loss0.45.pth": W, "epoch13-val_loss-0.25.pth": W, "epoch14_val_loss_1.5e-01.pth": W},
        ["epoch14_val_loss_1.5e-01.pth"], options={"best": 1, "metric": "val_loss", "mode": "min"},
    ),
    "Lightning's CSVLogger": Layout(
        {f"checkpoints/epoch={epoch}-step={10 * epoch + 10}.ckpt": W for epoch in (0, 1)}
        | {"metrics.csv": text("epoch,step,train_loss,val_loss\n0,9,0.5,\n0,9,,0.2\n1,19,,0.3\n")},
        ["checkpoints/epoch=0-step=10.ckpt"], options={"best": 1, "metric": "val_loss", "mode": "min"},
    ),
    "Lightning metric with a slash": Layout(
        {"epoch=0-val/loss=0.9.ckpt": W, "epoch=1-val/loss=0.5.ckpt": W}, ["epoch=1-val"],
        options={"best": 1, "metric": "val/loss", "mode": "min"},
    ),
}  # fmt: skip


def build(root: Path, files: Files) -> Path:
    run = root / "models" / "run"
    run.mkdir(parents=True)
    for name, write in files.items():
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(write, str):
            path.symlink_to(write)
        else:
            write(path)
    return run


@pytest.mark.guarantee("which-files")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_layout(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    run = build(tmp_path, layout.files)
    sources = [run / source for source in layout.sources]

    def call() -> Any:
        return average(sources, tmp_path / "mean.safetensors", dry_run=True, bn="keep", **layout.options)

    if layout.used is None:
        with pytest.raises(CkptAvgError) as caught:
            call()
        assert layout.refused.replace("{}", str(run)) in str(caught.value)
        assert caught.value.exit_code == layout.exit_code
        if isinstance(caught.value, PartError) and layout.sources == ("",):
            assert {file for file, _ in inspect(run).seen} == {path.name for path in run.iterdir()}
        return
    result = call()
    assert [str(path) for path in result.checkpoints] == [str(run / used) for used in layout.used]
    reasons = {item.path.name: item.reason for item in result.skipped}
    assert reasons.keys() == layout.skipped.keys()
    assert all(reason in reasons[name] for name, reason in layout.skipped.items())
    assert any(layout.notice in notice for notice in result.notices) or not layout.notice, result.notices
    if layout.sources == ("",) and len(result.checkpoints) > 1 and not layout.options:
        assert [listed.spec.path for listed in inspect(run).listed] == list(result.checkpoints)


def test_the_page_has_a_row_for_each_layout() -> None:
    rows = re.findall(r"^\| (.+?) \| .* \| .* \|$", PAGE.partition("## Layouts")[2], re.MULTILINE)
    assert rows[1:] == list(LAYOUTS)
