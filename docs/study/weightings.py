"""Whether other weights than equal ones are better, on the fixture run and on a small language model.

    python docs/study/weightings.py --seeds 8 --language-seeds 5 --work RUNS > tables.md

The weightings and windows were chosen before anything was measured. The scores go to `weightings.json` next to this
script, the tables to stdout, in Markdown, and progress to stderr. Runs and measurements stay in RUNS and are not made
again.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import language
import safetensors.torch
import torch
from runs import held_out_set, logits_of, model_of, score, train_tail
from torch import nn
from train import make_model, train_loader

from ckpt_avg import average, soup

WEIGHTINGS: dict[str, dict[str, Any]] = {
    "mean": {},
    "minus-sqrt": {"weighting": "minus-sqrt"},
    "ema, half-life 10 %": {"weighting": "ema", "half_life": "10%"},
    "ema, half-life 25 %": {"weighting": "ema", "half_life": "25%"},
    "ema, half-life 50 %": {"weighting": "ema", "half_life": "50%"},
    "power, width 0.05": {"weighting": "power", "width": 0.05},
    "power, width 0.1": {"weighting": "power", "width": 0.1},
    "power, width 0.15": {"weighting": "power", "width": 0.15},
}
SOUP = "greedy soup"
LAST, SINGLE = "last checkpoint", "single checkpoint"
Scores = dict[str, float]

DATA = Path(__file__).with_suffix(".json")


# -- The fixture run: 12 checkpoints, BatchNorm recomputed for each average. The soup chooses on one half of the
# -- held-out images, and everything is scored on the other half.


def halves(logits: torch.Tensor) -> tuple[Scores, Scores]:
    """Returns the scores on the held-out images of even index, and on those of odd index."""
    labels, known = held_out_set()[1], logits.log_softmax(1)
    return score(known[::2], labels[::2]), score(known[1::2], labels[1::2])


def loss_to_choose_by(model: nn.Module) -> Scores:
    """Returns the loss on the half that the soup chooses on."""
    return {"loss": halves(logits_of(model, held_out_set()[0]))[0]["loss"]}


def measure_digits(work: Path, seed: int) -> dict[str, Scores]:
    """Returns the scores of each weighting, and of the soup, on the half that nothing was chosen on."""
    tail = train_tail(work, seed, 1)
    code: dict[str, Any] = {"model": make_model, "data": train_loader, "overwrite": True}
    output = work / f"digits_{seed}.safetensors"
    found: dict[str, Scores] = {}
    for name, options in WEIGHTINGS.items():
        average([tail], output, **code, **options)
        found[name] = scored(output)
    soup([tail], output, evaluate=loss_to_choose_by, minimize="loss", split="even held-out images", **code)
    found[SOUP] = scored(output)
    return found


def scored(path: Path) -> Scores:
    """Returns the scores of a file of weights on the half that nothing was chosen on."""
    return halves(logits_of(model_of(safetensors.torch.load_file(path)), held_out_set()[0]))[1]


# -- The language model: averages of the last checkpoints of the constant run, and runs that decay over as many steps.


def measure_language(work: Path, seed: int) -> dict[str, Scores]:
    """Returns the held-out loss by window, in steps, and by what was done over it."""
    language.train_seed(work, seed)
    constant, output = work / f"constant_{seed}", work / f"language_{seed}.safetensors"
    found: dict[str, Scores] = {}
    for window in language.WINDOWS:
        first = language.STEPS - window + language.INTERVAL
        scores = {LAST: loss_of_checkpoint(constant)}
        for name, options in WEIGHTINGS.items():
            average([constant], output, from_step=first, overwrite=True, **options)
            scores[name] = loss_of_weights(safetensors.torch.load_file(output))
        for decay in language.DECAYS:
            scores[f"decayed rate, {decay}"] = loss_of_checkpoint(work / f"decay_{decay}_{window}_{seed}")
        found[str(window)] = scores
    return found


def loss_of_checkpoint(folder: Path) -> float:
    """Returns the held-out loss at the end of a run."""
    return loss_of_weights(torch.load(folder / f"step_{language.STEPS}.pt", weights_only=True)["model"])


def loss_of_weights(weights: Mapping[str, torch.Tensor]) -> float:
    """Returns the held-out loss of a language model with these weights, in nats per byte."""
    model = language.make_model()
    model.load_state_dict(dict(weights))
    return language.evaluate(model)["loss"]


# -- Tables --------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def difference(ours: Sequence[float], theirs: Sequence[float], form: str) -> list[str]:
    """Returns ours − theirs, paired by seed, as mean ± standard deviation, and on how many seeds ours is less."""
    pairs = list(zip(ours, theirs, strict=True))
    each = [a - b for a, b in pairs]
    fewer = sum(a < b for a, b in pairs)
    equal = sum(a == b for a, b in pairs)
    return [f"{fmean(each):+{form}} ± {stdev(each):{form}}", f"{fewer} / {equal} / {len(each) - fewer - equal}"]


def digits_table(seeds: Sequence[Mapping[str, Scores]], reference: str = "mean") -> str:
    """Returns the scores of everything that was tried, and their differences to the reference."""
    rows = []
    for name in seeds[0]:
        accuracies, losses = ([seed[name][key] for seed in seeds] for key in ("accuracy", "loss"))
        others = [seed[reference]["loss"] for seed in seeds]
        less = difference(losses, others, ".4f") if name != reference else ["", ""]
        percents = [100 * each for each in accuracies]
        rows.append(
            [
                name,
                f"{fmean(percents):.2f} ± {stdev(percents):.2f}",
                f"{fmean(losses):.4f} ± {stdev(losses):.4f}",
                *less,
            ]
        )
    return table(["", "accuracy, %", "loss", f"loss less that of the {reference}", "lower / equal / higher"], rows)


def language_table(seeds: Sequence[Mapping[str, Scores]], window: str) -> str:
    """Returns the losses of one window, and their differences to the mean and to the last checkpoint."""
    rows = []
    for name in seeds[0][window]:
        losses = [seed[window][name] for seed in seeds]
        cells = [name, f"{fmean(losses):.4f} ± {stdev(losses):.4f}"]
        for other in ("mean", LAST):
            cells += difference(losses, [seed[window][other] for seed in seeds], ".4f") if name != other else ["", ""]
        rows.append(cells)
    header = ["", "loss, nats per byte", "less that of the mean", "lower / equal / higher", "less that of the last"]
    return table([*header, "lower / equal / higher"], rows)


def measured(work: Path, part: str, seed: int, measure: Callable[[Path, int], Any]) -> Any:
    """Returns what a part measures on one seed, from `work` if it is there already."""
    file = work / f"{part}_{seed}.json"
    if not file.exists():
        file.write_text(json.dumps(measure(work, seed)))
        print(f"{part} {seed}: measured", file=sys.stderr, flush=True)
    return json.loads(file.read_text())


def main() -> None:
    """Trains, measures and prints the tables."""
    parser = argparse.ArgumentParser(description="Compare weightings with equal weights, over several seeds.")
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="of the fixture run: 0 to N - 1; at least 2")
    parser.add_argument("--language-seeds", type=int, default=5, metavar="N", help="of the language model; at least 2")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="keep the runs here")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same bytes each time
    args.work.mkdir(parents=True, exist_ok=True)
    find = functools.partial(measured, args.work)
    digits = [find("weightings", seed, measure_digits) for seed in range(args.seeds)]
    words = [find("language", seed, measure_language) for seed in range(args.language_seeds)]
    DATA.write_text(json.dumps({"fixture run": digits, "language model": words}, indent=1) + "\n")
    print(f"### The fixture run\n\n{digits_table(digits)}")
    for window in map(str, language.WINDOWS):
        print(f"\n### The language model, last {window} of {language.STEPS} steps\n\n{language_table(words, window)}")
    print(f"\nTexts: {', '.join(f'{len(text):,}' for text in language.texts())} bytes, digest {language.digest()}.")


if __name__ == "__main__":
    main()
