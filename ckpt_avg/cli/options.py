"""The options of the commands: made from the groups of `commands.options`, and a few that only the command line has."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ckpt_avg.batchnorm.options import RefreshOptions
from ckpt_avg.cli.colours import WHEN
from ckpt_avg.cli.help import EVERYDAY, Option
from ckpt_avg.commands.options import MeanOptions, ResourceOptions
from ckpt_avg.commands.requests import options_of
from ckpt_avg.distributed.ranks import RANK_TIMEOUT
from ckpt_avg.engine import engine_for
from ckpt_avg.formats.reading import Reading
from ckpt_avg.mean.weighting import Weighting
from ckpt_avg.mean.weighting_rules import options_of_rule
from ckpt_avg.runs.selection import Selection
from ckpt_avg.tables import terminal_width
from ckpt_avg.text import parse_size, size
from ckpt_avg.version import __version__
from ckpt_avg.wording import flag_of

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}. Write for example 256MiB.") from None


def _number(kind: Callable[[str], float], form: str) -> Callable[[str], float]:
    """Returns a parser of numbers, for click."""

    def parse(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            raise click.BadParameter(f"{text[:40]!r} is not a {form}.") from None

    return parse


_whole = _number(int, "whole number. Write for example 8")
_seconds = _number(float, "number of seconds. Write for example 600")
_real = _number(float, "number. Write for example 0.001")


@dataclass(frozen=True, slots=True)
class Printing:
    """What a command prints.

    Attributes:
        as_json: one JSON document instead of text.
        wide: tables in full.
        quiet: no progress bars and notices.
        verbose: details.
    """

    as_json: bool
    wide: bool
    quiet: bool
    verbose: bool

    @property
    def width(self) -> float:
        """How many columns a table may take."""
        return math.inf if self.wide else terminal_width()


def _only_here(*names: str, heading: str, **options: Any) -> Callable[[_Command], _Command]:
    return click.option(*names, cls=Option, heading=heading, **options)


def _plot(text: str) -> Callable[[_Command], _Command]:
    return _only_here("--plot", heading="Output", metavar="FILE.png", help=text)


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Prints the version and the engine, for ``--version``."""
    if value and not context.resilient_parsing:
        click.echo(f"ckpt-avg, version {__version__}, {engine_for('cpu')} engine")
        context.exit()


output = _only_here(
    "-o",
    "--output",
    heading=EVERYDAY,
    required=True,
    metavar="OUT.safetensors|FOLDER/",
    help="Write this file, or a folder that from_pretrained loads.",
)
report = _only_here(
    "--report",
    heading="Output",
    metavar="FILE.html|.json",
    multiple=True,
    help="Write a report as a page or JSON.",
)
card = _only_here("--card", heading="Output", is_flag=True, help="Print the model card instead of the result.")
sweep_plot = _plot("Draw the metric over k (.png, .svg or .pdf).")
compare_plot = _plot("Draw the path of the weights (.png, .svg or .pdf).")
tensors = _only_here("--tensors", heading="Output", is_flag=True, help="List the tensors that moved most.")
app_dir = _only_here(
    "--app-dir",
    heading=RefreshOptions.heading,
    default=".",
    show_default=True,
    metavar="DIR",
    help="Import --model, --data and --eval from DIR.",
)
rank_timeout = _only_here(
    "--rank-timeout",
    heading=ResourceOptions.heading,
    type=_seconds,
    default=int(RANK_TIMEOUT),
    show_default=True,
    metavar="SECONDS",
    help="Stop if another rank is silent for this long.",
)
_as_json = _only_here("--json", "as_json", heading="Output", is_flag=True, help="Print one JSON document on stdout.")
_wide = _only_here("--wide", heading="Output", is_flag=True, help="Print tables in full, however wide they are.")
_color = _only_here(
    "--color",
    heading="Output",
    type=click.Choice(WHEN),
    metavar="|".join(WHEN),
    default=WHEN[0],
    show_default=True,
    expose_value=False,
    help="Use colours: on a terminal, always or never.",
)
_quiet = _only_here("-q", "--quiet", heading="Output", is_flag=True, help="Hide progress bars and notices.")
_verbose = _only_here(
    "-v", "--verbose", heading="Output", is_flag=True, help="Add details, such as skipped files with reasons."
)
version = _only_here(
    "-V",
    "--version",
    heading="Help",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version and the engine, and exit.",
)
sources = click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")


def prints(command: _Command) -> _Command:
    """Gives a command the options that say what it prints, as one argument ``printing``."""

    @functools.wraps(command)
    def with_printing(*arguments: Any, as_json: bool, wide: bool, quiet: bool, verbose: bool, **given: Any) -> Any:
        return command(*arguments, printing=Printing(as_json, wide, quiet, verbose), **given)

    decorated: Any = with_printing
    for option in (version, _color, _verbose, _quiet, _wide, _as_json):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return] # the same kind of function


def makes_output(command: _Command) -> _Command:
    """Gives a command the options that `run.make_output` takes."""
    for option in (rank_timeout, card, report, output, app_dir):
        command = option(command)
    return prints(command)


def options_from(request: type, *, only: Collection[str] = ()) -> Callable[[_Command], _Command]:
    """Returns a decorator that gives a command the options of a request or a group, or some of them."""

    def decorate(command: _Command) -> _Command:
        for heading, option in reversed(list(options_of(request))):
            if option.metadata.get("help") and (not only or option.name in only):
                command = _click_option(EVERYDAY if option.metadata.get("everyday") else heading, option)(command)
        return command

    return decorate


def _click_option(heading: str, option: Field[Any]) -> Callable[[_Command], _Command]:
    known, default, kind = option.metadata, option.default, str(option.type)
    metavar = known.get("metavar", "|".join(known.get("choices", ())))
    settings: dict[str, Any] = {"help": known["help"], "default": default, "show_default": bool(default)}
    if kind == "bool":
        settings |= {"is_flag": True}
    elif metavar == "SIZE":
        settings |= {"type": _size, "metavar": metavar}
        if default is not None:
            settings["default"] = size(int(str(default))).replace(".0 ", "")
    else:
        number = _whole if kind.startswith("int") else _real if kind.startswith("float") else str
        settings |= {"type": number, "metavar": metavar, "multiple": default == ()}
    return click.option(flag_of(option.name, option), option.name, cls=Option, heading=heading, **settings)


def with_references(app_dir: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options with references to the user's code, which `prepare` imports, in place of their texts."""
    from ckpt_avg.user_code.load import Reference

    one = {name: Reference(given[name], f"--{name}", app_dir) for name in ("model", "data") if given[name] is not None}
    return {**given, **one, "evaluate": [Reference(each, "--eval", app_dir) for each in given["evaluate"]]}


def average_command_for(
    context: click.Context,
    checkpoints: Sequence[Path],
    output: str = "swa.safetensors",
    *,
    are_last: bool = False,
    weighting: Weighting | None = None,
    weights: Sequence[float] | None = None,
) -> list[str]:
    """Returns the ``average`` command for checkpoints, with the options that a sweep or a soup was given.

    The last k of the selected checkpoints become ``--last k``, unless ``--best`` selects them. Otherwise the command
    lists the checkpoints and selects nothing. It writes ``output``, or a name like it if that exists. ``weights`` are
    those that ``weighting`` gives the checkpoints, None if they are equal.
    """
    by_name = not are_last or context.params["best"] is not None
    groups = (Reading, MeanOptions, RefreshOptions) if by_name else (Selection, Reading, MeanOptions, RefreshOptions)
    passed_on = {option.name for group in groups for option in fields(group)} - {"last"}
    passed_on |= {"app_dir", "keep_order", "sha256", "split", "max_shard_size"}
    words = ["ckpt-avg", "average"]
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in passed_on and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option, value = max(parameter.opts, key=len), context.params[name]
            if value is True:
                words.append(option)
            else:
                for each in value if parameter.multiple else [value]:
                    words += [option, str(each)]
    if not by_name:
        words += ["--last", str(len(checkpoints))]
    if weighting is not None and weights is not None:
        # What power gives them depends on the checkpoints before them, which a list does not contain.
        is_listed = by_name and weighting.weighting == "power"
        words += ["--weights", ",".join(map(repr, weights))] if is_listed else options_of_rule(weighting)
    words += ["-o", free_name(output)]
    paths = [str(path) for path in checkpoints] if by_name else list(context.params["sources"])
    return [*words, *(["--"] if any(path.startswith("-") for path in paths) else []), *paths]


def free_name(name: str) -> str:
    """Returns a name of a file or folder that does not exist: this one, or with a number."""
    bare = name.rstrip("/") or name
    stem, suffix = os.path.splitext(bare)
    suffix += name[len(bare) :]
    names = itertools.chain([name], (f"{stem}-{number}{suffix}" for number in itertools.count(2)))
    return next(each for each in names if not os.path.lexists(each))
