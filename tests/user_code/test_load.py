"""``MODULE:NAME``: finds the user's code where it was named, and tells its errors from ours."""

from __future__ import annotations

import builtins
import itertools
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_avg import UsageError, UserCodeError
from ckpt_avg.user_code.load import Reference

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def imports_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test puts on the path is gone after it; its modules have names that no other test uses."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a module into the folder and returns its name, which no other test uses."""

    def call(text: str, folder: Path = tmp_path, name: str | None = None) -> str:
        name = name or f"user_module_{os.getpid()}_{next(_numbers)}"
        (folder / f"{name}.py").write_text(text)
        return name

    return call


def refused(error: type[UsageError | UserCodeError], reference: str, app_dir: object) -> str:
    with pytest.raises(error) as caught:
        Reference(reference, "--model", str(app_dir)).load()
    message = str(caught.value)
    assert message.startswith(f"--model {reference}: ") or "--app-dir" in message
    return message


def test_a_function_is_found_in_the_app_dir(tmp_path: Path, write: Callable[..., str]) -> None:
    name = write("def make():\n    return 'made'\n")
    assert Reference(f"{name}:make", "--model", tmp_path).load()() == "made"


def test_the_app_dir_may_be_relative(
    tmp_path: Path, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later change of the current folder must not lose it: an absolute path goes on sys.path."""
    name, other = write("value = 1\n"), write("value = 2\n")
    monkeypatch.chdir(tmp_path)
    assert Reference(f"{name}:value", "--model", ".").load() == 1
    assert str(tmp_path) in sys.path
    assert "." not in sys.path
    monkeypatch.chdir("/")
    assert __import__(other).value == 2


def test_names_may_be_dotted_on_both_sides(tmp_path: Path, write: Callable[..., str]) -> None:
    package = tmp_path / f"user_module_{os.getpid()}_package"
    package.mkdir()
    (package / "__init__.py").touch()
    inner = write(
        "class Factory:\n    class Inner:\n        @staticmethod\n        def make():\n            return 5\n", package
    )
    assert Reference(f"{package.name}.{inner}:Factory.Inner.make", "--model", tmp_path).load()() == 5


def test_an_installed_module_is_found_from_any_folder(tmp_path: Path) -> None:
    assert Reference("os:path.join", "--model", tmp_path).load() is os.path.join


def test_a_module_is_imported_once_for_model_and_data(tmp_path: Path, write: Callable[..., str]) -> None:
    name = write("import builtins\nbuiltins.imported = getattr(builtins, 'imported', 0) + 1\nfirst = second = []\n")
    try:
        first = Reference(f"{name}:first", "--model", tmp_path).load()
        second = Reference(f"{name}:second", "--data", tmp_path).load()
        assert first is second
        assert builtins.imported == 1  # type: ignore[attr-defined]
    finally:
        del builtins.imported  # type: ignore[attr-defined]


def test_the_app_dir_goes_on_the_path_once(tmp_path: Path, write: Callable[..., str]) -> None:
    name = write("value = 1\n")
    Reference(f"{name}:value", "--model", tmp_path).load()
    Reference(f"{name}:value", "--data", tmp_path).load()
    assert sys.path[0] == str(tmp_path)
    assert sys.path.count(str(tmp_path)) == 1


def test_the_app_dir_wins_over_folders_before_it_on_the_path(tmp_path: Path, write: Callable[..., str]) -> None:
    """The user named this folder: a module of the same name elsewhere, on PYTHONPATH say, is not meant."""
    elsewhere, named = tmp_path / "elsewhere", tmp_path / "named"
    elsewhere.mkdir()
    named.mkdir()
    name = write("where = 'elsewhere'\n", elsewhere)
    write("where = 'named'\n", named, name)
    sys.path[:0] = [str(elsewhere), str(named)]
    assert Reference(f"{name}:where", "--model", named).load() == "named"


@pytest.mark.parametrize("reference", ["train", "train.make", "train:", ":make", ":", ""])
def test_a_malformed_reference_shows_the_form(tmp_path: Path, reference: str) -> None:
    message = refused(UsageError, reference, tmp_path)
    assert "expected MODULE:NAME, for example train:make_model" in message


@pytest.mark.parametrize("module", ["no_such_module_here", "no_such_module_here.inner", "os.no_such_module_here"])
def test_a_missing_module_is_a_usage_error(tmp_path: Path, module: str) -> None:
    message = refused(UsageError, f"{module}:make", tmp_path)
    missing = "no_such_module_here" if module.startswith("no") else module
    assert f"no module {missing!r}" in message
    assert str(tmp_path) in message
    assert "--app-dir" in message


def test_a_file_name_instead_of_a_module_is_a_usage_error(tmp_path: Path, write: Callable[..., str]) -> None:
    """The commonest slip."""
    name = write("def make():\n    pass\n")
    message = refused(UsageError, f"{name}.py:make", tmp_path)
    assert f"{name}.py" in message


def test_a_relative_module_is_a_usage_error(tmp_path: Path) -> None:
    refused(UsageError, ".train:make", tmp_path)


def test_a_missing_dependency_of_the_module_is_the_users_error(tmp_path: Path, write: Callable[..., str]) -> None:
    """Telling the user that their module does not exist would send them the wrong way."""
    name = write("import no_such_dependency_here\n")
    message = refused(UserCodeError, f"{name}:make", tmp_path)
    assert f"importing {name} failed" in message
    assert "No module named 'no_such_dependency_here'" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise ValueError('no GPU')\n", "ValueError: no GPU"),
        ("import os\nos.environ['NO_SUCH_VARIABLE_HERE']\n", "KeyError: 'NO_SUCH_VARIABLE_HERE'"),
        ("def make(:\n", "SyntaxError"),
        ("from os import no_such_name_here\n", "ImportError: cannot import name 'no_such_name_here'"),
        ("import sys\nsys.exit(0)\n", "SystemExit: 0"),
        ("import argparse\nargparse.ArgumentParser(prog='t').parse_args(['--nonsense'])\n", "SystemExit: 2"),
    ],
    ids=["raises", "KeyError", "syntax", "name", "exits", "parses the command line"],
)
def test_a_module_that_fails_on_import_is_the_users_error(
    tmp_path: Path, write: Callable[..., str], text: str, says: str
) -> None:
    """A script without a __main__ guard may end the process: that must not look like success."""
    name = write(text)
    message = refused(UserCodeError, f"{name}:make", tmp_path)
    assert f"importing {name} {'ends the program' if 'SystemExit' in says else 'failed'}" in message
    assert says in message
    assert UserCodeError.exit_code == 7


def test_the_original_exception_is_kept_as_the_cause(tmp_path: Path, write: Callable[..., str]) -> None:
    name = write("raise ValueError('no GPU')\n")
    with pytest.raises(UserCodeError) as caught:
        Reference(f"{name}:make", "--data", tmp_path).load()
    assert isinstance(caught.value.__cause__, ValueError)


def test_an_interrupt_during_import_passes(tmp_path: Path, write: Callable[..., str]) -> None:
    name = write("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        Reference(f"{name}:make", "--model", tmp_path).load()


@pytest.mark.parametrize("attribute", ["make", "Factory.make", "make..it", "value.real.nothing"])
def test_a_missing_name_says_which_file_was_looked_at(
    tmp_path: Path, write: Callable[..., str], attribute: str
) -> None:
    name = write("class Factory:\n    pass\nvalue = 1\n")
    message = refused(UsageError, f"{name}:{attribute}", tmp_path)
    assert repr(attribute) in message
    assert str(tmp_path / f"{name}.py") in message


def test_a_module_of_the_same_name_elsewhere_is_recognised_by_its_file(
    tmp_path: Path, write: Callable[..., str]
) -> None:
    """A user's own platform.py is hidden by Python's, which is imported already: the message shows the file."""
    write("def make():\n    pass\n", name="platform")
    message = refused(UsageError, "platform:make", tmp_path)
    assert platform.__file__ in message


@pytest.mark.parametrize(("kind", "says"), [("nothing", "no such file or"), ("file", "is not a folder. Name")])
def test_an_app_dir_that_is_no_folder_is_refused(tmp_path: Path, kind: str, says: str) -> None:
    path = tmp_path / "app"
    if kind == "file":
        path.touch()
    message = refused(UsageError, "train:make", path)
    assert f"--app-dir {path}: {says}" in message


def test_a_reference_imports_its_module_only_when_it_is_loaded(tmp_path: Path, write: Callable[..., str]) -> None:
    """If it failed, a user would wait for torch before being told that two checkpoints do not fit together."""
    name = write("def make():\n    return 3\n")
    reference = Reference(f"{name}:make", "--model", tmp_path)
    assert (reference.module, name in sys.modules) == (name, False)
    assert reference.load()() == 3


def test_a_name_that_is_none_is_refused(tmp_path: Path, write: Callable[..., str]) -> None:
    """None means that an option was not given: if it failed, a run with --data would keep the averaged statistics."""
    name = write("batches = None\n")
    with pytest.raises(UsageError, match=rf"^--data {name}:batches: is None\. Name a function of the module\.$"):
        Reference(f"{name}:batches", "--data", tmp_path).load()


def test_the_folder_of_the_module_stays_whatever_the_program_does(
    tmp_path: Path, write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's module may change the folder while it is imported, before the next option is loaded."""
    name = write("def make():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    reference = Reference(f"{name}:make", "--model", ".")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert reference.load()() == 3
    assert sys.path[0] == str(tmp_path)


def test_what_is_beside_a_model_is_found_in_its_module(tmp_path: Path, write: Callable[..., str]) -> None:
    name = write("def make():\n    pass\ndef forward_batch(model, batch):\n    return 3\n")
    reference = Reference(f"{name}:make", "--model", tmp_path)
    reference.load()
    assert reference.beside("forward_batch")(None, None) == 3
    assert reference.beside("other") is None
