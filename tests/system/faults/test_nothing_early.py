"""What is refused for its words, its bytes or its tensors is refused before anything is made in the output's folder.

strace sees every call of a run that might make something there, under a name or without one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest
import torch
from safetensors.torch import save_file
from system.faults.checkpoints import safetensors_files, sharded_folders, zip_files
from system.faults.runs import Runs
from system.faults.tracing import TRACE, changes

pytestmark = pytest.mark.slow


def named_twice(inputs: Path) -> list[object]:
    first, *_ = safetensors_files(inputs)
    return [first, first]


def no_such_option(inputs: Path) -> list[object]:
    return [*safetensors_files(inputs), "--no-such-option"]


def no_such_checkpoint(inputs: Path) -> list[object]:
    return [*safetensors_files(inputs), inputs / "none.safetensors"]


def a_bound_that_is_none(inputs: Path) -> list[object]:
    return [*safetensors_files(inputs), "--dtype", "int8"]


def truncated(inputs: Path) -> list[object]:
    *_, last = paths = safetensors_files(inputs)
    os.truncate(last, last.stat().st_size - 4)
    return [*paths]


def truncated_zip(inputs: Path) -> list[object]:
    *_, last = paths = zip_files(inputs)
    os.truncate(last, last.stat().st_size // 2)
    return [*paths]


def no_checkpoint(inputs: Path) -> list[object]:
    *_, last = paths = safetensors_files(inputs)
    last.write_text("<!DOCTYPE html>")
    return [*paths]


def missing_shard(inputs: Path) -> list[object]:
    *_, last = paths = sharded_folders(inputs)
    next(last.glob("*-00002-*")).unlink()
    return [*paths]


def other_shapes(inputs: Path) -> list[object]:
    *_, last = paths = safetensors_files(inputs)
    save_file({**layouts.state(9), "head.bias": torch.ones(7)}, last)
    return [*paths]


def missing_tensors(inputs: Path) -> list[object]:
    *_, last = paths = zip_files(inputs)
    layouts.save({"model": {"head.bias": torch.ones(2)}}, last)
    return [*paths]


def nothing_to_average(inputs: Path) -> list[object]:
    save_file({}, inputs / "empty.safetensors")
    return [inputs / "empty.safetensors"]


REFUSED = [
    (2, named_twice),
    (2, no_such_option),
    (2, no_such_checkpoint),
    (2, a_bound_that_is_none),
    (3, truncated),
    (3, truncated_zip),
    (3, no_checkpoint),
    (3, missing_shard),
    (4, other_shapes),
    (4, missing_tensors),
    (4, nothing_to_average),
]


@pytest.mark.guarantee("nothing-early")
@pytest.mark.parametrize("folder", [".", "new/deeper"])
@pytest.mark.parametrize(("code", "make"), REFUSED)
def test_what_is_refused_makes_nothing_in_the_outputs_folder(
    runs: Runs,
    inputs: Path,
    output: Path,
    code: int,
    make: Callable[[Path], list[object]],
    folder: str,
) -> None:
    """Not even for a moment, nor without a name. (NaN and Inf are found later, when tensors are read.)"""
    arguments = [*make(inputs), "-o", output.parent / folder / output.name]
    ended = runs.run("average", *arguments, "--bn", "keep", strace=TRACE)
    assert ended.code == code, ended.error
    assert ended.calls
    assert changes(ended.calls, output.parent) == []
    assert os.listdir(output.parent) == []


@pytest.mark.guarantee("nothing-early")
@pytest.mark.parametrize("code", [2, 3, 4])
def test_the_trace_catches_a_writer_that_creates_before_the_checks(
    runs: Runs, inputs: Path, output: Path, code: int
) -> None:
    """A control: its file has no name, so that the folder looks empty all the time."""
    make = {2: named_twice, 3: truncated, 4: other_shapes}[code]
    arguments = make(inputs)
    ended = runs.run("average", *arguments, "-o", output, "--bn", "keep", strace=TRACE, wrong=["creating_early"])
    assert ended.code == code, ended.error
    assert os.listdir(output.parent) == []
    assert {call.name for call in changes(ended.calls, output.parent)} == {"openat"}


def test_the_trace_sees_how_an_output_comes_about(runs: Runs, inputs: Path, output: Path) -> None:
    """A control: a run that succeeds is seen to open, fill and name its output there."""
    ended = runs.run("average", *safetensors_files(inputs), "-o", output, "--bn", "keep", strace=TRACE)
    assert ended.code == 0, ended.error
    assert {"openat", "pwrite64", "linkat"} <= {call.name for call in changes(ended.calls, output.parent)}
