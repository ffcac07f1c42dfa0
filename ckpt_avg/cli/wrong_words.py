"""What to write instead of words on the command line that are missing or wrong."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence

import click

from ckpt_avg.files.missing import is_remote
from ckpt_avg.formats.trainers.name_patterns import SUFFIXES
from ckpt_avg.text import nearest, one_line, suggestion

# click's sentences → ours
_FORMS = (
    (r"^Got unexpected extra arguments? \((.*)\)$", r"\1: unexpected."),
    (r"^Option '(\S+)' requires an argument\.$", r"\1: its value is missing."),
    (r"^Option '(\S+)' does not take a value\.$", r"\1: takes no value."),
)
_SOURCES = "SOURCE..."
_BEST = "--best N --metric NAME --mode min|max"
_OTHER_TOOLS = {  # options of other tools, with - in place of _ → ours
    **dict.fromkeys(
        ("--inputs", "--input", "--in", "--checkpoints", "--checkpoint", "--ckpts", "--models", "--src-path", "--path"),
        _SOURCES,
    ),
    **dict.fromkeys(("--checkpoint-dir", "--ckpt-dir", "--dir", "--input-dir", "--exp-dir", "--run-dir"), _SOURCES),
    **dict.fromkeys(("--num-epoch-checkpoints", "--num-update-checkpoints", "--num-last-checkpoints"), "--last N"),
    **dict.fromkeys(("-n", "--num", "--avg", "--last-n", "--last-k", "--num-checkpoints", "--k", "--n"), "--last N"),
    **dict.fromkeys(("--num-best-checkpoints", "--best-k", "--val-best", "--top-k", "--best-n"), _BEST),
    **dict.fromkeys(("--checkpoint-upper-bound", "--max-epoch", "--epoch", "--iter", "--end"), "--to-step S"),
    **dict.fromkeys(("--min-epoch", "--swa-start", "--start", "--swa-epoch-start"), "--from-step S"),
    **dict.fromkeys(("--swa-freq", "--interval", "--freq", "--step"), "--every K"),
    **dict.fromkeys(("--epochs", "--steps", "--range", "--window"), "--from-step S --to-step S"),
    **dict.fromkeys(("--output-dir", "--out-dir"), "-o FOLDER/"),
    **dict.fromkeys(("--output-path", "--output-file", "--outfile", "--out", "--dst-model", "--save-path"), "-o FILE"),
    **dict.fromkeys(("--use-ema", "--use-averaged-model"), "--ema"),
    **dict.fromkeys(("--force", "-f", "-y", "--yes"), "--overwrite"),
    **dict.fromkeys(("--workers", "--jobs", "-j", "--num-workers", "--num-threads", "--nproc"), "--threads N"),
    **dict.fromkeys(("--out-dtype", "--precision", "--torch-dtype"), "--dtype DTYPE"),
    **{"--bf16": "--dtype bfloat16", "--fp16": "--dtype float16", "--fp32": "--dtype float32"},
    **dict.fromkeys(("--no-bn", "--skip-bn"), "--bn keep"),
    **dict.fromkeys(("--update-bn", "--bn-update"), "--bn refresh"),
    **dict.fromkeys(("--gpu", "--cuda"), "--device cuda"),
    **dict.fromkeys(("--dataloader", "--loader", "--train-loader", "--dataset"), "--data MODULE:FACTORY"),
    **dict.fromkeys(("--metric-mode", "--direction"), "--mode min|max"),
    **dict.fromkeys(("--alpha", "--coefficients", "--merge-weights"), "--weights W,W,..."),
}
_OTHER_COMMANDS = {
    **dict.fromkeys(("avg", "mean", "merge", "swa", "combine"), "average"),
    **dict.fromkeys(("show", "info", "ls", "list", "view"), "inspect"),
    **dict.fromkeys(("diff", "distance"), "compare"),
    **dict.fromkeys(("bn", "refresh", "update-bn"), "refresh-bn"),
    **dict.fromkeys(("eval", "evaluate", "search"), "sweep"),
    **dict.fromkeys(("validate", "checksum"), "verify"),
    "version": "--version",
}


def message_of(error: click.ClickException, command: click.Command, arguments: Sequence[str]) -> str:
    """Returns click's message in the form of ours: where, what is wrong, what to do."""
    message, is_value = re.subn(r"^Invalid value for '(\S+)': ", r"\1: ", error.format_message())
    if is_value:
        return one_line(message)
    commands = command.commands if isinstance(command, click.Group) else {}
    chosen = commands.get(arguments[0])
    if isinstance(command, click.Group) and chosen is None:
        return _without_command(error, command, arguments)
    help = f"See ckpt-avg {arguments[0]} --help." if chosen is not None else "See ckpt-avg --help."
    if isinstance(error, click.NoSuchOption) and chosen is not None:
        advice = _instead_of_option(error.option_name, chosen, commands, arguments)
        return one_line(f"{error.option_name}: no such option. {advice or help}")
    if isinstance(error, click.MissingParameter) and error.param is not None:
        is_option = isinstance(error.param, click.Option)
        name = error.param.opts[-1] if is_option else error.param.human_readable_name
        message = f"{name}: missing."
        if name == "--output":
            help = f"Add {shlex.join(_output())}."
    for form, ours in _FORMS:
        message = re.sub(form, ours, message)
    return one_line(f"{message} {help}")


def _without_command(error: click.ClickException, group: click.Group, arguments: Sequence[str]) -> str:
    """Says what to write if the first word is no command: a path, an option, or a word like a command."""
    word = arguments[0]
    if isinstance(error, click.NoSuchOption):
        if later := next((word for word in arguments if word in group.commands), None):
            rest = [word for place, word in enumerate(arguments) if place != arguments.index(later)]
            return one_line(f"{error.option_name}: no such option. Write: ckpt-avg {shlex.join([later, *rest])}")
        if any(error.option_name in option.opts for each in group.commands.values() for option in each.params):
            return f"{error.option_name}: no command before it. Write the command first:\n{_commands_for(arguments)}"
        return one_line(f"{error.option_name}: no such option. See ckpt-avg --help.")
    if os.path.lexists(word) or "/" in word or is_remote(word) or word.endswith(SUFFIXES):
        return f"{one_line(word)}: is a path, not a command. Write the command first:\n{_commands_for(arguments)}"
    other = _OTHER_COMMANDS.get(word.lower())
    near = f" Did you mean {other!r}?" if other else suggestion(word, group.commands)
    return one_line(f"{word}: no such command.{near} See ckpt-avg --help.")


def _commands_for(arguments: Sequence[str]) -> str:
    """Returns complete commands that begin with the words that were given."""
    writes = any(word in ("-o", "--output") or word.startswith(("--output=", "-o=")) for word in arguments)
    commands = [["average", *arguments, *([] if writes else _output())]]
    if not writes:
        commands.insert(0, ["inspect", *arguments])
    return "\n".join(f"  ckpt-avg {one_line(shlex.join(each))}" for each in commands)


def _output() -> list[str]:
    from ckpt_avg.cli.options import free_name

    return ["-o", free_name("swa.safetensors")]


def _instead_of_option(
    name: str, command: click.Command, commands: Mapping[str, click.Command], arguments: Sequence[str]
) -> str:
    """Returns what to write instead of an option that a command does not have."""
    known = {option: each for each in command.params if isinstance(each, click.Option) for option in each.opts}
    given = next((word.partition("=")[0] for word in arguments[1:] if word.startswith(name)), name)
    if given.startswith("-") and not given.startswith("--") and f"-{given}" in known:
        return f"Write two dashes: -{given}."
    plain = name.lower().replace("_", "-")
    if plain in known:
        return f"Did you mean {plain!r}?"
    instead = _OTHER_TOOLS.get(plain) or _OTHER_TOOLS.get(f"-{given}".lower().replace("_", "-"), "")
    if instead == _SOURCES:
        rest = [word.removeprefix(f"{given}=") for word in arguments if word != given]
        return f"Write: ckpt-avg {shlex.join(rest)}"
    if instead and instead.split(" ")[0] in known:
        return f"Write {instead}."
    others = [each for each, other in commands.items() if any(plain in option.opts for option in other.params)]
    if others:
        return f"These commands have it: {', '.join(others)}."
    near = nearest(plain, known, 0.75)
    return "" if near is None else f"Did you mean {near!r}?"
