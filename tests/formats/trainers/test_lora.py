"""Adapters of other libraries than PEFT: a note says that the mean of factors is not the factor of the mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_avg import open_checkpoint

NAMES = (
    "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight",  # kohya-ss/sd-scripts
    "unet.attn1.processor.to_q_lora.down.weight",  # diffusers
    "to_q.lora.up.weight",
    "double_blocks.0.processor.proj_lora1.down.weight",  # XLabs
    "attn.to_out.0.lora_linear_layer.down.weight",
    "transformer.h.0.attn.c_attn.lora_A",  # microsoft/LoRA
    "model.embed_tokens.lora_embedding_A",  # PEFT
    "layers.0.attn.q_proj.lora_a.weight",  # pytorch/torchtune
    "to_q.lora.B",
    "lora_unet_mid.hada_w1_a",  # LyCORIS
    "lycoris_layers_0.lokr_w2_b",
)


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_recognised_by_their_names(tmp_path: Path, name: str) -> None:
    save_file({name: torch.rand(2, 4)}, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert any("factors of a low-rank adapter" in note for note in checkpoint.spec.notes)


@pytest.mark.parametrize("name", ["explora_down.weight", "flora_A.weight", "floral.down.weight", "lora.weight"])
def test_other_names_are_no_factors(tmp_path: Path, name: str) -> None:
    save_file({name: torch.rand(2, 4)}, tmp_path / "a.safetensors")
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        assert checkpoint.spec.notes == ()
