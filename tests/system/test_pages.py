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
    """In the commands of its blocks, and in the code of its text."""
    commands = [line for block in blocks(page) if block.language == "console" for line in _joined(block.commands)]
    spans = _spans(page)
    for line in [*commands, *(span for span in spans if span.startswith("ckpt-avg "))]:
        for found in re.finditer(r"(?:ckpt-avg|-m ckpt_avg) ([^|;&]*)", line):
            words = found[1].split()
            if words and re.fullmatch(r"[a-z-]+", words[0]) and not words[0].startswith("-"):
                assert words[0] in cli.commands, (words[0], line)
            flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
            assert flags <= _options(), (flags - _options(), line)
    named = {flag for span in spans if _is_ours(span) for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", span)}
    others = set(re.findall(r"--[\w-]+", "".join(re.findall(r"<!-- options of others: (.*?) -->", page.read_text()))))
    assert named - _options() == others, "write an option of another program after its name, or in this comment"


def _spans(page: Path) -> list[str]:
    """The code in the text of a page, without the tables' columns on other tools."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    if page.name == "coming-from-other-tools.md":
        text = re.sub(r"^\| .*? \|", "|", text, flags=re.MULTILINE)
    return [" ".join(span.split()) for part in text.split("\n\n") for span in re.findall(r"`([^`]+)`", part)]


def _is_ours(span: str) -> bool:
    """Whether code begins with an option or one of our commands, and not with the name of another program."""
    return span.startswith("-") or span.split(maxsplit=1)[0] in cli.commands


@pytest.mark.parametrize("page", [README, *PAGES], ids=_name)
def test_python_names_that_a_page_imports_exist(page: Path) -> None:
    """Also in blocks that are not run."""
    for block in blocks(page):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and node.module == "ckpt_avg":
                    assert {each.name for each in node.names} <= set(ckpt_avg.__all__), (page.name, block.line)


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


def test_messages_that_pages_show_exist() -> None:
    """A reader looks for the words that the command prints: in the headings of troubleshooting, and in blocks."""
    texts = [text for path in SOURCE.rglob("*.py") for text in _texts(ast.parse(path.read_text()))]
    headings = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 20
    for heading in headings:
        fragments = [each.strip(" :") for each in heading.strip("`").split("…")]
        assert any(all(fragment in text for fragment in fragments) for text in texts), heading
    patterns = [re.compile(".+".join(map(re.escape, text.split("\0")))) for text in texts if _letters(text) >= 12]
    for page in [README, *PAGES]:
        for block in blocks(page):
            for line in block.text.splitlines():
                if line.startswith(("Error: ", "Notice: ")):
                    assert any(pattern.search(line) for pattern in patterns), (page.name, line)


def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def test_tests_that_pages_name_exist() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:tests|docs|ckpt_avg|fixtures)/[\w/.-]+)`", page.read_text()):
            assert (ROOT / path).exists() or "kestrel" in path, (page.name, path)  # the example of a new trainer
        for name in re.findall(r"`(test_\w+\.py)`", page.read_text()):
            assert list(ROOT.glob(f"tests/**/{name}")) or "kestrel" in name, (page.name, name)


def test_modules_that_the_page_on_the_inside_names_exist() -> None:
    named = re.findall(r"`([a-z_]+/[\w/]+)(?:\.\w+)?`", (DOCS / "how-it-works.md").read_text())
    assert len(named) > 10
    assert [name for name in named if not list(SOURCE.glob(f"{name}*")) and not list(ROOT.glob(f"{name}*"))] == []
