"""Runs of the transformers Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger, copied, load_strictly, program, same
from nets import Net, batches
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

WORDS, LENGTH = 40, 8


class Plain(nn.Module):
    """A model that transformers does not know: the Trainer saves its state dict as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.net(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 12, "intermediate_size": 20, "max_position_embeddings": 16}
    return BertForSequenceClassification(
        BertConfig(vocab_size=WORDS, num_hidden_layers=2, num_attention_heads=2, num_labels=3, **sizes)
    )


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=12, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert, "gpt2_tied": gpt2, "bert_sharded": bert, "plain": Plain, "pytorch_bin": bert
}  # fmt: skip


class Sharding(Trainer):
    """The Trainer of a model too large for one file: `save_pretrained` splits it at a (tiny) size."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self.model.save_pretrained(output_dir, state_dict=state_dict, max_shard_size=4000)


class PyTorchBin(Trainer):
    """The Trainer of transformers 4 with ``save_safetensors=False``, which version 5 no longer has."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        Path(output_dir).mkdir(exist_ok=True)
        self.model.config.save_pretrained(output_dir)
        torch.save(self.model.state_dict(), f"{output_dir}/pytorch_model.bin")
        torch.save(self.args, f"{output_dir}/training_args.bin")


TRAINERS: dict[str, type[Trainer]] = {"bert_sharded": Sharding, "pytorch_bin": PyTorchBin}


class Note(TrainerCallback):
    """Keeps the weights of every checkpoint and the learning rate that its last step took."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}
        self.rates: dict[int, float] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        self.rates[state.global_step + 1] = live["optimizer"].param_groups[0]["lr"]

    def on_save(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        self.states[state.global_step] = copied(live["model"].state_dict())


def examples(run: str, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    if run == "plain":
        ((images, labels),) = batches(1, count, seed)
        return [{"images": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    random = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (count, LENGTH), generator=random)
    labels = words if run == "gpt2_tied" else words.sum(1) % 3
    return [{"input_ids": text, "labels": label} for text, label in zip(words, labels, strict=True)]


def train(ledger: Ledger, run: str, *, steps: int, every: int) -> None:
    set_seed(7)
    folder = ledger.folder(run)
    model, note = MODELS[run](), Note()
    trainer = TRAINERS.get(run, Trainer)(
        model,
        TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            learning_rate=0.02,
            max_steps=steps,
            lr_scheduler_type="cosine_with_restarts",
            lr_scheduler_kwargs={"num_cycles": 3},
            save_steps=every,
            eval_strategy="steps",
            eval_steps=every,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            load_best_model_at_end=run == "bert",
            metric_for_best_model="eval_loss",
        ),
        train_dataset=examples(run, 24, 1),
        eval_dataset=examples(run, 8, 2),
        callbacks=[note],
    )
    trainer.train()
    if run == "bert":
        trainer.save_model()  # next to the checkpoints: a copy of the best, under the name of any weights
        trainer.save_state()
    for step, live in note.states.items():
        entries = [entry for entry in trainer.state.log_history if entry["step"] == step]
        metrics = next(entry for entry in entries if "eval_loss" in entry)
        path = f"checkpoint-{step}"
        state = as_written(model, live)
        loaded(model, folder / path, state)
        ledger.saved(
            run,
            path,
            state,
            kind="HF Trainer",
            step=step,
            metrics={"eval_loss": metrics["eval_loss"]},  # the others tell the speed
            logged_rate=next(entry["learning_rate"] for entry in entries if "learning_rate" in entry),
            learning_rate=note.rates[step],
            best=trainer.state.best_model_checkpoint == str(folder / path),
        )


def as_written(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leaves out the names that transformers restores by tying: it writes the first name of each tied tensor alone."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: value for name, value in state.items() if name not in tied}


def loaded(model: nn.Module, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """What was noted is what the library loads again."""
    if isinstance(model, PreTrainedModel):
        again = type(model).from_pretrained(folder)
        same(as_written(again, copied(again.state_dict())), state)
    else:
        same(load_file(folder / "model.safetensors"), state)


def write(out: Path) -> None:
    ledger = Ledger(out)
    train(ledger, "bert", steps=24, every=2)
    for run in MODELS:
        if run != "bert":
            train(ledger, run, steps=6, every=2)
    ledger.close()


def load(run: str, weights: Path) -> None:
    """A model of transformers is loaded from a folder, which ties what is tied; any other one strictly."""
    model = MODELS[run]()
    if not isinstance(model, PreTrainedModel):
        load_strictly(model, weights)
        return
    model.config.save_pretrained(weights.parent)
    _, report = type(model).from_pretrained(weights.parent, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    print(report)


if __name__ == "__main__":
    program(write, load)
