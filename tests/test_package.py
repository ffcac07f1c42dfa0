"""The package as it is imported: its public names, its errors, and what importing it costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import ckpt_avg as package
from ckpt_avg import errors

SOURCE = Path(package.__file__).parent


def modules_after(code: str) -> set[str]:
    """The modules that a process has after this code."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split())


def test_importing_the_package_does_not_import_torch() -> None:
    assert modules_after("import ckpt_avg").isdisjoint({"torch", "numpy", "click", "ckpt_avg.commands.average"})
    modules = modules_after("import ckpt_avg\nckpt_avg.UsageError, ckpt_avg.open_checkpoint, ckpt_avg.check")
    assert "ckpt_avg.formats" in modules
    assert "torch" not in modules


def test_everything_public_can_be_imported() -> None:
    namespace: dict[str, object] = {}
    exec("from ckpt_avg import *", namespace)
    assert set(package.__all__) <= set(namespace)
    assert dir(package) == sorted(package.__all__)
    assert all(namespace[name] is not None for name in package.__all__)


def test_public_names_are_declared_alike() -> None:
    """For type checkers (TYPE_CHECKING) and for the import itself (`_HOMES`)."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        (node.module, alias.name, alias.asname)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {(module, name, name) for module, names in package._HOMES.items() for name in names}
    for module, name, _ in typed:
        value = getattr(importlib.import_module(str(module)), name)
        assert value is getattr(package, name)
        assert value.__doc__ or typing.get_args(value)


def test_the_package_is_typed() -> None:
    assert (SOURCE / "py.typed").exists()


def test_the_citation_names_this_version() -> None:
    lines = (SOURCE.parent / "CITATION.cff").read_text().splitlines()
    assert f"version: {package.__version__}" in lines


def test_every_error_is_public_and_has_its_code() -> None:
    tree = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.CkptAvgError)
    ]
    tree.remove(errors.TooManyFilesError)  # to callers a ResourceError
    assert {value.__name__ for value in tree} <= set(package.__all__)
    assert {value.__name__: value.exit_code for value in tree} == {
        "CkptAvgError": 1,
        "UsageError": 2,
        "CheckpointFormatError": 3,
        "NoWeightsError": 3,
        "PartError": 3,
        "ChangedWhileReadingError": 3,
        "IncompatibleError": 4,
        "NonFiniteError": 4,
        "OutputError": 5,
        "ResourceError": 6,
        "UserCodeError": 7,
        "RankError": 8,
        "RequirementError": 9,
        "VerificationError": 9,
    }


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ckpt_avg' has no attribute 'averge'"):
        _ = package.averge
