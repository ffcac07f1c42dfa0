"""Runs a command, and turns errors and signals into the exit codes of `errors`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence

import click

from ckpt_avg.cli.colours import choose, coloured
from ckpt_avg.cli.signals import Signals, Terminated
from ckpt_avg.distributed.launch import launched_rank
from ckpt_avg.errors import CkptAvgError, OutputError, ResourceError, UsageError, UserCodeError, is_out_of_memory
from ckpt_avg.text import safe_text
from ckpt_avg.wording import for_command_line

# A signal may come between publishing and the last line of output.
_UNTOUCHED = ": the output path is unchanged, or complete if it was already published"


def run(command: click.Command, arguments: Sequence[str]) -> int:
    """Runs a click command and returns the exit code. A bug of ours keeps its traceback, and exits with 1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # torch warns on import if numpy is missing; this package does not need it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    if sys.stderr is None:
        # The caller closed it; tqdm and traceback would print on stdout instead.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it stays open until the process ends)
    choose(arguments)
    with for_command_line():
        code = _run(command, arguments)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads our output any more. The interpreter must not flush it again on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def open_missing_streams() -> None:
    """Opens /dev/null for each of stdin, stdout and stderr that the caller closed.

    Otherwise the next file that is opened gets its number, and whatever is printed goes into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # noqa: PERF203 (three rounds)
            os.dup2(os.open(os.devnull, os.O_RDWR), number)  # open() may have returned this very number


def say(text: str, *, err: bool = False) -> None:
    """Prints a line. A closed pipe or a broken stderr is no failure; another failure of stdout is an OutputError."""
    try:
        stream = sys.stderr if err else sys.stdout
        click.echo(coloured(safe_text(text), stream), err=err, color=True)
    except OSError as error:
        # The rest of the stream's buffer must not fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2 if err else 1)
        if not err and not isinstance(error, BrokenPipeError):
            raise OutputError(f"stdout: cannot be written: {error.strerror}. The result was: {text}") from error


def _run(command: click.Command, arguments: Sequence[str]) -> int:
    # Only rank 0 prints results; any rank prints its errors.
    silent = bool(arguments) and arguments[0] in ("average", "refresh-bn", "soup", "sweep") and launched_rank()
    as_json = "--json" in arguments and not silent
    signals = Signals()
    try:
        # Not command.main(), which returns the code of an Exit as a value and turns a closed pipe into exit 1.
        with signals, command.make_context("ckpt-avg", list(arguments), obj=tuple(arguments)) as context:
            command.invoke(context)
        return 0
    except BrokenPipeError:  # --help and --version print by themselves
        return 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        from ckpt_avg.cli.wrong_words import message_of

        message = message_of(error, command, arguments)
        return _fail(type(error).__name__, message, error.exit_code, as_json)
    except (KeyboardInterrupt, click.Abort) as error:
        return _interrupted(error, arguments, as_json)
    except Terminated as error:
        return _interrupted(error, arguments, as_json)
    except Exception as error:
        if signals.dropped is not None:
            return _interrupted(signals.dropped, arguments, as_json)
        return _failed(error, arguments, as_json)


def _failed(error: Exception, arguments: Sequence[str], as_json: bool) -> int:
    """Says what has failed; a bug of ours is raised again."""
    # torch raises for loader workers that the signal has ended, too; a RankError knows the cause better.
    signalled = _signal_before(error) if isinstance(error, (UserCodeError, RuntimeError)) else None
    if signalled is not None:
        return _interrupted(signalled, arguments, as_json)
    if isinstance(error, CkptAvgError):
        if isinstance(error, UserCodeError) and error.__cause__ is not None:
            from ckpt_avg.user_code.raised import lines_of

            if lines := lines_of(error.__cause__, whole=not {"-v", "--verbose"}.isdisjoint(arguments)):
                say(lines, err=True)
        return _fail(type(error).__name__, str(error), error.exit_code, as_json, error.document)
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        text = "torch is not installed, and is needed here. Install it: pip install torch."
        return _fail("UsageError", text, UsageError.exit_code, as_json)
    if not isinstance(error, (MemoryError, OSError, RuntimeError, ImportError)) or not is_out_of_memory(error):
        raise error
    reason = (str(error).splitlines() or ["the system has no more"])[0]
    advice = "Use a smaller --memory, or smaller batches for the refresh and --eval."
    if isinstance(error, ImportError):
        advice = "Raise the limit on the memory of this process (ulimit -v) or of its job."
    text = f"out of memory: {reason}. {advice}"
    return _fail("ResourceError", text, ResourceError.exit_code, as_json)


def _signal_before(error: BaseException) -> KeyboardInterrupt | Terminated | None:
    """Returns the signal for which the command was stopping when the error came."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (KeyboardInterrupt, Terminated)):
            return found
        found = found.__context__
    return None


def _interrupted(error: KeyboardInterrupt | click.Abort | Terminated, arguments: Sequence[str], as_json: bool) -> int:
    known = vars(error).get("document")  # of an output that is published already
    output = _UNTOUCHED if any(word.startswith(("-o", "--output")) for word in arguments) else ""
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return _fail("Interrupted", f"interrupted{output}", 130, as_json, known)
    return _fail("Terminated", f"terminated{output}", 128 + error.number, as_json, known)


def error_json(kind: str, message: str, code: int) -> dict[str, object]:
    """Returns an error as plain values."""
    return {"kind": kind, "message": message, "exit_code": code}


def _fail(kind: str, message: str, code: int, as_json: bool, known: Mapping[str, object] | None = None) -> int:
    rank = launched_rank()
    say(f"{'' if rank is None else f'[rank {rank}] '}Error: {message}", err=True)
    if as_json:
        say(json.dumps({**(known or {}), "error": error_json(kind, message, code)}, indent=2))
    return code
