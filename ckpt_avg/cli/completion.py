"""Scripts by which shells complete commands, options, choices and paths.

They contain all words, so that a shell completes at once, without starting Python.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping

import click

SHELLS = ("bash", "zsh", "fish")
_CHOICES = re.compile(r"[a-z][\w:-]*(\|[a-z][\w:-]*)+")
_PATH = re.compile(r"FILE|DIR|OUT")


def bash_script(group: click.Group) -> str:
    """Returns a script for bash 3.2 and later. Where no word fits, it completes paths."""
    names = " ".join(group.commands)
    choices = [f'{"|".join(option.opts)}) words="{" ".join(_choices(option))}" ;;' for option in _with_choices(group)]
    values = {name for option in _options(group) if _takes_value(option) for name in option.opts}
    options = [
        f'{name}) words="{" ".join(word for option in _options_of(command) for word in option.opts)}" ;;'
        for name, command in group.commands.items()
    ]
    return f"""\
# Completes ckpt-avg in bash.
_ckpt_avg() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" command="" words="" word
    COMPREPLY=()
    if [ "$cur" = "=" ]; then
        cur=""
    elif [ "$prev" = "=" ]; then
        prev="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$word" in
            -*) ;;
            *) command="$word"; break ;;
        esac
    done
    case "$prev" in
        {_lines(choices, 8)}
        {"|".join(sorted(values))}) return ;;
        completion) words="{" ".join(SHELLS)}" ;;
        help) words="{names}" ;;
        *)
            case "$command $cur" in
                " "[!-]*|" ") words="{names}" ;;
                *" -"*)
                    case "$command" in
                        {_lines(options, 24)}
                        "") words="--help --version" ;;
                    esac ;;
            esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _ckpt_avg ckpt-avg
"""


def zsh_script(group: click.Group) -> str:
    """Returns a script for zsh, to be sourced or put in a folder of ``fpath``."""
    choices = [
        f"{'|'.join(option.opts)}) compadd -- {' '.join(_choices(option))} ;;" for option in _with_choices(group)
    ]
    options = []
    for name, command in group.commands.items():
        given = [_described(word, option.help) for option in _options_of(command) for word in option.opts]
        options.append(f"{name}) given=({' '.join(given)}) ;;")
    names = " ".join(_described(name, _summary(command)) for name, command in group.commands.items())
    return f"""\
#compdef ckpt-avg
_ckpt_avg() {{
    local command="" word
    local -a given
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        if [[ "$word" != -* ]]; then command="$word"; break; fi
    done
    case "$words[CURRENT-1]" in
        {_lines(choices, 8)}
        completion) compadd -- {" ".join(SHELLS)} ;;
        *)
            if [[ -z "$command" || "$words[CURRENT-1]" == help ]]; then
                given=({names})
                _describe command given
            elif [[ "$words[CURRENT]" == -* ]]; then
                case "$command" in
                    {_lines(options, 20)}
                esac
                _describe option given
            else
                _files
            fi ;;
    esac
}}
if [[ "${{zsh_eval_context[-1]}}" == loadautofunc ]]; then
    _ckpt_avg "$@"
else
    compdef _ckpt_avg ckpt-avg
fi
"""


def fish_script(group: click.Group) -> str:
    """Returns a script for fish."""
    lines = ["-n __fish_use_subcommand -f"]
    for name, command in group.commands.items():
        lines.append(f"-n __fish_use_subcommand -a {name} -d {shlex.quote(_summary(command))}")
        for option in _options_of(command):
            names = " ".join(f"{'-l' if word.startswith('--') else '-s'} {word.lstrip('-')}" for word in option.opts)
            choices = " ".join(_choices(option))
            value = f" -xa '{choices}'" if choices else "" if not _takes_value(option) else " -x"
            value = " -rF" if _PATH.search(option.metavar or "") else value
            lines.append(f"-n '__fish_seen_subcommand_from {name}' {names}{value} -d {shlex.quote(option.help or '')}")
    lines.append(f"-n '__fish_seen_subcommand_from help' -fa '{' '.join(group.commands)}'")
    lines.append(f"-n '__fish_seen_subcommand_from completion' -fa '{' '.join(SHELLS)}'")
    return "".join(f"complete -c ckpt-avg {line}\n" for line in lines)


SCRIPTS: Mapping[str, Callable[[click.Group], str]] = dict(
    zip(SHELLS, (bash_script, zsh_script, fish_script), strict=True)
)


def _options_of(command: click.Command) -> list[click.Option]:
    return [
        each
        for each in command.get_params(click.Context(command, help_option_names=["-h", "--help"]))
        if isinstance(each, click.Option)
    ]


def _options(group: click.Group) -> list[click.Option]:
    """Returns the options of all commands, each once: they mean the same everywhere."""
    found = {tuple(option.opts): option for command in group.commands.values() for option in _options_of(command)}
    return list(found.values())


def _with_choices(group: click.Group) -> list[click.Option]:
    return [option for option in _options(group) if _choices(option)]


def _choices(option: click.Option) -> list[str]:
    values = option.metavar or ""
    return [each for each in values.split("|") if each.islower()] if _CHOICES.match(values) else []


def _takes_value(option: click.Option) -> bool:
    """Whether an option has a value that is neither a choice nor a path."""
    return not option.is_flag and not _choices(option) and not _PATH.search(option.metavar or "")


def _summary(command: click.Command) -> str:
    return command.get_short_help_str(200)


def _described(word: str, text: str | None) -> str:
    """Returns a word and what it means, as zsh's ``_describe`` takes them."""
    return shlex.quote(f"{word}:{text}")


def _lines(lines: list[str], indent: int) -> str:
    return f"\n{' ' * indent}".join(lines)
