"""What users see of an error of their code: their own lines first, and where to look."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_avg.user_code.load import Reference
from ckpt_avg.user_code.model import build_model
from ckpt_avg.user_code.raised import lines_of, sentence

SOURCE = """
import json
import torch
from torch import nn

class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2))

    def forward(self, x):
        return self.layers(x)

def wide():
    return Narrow()(torch.ones(1, 3))

def reads():
    return json.loads("{")

def chained():
    try:
        {}["missing"]
    except KeyError as error:
        raise ValueError("no such row\\nof the table") from error

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise LookupError(f"row {index} is bad")

def worker():
    return list(torch.utils.data.DataLoader(Rows(), num_workers=1))

def recurses(depth=0):
    return recurses(depth + 1)
"""


@pytest.fixture
def module(tmp_path: Path) -> dict[str, Any]:
    """A module of the user's, with its file."""
    path = tmp_path / "theirs.py"
    path.write_text(SOURCE)
    found: dict[str, Any] = {"__name__": "theirs"}
    exec(compile(SOURCE, str(path), "exec"), found)
    return found


def raised(call: Callable[[], object]) -> BaseException:
    """The exception, without the frame of this function."""
    try:
        call()
    except Exception as error:
        assert error.__traceback__ is not None
        return error.with_traceback(error.__traceback__.tb_next)
    raise AssertionError("it should have failed")


def shown(module: dict[str, Any], name: str) -> list[str]:
    """The lines that are shown, without marks below them, with the name of the file alone."""
    lines = lines_of(raised(module[name])).replace(f"{Path(module[name].__code__.co_filename).parent}/", "").split("\n")
    return [line for line in lines if set(line.strip()) - set("~^")]


def test_frames_of_libraries_are_hidden(module: dict[str, Any]) -> None:
    """Of torch, the standard library and this package; the line that called them stays."""
    assert shown(module, "reads")[:-1] == [
        "Traceback (most recent call last):",
        '  File "theirs.py", line 18, in reads',
        '    return json.loads("{")',
        "json.decoder.JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ]
    lines = shown(module, "wide")
    assert [line for line in lines if line.startswith("  File")] == [
        '  File "theirs.py", line 15, in wide',
        '  File "theirs.py", line 12, in forward',
    ]
    assert lines[-1].endswith(" calls of libraries hidden: -v shows them)")
    assert "modules/container.py" not in "\n".join(lines)


def test_all_of_them_are_shown_on_request(module: dict[str, Any]) -> None:
    error = raised(module["wide"])
    assert lines_of(error, whole=True) == "".join(traceback.format_exception(error)).rstrip("\n")


def test_causes_are_shown(module: dict[str, Any]) -> None:
    lines = shown(module, "chained")
    assert [line for line in lines if not line.startswith(" ")] == [
        "Traceback (most recent call last):",
        "KeyError: 'missing'",
        "The above exception was the direct cause of the following exception:",
        "Traceback (most recent call last):",
        "ValueError: no such row",
        "of the table",
    ]


@pytest.mark.slow
def test_the_lines_of_a_worker_of_the_loader_are_theirs(module: dict[str, Any]) -> None:
    """torch puts the traceback of the worker into the text of the exception."""
    error = raised(module["worker"])
    files = [line for line in lines_of(error).split("\n") if line.startswith("  File")]
    assert [line.partition("theirs.py")[2] for line in files] == ['", line 34, in worker', '", line 31, in __getitem__']
    assert sentence(error).startswith("LookupError: row 0 is bad. See ")


def test_a_repeated_line_is_shown_once(module: dict[str, Any]) -> None:
    lines = shown(module, "recurses")
    assert sum("return recurses" in line for line in lines) <= 4
    assert any("[Previous line repeated " in line for line in lines)


def test_without_a_line_of_theirs_the_sentence_says_it_all() -> None:
    """A class of a library, called with other arguments than it takes: a traceback would not help."""
    error = raised(partial(torch.nn.Linear(2, 2), 1, 2))
    assert lines_of(error) == ""
    assert sentence(error) == "TypeError: Linear.forward() takes 2 positional arguments but 3 were given"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(:\n", "SyntaxError: invalid syntax. See {path}, line 1."),
        ("import no_such_package.part\n", f"Install it ({sys.executable} -m pip install no_such_package), or name"),
        ("import sys\nsys.exit(2)\n", "Put what trains under if __name__ == '__main__':, so that the module can be"),
        ("x = 1\nx / 0\n", "ZeroDivisionError: division by zero. See {path}, line 2."),
    ],
    ids=["syntax", "missing package", "script", "raises"],
)
def test_an_import_that_fails_says_what_to_do(tmp_path: Path, text: str, expected: str) -> None:
    name = f"fails_{abs(hash(text))}"
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    error = raised(lambda: Reference(f"{name}:make", "--model", tmp_path).load())
    assert expected.format(path=path) in str(error)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda width: None, "missing 1 required positional argument: 'width'. Name one that needs no arguments."),
        (lambda: len(3), "object of type 'int' has no len(). See "),
    ],
    ids=["takes others", "raises TypeError itself"],
)
def test_a_function_that_takes_other_arguments_says_so(function: Callable[..., Any], expected: str) -> None:
    assert expected in str(raised(lambda: build_model(function, {})))
