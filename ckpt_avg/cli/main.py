"""The ``ckpt-avg`` command: parse, call the API, print. Nothing here imports torch before it is needed.

Results go to stdout; progress, notices and errors to stderr; ``--json`` puts exactly one document on stdout.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import click

from ckpt_avg.cli import options as cli_options
from ckpt_avg.cli.exits import open_missing_streams, run, say
from ckpt_avg.cli.run import collect_from_here, make_output, show
from ckpt_avg.distributed.launch import launch_of
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ckpt-avg")
def cli() -> None:
    """Average the checkpoints of a training run into one safetensors file (Stochastic Weight Averaging).

    A SOURCE is a checkpoint file (safetensors, or written by torch.save), a checkpoint folder (transformers,
    accelerate, Lightning, DeepSpeed, torch.distributed.checkpoint), or a run folder of these, which is read in the
    order of its steps. No code inside a checkpoint is ever run.
    """


@cli.command("average")
@cli_options.sources
@click.option("-o", "--output", required=True, metavar="OUT.safetensors", help="The file to write.")
@cli_options.selection
@cli_options.reading
@cli_options.mean
@cli_options.user_code
@cli_options.keep
@cli_options.refresh
@cli_options.evaluation
@click.option("--eval-all", "evaluate_all", is_flag=True, help="Measure every checkpoint, not the last alone.")
@cli_options.require
@cli_options.sha256
@cli_options.overwrite
@cli_options.dry_run
@cli_options.report
@cli_options.as_json
@cli_options.rank_timeout
@cli_options.quiet
@cli_options.verbose
def average_command(sources: Sequence[str], output: str, verbose: bool, **options: Any) -> None:
    """Write the equal-weighted mean of the checkpoints, BatchNorm statistics recomputed.

    \b
    ckpt-avg average RUN --last 8 -o swa.safetensors
    ckpt-avg average RUN -o swa.safetensors --model train:make_model --data train:train_loader
    ckpt-avg average RUN -o swa.safetensors --bn keep \\
        --model train:make_model --eval train:evaluate --require 'accuracy>=last'
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.report import average_text
    from ckpt_avg.commands.average import average

    make_output(
        lambda **given: average(sources, output, **given),
        lambda result: average_text(result, verbose=verbose),
        sources,
        output,
        **options,
    )


@cli.command("refresh-bn")
@click.argument("weights")
@click.option("-o", "--output", required=True, metavar="OUT.safetensors", help="The file to write.")
@cli_options.reading
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to refresh.")
@cli_options.dtype
@cli_options.user_code
@cli_options.refresh
@cli_options.evaluation
@cli_options.require
@cli_options.sha256
@cli_options.overwrite
@cli_options.dry_run
@cli_options.report
@cli_options.as_json
@cli_options.rank_timeout
@cli_options.quiet
def refresh_command(weights: str, output: str, **options: Any) -> None:
    """Write WEIGHTS with their BatchNorm statistics recomputed, and everything else as it is.

    \b
    ckpt-avg refresh-bn weights.pt -o refreshed.safetensors --model train:make_model --data train:train_loader
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.report import refreshed_text
    from ckpt_avg.commands.refresh_bn import refresh_weights
    from ckpt_avg.errors import UsageError

    for option in ("model", "data"):
        if options[option] is None:
            raise UsageError(f"--{option}: expected MODULE:FACTORY, got nothing. The statistics are measured with it.")
    make_output(lambda **given: refresh_weights(weights, output, **given), refreshed_text, [weights], output, **options)


@cli.command("sweep")
@cli_options.sources
@cli_options.selection
@cli_options.reading
@cli_options.mean
@cli_options.hold
@cli_options.user_code
@cli_options.keep
@cli_options.refresh
@cli_options.evaluation
@click.option("--maximize", metavar="METRIC", help="Which metric says what is best: the higher, the better.")
@click.option("--minimize", metavar="METRIC", help="The same: the lower, the better.")
@click.option(
    "--windows", default="both", show_default=True, metavar="last|first|both", help="The last k, the first k, or both."
)
@click.option("--plot", metavar="FILE.png", help="Draw the metric over k (.png, .svg, .pdf); needs matplotlib.")
@cli_options.overwrite
@cli_options.report
@cli_options.as_json
@cli_options.quiet
@click.pass_context
def sweep_command(
    context: click.Context,
    /,
    sources: Sequence[str],
    model: str | None,
    data: str | None,
    evaluate: str | None,
    app_dir: str,
    plot: str | None,
    report: str | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Measure the average of the last k checkpoints for each k, and of the first k, to find the best window.

    \b
    ckpt-avg sweep RUN --model train:make_model --data train:train_loader \\
        --eval train:evaluate --maximize accuracy
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.plots import KINDS, draw_sweep, refuse_without_matplotlib
    from ckpt_avg.cli.progress_bars import bars
    from ckpt_avg.cli.report_evaluation import sweep_json, sweep_text
    from ckpt_avg.commands.sweep import sweep
    from ckpt_avg.errors import UsageError
    from ckpt_avg.output.paths import SideFiles, json_bytes

    if launch_of() is not None:
        raise UsageError("sweep: expected one process, got the ranks of torchrun. Start it without torchrun.")
    for option, given in (("--model", model), ("--eval", evaluate)):
        if given is None:
            raise UsageError(f"{option}: expected a name, MODULE:NAME, got nothing. Each average is measured with it.")
    files = SideFiles(sources, output=None, overwrite=overwrite)
    files.check("--report", report, (".json",))
    files.check("--plot", plot, KINDS)
    if plot is not None:
        refuse_without_matplotlib()
    with contextlib.redirect_stdout(sys.stderr), bars(quiet=quiet) as progress:
        collect_from_here()
        loaded = cli_options.load_all(app_dir, model=model, data=data, evaluate=evaluate)
        result = sweep(sources, progress=progress, **loaded, **options)
    command = cli_options.average_command_for(context, result.best)
    document = sweep_json(result, command)
    contents = {
        "--report": lambda: json_bytes(document),
        "--plot": lambda: draw_sweep(result, os.path.splitext(plot or "")[1].lower()),
    }
    show(sweep_text(result, shlex.join(command)), document, contents, files, as_json=as_json)


@cli.command("check")
@cli_options.sources
@cli_options.selection
@cli_options.reading
@cli_options.as_json
@cli_options.verbose
def check_command(sources: Sequence[str], as_json: bool, verbose: bool, **options: Any) -> None:
    """Say whether the checkpoints fit together, from their headers alone."""
    from ckpt_avg.cli.report import compatibility_json, compatibility_text
    from ckpt_avg.commands.check import check

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
@cli_options.reading
@cli_options.as_json
def inspect_command(path: str, as_json: bool, **options: Any) -> None:
    """Show what a checkpoint or a run folder holds, and how it would be read."""
    from ckpt_avg.cli.report_inspect import inspection_json, inspection_text
    from ckpt_avg.commands.inspect import inspect

    found = inspect(path, **options)
    say(json.dumps(inspection_json(found), indent=2) if as_json else inspection_text(found))


@cli.command("verify")
@click.argument("output", metavar="OUT")
@click.argument("checkpoints", nargs=-1, metavar="[--sources SOURCE...]")
@click.option("--sources", is_flag=True, help="Take the mean of the SOURCEs behind it again, and compare bit for bit.")
@cli_options.work
@cli_options.as_json
@cli_options.quiet
def verify_command(
    output: str, checkpoints: Sequence[str], sources: bool, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Say whether OUT, which ckpt-avg wrote, is whole and undamaged, and the mean of its checkpoints.

    \b
    ckpt-avg verify swa.safetensors
    ckpt-avg verify swa.safetensors --sources RUN
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.progress_bars import bars
    from ckpt_avg.cli.report_verify import verify_json, verify_text
    from ckpt_avg.commands.verify import verify
    from ckpt_avg.errors import UsageError

    if sources != bool(checkpoints):
        expected, got = ("checkpoints behind it", "none") if sources else ("one file, or --sources", "several paths")
        raise UsageError(f"verify: expected {expected}, got {got}. Write: ckpt-avg verify OUT --sources SOURCE...")
    with bars(quiet=quiet, reading="verifying") as progress:
        report = verify(output, sources=checkpoints or None, progress=progress, **options)
    say(json.dumps(verify_json(report), indent=2) if as_json else verify_text(report))


def main() -> None:
    """The entry point: runs the command and exits with its code."""
    open_missing_streams()
    gc.disable()  # importing torch and reading headers make many objects, and no garbage worth a search
    code = run(cli, sys.argv[1:])
    gc.freeze()  # nor is there one in the tables that are left: as it ends, the interpreter would look through them all
    sys.exit(code)
