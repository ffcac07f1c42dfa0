"""What the commands that compute something share: a run on one rank or many, and what it prints and reports."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import ckpt_avg
from ckpt_avg.cli.exits import error_json, say
from ckpt_avg.cli.options import load_all
from ckpt_avg.commands.documents import average_json
from ckpt_avg.commands.options import RankOptions
from ckpt_avg.distributed.launch import join_ranks, launch_of
from ckpt_avg.distributed.ranks import RANK_TIMEOUT
from ckpt_avg.errors import CkptAvgError, RequirementError, UsageError

if TYPE_CHECKING:
    from ckpt_avg.output.paths import SideFiles
    from ckpt_avg.progress import Progress
    from ckpt_avg.runs.discover import Sources

_Result = TypeVar("_Result")


def make_output(
    request: type[Any],
    function: str,
    text: Callable[[Any], str],
    sources: Sources,
    output: str,
    *,
    document: Callable[[Any], dict[str, Any]] = average_json,
    app_dir: str,
    report: str | None,
    as_json: bool,
    quiet: bool,
    rank_timeout: float = RANK_TIMEOUT,
    **given: Any,
) -> None:
    """Runs what makes an output, on one rank or many; prints and reports the result, even if a requirement is not met.

    ``request`` is the class of the request, which checks options and sources before the user's code is imported.
    ``function`` is the name of `average`, `refresh_weights` or `soup`: torch is imported with it.
    """
    from ckpt_avg.output.paths import SideFiles, checksum_path, json_bytes

    launch = launch_of()
    speaks = launch is None or launch.rank == 0
    files = SideFiles(sources, output=output, overwrite=given["overwrite"])
    if given["sha256"]:
        files.reserve(checksum_path(output), "the checksum")
    unmet: RequirementError | None = None
    try:
        with computing(quiet=quiet or not speaks) as progress, join_ranks(timeout=rank_timeout) as ranks:
            shared: dict[str, Any] = {"ranks": ranks} if issubclass(request, RankOptions) else {}
            request(sources, output, **shared, **given).discover()
            if speaks:
                files.check("--report", report, (".json",))
            options = {**load_all(app_dir, given), **shared, "progress": progress}
            result = getattr(ckpt_avg, function)(sources, output, **options)
    except RequirementError as error:
        unmet, result = error, error.result
    if not speaks:
        return
    found = document(result)
    reported = found
    if unmet is not None:
        reported = {**found, "error": error_json(type(unmet).__name__, str(unmet), unmet.exit_code)}
    _show(text(result), found, {"--report": lambda: json_bytes(reported)}, files, as_json=as_json, failure=unmet)


def make_report(
    sources: Sources,
    measure: Callable[[], _Result],
    text: Callable[[_Result], str],
    document: Callable[[_Result], dict[str, Any]],
    draw: Callable[[_Result, str], bytes],
    *,
    plot: str | None,
    report: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Runs what only measures; prints the result, writes its report and draws it, into paths that are checked first."""
    from ckpt_avg.cli.plots import KINDS, refuse_without_matplotlib
    from ckpt_avg.output.paths import SideFiles, json_bytes

    files = SideFiles(sources, output=None, overwrite=overwrite)
    files.check("--report", report, (".json",))
    files.check("--plot", plot, KINDS)
    if plot is not None:
        refuse_without_matplotlib()
    result = measure()
    found = document(result)
    contents = {
        "--report": lambda: json_bytes(found),
        "--plot": lambda: draw(result, os.path.splitext(plot or "")[1].lower()),
    }
    _show(text(result), found, contents, files, as_json=as_json)


def refuse_ranks(command: str) -> None:
    """Raises UsageError if this process is one of several ranks."""
    if launch_of() is not None:
        raise UsageError(f"{command}: runs in one process only. Start it without torchrun.")


@contextlib.contextmanager
def computing(*, quiet: bool) -> Iterator[Progress]:
    """Draws progress bars, collects garbage for the user's code, and sends what it prints to stderr."""
    from ckpt_avg.cli.progress_bars import bars

    gc.freeze()  # what has been imported needs no search
    gc.enable()
    with contextlib.redirect_stdout(sys.stderr), bars(quiet=quiet) as progress:
        yield progress


def _show(
    text: str,
    document: dict[str, Any],
    contents: Mapping[str, Callable[[], bytes]],
    files: SideFiles,
    *,
    as_json: bool,
    failure: CkptAvgError | None = None,
) -> None:
    """Prints the result, then writes the files of ``contents``; the result is printed even if that fails."""
    if not as_json:
        say(text)
    try:
        for option, make in contents.items():
            files.publish(option, make)
    except CkptAvgError as error:
        failure = failure or error
    if failure is not None:
        failure.document = document
        raise failure
    if as_json:
        say(json.dumps(document, indent=2))
