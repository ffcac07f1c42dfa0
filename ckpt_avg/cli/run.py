"""What the commands that compute something share: a run on one rank or many, and what it prints and reports."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import ckpt_avg
from ckpt_avg.cli.colours import coloured
from ckpt_avg.cli.exits import error_json, say
from ckpt_avg.cli.options import Printing, with_references
from ckpt_avg.commands.options import RankOptions
from ckpt_avg.distributed.launch import join_ranks, launch_of
from ckpt_avg.distributed.ranks import RANK_TIMEOUT
from ckpt_avg.errors import CkptAvgError, RequirementError, UsageError
from ckpt_avg.formats.reading import Reading
from ckpt_avg.progress import Progress
from ckpt_avg.text import one_line

if TYPE_CHECKING:
    from ckpt_avg.commands.compare import CompareResult
    from ckpt_avg.commands.draft import AverageResult
    from ckpt_avg.output.paths import SideFiles
    from ckpt_avg.runs.discover import Sources

_Result = TypeVar("_Result")

_FUNCTIONS = {"refresh-bn": "refresh_weights"}  # of commands with another name


def make_output(
    kind: str,
    request: type[Any],
    text: Callable[..., str],
    sources: Sources,
    output: str,
    *,
    document: Callable[[Any], dict[str, Any]] | None = None,
    app_dir: str,
    report: Sequence[str],
    card: bool,
    printing: Printing,
    rank_timeout: float = RANK_TIMEOUT,
    **given: Any,
) -> None:
    """Runs what makes an output, on one rank or many; prints and reports the result, even if a requirement is not met.

    ``kind`` is the name of the command, ``request`` the class of its request. ``text`` is called with the result,
    ``verbose`` and ``width``, ``document`` with the result.
    """
    from ckpt_avg.commands.documents import average_json
    from ckpt_avg.output.paths import REPORTS, SideFiles, checksum_path

    launch = launch_of()
    speaks = launch is None or launch.rank == 0
    files = SideFiles(sources, output=output, overwrite=given["overwrite"])
    if given["sha256"]:
        files.reserve(checksum_path(output), "the checksum")
    if given.get("resume"):
        files.reserve(given["resume"], "--resume")
    unmet: RequirementError | None = None
    try:
        with computing(quiet=printing.quiet or not speaks) as progress, join_ranks(timeout=rank_timeout) as ranks:
            shared: dict[str, Any] = {"ranks": ranks} if issubclass(request, RankOptions) else {}
            request(sources, output, **shared, **given)  # raises what is wrong with the options
            for path in report if speaks else ():
                files.check("--report", path, REPORTS)
            expect_user_code(given)
            options = {**with_references(app_dir, given), **shared, "progress": progress}
            result = getattr(ckpt_avg, _FUNCTIONS.get(kind, kind))(sources, output, **options)
    except RequirementError as error:
        unmet, result = error, error.result
    if not speaks:
        return
    average: AverageResult = getattr(result, "average", result)
    found = (document or average_json)(result)
    shown = ""
    if card and unmet is None:
        shown = _card(average, output, quiet=printing.quiet)
        found["card"] = shown
    if not printing.as_json:
        say(shown or text(result, verbose=printing.verbose, width=printing.width))
    whole: dict[str, Any] = {}
    stopped: BaseException | None = None
    if report:
        from ckpt_avg.commands.report import output_report

        compared, stopped = _compared(average, given, quiet=printing.quiet)
        whole = output_report(kind, found, _command_line(), average, compared)
    if unmet is not None:
        whole["error"] = error_json(type(unmet).__name__, str(unmet), unmet.exit_code)
    contents = [("--report", path, _reporting(path, whole)) for path in report]
    says = not (printing.as_json or shown)  # the card is alone on stdout
    _write(found, contents, files, as_json=printing.as_json, says=says, failure=unmet, stopped=stopped)


def make_report(
    kind: str,
    sources: Sources,
    measure: Callable[[], _Result],
    text: Callable[..., str],
    document: Callable[[_Result], dict[str, Any]],
    draw: Callable[[_Result, str], bytes],
    *,
    plot: str | None,
    report: Sequence[str],
    overwrite: bool,
    printing: Printing,
    resume: str | None = None,
) -> None:
    """Runs what only measures; prints the result, writes its report and draws it, into paths that are checked first."""
    from ckpt_avg.cli.plots import KINDS, refuse_without_matplotlib
    from ckpt_avg.commands.report import report_document
    from ckpt_avg.output.paths import REPORTS, SideFiles

    files = SideFiles(sources, output=None, overwrite=overwrite)
    if resume:
        files.reserve(resume, "--resume")
    for path in report:
        files.check("--report", path, REPORTS)
    files.check("--plot", plot, KINDS)
    if plot is not None:
        refuse_without_matplotlib()
    result = measure()
    found = document(result)
    if not printing.as_json:
        say(text(result, verbose=printing.verbose, width=printing.width))
    whole = report_document(kind, found, _command_line())
    contents = [("--report", path, _reporting(path, whole)) for path in report]
    if plot is not None:
        contents.append(("--plot", plot, lambda: draw(result, os.path.splitext(plot)[1].lower())))
    _write(found, contents, files, as_json=printing.as_json, says=not printing.as_json)


def refuse_ranks(command: str) -> None:
    """Raises UsageError if this process is one of several ranks."""
    if launch_of() is not None:
        raise UsageError(f"{command}: runs in one process only. Start it without torchrun.")


def expect_user_code(given: Mapping[str, Any]) -> None:
    """Collects garbage from now on if the user has named code of theirs."""
    if any((given["model"], given["data"], *given["evaluate"])):
        gc.freeze()  # what has been imported needs no search
        gc.enable()


def showing(*, quiet: bool, keep: bool = True) -> contextlib.AbstractContextManager[Progress]:
    """Shows progress and notices on stderr, as `progress_lines.shown` does, in colours where these are wanted."""
    from ckpt_avg.progress_lines import shown

    return shown(quiet=quiet, keep=keep, paint=lambda text: coloured(text, sys.stderr))


@contextlib.contextmanager
def computing(*, quiet: bool) -> Iterator[Progress]:
    """Shows progress, and sends what the user's code prints to stderr."""
    with showing(quiet=quiet) as progress, contextlib.redirect_stdout(sys.stderr):
        yield progress


def _command_line() -> tuple[str, ...]:
    return "ckpt-avg", *click.get_current_context().obj


def _card(result: AverageResult, output: str, *, quiet: bool) -> str:
    """Returns the model card of an output, and says what it leaves out if the run has not said it."""
    from ckpt_avg.commands.card import card_notice, checkpoint_folder, model_card, read_config

    name = os.path.basename(os.path.abspath(output))
    if result.files:
        folder = Path(output) if result.written else checkpoint_folder(result.checkpoints)
        return model_card(result, name=name, config=read_config(folder), recorded=result.metadata)
    config = read_config(checkpoint_folder(result.checkpoints))
    notice = card_notice(config)
    if notice is not None and not quiet:
        say(f"Notice: {notice}", err=True)
    return model_card(result, name=os.path.splitext(name)[0], config=config, recorded=result.metadata)


def _compared(
    result: AverageResult, given: Mapping[str, Any], *, quiet: bool
) -> tuple[CompareResult | str | None, BaseException | None]:
    """Returns what `compare` says of the checkpoints, or why it says nothing; and the signal that stopped it."""
    from ckpt_avg.commands.report import comparison_of

    options = {each.name: given[each.name] for each in fields(Reading) if each.name in given}

    def measure() -> CompareResult:
        with showing(quiet=quiet) as progress:
            silent = replace(progress, notice=lambda text: None)  # those of the output were shown
            return ckpt_avg.compare(result.checkpoints, threads=given["threads"], progress=silent, **options)

    try:
        compared = comparison_of(result, measure)
    except BaseException as error:
        return "interrupted", error
    if isinstance(compared, str) and not quiet:
        say(f"Notice: the report has no distances: {one_line(compared)}", err=True)
    return compared, None


def _reporting(path: str, document: dict[str, Any]) -> Callable[[], bytes]:
    """Returns what makes the contents of a report."""

    def contents() -> bytes:
        from ckpt_avg.output.paths import json_bytes

        if os.path.splitext(path)[1].lower() != ".html":
            return json_bytes(document)
        from ckpt_avg.cli.report_html import report_html

        return report_html(document)

    return contents


def _write(
    document: dict[str, Any],
    contents: Sequence[tuple[str, str, Callable[[], bytes]]],
    files: SideFiles,
    *,
    as_json: bool,
    says: bool,
    failure: CkptAvgError | None = None,
    stopped: BaseException | None = None,
) -> None:
    """Writes files, given as option, path and contents; then prints the document, even if that fails.

    With ``says`` it names each file on stdout.
    """
    for option, path, make in contents:
        try:
            files.publish(option, path, make)
            if says:
                say(f"wrote {one_line(path)}")
        except CkptAvgError as error:  # noqa: PERF203 (a few files)
            failure = failure or error
    if stopped is not None:
        vars(stopped)["document"] = document
        raise stopped
    if failure is not None:
        failure.document = document
        raise failure
    if as_json:
        say(json.dumps(document, indent=2))
