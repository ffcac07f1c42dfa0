"""A run of the transformers Trainer with a LoRA adapter of PEFT: the folders hold the adapter alone."""

from __future__ import annotations

from pathlib import Path

import torch
from ledger import Ledger, copied, program, same
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed


def model() -> PeftModel:
    set_seed(7)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=12, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    )
    return get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"]))


def write(out: Path) -> None:
    ledger = Ledger(out)
    folder = ledger.folder("peft")
    states: dict[int, dict[str, torch.Tensor]] = {}

    class Note(TrainerCallback):
        def on_save(self, args: object, state: object, control: object, **live: object) -> None:
            states[state.global_step] = copied(get_peft_model_state_dict(live["model"]))

    words = torch.randint(40, (24, 8), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=2, learning_rate=0.05, use_cpu=True, report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    examples = [{"input_ids": text, "labels": text} for text in words]
    Trainer(model(), arguments, train_dataset=examples, callbacks=[Note()]).train()
    for step, state in states.items():
        same(load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors"), state)
        ledger.saved("peft", f"checkpoint-{step}", state, kind="PEFT adapter", step=step)
    ledger.close()


def load(run: str, weights: Path) -> None:
    """The adapter is loaded from a folder with its configuration."""
    adapted = model()
    adapted.peft_config["default"].save_pretrained(str(weights.parent))
    weights = weights.rename(weights.with_name("adapter_model.safetensors"))
    again = PeftModel.from_pretrained(adapted.unload(), str(weights.parent))
    same(copied(get_peft_model_state_dict(again)), load_file(weights))


if __name__ == "__main__":
    program(write, load)
