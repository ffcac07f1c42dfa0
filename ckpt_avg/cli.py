"""The ``ckpt-avg`` command: parse, call the API, print. Nothing here imports torch before it is needed.

Results go to stdout; progress, notices and errors to stderr; ``--json`` puts exactly one document on stdout.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from ckpt_avg import __version__
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.exits import run, say

_Command = TypeVar("_Command", bound=Callable[..., Any])
_UNITS = {
    "": 1,
    "B": 1,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}


def _parse_size(context: click.Context, parameter: click.Parameter, value: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise click.BadParameter(f"expected a size such as 256MiB, got {value!r}")
    amount = float(match[1]) * _UNITS[match[2].upper()]
    if amount > sys.maxsize:
        raise click.BadParameter(f"expected a size such as 256MiB, got {value[:40]}…")
    return int(amount)


def _together(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_sources = click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
_selection = _together(
    click.option("--last", type=int, metavar="N", help="Take the last N checkpoints."),
    click.option("--every", type=int, metavar="K", help="Take each K-th, counted back from the last."),
    click.option("--from-step", type=int, metavar="S", help="Leave out what lies before step S (or epoch S)."),
    click.option("--to-step", type=int, metavar="S", help="Leave out what lies behind step S (or epoch S)."),
    click.option("--best", type=int, metavar="N", help="Take the N best by a metric that the trainer recorded."),
    click.option("--metric", metavar="NAME", help="Which metric, with --best."),
    click.option("--mode", metavar="min|max", help="Whether low or high is better, with --best."),
    click.option("--include", multiple=True, metavar="GLOB", help="Take only file names that match. Repeatable."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out file names that match. Repeatable."),
    click.option("--at-lr-minima", is_flag=True, help="Take those at the bottom of the learning rate's cycles."),
)
_reading = _together(
    click.option(
        "--state-key", metavar="DOTTED.KEY", help="Where a torch file holds the state dict, if not under a common key."
    ),
    click.option("--ema", is_flag=True, help="Take the running averages that some trainers keep beside the weights."),
    click.option("--strip-prefix", metavar="PREFIX", help="Take this off the front of names, for example 'model.'."),
)
_verbose = click.option("-v", "--verbose", is_flag=True, help="Say what was left out of run folders, and why.")
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ckpt-avg")
def cli() -> None:
    """Average the checkpoints of a training run into one safetensors file (Stochastic Weight Averaging).

    A SOURCE is a checkpoint file (safetensors, or written by torch.save), a checkpoint folder (transformers,
    accelerate, Lightning, DeepSpeed, torch.distributed.checkpoint), or a run folder of these, which is read in the
    order of its steps. No code inside a checkpoint is ever run.
    """


@cli.command("average")
@_sources
@click.option("-o", "--output", required=True, metavar="OUT.safetensors", help="The file to write.")
@_selection
@_reading
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to sum and refresh."
)
@click.option(
    "--dtype",
    default="keep",
    show_default=True,
    metavar="keep|float64|float32|bfloat16|float16",
    help="The dtype of the output's floating-point tensors.",
)
@click.option("--threads", type=int, metavar="N", help="Workers; by default one for each usable core.")
@click.option(
    "--memory",
    callback=_parse_size,
    default="128MiB",
    show_default=True,
    metavar="SIZE",
    help="Working memory, shared by the workers.",
)
@click.option(
    "--non-float",
    default="equal",
    show_default=True,
    metavar="equal|last",
    help="Integer and bool tensors: must be equal, or take the last checkpoint's.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Let NaN and Inf through instead of refusing them.")
@click.option("--model", metavar="MODULE:FACTORY", help="Returns the model, for the BatchNorm refresh.")
@click.option("--data", metavar="MODULE:FACTORY", help="Returns an iterable of batches, for the BatchNorm refresh.")
@click.option(
    "--bn",
    default="auto",
    show_default=True,
    metavar="auto|refresh|keep",
    help="Recompute the BatchNorm statistics, or keep the mean of the checkpoints'.",
)
@click.option("--bn-batches", type=int, metavar="N", help="Refresh over at most N batches.")
@click.option(
    "--app-dir", default=".", show_default=True, metavar="DIR", help="Where --model and --data are imported from."
)
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; write nothing.")
@_json
@click.option("-q", "--quiet", is_flag=True, help="No progress bars and no notices.")
@_verbose
def average_command(
    sources: Sequence[str],
    output: str,
    model: str | None,
    data: str | None,
    app_dir: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Write the equal-weighted mean of the checkpoints, BatchNorm statistics recomputed.

    \b
    ckpt-avg average RUN --last 8 -o swa.safetensors
    ckpt-avg average RUN -o swa.safetensors --model train:make_model --data train:train_loader
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.api import average
    from ckpt_avg.bars import bars
    from ckpt_avg.report import average_json, average_text
    from ckpt_avg.user_code import forward_batch_beside, load_user_code

    # What the user's code prints is no result of this command.
    with contextlib.redirect_stdout(sys.stderr), bars(quiet=quiet) as progress:
        factories: dict[str, Any] = {
            "model": load_user_code(model, "--model", app_dir) if model else None,
            "data": load_user_code(data, "--data", app_dir) if data else None,
            "forward_batch": forward_batch_beside(model) if model else None,
        }
        result = average(sources, output, progress=progress, **factories, **options)
    if as_json:
        say(json.dumps(average_json(result), indent=2))
    else:
        say(average_text(result, verbose=verbose))


@cli.command("check")
@_sources
@_selection
@_reading
@_json
@_verbose
def check_command(sources: Sequence[str], as_json: bool, verbose: bool, **options: Any) -> None:
    """Say whether the checkpoints fit together, from their headers alone."""
    from ckpt_avg.compat import check
    from ckpt_avg.report import compatibility_json, compatibility_text

    report = check(sources, **options)
    for text in () if as_json else report.notices:
        say(f"Notice: {text}", err=True)
    if as_json:
        say(json.dumps(compatibility_json(report), indent=2))
    elif report.compatible:
        say(compatibility_text(report, verbose=verbose))
    if not report.compatible:
        say(f"Error: {report}", err=True)
        raise click.exceptions.Exit(IncompatibleError.exit_code)


@cli.command("inspect")
@click.argument("path")
@_reading
@_json
def inspect_command(path: str, as_json: bool, **options: Any) -> None:
    """Show what a checkpoint or a run folder holds, and how it would be read."""
    from ckpt_avg.inspection import inspect
    from ckpt_avg.report_inspect import inspection_json, inspection_text

    found = inspect(path, **options)
    say(json.dumps(inspection_json(found), indent=2) if as_json else inspection_text(found))


def main() -> None:
    """The entry point: runs the command and exits with its code."""
    sys.exit(run(cli, sys.argv[1:]))
