"""safetensors files that lie: the command says what is wrong in one line, with exit 3, and touches no output."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formats.test_safetensors_header import REJECTED, lay_out, one
from safetensors.torch import load_file

Command = Callable[..., tuple[int, str, str]]
OLD = b"what stood here before"


def refusal(command: Command, *sources: object, folder: Path, code: int = 3) -> str:
    """Averages what must be refused, into an empty folder and over an old file; returns the line that is said.

    Args:
        command: runs ckpt-avg, and gives exit code, stdout and stderr.
        sources: sources and options.
        folder: where a folder for the output can be made.
        code: the exit code that is due.
    """
    place = folder / "place of the output"
    place.mkdir(exist_ok=True)
    output = place / "mean.safetensors"
    said = set()
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
        said.add(err)
    (err,) = said
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


# --- the harness itself ------------------------------------------------------------------------------------


def accepts(*arguments: object) -> tuple[int, str, str]:
    return 0, "averaged 2 checkpoints", ""


def writes(*arguments: object) -> tuple[int, str, str]:
    Path(str(arguments[3])).write_bytes(b"half")
    return 3, "", "Error: bad.safetensors: damaged. Copy it again.\n"


def litters(*arguments: object) -> tuple[int, str, str]:
    Path(f"{arguments[3]}.tmp").write_bytes(b"half")
    return 3, "", "Error: bad.safetensors: damaged. Copy it again.\n"


def touches(*arguments: object) -> tuple[int, str, str]:
    if Path(str(arguments[3])).exists():
        Path(str(arguments[3])).write_bytes(OLD)
    return 3, "", "Error: bad.safetensors: damaged. Copy it again.\n"


def saying(text: str, code: int = 3, out: str = "") -> Command:
    return lambda *arguments: (code, out, text)


WRONG: dict[str, Command] = {
    "accepts the file": accepts,
    "writes before it checks": writes,
    "leaves litter": litters,
    "writes the old bytes again": touches,
    "crashes": saying("Traceback (most recent call last):\nValueError\n", 1),
    "crashes with the right code": saying("Traceback (most recent call last):\nValueError\n"),
    "has the code of another failure": saying("Error: bad.safetensors: damaged. Copy it again.\n", 4),
    "says it in two lines": saying("Error: bad.safetensors: damaged.\nCopy it again.\n"),
    "obeys a hostile name": saying("Error: bad.safetensors: tensor '\x1b[31m' is odd. Rename it.\n"),
    "names no file": saying("Error: something is damaged. Copy it again.\n"),
    "says nothing": saying(""),
    "prints a result": saying("Error: bad.safetensors: damaged. Copy it again.\n", 3, "wrote it"),
    "quotes without end": saying(f"Error: bad.safetensors: {'x' * 9000}.\n"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_harness_catches_a_command_that(tmp_path: Path, wrong: str) -> None:
    """Each of these would make the tests below worthless."""
    good = saying("Error: bad.safetensors: damaged. Copy it again.\n")
    assert refusal_of(good, Path("bad.safetensors"), folder=tmp_path).endswith("Copy it again.")
    with pytest.raises(AssertionError):
        refusal_of(WRONG[wrong], Path("bad.safetensors"), folder=tmp_path)


# --- each rejection ----------------------------------------------------------------------------------------


@pytest.mark.guarantee("safetensors-bytes", "safetensors-cut", "safetensors-limits", "tensor-names")
@pytest.mark.parametrize("case", REJECTED)
def test_a_violation_ends_the_command_with_one_line(in_process: Command, tmp_path: Path, case: str) -> None:
    """Exit 3, the file, the tensor, what was expected and found; the output is absent or what it was."""
    content, facts = REJECTED[case]
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    message = refusal_of(in_process, bad, folder=tmp_path)
    for fact in facts:
        assert fact in message


def test_the_second_checkpoint_is_looked_at_before_anything_is_written(in_process: Command, tmp_path: Path) -> None:
    """A sound first checkpoint must not begin an output that the second one spoils."""
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    good.write_bytes(one())
    bad.write_bytes(one(data=b""))
    message = refusal(in_process, good, bad, folder=tmp_path)
    assert message == f"{bad}: expected 62 bytes, got 61: 1 byte missing. It is truncated: copy it again."


@pytest.mark.parametrize("content", [lay_out("", length=60), lay_out(" " * 60)], ids=["cut", "leading spaces"])
def test_a_length_that_looks_like_a_tag_makes_no_html_page(in_process: Command, tmp_path: Path, content: bytes) -> None:
    """60 is ``<`` in ASCII; "download the file again" is no advice for a file that was cut while it was copied."""
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(content)
    assert "HTML" not in refusal_of(in_process, bad, folder=tmp_path)


@pytest.mark.guarantee("nothing-to-average")
def test_files_without_a_tensor_are_nothing_to_average(in_process: Command, tmp_path: Path) -> None:
    """They are valid, so that it is no corrupt input: exit 4."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for number, path in enumerate(paths):
        path.write_bytes(lay_out("{}" if number else '{"__metadata__":{"step":"3"}}'))
    message = refusal(in_process, *paths, folder=tmp_path, code=4)
    assert message.startswith(f"{paths[0]}: nothing to average: there are no named tensors. ")


# Three tensors, of which the first has no elements and the second no dimensions.
EMPTY_AND_SCALAR = (
    '{"none":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},'
    '"one":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
    '"two":{"dtype":"F64","shape":[2],"data_offsets":[4,20]}}'
)


@pytest.mark.guarantee("empty-tensors")
def test_tensors_without_elements_or_dimensions_are_averaged(in_process: Command, tmp_path: Path) -> None:
    """They lie at odd offsets beside others, which a strict reader must not refuse."""
    for number in (1, 2):
        data = struct.pack("<f2d", number, 10 * number, -number)
        (tmp_path / f"step_{number}.safetensors").write_bytes(lay_out(EMPTY_AND_SCALAR, data))
    output = tmp_path / "mean.safetensors"
    assert in_process("average", *sorted(tmp_path.glob("step_*")), "--output", output)[0] == 0
    found = load_file(output)
    assert found["none"].shape == (0, 3)
    assert torch.equal(found["one"], torch.tensor(1.5))
    assert torch.equal(found["two"], torch.tensor([15.0, -1.5], dtype=torch.float64))


@pytest.mark.guarantee("tensor-names")
@pytest.mark.parametrize("name", ["../../etc/passwd", "\x1b[31mred", "a\nb", "é" * 2048])
def test_odd_names_reach_the_output_and_are_shown_escaped(in_process: Command, tmp_path: Path, name: str) -> None:
    """A name is data: nothing but the output is written, whatever it says."""
    sources = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in sources:
        path.write_bytes(one('"F64"', "[1]", "[0,8]", json.dumps(name)[1:-1], bytes(8)))
    before = set(tmp_path.iterdir())
    code, out, err = in_process("average", *sources, "--output", tmp_path / "mean.safetensors", "--verbose")
    assert code == 0
    assert all(line.isprintable() for line in (out + err).splitlines())
    assert set(tmp_path.iterdir()) - before == {tmp_path / "mean.safetensors"}
    assert set(load_file(tmp_path / "mean.safetensors")) == {name}


# --- the same rules for the shards of torch.distributed.checkpoint -----------------------------------------

SHARDING = '"__metadata__":{"DCP_SHARDING_INFO":"{}"}'
ENTRY = '"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
SPOILT_SHARDS: dict[str, tuple[bytes, str]] = {
    "under 8 bytes": (b"\2\0\0", "expected 8 bytes at byte 0, got a file of 3 bytes"),
    "header is a list": (lay_out("[]"), "expected a JSON object as header, got b'['"),
    "header is a number": (lay_out("1"), "expected a JSON object as header, got b'1'"),
    "leading space": (lay_out(f" {{{SHARDING},{ENTRY}}}", b"\1"), "expected a JSON object as header"),
    "truncated data": (lay_out(f"{{{SHARDING},{ENTRY}}}"), "1 byte missing. It is truncated: copy it again."),
    "duplicate tensor": (lay_out(f"{{{SHARDING},{ENTRY},{ENTRY}}}", b"\1"), "duplicate key 'w'"),
    "sharding information of another form": (
        lay_out('{"__metadata__":{"DCP_SHARDING_INFO":"[1]"}}'),
        "DCP_SHARDING_INFO: expected saved_offsets for each tensor, got something else. Save it again.",
    ),
    "negative saved offset": (
        lay_out('{"__metadata__":{"DCP_SHARDING_INFO":"{\\"w\\":{\\"saved_offsets\\":[-1]}}"},' + ENTRY + "}", b"\1"),
        "DCP_SHARDING_INFO: expected offsets from 0, got others. Save it again.",
    ),
    "two offsets for one dimension": (
        lay_out('{"__metadata__":{"DCP_SHARDING_INFO":"{\\"w\\":{\\"saved_offsets\\":[0,0]}}"},' + ENTRY + "}", b"\1"),
        "tensor 'w': expected U8 and 1 offsets, got U8 and (0, 0). The file is damaged: save or copy it again.",
    ),
}


def shard_of(folder: Path, content: bytes) -> Path:
    """Writes the only shard of a checkpoint folder; returns the shard."""
    folder.mkdir()
    path = folder / "shard-00001-model-00001-of-00001.safetensors"
    path.write_bytes(content)
    return path


def test_the_shard_is_valid_before_it_is_spoilt(in_process: Command, tmp_path: Path) -> None:
    """The literals above differ from this one in the one thing they name."""
    shard = shard_of(tmp_path / "step_1", lay_out(f"{{{SHARDING},{ENTRY}}}", b"\1"))
    assert in_process("inspect", shard.parent)[0] == 0


@pytest.mark.guarantee("safetensors-bytes")
@pytest.mark.parametrize("case", SPOILT_SHARDS)
def test_a_shard_of_a_distributed_checkpoint_is_held_to_the_same_rules(
    in_process: Command, tmp_path: Path, case: str
) -> None:
    """It is opened by its folder, past the look at the first bytes that a file of its own gets."""
    content, fact = SPOILT_SHARDS[case]
    shard = shard_of(tmp_path / "step_1", content)
    message = refusal(in_process, shard.parent, folder=tmp_path)
    assert message.startswith(f"{shard}: ")
    assert fact in message
