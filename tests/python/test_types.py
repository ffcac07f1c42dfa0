"""What a type checker and `typing.get_type_hints` say of the public functions."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import ckpt_avg
from ckpt_avg import choices
from ckpt_avg.commands.options import MeanOptions

FUNCTIONS = ["average", "check", "compare", "inspect", "refresh_weights", "soup", "sweep", "verify"]
PROGRAM = """
from pathlib import Path
from ckpt_avg import average, sweep, verify

result = average("runs/7", Path("swa.safetensors"), last=8, bn="keep", dtype="bfloat16", weights=[0.5, 0.5])
for path in result.checkpoints:
    print(path.name)
sweep(["runs/7"], evaluate=lambda model: 1.0, maximize="accuracy", windows="last")
average("runs/7", "a.safetensors", last="3")  # wrong: arg-type
average("runs/7", "a.safetensors", lats=3)  # wrong: call-arg
average("runs/7", "a.safetensors", dtype="fp16")  # wrong: arg-type
average("runs/7", "a.safetensors", bn="kept")  # wrong: arg-type
average("runs/7")  # wrong: call-arg
average(5, "a.safetensors")  # wrong: arg-type
result.checkpoint  # wrong: attr-defined
verify("a.safetensors").data_digest + 1  # wrong: operator
"""


@pytest.mark.slow  # mypy reads torch's own files
def test_a_type_checker_finds_what_is_wrong_in_a_users_program(tmp_path: Path) -> None:
    """Also the signatures that are made from the option groups: a wrong keyword, type, literal or attribute."""
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "program.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert not found.stderr
    lines = [line for line in found.stdout.splitlines() if ": error: " in line]
    shown = {(int(line.split(":")[1]), line.rpartition("[")[2].rstrip("]")) for line in lines}
    expected = {
        (number, line.partition("# wrong: ")[2])
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        if "# wrong" in line
    }
    assert shown == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_type_hints_are_those_of_the_signature(name: str) -> None:
    """For editors, notebooks and libraries that look at functions while the program runs."""
    function = getattr(ckpt_avg, name)
    hints = typing.get_type_hints(function)
    assert list(hints) == [*inspect.signature(function).parameters, "return"]
    assert hints.get("dtype", choices.OutputDType) == choices.OutputDType
    assert hints.get("last", int | None) == int | None
    assert hints["return"].__module__.startswith("ckpt_avg.")


def test_options_allow_the_values_of_their_types() -> None:
    """A choice that a type lacked would be an error for type checkers only."""
    assert typing.get_type_hints(ckpt_avg.average)["bn"] == ckpt_avg.BatchNormMode
    for value in typing.get_args(ckpt_avg.OutputDType):
        assert MeanOptions(dtype=value).dtype == value


@pytest.mark.parametrize("name", sorted(set(vars(choices)) & set(ckpt_avg.__all__)))
def test_the_reference_lists_every_choice(name: str) -> None:
    """The site's builder shows no values of a Literal."""
    page = (Path(ckpt_avg.__file__).parents[1] / "docs" / "api.md").read_text()
    values = ", ".join(f"``{value}``" for value in typing.get_args(getattr(choices, name)))
    assert f".. py:data:: {name}\n\n   The values of ``" in page
    assert f": {values}.\n" in page.partition(f".. py:data:: {name}\n")[2].partition("py:data")[0]


def test_every_public_function_has_an_example() -> None:
    """Which another test runs."""
    functions = [name for name in ckpt_avg.__all__ if inspect.isfunction(getattr(ckpt_avg, name))]
    assert len(functions) > len(FUNCTIONS)
    assert [name for name in functions if "Example:" not in (getattr(ckpt_avg, name).__doc__ or "")] == []
