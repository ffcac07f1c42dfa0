"""The options that commands share."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ckpt_avg.distributed.ranks import RANK_TIMEOUT

if TYPE_CHECKING:
    from ckpt_avg.commands.sweep import Measured

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


def _parse_size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", value.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise click.BadParameter(f"expected a size such as 256MiB, got {value!r}")
    amount = float(match[1]) * _UNITS[match[2].upper()]
    if amount > sys.maxsize:
        raise click.BadParameter(f"expected a size such as 256MiB, got {value[:40]}…")
    return int(amount)


def together(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Returns a decorator that gives a command these options, in this order."""

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


sources = click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
selection = together(
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
reading = together(
    click.option(
        "--state-key", metavar="DOTTED.KEY", help="Where a torch file holds the state dict, if not under a common key."
    ),
    click.option("--ema", is_flag=True, help="Take the running averages that some trainers keep beside the weights."),
    click.option("--strip-prefix", metavar="PREFIX", help="Take this off the front of names, for example 'model.'."),
)
verbose = click.option("-v", "--verbose", is_flag=True, help="Say what was left out of run folders, and why.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


dtype = click.option(
    "--dtype",
    default="keep",
    show_default=True,
    metavar="keep|float64|float32|bfloat16|float16",
    help="The dtype of the output's floating-point tensors.",
)
hold = click.option(
    "--hold",
    callback=_parse_size,
    metavar="SIZE",
    help="Memory for averages that wait to be measured (default: 2GiB).",
)
work = together(
    click.option("--threads", type=int, metavar="N", help="Workers; by default one for each usable core."),
    click.option(
        "--memory",
        callback=_parse_size,
        default="128MiB",
        show_default=True,
        metavar="SIZE",
        help="Working memory, shared by the workers.",
    ),
    click.option(
        "--io",
        default="auto",
        show_default=True,
        metavar="auto|mmap|pread",
        help="How to read; auto maps files, but for network storage.",
    ),
)
mean = together(
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda|cuda:N",
        help="Where to sum and to run the model (auto: sum on the CPU, run the model on CUDA).",
    ),
    dtype,
    work,
    click.option(
        "--non-float",
        default="equal",
        show_default=True,
        metavar="equal|last",
        help="Integer and bool tensors: must be equal, or take the last checkpoint's.",
    ),
    click.option("--allow-nonfinite", is_flag=True, help="Let NaN and Inf through instead of refusing them."),
)
user_code = together(
    click.option("--model", metavar="MODULE:FACTORY", help="Returns the model, for the refresh and --eval."),
    click.option("--data", metavar="MODULE:FACTORY", help="Returns an iterable of batches, for the BatchNorm refresh."),
    click.option(
        "--app-dir",
        default=".",
        show_default=True,
        metavar="DIR",
        help="Where --model, --data and --eval are imported from.",
    ),
)
keep = click.option(
    "--bn",
    default="auto",
    show_default=True,
    metavar="auto|refresh|keep",
    help="Recompute the BatchNorm statistics, or keep the mean of the checkpoints'.",
)
refresh = together(
    click.option("--bn-batches", type=int, metavar="N", help="Refresh over at most N batches."),
    click.option(
        "--bn-estimator",
        default="pooled",
        show_default=True,
        metavar="pooled|batch-mean",
        help="Statistics of all values together, or the mean of the batches' as update_bn has it.",
    ),
    click.option(
        "--amp",
        default="off",
        show_default=True,
        metavar="off|bfloat16|float16",
        help="Refresh in automatic mixed precision.",
    ),
)
evaluation = click.option(
    "--eval", "evaluate", metavar="MODULE:FUNCTION", help="Called with a model; returns a number or a dict of them."
)
require = click.option(
    "--require",
    multiple=True,
    metavar="'METRIC>=last'",
    help="Publish only if this holds: >=, >, <=, < and last, best, mean or a number. Repeatable.",
)
sha256 = click.option(
    "--sha256", is_flag=True, help="Write OUT.sha256, for sha256sum -c, and digests of the sources into the metadata."
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace what exists of the files to write.")
report = click.option("--report", metavar="FILE.json", help="Write what --json prints to a file as well.")
rank_timeout = click.option(
    "--rank-timeout",
    type=float,
    default=RANK_TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="With torchrun: stop when a rank gives no sign of life for this long.",
)
quiet = click.option("-q", "--quiet", is_flag=True, help="No progress bars and no notices.")
dry_run = click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; write nothing.")


def load_all(app_dir: str, **references: str | None) -> dict[str, Any]:
    """Imports what --model, --data and --eval name.

    Returns:
        The same names with what was imported, or None; and ``forward_batch``, a function beside the model.
    """
    from ckpt_avg.user_code.load import forward_batch_beside, load_user_code

    found: dict[str, Any] = {
        name: load_user_code(reference, "--eval" if name == "evaluate" else f"--{name}", app_dir)
        if reference is not None
        else None
        for name, reference in references.items()
    }
    model = references.get("model")
    found["forward_batch"] = forward_batch_beside(model) if model is not None else None
    return found


_CHOICES = ("last", "best", "metric", "mode", "include", "exclude", "from_step", "to_step", "at_lr_minima", "every")
_OF_SWEEP = ("evaluate", "maximize", "minimize", "windows", "hold", "plot", "report", "overwrite", "as_json", "quiet")


def average_command_for(context: click.Context, window: Measured) -> list[str]:
    """Returns the ``average`` command that makes one average of a sweep, from the options that the sweep was given.

    The last k of what was selected are asked for with ``--last k``. Where that says something else, because of
    ``--best`` or at the other end of the run, the checkpoints are named one by one, and nothing needs to be selected.
    """
    by_name = window.side == "first" or context.params["best"] is not None
    paths = [str(path) for path in window.checkpoints] if by_name else list(context.params["sources"])
    words = ["ckpt-avg", "average"]
    for parameter in context.command.params:
        name = parameter.name or ""
        is_given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if not isinstance(parameter, click.Option) or not is_given or name in (*_OF_SWEEP, "last"):
            continue
        if by_name and name in _CHOICES:
            continue
        option, value = max(parameter.opts, key=len), context.params[name]
        if parameter.is_flag:
            words.append(option)
        else:
            for each in value if parameter.multiple else [value]:
                words += [option, str(each)]
    if not by_name:
        words += ["--last", str(len(window.checkpoints))]
    words += ["-o", _free_name()]
    return [*words, *(["--"] if any(path.startswith("-") for path in paths) else []), *paths]


def _free_name() -> str:
    names = itertools.chain(["swa.safetensors"], (f"swa-{number}.safetensors" for number in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))
