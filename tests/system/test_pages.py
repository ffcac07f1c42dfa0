"""Every block of the documentation runs, and what the pages name exists."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from system.pages import DOCS, ROOT, blocks, needs, run_page, runs

import ckpt_avg
from ckpt_avg.cli.main import cli

PAGES = sorted(page for page in DOCS.glob("**/*.md"))
SOURCE = Path(ckpt_avg.__file__).parent
README = ROOT / "README.md"


def _pages_to_run() -> list[object]:
    """Each page with blocks to run: slow, or with the trainers' libraries if it uses them."""
    return [
        pytest.param(page, marks=pytest.mark.trainers if needs(page) else pytest.mark.slow, id=_name(page))
        for page in PAGES
        if runs(page)
    ]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", _pages_to_run())
def test_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """A reader who copies them gets what the page says."""
    for library in needs(page):
        if importlib.util.find_spec(library.replace("-", "_")) is None:
            assert "trainers" not in os.environ.get("CKPT_AVG_TEST_REQUIRE", ""), f"{library} is not installed"
            pytest.skip(f"{library} is not installed")
    run_page(page, tmp_path)


def _options() -> set[str]:
    return {
        name
        for command in (cli, *cli.commands.values())
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help", "-h"}


@pytest.mark.parametrize("page", [README, *PAGES], ids=_name)
def test_options_and_commands_that_a_page_names_exist(page: Path) -> None:
    """In commands of the page's blocks and in ``ckpt-avg …`` of its text."""
    text = page.read_text()
    lines = [line for block in blocks(page) if block.language == "console" for line in _joined(block.commands)]
    lines += re.findall(r"`(ckpt-avg [^`]+)`", text)
    for line in lines:
        for found in re.finditer(r"(?:ckpt-avg|-m ckpt_avg) ([^|;&]*)", line):
            words = found[1].split()
            if words and re.fullmatch(r"[a-z-]+", words[0]) and not words[0].startswith("-"):
                assert words[0] in cli.commands, (words[0], line)
            flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
            assert flags <= _options(), (flags - _options(), line)


def _joined(commands: str) -> list[str]:
    return re.sub(r"\\\n", " ", commands).splitlines()


def _texts(node: ast.AST) -> Iterator[str]:
    """The texts in the sources, without docstrings; a null character is where something is inserted."""
    for each in ast.iter_child_nodes(node):
        if isinstance(each, ast.Constant | ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "\0"
                for part in (each.values if isinstance(each, ast.JoinedStr) else [each])
            )
        elif not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)):
            yield from _texts(each)


def test_messages_that_troubleshooting_explains_exist() -> None:
    """A reader looks for the words that the command prints."""
    page = (DOCS / "troubleshooting.md").read_text()
    texts = [text for path in SOURCE.rglob("*.py") for text in _texts(ast.parse(path.read_text()))]
    headings = re.findall(r"^### (.*)$", page, re.MULTILINE)
    assert len(headings) > 20
    for heading in headings:
        fragments = [each.strip(" :") for each in heading.strip("`").split("…")]
        assert any(all(fragment in text for fragment in fragments) for text in texts), heading


def test_tests_that_pages_name_exist() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:tests|docs|ckpt_avg|fixtures)/[\w/.-]+)`", page.read_text()):
            assert (ROOT / path).exists() or "kestrel" in path, (page.name, path)  # the example of a new trainer
        for name in re.findall(r"`(test_\w+\.py)`", page.read_text()):
            assert list(ROOT.glob(f"tests/**/{name}")) or "kestrel" in name, (page.name, name)
