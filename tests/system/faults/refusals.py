"""What every refusal has in common, and how tests ask for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

Command = Callable[..., tuple[int, str, str]]  # runs ckpt-avg; gives its exit code, stdout and stderr
OLD = b"the old output"


def refusal(command: Command, *sources: object, folder: Path, code: int = 3) -> str:
    """Averages what must be refused, without an output and over an old one; returns the one line that is printed.

    Args:
        command: runs ckpt-avg.
        sources: sources and options.
        folder: where a folder for the output can be made.
        code: the expected exit code.
    """
    place = folder / "place of the output"
    place.mkdir(exist_ok=True)
    output = place / "mean.safetensors"
    printed = set()
    for old, option in ((None, ()), (OLD, ("--overwrite",))):
        if old is not None:
            output.write_bytes(old)
            os.utime(output, ns=(1, 1))
        found, out, err = command("average", *sources, "--output", output, *option)
        assert (found, out) == (code, ""), err
        assert os.listdir(place) == ([] if old is None else [output.name]), "something was written"
        if old is not None:
            assert (output.read_bytes(), output.stat().st_mtime_ns) == (old, 1), "the output was touched"
            output.unlink()
        printed.add(err)
    (err,) = printed
    assert err.startswith("Error: ")
    assert err.endswith("\n")
    message = err.removeprefix("Error: ")[:-1]
    assert message.isprintable(), "one line, and nothing that a terminal obeys"
    assert len(message) < 2000
    assert message.endswith((".", ")")), "whole sentences"
    return message


def refusal_of(command: Command, bad: Path, *options: object, folder: Path, code: int = 3) -> str:
    """Averages a file or folder that must be refused, and whose path the message must name first."""
    message = refusal(command, bad, *options, folder=folder, code=code)
    assert message.startswith(f"{bad}"), "it names the file"
    return message


def mean(command: Command, *sources: object, folder: Path) -> tuple[dict[str, list[float]], str]:
    """Averages what must be accepted: the values of the output, and all that was printed."""
    output = folder / "mean.safetensors"
    code, out, err = command("average", *sources, "--output", output)
    assert code == 0, err
    found = {name: value.tolist() for name, value in load_file(output).items()}
    output.unlink()
    return found, out + err
