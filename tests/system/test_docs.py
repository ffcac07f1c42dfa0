"""What the README and the docs say is run and compared."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

import ckpt_avg
from ckpt_avg.cli.main import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs" / "commands.md").read_text()
TERMINAL = (ROOT / "docs" / "terminal.md").read_text()
WEIGHTS = (ROOT / "docs" / "weights.md").read_text()

Run = Callable[..., tuple[int, str, str]]


def _block(text: str, marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found, marker
    return found[1]


def _readme_command(marker: str, output: Path) -> list[str]:
    """The arguments of a command that the README marks, with another path for its output."""
    command = _block(README, f"command: {marker}").replace("\\\n>", " ")
    words = shlex.split(command.partition("ckpt-avg ")[2])
    return [str(output) if word.endswith(".safetensors") else word for word in words]


def test_readme_command_prints_what_the_readme_shows_and_its_output_loads(
    in_process: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: object
) -> None:
    monkeypatch.chdir(ROOT)
    output = tmp_path / "swa.safetensors"
    code, out, err = in_process(*_readme_command("average", output))
    assert (code, err) == (0, "")
    assert out.replace(f"{tmp_path}/", "") == _block(README, "output: average")
    model = train.make_model()  # type: ignore[attr-defined]
    model.load_state_dict(load_file(output), strict=True)
    assert train.evaluate(model.eval())["accuracy"] > 0.98  # type: ignore[attr-defined]


def test_the_page_on_the_terminal_shows_what_inspect_prints(in_process: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = shlex.split(_block(TERMINAL, "command: inspect"))[2:]
    assert in_process(*command) == (0, _block(TERMINAL, "output: inspect"), "")


def test_readme_evaluation_prints_what_the_readme_shows(
    in_process: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words to the letter, the metrics to two digits: other processors round otherwise."""
    monkeypatch.chdir(ROOT)
    code, out, err = in_process(*_readme_command("eval", tmp_path / "best.safetensors"))
    assert (code, err) == (0, "")
    shown = _block(README, "output: eval")
    number = r"[-+]?\d[\d.]*(?:e[-+]\d+)?"
    verdict = r" (?:helped|did not help)| \((?:better|worse|equal)\)"
    words, found = (re.sub(rf"{number}|{verdict}|  +", " ", text.replace(f"{tmp_path}/", "")) for text in (shown, out))
    assert found == words
    rows, measured = (
        [
            [float(value) for value in re.findall(number, line)[-4::2]]
            for line in text.splitlines()
            if "average," in line
        ]
        for text in (shown, out)
    )
    assert len(rows) == 2
    assert measured == [pytest.approx(row, rel=0.05) for row in rows]


@pytest.mark.parametrize("line", re.findall(r"^\$ (ckpt-avg [^\\\n]*?)(?:  +#.*)?$", README + WEIGHTS, re.MULTILINE))
def test_other_commands_of_the_readme_and_on_weights_work(
    line: str, in_process: Run, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's RUN and a.pt, b.pt, … stand for the reader's own; the fixture run takes their place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").symlink_to(run_folder)
    tensors = {"weight": torch.ones(3)}
    torch.save(tensors, "a.pt")
    torch.save(tensors, "b.pt")
    save_file(tensors, "c.safetensors")
    (tmp_path / "weights.pt").symlink_to(run_folder / "epoch_20.pt")
    arguments = shlex.split(line)[1:]
    if "--model" in arguments:
        arguments += ["--app-dir", str(run_folder), "--bn-batches", "2"]
    if arguments[0] in ("soup", "sweep"):
        arguments += ["--last", "2"]
    if arguments[0] == "average" and "RUN" in arguments:
        arguments += ["--bn", "keep"]
    if arguments[0] == "verify":
        ckpt_avg.average("RUN", "swa.safetensors", last=8, bn="keep")
    code, _, err = in_process(*arguments)
    assert code == 0, err


def test_every_command_and_option_is_documented() -> None:
    commands = cli.commands.values()
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    assert {command.name for command in commands} == set(re.findall(r"^\| `ckpt-avg ([\w-]+)", COMMANDS, re.MULTILINE))
    for command in commands:
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                name = max(parameter.opts, key=len)
                assert parameter.help, (command.name, name)
                assert name in pages or name in ("--output", "--quiet"), (command.name, name)


@pytest.mark.parametrize("name", [module.name for module in pkgutil.walk_packages(ckpt_avg.__path__, "ckpt_avg.")])
def test_examples_in_docstrings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.endswith("__main__"):
        return
    monkeypatch.chdir(ROOT)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_example_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = doctest.testmod(ckpt_avg)
    assert (result.failed, result.attempted > 0) == (0, True)


@pytest.mark.parametrize("page", sorted(ROOT.glob("**/*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    if ".venv" in page.parts:
        return
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in _anchors(path.read_text()), (target, anchor)


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
