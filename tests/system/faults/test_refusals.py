"""Files that are damaged, hostile or unfit: the command prints one line, exits with 3 and touches no output.

`tests/formats` shows for each reader what it refuses, and why. Here a sample of each family goes through the command.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import layouts
import pytest
import torch
from formats import test_torch_legacy as legacy
from formats import test_torch_zip as torch_zip
from formats.pickles import test_unpickler as unpickler
from formats.pickles.test_unpickler import named, proto, sequence, text
from formats.test_safetensors_header import REJECTED, lay_out, one
from safetensors.torch import load_file
from system.faults.refusals import OLD, Command, mean, refusal, refusal_of, write

from ckpt_avg import CheckpointFormatError, open_checkpoint
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
DTENSOR = (
    named("torch._tensor", "_rebuild_from_type_v2")
    + sequence(
        named("torch._utils", "_rebuild_wrapper_subclass"),
        named("torch.distributed.tensor", "DTensor"),
        sequence(named("torch.distributed.tensor", "DTensor")),
        b"}",
    )
    + b"R"
)


def spoilt_zip(change: Callable[[torch_zip.Layout], object]) -> Callable[[Path], Path]:
    """Returns what writes a torch file with something changed in its archive."""

    def make(folder: Path) -> Path:
        layout = torch_zip.Layout(torch_zip.claim(folder / "bad.pt", torch_zip.view(), version=b"3\n"))
        change(layout)
        return layout.write()

    return make


def claiming(contents: object, **members: bytes) -> Callable[[Path], Path]:
    return lambda folder: torch_zip.claim(folder / "bad.pt", contents, **members)


def pickled(stream: bytes) -> Callable[[Path], Path]:
    return lambda folder: unpickler.archive(folder / "bad.pt", stream)


def old_stream(**changed: bytes) -> Callable[[Path], Path]:
    """Returns what writes a file as before torch 1.6 with a part changed."""
    state = {"w": torch.ones(2)}
    return lambda folder: legacy.Stream(layouts.save(state, folder / "bad.pt", stream=True)).write(**changed)


def written(content: bytes, name: str = "bad.pt") -> Callable[[Path], Path]:
    return lambda folder: write(folder, content, name)


def encrypt(layout: torch_zip.Layout) -> None:
    for part in ("local", "central"):
        layout.set(part, "flags", 1)


NETS = {"net_g": torch_zip.view(), "net_d": torch_zip.view()}
FAMILIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    **{f"safetensors: {case}": (written(REJECTED[case][0], "bad.safetensors"), REJECTED[case][1][-1])
       for case in SAFETENSORS},
    "zip: cut": (spoilt_zip(lambda layout: layout.content.pop()), "expected the zip directory at the end of the file"),
    "zip: encrypted": (spoilt_zip(encrypt), "member 'a/data/0' is encrypted"),
    "zip: compressed": (spoilt_zip(lambda layout: layout.set("central", "method", 8)), "'a/data/0' is compressed"),
    "zip: header": (spoilt_zip(lambda layout: layout.set("local", "crc", 1)), "its local header contradicts"),
    "zip: outside": (spoilt_zip(lambda layout: layout.set("central", "header", 10**6)), "begins outside the archive"),
    "zip: disks": (spoilt_zip(lambda layout: layout.set("end", "disk", 1)), "got one split over several disks"),
    "zip: TorchScript": (claiming(torch_zip.view(), **{"constants.pkl": b"\x80\2)."}), "got a TorchScript program"),
    "zip: big-endian": (claiming(torch_zip.view(), byteorder=b"big"), "expected little-endian tensors"),
    "tensor: record": (claiming(torch_zip.view(numel=5)), "tensor 'w': expected a record of 20 bytes, got 24"),
    "tensor: view": (claiming(torch_zip.view(offset=1)), "got a view that ends at byte 28. Save it again."),
    "tensor: stride": (claiming(torch_zip.view(offset=5, stride=(-3, -1))), "stride (-3, -1), offset 5. Save it again"),
    "tensor: expanded": (
        claiming(torch_zip.view(shape=(10**6, 10**6), stride=(0, 0))), "Save tensor.contiguous() instead."),
    "tensor: quantized": (
        lambda folder: layouts.save({"w": torch_zip.unusual("quantized")}, folder / "bad.pt"),
        "tensor 'w': expected a plain tensor, got a quantized tensor"),
    "tensor: DTensor": (
        pickled(proto(2, b"}" + text("w") + DTENSOR + b"s")), "a tensor subclass (torch.distributed.tensor.DTensor)"),
    "state dict: number": (claiming(torch_zip.view() | {8: torch_zip.view()["w"]}), "expected tensor names, got"),
    "state dict: two": (claiming(NETS), "Choose one with --state-key, for example --state-key net_g."),
    "state dict: none": (claiming({"epoch": 3}), "expected a state dict, got a dict with the keys 'epoch'"),
    "state dict: object": (
        lambda folder: layouts.save(argparse.Namespace(w=torch.ones(1)), folder / "bad.pt"),
        "got a pickled object of class 'argparse.Namespace'"),
    "pickle: cut": (pickled(b"\x80\2}"), "the pickle is truncated"),
    "pickle: empty stack": (pickled(b"\x80\2R."), "the pickle is damaged (IndexError: "),
    "pickle: extension": (pickled(b"\x80\2\x82\x7f."), "the pickle uses extension code 127"),
    "pickle: call": (pickled(proto(2, text("x") + b")R")), "the pickle calls 'str', which is no function"),
    "pickle: bytes after it": (pickled(b"\x80\2}.}."), "bytes follow the end of the pickle"),
    "old stream: version": (old_stream(version=pickle.dumps(1000, 2)), "expected version 1001 of torch's stream"),
    "old stream: keys": (old_stream(keys=pickle.dumps(None, 2)), "expected a list of storage keys, each once"),
    "old stream: cut": (old_stream(storages=b""), "expected 8 bytes at byte"),
    "a tar": (written(b"sys_info".ljust(257, b"\0") + b"ustar" + bytes(250)), "got a tar archive"),
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
    make, fact = FAMILIES[case]
    assert fact in refusal_of(in_process, make(tmp_path), folder=tmp_path)


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
    """They lie at odd offsets beside others, which a strict reader must not refuse."""
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
    path = unpickler.archive(tmp_path / "evil.pt", unpickler.beside_weights(evil))
    assert mean(in_process, path, folder=tmp_path)[0]["w"] == VALUES
    if name != "hooks of a tensor":  # that one is a tensor
        inside = proto(4, b"}" + text("state_dict") + b"}" + text("evil") + evil + b"ss")
        refusal_of(in_process, unpickler.archive(path, inside), folder=tmp_path)
    assert not (tmp_path / "touched").exists()


def test_a_damaged_number_beside_the_weights_is_named_or_does_no_harm(in_process: Command, tmp_path: Path) -> None:
    """The epoch as a tensor with a record that is too long: the weights don't depend on it."""
    epoch = torch_zip.Rebuilt(torch_zip.Storage(key="1", numel=1), 0, (1,), (1,))
    path = torch_zip.claim(tmp_path / "a.pt", {"epoch": epoch, "model": torch_zip.view()}, **{"data/1": bytes(8)})
    code, _, err = in_process("average", path, "--output", tmp_path / "mean.safetensors")
    assert code == 0 or "'epoch'" in err, err


@pytest.mark.guarantee("weights-crc")
def test_damaged_weights_are_found_where_all_bytes_are_read(in_process: Command, tmp_path: Path) -> None:
    """With --sha256: a flipped bit of a weight, which no header shows, contradicts the CRC-32 beside it."""
    path = torch_zip.claim(tmp_path / "a.pt", torch_zip.view())
    mean(in_process, path, "--sha256", folder=tmp_path)
    data = torch_zip.DATA
    path.write_bytes(path.read_bytes().replace(data, data[:-1] + bytes([data[-1] ^ 1])))
    message = refusal_of(in_process, path, "--sha256", "--quiet", folder=tmp_path)
    assert f"member 'a/data/0': expected CRC-32 {zlib.crc32(data):08x}, got " in message
    assert message.endswith(torch_zip.DAMAGED)


def foreign_pickles() -> list[bytes]:
    """All bytes in the tests of Python's own pickle module, damaged ones among them; none where they are missing."""
    found = importlib.util.find_spec("test") and importlib.util.find_spec("test.pickletester")
    if not found or not found.origin:
        return []
    tree = ast.parse(Path(found.origin).read_bytes())
    return sorted({node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
                   and isinstance(node.value, bytes)})  # fmt: skip


@pytest.mark.guarantee("damaged-pickles")
def test_the_pickles_of_pythons_own_tests_hold_no_weights(tmp_path: Path) -> None:
    """Streams of every protocol, sound, damaged and hostile: the documented exception and nothing else."""
    streams = foreign_pickles()
    if not streams:
        pytest.skip("this Python comes without its tests")
    assert len(streams) > 100
    for stream in streams:
        for path in (unpickler.archive(tmp_path / "a.pt", stream), write(tmp_path, b"\x80\2" + stream)):
            with pytest.raises(CheckpointFormatError) as caught:
                open_checkpoint(path)
            assert str(caught.value).startswith(f"{path}: ")
            assert str(caught.value).isprintable()


@pytest.mark.guarantee("pickle-bombs")
def test_a_pickle_over_the_limit_is_not_read(in_process: Command, tmp_path: Path) -> None:
    """256 MiB and a byte; sparse, so that nothing of it is on the disk."""
    size = LIMITS.pickle + 1
    path = tmp_path / "step_1.pt"
    torch_zip.zip64(path, {"a/data.pkl": (size, {})})
    message = refusal_of(in_process, path, folder=tmp_path)
    assert message == (
        f"{path}: expected a pickle of at most {size - 1:,} bytes, got {size:,}. Save only the state dict."
    )
