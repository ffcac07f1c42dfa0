"""Trains a small language model at a constant rate, and the decayed runs that averaging is compared with.

A byte-level transformer of 0.37 million parameters reads the standard library's own sources. Each seed is trained once
at a constant rate, with checkpoints at a fixed interval. From the checkpoint a window before the end, decayed runs
branch off and take as many steps over the same batches, while the rate falls to zero: along 1 - sqrt(x), as WSM
(arXiv 2507.17634) decays, and along a straight line.

    python docs/study/language.py --work RUNS --seeds 4

Finished runs in RUNS are not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

CONTEXT, BATCH = 128, 12  # bytes of a sequence, sequences of a batch
WIDTH, LAYERS, HEADS = 96, 3, 4
RATE, WARMUP = 3e-3, 100
STEPS, INTERVAL = 2400, 40  # of a run, and between its checkpoints
WINDOWS = (400, 800)  # steps that are averaged, or over which the rate decays
EVERY = 10  # each tenth file is held out
BYTES = 8_000_000  # of sources, at most
HELD_OUT = 1_000  # sequences that are scored

DECAYS: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
}


class Layer(nn.Module):
    """Causal attention and a perceptron, each after a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_perceptron = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, context, WIDTH] to the same shape."""
        batch, length, _ = x.shape
        parts = self.query_key_value(self.before_attention(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.output(seen.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.perceptron(self.before_perceptron(x))


class Model(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps bytes [batch, context] to logits [batch, context, 256]."""
        x = self.bytes(x) + self.positions.weight[: x.shape[1]]
        logits: Tensor = self.head(self.norm(self.layers(x)))
        return logits


def make_model() -> Model:
    """Returns a model with random weights."""
    return Model()


@cache
def texts() -> tuple[Tensor, ...]:
    """Returns the bytes to train on, and those held out: files of the standard library, in order of their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    contents = [file.read_bytes() for file in files]
    training = b"".join(each for index, each in enumerate(contents) if index % EVERY)[:BYTES]
    held_out = b"".join(contents[::EVERY])
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (training, held_out))


def digest() -> str:
    """Returns the first digits of the SHA-256 of all texts, since each version of Python has its own."""
    return hashlib.sha256(b"".join(bytes(text.tolist()) for text in texts())).hexdigest()[:16]


def batch_of(seed: int, step: int) -> Tensor:
    """Returns the sequences of a step, [BATCH, CONTEXT + 1]: the same in every run of a seed."""
    text = texts()[0]
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    begins = torch.randint(len(text) - CONTEXT - 1, (BATCH, 1), generator=generator)
    return text[begins + torch.arange(CONTEXT + 1)].long()


def loss_of(model: nn.Module, sequences: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the next byte, in nats."""
    return functional.cross_entropy(model(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Returns the ``loss`` on the held-out files, in nats per byte."""
    text = texts()[1]
    begins = torch.linspace(0, len(text) - CONTEXT - 1, HELD_OUT).long()[:, None]
    parts = text[begins + torch.arange(CONTEXT + 1)].long().split(50)
    return {"loss": sum(loss_of(model, part).item() * len(part) for part in parts) / HELD_OUT}


def train_run(folder: Path, seed: int, rate: Callable[[int], float], start: Path | None = None) -> None:
    """Trains into `folder`, from the beginning or from a checkpoint, unless it is there already.

    `rate` is that of a step. A constant run keeps every checkpoint; a run that branches off, its last.
    """
    if (folder / f"step_{STEPS}.pt").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    done = 0
    if start is not None:
        saved = torch.load(start, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    branch = done
    for step in range(done + 1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = loss_of(model, batch_of(seed, step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == STEPS or (start is None and step % INTERVAL == 0 and step >= STEPS - max(WINDOWS)):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, folder / f"step_{step}.pt")
    print(f"{folder.name}: {STEPS - branch} steps in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def constant_rate(step: int) -> float:
    """Returns the rate of the constant run: warmed up, then constant."""
    return RATE * min(1.0, step / WARMUP)


def train_seed(work: Path, seed: int) -> None:
    """Trains a seed's constant run and its decayed runs."""
    constant = work / f"constant_{seed}"
    train_run(constant, seed, constant_rate)
    for window in WINDOWS:
        for name, shape in DECAYS.items():

            def rate(step: int, window: int = window, shape: Callable[[float], float] = shape) -> float:
                return RATE * shape((step - 1 - (STEPS - window)) / window)

            folder = work / f"decay_{name}_{window}_{seed}"
            train_run(folder, seed, rate, constant / f"step_{STEPS - window}.pt")


def main() -> None:
    """Trains the runs."""
    parser = argparse.ArgumentParser(description="Train the language models of the study.")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="keep the runs here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"texts {digest()}, {sum(each.numel() for each in make_model().parameters()):,} parameters", file=sys.stderr)
    for seed in range(args.seeds):
        train_seed(args.work, seed)


if __name__ == "__main__":
    main()
