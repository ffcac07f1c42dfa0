"""What the choices around an average cost on the fixture run: the window, the refresh, and common mistakes.

    python docs/study/choices.py --seeds 8 --work RUNS > tables.md

Each seed's checkpoints are averaged with one thing changed, and the result is scored on the 1,000 held-out images. The
scores go to `choices.json` next to this script, and the table to stdout, in Markdown. Runs and scores stay in RUNS
and are not made again.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from runs import TAIL, checkpoint_state, held_out_set, logits_of, model_of, score, train_tail, training_set
from torch import Tensor
from train import BATCH_SIZE, PIXEL_MEAN, PIXEL_STD, make_model, train_loader
from weightings import digits_table, measured

from ckpt_avg import average

Scores = dict[str, float]
Batches = Callable[[], Any]

DATA = Path(__file__).with_suffix(".json")
REFERENCE = "average of 12"
KEPT = "statistics averaged (`--bn keep`)"
OTHER_SEED = "one of the 12 from another seed"
TWO_SEEDS = "mean of the last checkpoints of two seeds"
BATCHES = (1, 2, 4, 8, 16)


def window(count: int) -> str:
    """Returns the name of the average of the last `count` checkpoints."""
    return f"last {count}"


def first_batches(count: int) -> str:
    """Returns the name of an average whose statistics come from the first `count` batches."""
    return f"refresh over {count * BATCH_SIZE} images"


def batches_of(images: Tensor, size: int = BATCH_SIZE) -> Iterator[list[Tensor]]:
    """Yields batches as a loader would."""
    return ([part] for part in images.split(size))


def sorted_by_class() -> Iterator[list[Tensor]]:
    """Yields batches that are mostly of one class, as an unshuffled folder of images gives."""
    images, labels = training_set()
    return batches_of(images[labels.argsort(stable=True)])


def small_batches() -> Iterator[list[Tensor]]:
    """Yields batches of 4, where training had 128."""
    return batches_of(training_set()[0], 4)


def not_normalised() -> Iterator[list[Tensor]]:
    """Yields pixels from 0 to 1, which training scaled to mean 0 and deviation 1."""
    return batches_of(training_set()[0] * PIXEL_STD + PIXEL_MEAN)


REFRESHES: dict[str, Batches] = {
    "refresh over batches sorted by class": sorted_by_class,
    "refresh over batches of 4 images": small_batches,
    "refresh over data that is not normalised": not_normalised,
}


def measure_choices(work: Path, seed: int, seeds: int) -> dict[str, Scores]:
    """Returns the scores of each choice for one seed."""
    tail = train_tail(work, seed, 1)
    other = train_tail(work, (seed + 1) % seeds, 1)
    score_of = functools.partial(scored, work / f"choices_{seed}.safetensors")
    found = {"last checkpoint": score_of([tail], last=1, bn="refresh")}
    found["last checkpoint, as saved"] = score_state(checkpoint_state(tail / f"epoch_{TAIL[-1]}.pt"))
    for count in range(2, len(TAIL)):
        found[window(count)] = score_of([tail], last=count)
    found[REFERENCE] = score_of([tail])
    found["bfloat16 output"] = score_of([tail], dtype="bfloat16")
    found["float16 output"] = score_of([tail], dtype="float16")
    found[KEPT] = score_of([tail], bn="keep", data=None, model=None)
    for count in BATCHES:
        found[first_batches(count)] = score_of([tail], bn_batches=count)
    for name, data in REFRESHES.items():
        found[name] = score_of([tail], data=data)
    middle = TAIL[len(TAIL) // 2]
    mixed = [(other if epoch == middle else tail) / f"epoch_{epoch}.pt" for epoch in TAIL]
    found[OTHER_SEED] = score_of(mixed, keep_order=True)
    found[TWO_SEEDS] = score_of([folder / f"epoch_{TAIL[-1]}.pt" for folder in (tail, other)], keep_order=True)
    return found


def scored(output: Path, sources: list[Path], **options: Any) -> Scores:
    """Averages as `options` say, and returns the scores of the file."""
    average(sources, output, **{"model": make_model, "data": train_loader, "overwrite": True, **options})
    return score_state({name: each.float() for name, each in safetensors.torch.load_file(output).items()})


def score_state(state: dict[str, Tensor] | Any) -> Scores:
    """Returns the scores of weights and statistics on the held-out images."""
    images, labels = held_out_set()
    return score(logits_of(model_of(state), images).log_softmax(1), labels)


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description="Measure what choices around an average cost, over several seeds.")
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="of the fixture run: 0 to N - 1; at least 2")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="keep the runs here")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same bytes each time
    args.work.mkdir(parents=True, exist_ok=True)
    measure = functools.partial(measure_choices, seeds=args.seeds)
    seeds = [measured(args.work, "choices", seed, measure) for seed in range(args.seeds)]
    DATA.write_text(json.dumps(seeds, indent=1) + "\n")
    print(digits_table(seeds, REFERENCE))


if __name__ == "__main__":
    main()
