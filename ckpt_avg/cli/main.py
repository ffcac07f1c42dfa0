"""The ``ckpt-avg`` command: parse, call the API, print. Nothing here imports torch before it is needed.

Results go to stdout; progress, notices and errors to stderr; ``--json`` puts exactly one document on stdout.
"""

from __future__ import annotations

import gc
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

import ckpt_avg
from ckpt_avg.cli import options
from ckpt_avg.cli.exits import open_missing_streams, run, say
from ckpt_avg.cli.options import Command
from ckpt_avg.cli.run import computing, make_output, make_report, refuse_ranks
from ckpt_avg.commands.options import OutputOptions
from ckpt_avg.commands.requests import (
    AverageRequest,
    CheckRequest,
    CompareRequest,
    InspectRequest,
    RefreshRequest,
    SoupRequest,
    SweepRequest,
    VerifyRequest,
)
from ckpt_avg.engine import engine_for
from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.text import one_line
from ckpt_avg.version import __version__

if TYPE_CHECKING:
    from ckpt_avg.commands.compare import CompareResult
    from ckpt_avg.commands.soup import SoupResult
    from ckpt_avg.commands.sweep import SweepResult


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        click.echo(f"ckpt-avg, version {__version__}, {engine_for('cpu')} engine")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version and the engine, and exit.",
)
def cli() -> None:
    """Average the checkpoints of a training run into one safetensors file (Stochastic Weight Averaging).

    A SOURCE is a checkpoint file (safetensors, or written by torch.save), a checkpoint folder (transformers,
    accelerate, Lightning, DeepSpeed, torch.distributed.checkpoint), or a run folder of these, which is read in the
    order of its steps. No code inside a checkpoint is ever run.
    """


@cli.command("average", cls=Command)
@options.sources
@options.options_from(AverageRequest)
@options.makes_output
@options.verbose
def average_command(sources: Sequence[str], output: str, verbose: bool, **given: Any) -> None:
    """Write the mean of checkpoints, with recomputed BatchNorm.

    \b
    ckpt-avg average RUN --last 8 -o swa.safetensors
    ckpt-avg average RUN -o swa.safetensors \\
        --model train:make_model --data train:train_loader
    ckpt-avg average RUN -o swa.safetensors --bn keep \\
        --model train:make_model --eval train:evaluate --require 'accuracy>=last'
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.average_text import average_text

    make_output(AverageRequest, "average", partial(average_text, verbose=verbose), sources, output, **given)


@cli.command("refresh-bn", cls=Command)
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

    make_output(RefreshRequest, "refresh_weights", refreshed_text, weights, output, **given)


@cli.command("sweep", cls=Command)
@options.sources
@options.options_from(SweepRequest)
@options.app_dir
@options.sweep_plot
@options.options_from(OutputOptions, only=["overwrite"])
@options.report
@options.as_json
@options.quiet
@click.pass_context
def sweep_command(
    context: click.Context,
    /,
    sources: Sequence[str],
    app_dir: str,
    plot: str | None,
    report: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Find the best window of checkpoints to average. Measures the last k and the first k, for each k.

    \b
    ckpt-avg sweep RUN --model train:make_model --data train:train_loader \\
        --eval train:evaluate --maximize accuracy
    """  # noqa: D301 (click needs the backspace character itself)
    refuse_ranks("sweep")
    SweepRequest(sources, **given).discover()  # checks options and sources before the user's code is imported
    from ckpt_avg.cli.documents import sweep_json
    from ckpt_avg.cli.plots import draw_sweep
    from ckpt_avg.cli.sweep_text import sweep_text

    def measure() -> SweepResult:
        with computing(quiet=quiet) as progress:
            return ckpt_avg.sweep(sources, progress=progress, **options.load_all(app_dir, given))

    def command(result: SweepResult) -> list[str]:
        """Returns the command that makes the best average."""
        best = result.best
        return options.average_command_for(context, best.checkpoints, are_last=best.side == "last")

    make_report(
        sources,
        measure,
        lambda result: sweep_text(result, shlex.join(command(result))),
        lambda result: sweep_json(result, command(result)),
        draw_sweep,
        plot=plot,
        report=report,
        overwrite=overwrite,
        as_json=as_json,
    )


@cli.command("soup", cls=Command)
@options.sources
@options.options_from(SoupRequest)
@options.app_dir
@options.output
@options.report
@options.as_json
@options.quiet
@click.pass_context
def soup_command(context: click.Context, /, sources: Sequence[str], output: str, **given: Any) -> None:
    """Write the greedy soup: add checkpoints while a metric gets no worse.

    \b
    ckpt-avg soup RUN -o soup.safetensors --eval train:evaluate \\
        --maximize accuracy --model train:make_model --data train:train_loader
    """  # noqa: D301 (click needs the backspace character itself)
    refuse_ranks("soup")
    from ckpt_avg.cli.documents import soup_json
    from ckpt_avg.cli.soup_text import soup_text

    def command(result: SoupResult) -> list[str]:
        """Returns the command that makes the same file; empty for a dry run."""
        return options.average_command_for(context, result.kept, output) if result.kept else []

    make_output(
        SoupRequest,
        "soup",
        lambda result: soup_text(result, command(result)),
        sources,
        output,
        document=lambda result: soup_json(result, command(result)),
        **given,
    )


@cli.command("check", cls=Command)
@options.sources
@options.options_from(CheckRequest)
@options.as_json
@options.verbose
def check_command(sources: Sequence[str], as_json: bool, verbose: bool, **given: Any) -> None:
    """Check that checkpoints fit together, from headers alone."""
    from ckpt_avg.cli.check_text import compatibility_text
    from ckpt_avg.cli.documents import compatibility_json

    report = ckpt_avg.check(sources, **given)
    for text in () if as_json else report.notices:
        say(f"Notice: {one_line(text)}", err=True)
    if as_json:
        say(json.dumps(compatibility_json(report), indent=2))
    elif report.compatible:
        say(compatibility_text(report, verbose=verbose))
    if not report.compatible:
        say(f"Error: {report}", err=True)
        raise click.exceptions.Exit(IncompatibleError.exit_code)


@cli.command("compare", cls=Command)
@options.sources
@options.options_from(CompareRequest)
@options.tensors
@options.compare_plot
@options.options_from(OutputOptions, only=["overwrite"])
@options.report
@options.as_json
@options.quiet
@options.verbose
def compare_command(
    sources: Sequence[str],
    tensors: bool,
    plot: str | None,
    report: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **given: Any,
) -> None:
    """Measure how far checkpoints are from their mean and from each other, and name what is far off.

    \b
    ckpt-avg compare RUN
    ckpt-avg compare RUN --last 20 --tensors --plot path.png
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.compare_plot import draw_comparison
    from ckpt_avg.cli.compare_text import comparison_text
    from ckpt_avg.cli.documents import compare_json
    from ckpt_avg.cli.progress_bars import bars

    refuse_ranks("compare")

    def measure() -> CompareResult:
        with bars(quiet=quiet, reading="comparing") as progress:
            return ckpt_avg.compare(sources, progress=progress, **given)

    make_report(
        sources,
        measure,
        partial(comparison_text, tensors=tensors, verbose=verbose),
        compare_json,
        draw_comparison,
        plot=plot,
        report=report,
        overwrite=overwrite,
        as_json=as_json,
    )


@cli.command("inspect", cls=Command)
@click.argument("path")
@options.options_from(InspectRequest)
@options.as_json
def inspect_command(path: str, as_json: bool, **given: Any) -> None:
    """Show what a path contains, and how it would be read."""
    from ckpt_avg.cli.documents import inspection_json
    from ckpt_avg.cli.inspect_text import inspection_text

    found = ckpt_avg.inspect(path, **given)
    say(json.dumps(inspection_json(found), indent=2) if as_json else inspection_text(found))


@cli.command("verify", cls=Command)
@click.argument("output", metavar="OUT")
@click.argument("checkpoints", nargs=-1, metavar="[--sources SOURCE...]")
@click.option(
    "--sources",
    cls=options.Option,
    heading="What to compare with",
    is_flag=True,
    help="Average the SOURCEs again and compare bit for bit.",
)
@options.options_from(VerifyRequest)
@options.as_json
@options.quiet
def verify_command(
    output: str, checkpoints: Sequence[str], sources: bool, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Check that OUT is undamaged and the mean of its checkpoints.

    \b
    ckpt-avg verify swa.safetensors
    ckpt-avg verify swa.safetensors --sources RUN
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.documents import verify_json
    from ckpt_avg.cli.progress_bars import bars
    from ckpt_avg.cli.verify_text import verify_text

    if sources != bool(checkpoints):
        problem = "--sources: names no checkpoints" if sources else f"{checkpoints[0]}: --sources is missing before it"
        raise UsageError(f"{problem}. Write: ckpt-avg verify OUT --sources SOURCE...")
    with bars(quiet=quiet, reading="verifying") as progress:
        report = ckpt_avg.verify(output, sources=checkpoints or None, progress=progress, **given)
    say(json.dumps(verify_json(report), indent=2) if as_json else verify_text(report))


def main() -> None:
    """The entry point: runs the command and exits with its code."""
    open_missing_streams()
    gc.disable()  # importing torch and reading headers make many objects, and no garbage worth a search
    code = run(cli, sys.argv[1:])
    gc.freeze()  # nor is there one in the tables that are left: as it ends, the interpreter would look through them all
    sys.exit(code)
