"""What the commands that compute something share: a run on one rank or many, and what it prints and reports."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckpt_avg.cli.exits import error_json, say
from ckpt_avg.cli.options import load_all
from ckpt_avg.commands.options import options_of
from ckpt_avg.distributed.launch import join_ranks, launch_of
from ckpt_avg.errors import CkptAvgError, RequirementError

if TYPE_CHECKING:
    from ckpt_avg.commands.publish import AverageResult
    from ckpt_avg.output.paths import SideFiles


def make_output(
    make: Callable[..., AverageResult],
    text: Callable[[AverageResult], str],
    sources: Sequence[str],
    output: str,
    *,
    report: str | None,
    as_json: bool,
    quiet: bool,
    rank_timeout: float,
    **options: Any,
) -> None:
    """Runs what makes an output, and prints and reports what came of it, also where a requirement is not met."""
    from ckpt_avg.cli.documents import average_json
    from ckpt_avg.cli.progress_bars import bars
    from ckpt_avg.output.paths import SideFiles, checksum_path, json_bytes

    launch = launch_of()
    speaks = launch is None or launch.rank == 0
    files = SideFiles(sources, output=output, overwrite=options["overwrite"])
    if options["sha256"]:
        files.reserve(checksum_path(output), "the checksum")
    unmet: RequirementError | None = None
    quiet = quiet or not speaks
    try:
        # What the user's code prints is no result of this command.
        with (
            contextlib.redirect_stdout(sys.stderr),
            bars(quiet=quiet) as progress,
            join_ranks(timeout=rank_timeout) as ranks,
        ):
            collect_from_here()
            if speaks:
                files.check("--report", report, (".json",))
            result = make(progress=progress, ranks=ranks, **load_all(**options))
    except RequirementError as error:
        unmet, result = error, error.result
    if not speaks:
        return
    document = average_json(result)
    if unmet is not None:
        reported = {**document, "error": error_json(type(unmet).__name__, str(unmet), unmet.exit_code)}
    else:
        reported = document
    show(text(result), document, {"--report": lambda: json_bytes(reported)}, files, as_json=as_json, failure=unmet)


def options_in(request: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a command was given that a request has options for."""
    names = {option.name for _, option in options_of(request)}
    return {name: value for name, value in given.items() if name in names}


def collect_from_here() -> None:
    """Turns the search for cyclic garbage on, for the user's code; what has been imported is left out of it."""
    gc.freeze()
    gc.enable()


def show(
    text: str,
    document: dict[str, Any],
    contents: Mapping[str, Callable[[], bytes]],
    files: SideFiles,
    *,
    as_json: bool,
    failure: CkptAvgError | None = None,
) -> None:
    """Prints the result, then writes the files that were asked for; whatever fails then, the result is not lost."""
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
