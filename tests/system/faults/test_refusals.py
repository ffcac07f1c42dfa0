"""Files that are damaged, hostile or unfit: the command prints one line, exits with 3 and touches no output.

`tests/formats` shows for each reader what it refuses, and why. Here a sample of each family goes through the command.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import layouts
import pytest
import torch
from formats.pickles import test_unpickler as unpickler
from formats.pickles.opcodes import named, proto, text, whole
from formats.safetensors_bytes import lay_out, one
from formats.test_safetensors_header import REJECTED
from formats.torch_bytes import (
    DAMAGED,
    DATA,
    PICKLE,
    RECORD,
    WHOLE,
    Member,
    archive,
    body_and_directory,
    end,
    holding,
    old,
    state,
    storage,
    tensor,
    weights,
    write,
)
from safetensors.torch import load_file
from system.faults.refusals import OLD, Command, mean, refusal, refusal_of

from ckpt_avg.limits import LIMITS

# --- the check itself --------------------------------------------------------------------------------------

GOOD = "Error: bad.safetensors: damaged. Copy it again.\n"


def after(change: Callable[[Path], object]) -> Command:
    """Returns a command that does something to the output first."""

    def command(*arguments: object) -> tuple[int, str, str]:
        change(Path(str(arguments[3])))
        return 3, "", GOOD

    return command


def printing(text: str, code: int = 3, out: str = "") -> Command:
    return lambda *arguments: (code, out, text)


WRONG: dict[str, Command] = {
    "accepts the file": printing("", 0, "averaged 2 checkpoints"),
    "writes before it checks": after(lambda output: output.write_bytes(b"half")),
    "leaves a file": after(lambda output: Path(f"{output}.tmp").write_bytes(b"half")),
    "writes the old bytes again": after(lambda output: output.exists() and output.write_bytes(OLD)),
    "crashes": printing("Traceback (most recent call last):\nValueError\n", 1),
    "crashes with the right code": printing("Traceback (most recent call last):\nValueError\n"),
    "has the code of another failure": printing(GOOD, 4),
    "prints two lines": printing("Error: bad.safetensors: damaged.\nCopy it again.\n"),
    "obeys a hostile name": printing("Error: bad.safetensors: tensor '\x1b[31m' is odd. Rename it.\n"),
    "names no file": printing("Error: something is damaged. Copy it again.\n"),
    "prints nothing": printing(""),
    "prints a result": printing(GOOD, 3, "wrote it"),
    "quotes without end": printing(f"Error: bad.safetensors: {'x' * 9000}.\n"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_catches_a_command_that(tmp_path: Path, wrong: str) -> None:
    """Each of these would make the tests below worthless."""
    assert refusal_of(printing(GOOD), Path("bad.safetensors"), folder=tmp_path).endswith("Copy it again.")
    with pytest.raises(AssertionError):
        refusal_of(WRONG[wrong], Path("bad.safetensors"), folder=tmp_path)


# --- a sample of each family -------------------------------------------------------------------------------

SAFETENSORS = (
    "empty file", "header over the format's limit", "header length 2^64-1", "truncated data", "trailing bytes",
    "overlap", "hole", "begin > end", "negative size", "product over 63 bits", "unknown dtype", "sub-byte F4",
    "unknown field", "duplicate tensor", "metadata value 1", "not UTF-8", "NUL in a name",
    "control characters shown escaped", "deep lists", "5,000 digits",
)  # fmt: skip
FAMILIES: dict[str, tuple[bytes, str]] = {
    **{f"safetensors: {case}": (REJECTED[case][0], REJECTED[case][1][-1]) for case in SAFETENSORS},
    "zip: truncated": (WHOLE[:-1], "expected the zip directory at the end of the file"),
    "zip: compressed": (archive(PICKLE, replace(RECORD, method=8)), f"which torch.save never does. {DAMAGED}"),
    "zip: size": (archive(PICKLE, replace(RECORD, size=9)), "member 'a/data/0' is outside the archive"),
    "zip: outside": (archive(PICKLE, replace(RECORD, at=10**6)), "begins outside the archive"),
    "zip: header": (archive(PICKLE, replace(RECORD, at=0)), "its local header contradicts the directory"),
    "zip: TorchScript": (archive(PICKLE, Member(b"a/constants.pkl", b"")), "got a TorchScript program"),
    "zip: big-endian": (archive(PICKLE, Member(b"a/byteorder", b"big"), RECORD), "expected little-endian tensors"),
    "tensor: record": (holding(weights(tensor(storage(numel=whole(3))))), "expected a record of 12 bytes, got 8"),
    "tensor: view": (holding(weights(tensor(offset=1))), "got a view that ends at byte 12. Save it again."),
    "tensor: stride": (holding(weights(tensor(stride=(-1,)))), "stride (-1,), offset 0. Save it again"),
    "tensor: expanded": (
        holding(weights(tensor(shape=(10**6, 10**6), stride=(0, 0)))), "Save tensor.contiguous() instead."),
    "tensor: quantized": (
        holding(weights(tensor(storage(named("torch", "QInt8Storage"))))), "expected a plain tensor, got a quantized"),
    "state dict: number": (holding(state((b"K\7", tensor()), (text("w"), tensor()))), "expected tensor names, got"),
    "state dict: two": (
        holding(state((text("net_g"), weights(tensor())), (text("net_d"), weights(tensor())))),
        "Choose one with --state-key, for example --state-key net_g."),
    "state dict: none": (holding(weights(whole(3), "epoch")), "expected a state dict, got a dict with the keys 'epoch"),
    "state dict: object": (holding(named("models", "Net") + b")\x81"), "got a pickled object of class 'models.Net'"),
    "pickle: truncated": (archive(Member(b"a/data.pkl", b"\x80\2}"), RECORD), "the pickle is truncated"),
    "pickle: empty stack": (holding(b"R"), "the pickle is damaged (IndexError: "),
    "pickle: extension": (holding(b"\x82\x7f"), "the pickle uses extension code 127"),
    "pickle: call": (holding(text("x") + b")R"), "the pickle calls 'str', which is no function"),
    "pickle: bytes after it": (holding(b"}.}"), "bytes follow the end of the pickle"),
    "pickle: bare": (b"\x80\4" + b"N0" * 40 + b"N.", "got a Python pickle (pickle.dump, as in detectron2's model zoo"),
    "old stream: version": (old(version=proto(whole(1000))), "expected version 1001 of torch's stream"),
    "old stream: keys": (old(keys=proto(b"N")), "expected a list of storage keys, each once"),
    "old stream: truncated": (old(storages=b""), "expected 8 bytes at byte"),
    "a tar": (b"sys_info".ljust(257, b"\0") + b"ustar" + bytes(250), "got the tar archive of torch before 0.1.10"),
}  # fmt: skip


@pytest.mark.guarantee(
    "byte-order",
    "damaged-pickles",
    "expanded-views",
    "nested-state-dicts",
    "odd-tensors",
    "old-torch-files",
    "pickled-modules",
    "safetensors-bytes",
    "safetensors-cut",
    "safetensors-limits",
    "storage-bounds",
    "tensor-keys",
    "tensor-names",
    "torchscript",
    "zip-cut",
    "zip-structure",
)
@pytest.mark.parametrize("case", FAMILIES)
def test_what_a_reader_refuses_ends_the_command_with_one_line(in_process: Command, tmp_path: Path, case: str) -> None:
    """Exit 3, the file, what was expected and found; the output is absent or what it was."""
    content, fact = FAMILIES[case]
    assert fact in refusal_of(in_process, write(tmp_path, content), folder=tmp_path)


def test_the_second_checkpoint_is_checked_before_anything_is_written(in_process: Command, tmp_path: Path) -> None:
    """A sound first checkpoint must not begin an output that the second one spoils."""
    good, bad = write(tmp_path, one(), "good.safetensors"), write(tmp_path, one(data=b""), "bad.safetensors")
    message = refusal(in_process, good, bad, folder=tmp_path)
    assert message == f"{bad}: expected 62 bytes, got 61: 1 byte missing. It is truncated: copy it again."


@pytest.mark.parametrize("content", [lay_out("", length=60), lay_out(" " * 60)], ids=["cut", "leading spaces"])
def test_a_length_that_looks_like_a_tag_makes_no_html_page(in_process: Command, tmp_path: Path, content: bytes) -> None:
    """60 is ``<`` in ASCII; "download the file again" is no advice for a file that was cut while it was copied."""
    assert "HTML" not in refusal_of(in_process, write(tmp_path, content, "bad.safetensors"), folder=tmp_path)


@pytest.mark.guarantee("nothing-to-average")
def test_files_without_a_tensor_are_nothing_to_average(in_process: Command, tmp_path: Path) -> None:
    """They are valid, so that it is no corrupt input: exit 4."""
    first = write(tmp_path, lay_out('{"__metadata__":{"step":"3"}}'), "a.safetensors")
    message = refusal(in_process, first, write(tmp_path, lay_out("{}"), "b.safetensors"), folder=tmp_path, code=4)
    assert message.startswith(f"{first}: nothing to average: there are no named tensors. ")


# Three tensors, of which the first has no elements and the second no dimensions.
EMPTY_AND_SCALAR = (
    '{"none":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},'
    '"one":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
    '"two":{"dtype":"F64","shape":[2],"data_offsets":[4,20]}}'
)


@pytest.mark.guarantee("empty-tensors")
def test_tensors_without_elements_or_dimensions_are_averaged(in_process: Command, tmp_path: Path) -> None:
    """They are at odd offsets next to others, which a strict reader must not refuse."""
    for number in (1, 2):
        data = struct.pack("<f2d", number, 10 * number, -number)
        write(tmp_path, lay_out(EMPTY_AND_SCALAR, data), f"step_{number}.safetensors")
    found, _ = mean(in_process, *sorted(tmp_path.glob("step_*")), folder=tmp_path)
    assert found == {"none": [], "one": 1.5, "two": [15.0, -1.5]}


@pytest.mark.guarantee("tensor-names")
@pytest.mark.parametrize("name", ["../../etc/passwd", "\x1b[31mred", "a\nb", "é" * 2048])
def test_odd_names_reach_the_output_and_are_shown_escaped(in_process: Command, tmp_path: Path, name: str) -> None:
    """A name is data: nothing but the output is written, whatever it says."""
    content = one('"F64"', "[1]", "[0,8]", json.dumps(name)[1:-1], bytes(8))
    sources = [write(tmp_path, content, f"{file}.safetensors") for file in "ab"]
    before = set(tmp_path.iterdir())
    code, out, err = in_process("average", *sources, "--output", tmp_path / "mean.safetensors", "--verbose")
    assert code == 0
    assert all(line.isprintable() for line in (out + err).splitlines())
    assert set(tmp_path.iterdir()) - before == {tmp_path / "mean.safetensors"}
    assert set(load_file(tmp_path / "mean.safetensors")) == {name}


@pytest.mark.guarantee("tied-tensors")
def test_two_names_of_one_tensor_are_both_written_and_said(in_process: Command, tmp_path: Path) -> None:
    """The output holds each, so that it loads into any model; the user is told that they were one."""
    tied = torch.tensor([1.0, 2.0])
    found, said = mean(in_process, layouts.save({"a": tied, "b": tied}, tmp_path / "a.pt"), folder=tmp_path)
    assert found == {"a": [1, 2], "b": [1, 2]}
    assert "Notice: tied weights are written under each of their names: 'a'='b'" in said


# --- pickles -----------------------------------------------------------------------------------------------

VALUES = [[0, 1, 2], [3, 4, 5]]


@pytest.mark.guarantee("no-code-runs")
@pytest.mark.parametrize("name", ["GLOBAL REDUCE", "OBJ", "a submodule", "BUILD", "hooks of a tensor"])
def test_a_hostile_pickle_is_averaged_without_its_code_or_refused(
    in_process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Beside the weights it changes nothing; in their place it is refused. Either way nothing of it runs."""
    monkeypatch.chdir(tmp_path)
    evil = unpickler.EVIL[name]
    path = unpickler.archive(tmp_path / "evil.pt", unpickler.next_to_weights(evil))
    assert mean(in_process, path, folder=tmp_path)[0]["w"] == VALUES
    if name != "hooks of a tensor":  # that one is a tensor
        inside = proto(b"}" + text("state_dict") + b"}" + text("evil") + evil + b"ss", 4)
        refusal_of(in_process, unpickler.archive(path, inside), folder=tmp_path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.guarantee("weights-crc")
def test_damaged_weights_are_found_where_all_bytes_are_read(in_process: Command, tmp_path: Path) -> None:
    """With --sha256: a flipped bit of a weight, which no header shows, contradicts the CRC-32 next to it."""
    path = write(tmp_path, WHOLE)
    mean(in_process, path, "--sha256", folder=tmp_path)
    write(tmp_path, WHOLE.replace(DATA, DATA[:-1] + bytes([DATA[-1] ^ 1])))
    message = refusal_of(in_process, path, "--sha256", "--quiet", folder=tmp_path)
    assert f"member 'a/data/0': expected CRC-32 {zlib.crc32(DATA):08x}, got " in message
    assert message.endswith(DAMAGED)


@pytest.mark.guarantee("pickle-bombs")
def test_a_pickle_over_the_limit_is_not_read(in_process: Command, tmp_path: Path) -> None:
    """256 MiB and a byte; sparse, so that nothing of it is on the disk."""
    size = LIMITS.pickle + 1
    member = replace(PICKLE, data=b"", size=size)
    _, directory = body_and_directory(member)
    path = tmp_path / "step_1.pt"
    with path.open("wb") as file:
        file.write(member.header())
        file.seek(size, os.SEEK_CUR)
        start = file.tell()
        file.write(directory + end(1, len(directory), start))
    message = refusal_of(in_process, path, folder=tmp_path)
    assert message == (
        f"{path}: expected a pickle of at most {size - 1:,} bytes, got {size:,}. Save only the state dict."
    )
