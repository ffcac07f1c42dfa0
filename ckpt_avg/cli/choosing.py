"""The commands that help to choose what to average: `sweep`, `soup` and `compare`. Each runs in one process."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

import ckpt_avg
from ckpt_avg.cli import options
from ckpt_avg.cli.help import Command
from ckpt_avg.cli.options import Printing
from ckpt_avg.cli.run import computing, expect_user_code, make_output, make_report, refuse_ranks, showing
from ckpt_avg.commands.options import OutputOptions
from ckpt_avg.commands.requests import CompareRequest, SoupRequest, SweepRequest

if TYPE_CHECKING:
    from ckpt_avg.commands.compare import CompareResult
    from ckpt_avg.commands.soup import SoupResult
    from ckpt_avg.commands.sweep import SweepResult


@click.command("sweep", cls=Command)
@options.sources
@options.options_from(SweepRequest)
@options.app_dir
@options.sweep_plot
@options.options_from(OutputOptions, only=["overwrite"])
@options.report
@options.prints
@click.pass_context
def sweep_command(
    context: click.Context,
    /,
    sources: Sequence[str],
    app_dir: str,
    plot: str | None,
    report: Sequence[str],
    overwrite: bool,
    printing: Printing,
    **given: Any,
) -> None:
    """Find the best window of checkpoints to average. Measures the last k and the first k, for each k.

    \b
    ckpt-avg sweep RUN --model train:make_model --data train:train_loader \\
        --eval train:evaluate --maximize accuracy
    """  # noqa: D301 (click needs the backspace character itself)
    refuse_ranks("sweep")
    request = SweepRequest(sources, **given)
    from ckpt_avg.cli.plots import draw_sweep
    from ckpt_avg.cli.sweep_text import sweep_text
    from ckpt_avg.commands.documents import sweep_json

    def measure() -> SweepResult:
        with computing(quiet=printing.quiet) as progress:
            expect_user_code(given)
            return ckpt_avg.sweep(sources, progress=progress, **options.with_references(app_dir, given))

    def command(result: SweepResult) -> list[str]:
        """Returns the command that makes the best average."""
        best = result.best
        return options.average_command_for(
            context,
            best.checkpoints,
            are_last=best.side == "last",
            weighting=request.rules[best.weighting],
            weights=best.weights,
        )

    make_report(
        "sweep",
        sources,
        measure,
        lambda result, **shown: sweep_text(result, shlex.join(command(result)), **shown),
        lambda result: sweep_json(result, command(result)),
        draw_sweep,
        plot=plot,
        report=report,
        overwrite=overwrite,
        printing=printing,
        resume=given["resume"],
    )


@click.command("soup", cls=Command)
@options.sources
@options.options_from(SoupRequest)
@options.app_dir
@options.output
@options.card
@options.report
@options.prints
@click.pass_context
def soup_command(context: click.Context, /, sources: Sequence[str], output: str, **given: Any) -> None:
    """Write the greedy soup of checkpoints. Adds one after the other while a metric gets no worse.

    \b
    ckpt-avg soup RUN -o soup.safetensors --eval train:evaluate \\
        --maximize accuracy --model train:make_model --data train:train_loader
    """  # noqa: D301 (click needs the backspace character itself)
    refuse_ranks("soup")
    from ckpt_avg.cli.soup_text import soup_text
    from ckpt_avg.commands.documents import soup_json

    def command(result: SoupResult) -> list[str]:
        """Returns the command that makes the same file; empty for a dry run."""
        return options.average_command_for(context, result.kept, output) if result.kept else []

    make_output(
        "soup",
        SoupRequest,
        lambda result, **shown: soup_text(result, command(result), **shown),
        sources,
        output,
        document=lambda result: soup_json(result, command(result)),
        **given,
    )


@click.command("compare", cls=Command)
@options.sources
@options.options_from(CompareRequest)
@options.tensors
@options.compare_plot
@options.options_from(OutputOptions, only=["overwrite"])
@options.report
@options.prints
def compare_command(
    sources: Sequence[str],
    tensors: bool,
    plot: str | None,
    report: Sequence[str],
    overwrite: bool,
    printing: Printing,
    **given: Any,
) -> None:
    """Find checkpoints that are far from the others. Measures how far each is from their mean and from the others.

    \b
    ckpt-avg compare RUN
    ckpt-avg compare RUN --last 20 --tensors --plot path.png
    """  # noqa: D301 (click needs the backspace character itself)
    from ckpt_avg.cli.compare_plot import draw_comparison
    from ckpt_avg.cli.compare_text import comparison_text
    from ckpt_avg.commands.documents import compare_json

    refuse_ranks("compare")

    def measure() -> CompareResult:
        with showing(quiet=printing.quiet) as progress:
            return ckpt_avg.compare(sources, progress=progress, **given)

    make_report(
        "compare",
        sources,
        measure,
        partial(comparison_text, tensors=tensors),
        compare_json,
        draw_comparison,
        plot=plot,
        report=report,
        overwrite=overwrite,
        printing=printing,
    )
