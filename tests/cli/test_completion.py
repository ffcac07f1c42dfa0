"""Completion scripts, run by the shells themselves."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_avg.cli.completion import SCRIPTS, SHELLS
from ckpt_avg.cli.main import cli

InProcess = Callable[..., tuple[int, str, str]]

CASES = [
    ("ckpt-avg av", {"average"}),
    ("ckpt-avg s", {"sweep", "soup"}),
    ("ckpt-avg average --la", {"--last"}),
    ("ckpt-avg average --bn ", {"auto", "refresh", "keep"}),
    ("ckpt-avg average --bn r", {"refresh"}),
    ("ckpt-avg average run --device cu", {"cuda"}),
    ("ckpt-avg check --bn", set()),
    ("ckpt-avg help ver", {"verify"}),
    ("ckpt-avg completion ", set(SHELLS)),
    ("ckpt-avg average epoch_", {"epoch_1.pt", "epoch_2.pt"}),
    ("ckpt-avg average -o epoch_1", {"epoch_1.pt"}),
    ("ckpt-avg average --log epoch_2", {"epoch_2.pt"}),
]

# A shell's own function gets the words, and prints what it would show. Paths are the shell's part: `-o default`.
BASH = """
source {script}
COMP_WORDS=({words}) COMP_CWORD={place}
_ckpt_avg
if [ ${{#COMPREPLY[@]}} -gt 0 ]; then
    printf '%s\\n' "${{COMPREPLY[@]}}"
elif [[ $(complete -p ckpt-avg) == *"-o default"* ]]; then
    compgen -f -- "${{COMP_WORDS[COMP_CWORD]}}"
fi
exit 0
"""
# zsh completes only in an editor: one on a pseudo-terminal, where what it would add is printed instead.
ZSH = """
zmodload zsh/zpty
zpty editor zsh -f -i
zpty -w editor 'PS1=; autoload -Uz compinit; compinit -u -d {folder}/dump; source {script}'
zpty -w editor 'compadd() {{ local -a found; builtin compadd -O found "$@"; print -rl -- $found >> {folder}/found }}'
zpty -w editor 'touch {folder}/ready'
until [[ -e {folder}/ready ]]; do sleep 0.05; done
zpty -w -n editor {line}$'\\t'
sleep 1
[[ -e {folder}/found ]] && cat {folder}/found
exit 0
"""


def completed(shell: str, line: str, folder: Path) -> set[str]:
    """The words that a shell offers for the last word of a line."""
    script = folder / "script"
    script.write_text(SCRIPTS[shell](cli))
    words = shlex.split(line) + ([""] if line.endswith(" ") else [])
    if shell == "bash":
        words = [part for word in words for part in (re.split("(=)", word) if "=" in word else [word])]  # as bash does
        given = " ".join(map(shlex.quote, words))
        program = BASH.format(script=script, words=given, place=len(words) - 1)
    elif shell == "zsh":
        program = ZSH.format(script=script, folder=folder, line=shlex.quote(line))
    else:
        program = f"source {script}; complete -C {shlex.quote(line)}"
    (folder / "work").mkdir(exist_ok=True)
    for name in ("epoch_1.pt", "epoch_2.pt"):
        (folder / "work" / name).touch()
    done = subprocess.run(
        [shell, "-c", program], cwd=folder / "work", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return {found.split("\t")[0] for found in done.stdout.splitlines() if found}


@pytest.mark.parametrize(("line", "words"), CASES, ids=[line for line, _ in CASES])
@pytest.mark.parametrize("shell", ["bash", pytest.param("zsh", marks=pytest.mark.slow), "fish"])
def test_a_shell_completes(shell: str, line: str, words: set[str], tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert completed(shell, line, tmp_path) == words


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_after_an_equals_sign(tmp_path: Path) -> None:
    """Where it splits the word."""
    assert completed("bash", "ckpt-avg average run --bn=r", tmp_path) == {"refresh"}
    assert completed("bash", "ckpt-avg average run --bn=", tmp_path) == {"auto", "refresh", "keep"}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_the_script(shell: str, in_process: InProcess) -> None:
    code, out, err = in_process("completion", shell)
    assert (code, err) == (0, "")
    assert out == SCRIPTS[shell](cli)
    assert all(name in out for name in cli.commands)


def test_another_shell_is_refused(in_process: InProcess) -> None:
    code, out, err = in_process("completion", "bahs")
    assert (code, out) == (2, "")
    assert err == "Error: bahs: is not one of bash, zsh, fish. Did you mean 'bash'?\n"
