"""The ``ckpt-avg`` command: parse, call the API, print. Nothing here imports torch before it is needed.

Results go to stdout; progress, notices and errors to stderr; ``--json`` puts exactly one document on stdout.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from typing import Any

import click

import ckpt_avg
from ckpt_avg.cli import options
from ckpt_avg.cli.choosing import compare_command, soup_command, sweep_command
from ckpt_avg.cli.exits import open_missing_streams, run, say
from ckpt_avg.cli.help import EVERYDAY, Group, Option
from ckpt_avg.cli.options import Printing
from ckpt_avg.cli.run import make_output, showing
from ckpt_avg.commands.requests import (
    AverageRequest,
    CheckRequest,
    InspectRequest,
    RefreshRequest,
    VerifyRequest,
)
from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.text import one_line, suggestion


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@options.version
def cli() -> None:
    """Average the checkpoints of a training run into one safetensors file (Stochastic Weight Averaging).

    A SOURCE is a checkpoint file (safetensors, or written by torch.save), a checkpoint folder (transformers,
    accelerate, Lightning, DeepSpeed, torch.distributed.checkpoint), or a run folder of these, which is read in the
    order of its steps. No code inside a checkpoint is ever run.

    \b
    ckpt-avg inspect RUN
    ckpt-avg average RUN --last 8 -o swa.safetensors
    """  # noqa: D301 (click needs the backspace character itself)


@cli.command("average")
@options.sources
@options.options_from(AverageRequest)
@options.makes_output
def average_command(sources: Sequence[str], output: str, **given: Any) -> None:
    """Write the mean of checkpoints, with recomputed BatchNorm.

    \b
    ckpt-avg average RUN --last 8 -o swa.safetensors
    ckpt-avg average RUN -o swa.safetensors \\
        --model train:make_model --data train:train_loader
    ckpt-avg average RUN -o swa.safetensors --bn keep \\
        --model train:make_model --eval train:evaluate --require 'accuracy>=last'
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.average_text import average_text

    make_output("average", AverageRequest, average_text, sources, output, **given)


@cli.command("refresh-bn")
@click.argument("weights")
@options.options_from(RefreshRequest)
@options.makes_output
def refresh_command(weights: str, output: str, **given: Any) -> None:
    """Write WEIGHTS with recomputed BatchNorm statistics.

    \b
    ckpt-avg refresh-bn weights.pt -o refreshed.safetensors \\
        --model train:make_model --data train:train_loader
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.average_text import refreshed_text

    make_output("refresh-bn", RefreshRequest, refreshed_text, weights, output, **given)


for each in (sweep_command, soup_command, compare_command):
    cli.add_command(each)


@cli.command("check")
@options.sources
@options.options_from(CheckRequest)
@options.prints
def check_command(sources: Sequence[str], printing: Printing, **given: Any) -> None:
    """Check that checkpoints fit together, from headers alone.

    \b
    ckpt-avg check RUN --last 8
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.check_text import compatibility_text

    with showing(quiet=printing.quiet, keep=False) as progress:
        report = ckpt_avg.check(sources, progress=progress, **given)
    for text in () if printing.as_json or printing.quiet else report.notices:
        say(f"Notice: {one_line(text)}", err=True)
    if printing.as_json:
        say(json.dumps(report.to_dict(), indent=2))
    elif report.compatible:
        say(compatibility_text(report, verbose=printing.verbose, width=printing.width))
    if not report.compatible:
        say(f"Error: {report}", err=True)
        raise click.exceptions.Exit(IncompatibleError.exit_code)


@cli.command("inspect")
@click.argument("path", nargs=-1, required=True, metavar="PATH...")
@options.options_from(InspectRequest)
@options.prints
def inspect_command(path: Sequence[str], printing: Printing, **given: Any) -> None:
    """Show what a path contains, and what would be averaged.

    \b
    ckpt-avg inspect epoch_20.pt
    ckpt-avg inspect RUN --last 8 --every 2
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.inspect_text import inspection_text

    with showing(quiet=printing.quiet, keep=False) as progress:
        found = ckpt_avg.inspect(path, progress=progress, **given)
    if printing.as_json:
        say(json.dumps(found.to_dict(), indent=2))
    else:
        say(inspection_text(found, quiet=printing.quiet, verbose=printing.verbose, width=printing.width))


@cli.command("verify")
@click.argument("output", metavar="OUT")
@click.argument("checkpoints", nargs=-1, metavar="[--sources SOURCE...]")
@click.option(
    "--sources",
    cls=Option,
    heading=EVERYDAY,
    is_flag=True,
    help="Average the SOURCEs again and compare bit for bit.",
)
@options.options_from(VerifyRequest)
@options.prints
def verify_command(output: str, checkpoints: Sequence[str], sources: bool, printing: Printing, **given: Any) -> None:
    """Check that OUT is undamaged and the mean of its checkpoints.

    \b
    ckpt-avg verify swa.safetensors
    ckpt-avg verify swa.safetensors --sources RUN
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.verify_text import verify_text

    if sources != bool(checkpoints):
        problem = "--sources: names no checkpoints" if sources else f"{checkpoints[0]}: --sources is missing before it"
        raise UsageError(f"{problem}. Write: ckpt-avg verify OUT --sources SOURCE...")
    with showing(quiet=printing.quiet) as progress:
        report = ckpt_avg.verify(output, sources=checkpoints or None, progress=progress, **given)
    if printing.as_json:
        say(json.dumps(report.to_dict(), indent=2))
    else:
        say(verify_text(report, verbose=printing.verbose, width=printing.width))


@cli.command("help")
@click.argument("command", required=False)
@click.pass_context
def help_command(context: click.Context, /, command: str | None) -> None:
    """Show the help of ckpt-avg, or of a command.

    \b
    ckpt-avg help average
    """  # noqa: D301 (click needs the backspace character itself)
    group = context.find_root()
    if command is None:
        click.echo(group.get_help())
    elif command in cli.commands:
        click.echo(click.Context(cli.commands[command], info_name=command, parent=group).get_help())
    else:
        raise UsageError(f"{command}: no such command.{suggestion(command, cli.commands)} See ckpt-avg --help.")


@cli.command("completion")
@click.argument("shell")
def completion_command(shell: str) -> None:
    """Print a script that completes words in bash, zsh or fish. For zsh, ~/.zshrc needs "fpath+=~/.zfunc".

    \b
    ckpt-avg completion bash > ~/.local/share/bash-completion/completions/ckpt-avg
    ckpt-avg completion zsh > ~/.zfunc/_ckpt-avg
    ckpt-avg completion fish > ~/.config/fish/completions/ckpt-avg.fish
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.completion import SCRIPTS

    if shell not in SCRIPTS:
        raise UsageError(f"{shell}: is not one of {', '.join(SCRIPTS)}.{suggestion(shell, SCRIPTS)}")
    click.echo(SCRIPTS[shell](cli), nl=False)


def main() -> None:
    """The entry point: runs the command and exits with its code."""
    open_missing_streams()
    gc.disable()  # importing torch and reading headers make many objects, and no garbage worth a search
    code = run(cli, sys.argv[1:])
    gc.freeze()  # nor is there one in the tables that are left: as it ends, the interpreter would look through them all
    sys.exit(code)
