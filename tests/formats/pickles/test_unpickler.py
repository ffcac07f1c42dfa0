"""A hostile pickle runs nothing, imports nothing, and is refused in bounded time and memory.

Pickles are written opcode by opcode. What could hang, eat memory or crash runs in a process of its own.
"""

from __future__ import annotations

import ast
import copyreg
import importlib.util
import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from formats.pickles.opcodes import named, proto, sequence, text, whole
from formats.torch_bytes import DISTRUST, RECORD, Member, storage
from formats.torch_bytes import archive as archive_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_avg.checkpoint.spec import DTYPES
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.pickles import stand_ins
from ckpt_avg.formats.pickles import unpickler as pickle_specs
from ckpt_avg.formats.pickles.stand_ins import Foreign, StorageRef, StoredTensor
from ckpt_avg.formats.pickles.unpickler import read_pickle
from ckpt_avg.limits import LIMITS

STORAGE = sequence(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), whole(6)) + b"Q"
TENSOR = (
    named("torch._utils", "_rebuild_tensor_v2")
    + sequence(STORAGE, whole(0), whole(2) + whole(3) + b"\x86", whole(3) + whole(1) + b"\x86", b"\x89", b"}")
    + b"R"
)
EXPECTED = StoredTensor(StorageRef("0", DTYPES["F32"], 6), DTYPES["F32"], 0, (2, 3), (3, 1))
TOUCH = text("touch touched")


def refused(stream: bytes) -> str:
    """Reads a pickle that must be refused; returns the message without what every message has."""
    with pytest.raises(CheckpointFormatError) as caught:
        read_pickle(stream, "file.pt")
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert message.startswith("file.pt: ")
    assert message.isprintable()
    assert len(message) < 1000
    assert message.endswith(".")
    return message


def test_the_tensor_of_these_tests_is_read() -> None:
    assert read_pickle(proto(TENSOR), "file.pt") == EXPECTED


def test_plain_values_come_through() -> None:
    plain: list[Any] = [None, True, 3, -(2**70), 2.5, "é", [1], (1, (2,)), {"a": {1: 2}}]
    since = {3: [b"b"], 4: [{1, 2}], 5: [bytearray(b"ab")]}  # before, these are calls
    for version in range(6):
        plain = plain + since.get(version, [])
        assert read_pickle(pickle.dumps(plain, version), "file.pt") == plain
    assert read_pickle(pickle.dumps(frozenset({1, "a"}), 4), "file.pt") == frozenset({1, "a"})


def test_a_frozenset_keeps_its_place() -> None:
    """FROZENSET lands where it was made, so that the values after it keep theirs."""
    contents = {"a": frozenset({1}), "b": [frozenset(), 2], "c": 3}
    assert read_pickle(pickle.dumps(contents, 4), "file.pt") == contents


# --- calls -------------------------------------------------------------------------------------------------

SYSTEM = text("os") + text("system") + b"\x93"
AGAIN_PICKLED = b"cos\nsystem\n(S'touch touched'\ntR."
EVIL: dict[str, bytes] = {
    "GLOBAL REDUCE": named("os", "system") + TOUCH + b"\x85R",
    "posix": named("posix", "system") + TOUCH + b"\x85R",
    "STACK_GLOBAL REDUCE": SYSTEM + TOUCH + b"\x85R",
    "dotted STACK_GLOBAL": text("os") + text("path.os.system") + b"\x93" + TOUCH + b"\x85R",
    "INST": b"(" + TOUCH + b"ios\nsystem\n",
    "OBJ": b"(" + named("os", "system") + TOUCH + b"o",
    "NEWOBJ": named("os", "system") + TOUCH + b"\x85\x81",
    "NEWOBJ_EX": named("os", "system") + TOUCH + b"\x85}\x92",
    "Popen": named("subprocess", "Popen") + b"](" + text("touch") + text("touched") + b"e\x85R",
    "check_output": named("subprocess", "check_output") + sequence(b"]" + text("touch") + b"a") + b"R",
    "eval": named("builtins", "eval") + text("open('touched','w')") + b"\x85R",
    "exec": named("builtins", "exec") + text("open('touched','w')") + b"\x85R",
    "__builtin__": named("__builtin__", "eval") + text("open('touched','w')") + b"\x85R",
    "open": named("builtins", "open") + text("touched") + text("w") + b"\x86R",
    "__import__": named("builtins", "__import__") + text("antigravity") + b"\x85R",
    "an import alone": named("antigravity", "fly") + b"0" + named("this", "s"),
    "a submodule": text("xml.dom.minidom") + text("parse") + b"\x93" + TOUCH + b"\x85R",
    "getattr": named("builtins", "getattr") + SYSTEM + text("__call__") + b"\x86R" + TOUCH + b"\x85R",
    "apply": named("functools", "partial") + SYSTEM + TOUCH + b"\x86R)R",
    "runpy": named("runpy", "run_path") + text("evil.py") + b"\x85R",
    "code object": named("types", "CodeType") + b")R" + b"0" + named("types", "FunctionType") + b")R",
    "pickle again": named("pickle", "loads") + b"C" + bytes([len(AGAIN_PICKLED)]) + AGAIN_PICKLED + b"\x85R",
    "torch.load": named("torch", "load") + text("evil.pt") + b"\x85R",
    "torch hub": named("torch.hub", "load_state_dict_from_url") + text("http://127.0.0.1:9/") + b"\x85R",
    "numpy load": named("numpy", "load") + text("evil.npy") + b"\x85R",
    "ctypes": named("ctypes", "CDLL") + text("evil.so") + b"\x85R",
    "socket": named("socket", "create_connection") + text("127.0.0.1") + whole(9) + b"\x86\x85R",
    "this package": named("ckpt_avg.output.unpublished_file", "publish") + text("touched") + b"\x85R",
    "its reader": named("ckpt_avg.formats.pickles.unpickler", "read_pickle") + text("x") + b"\x85R",
    "BUILD": named("foo", "Bar") + b")\x81}" + text("__setstate__") + SYSTEM + b"sb" + TOUCH + b"b",
    "BUILD slots": named("foo", "Bar") + b")\x81N}" + text("__reduce__") + SYSTEM + b"s\x86b",
    "APPEND": named("foo", "Bar") + b")\x81" + TOUCH + b"a(" + TOUCH + b"e",
    "SETITEM": named("os", "environ") + b")\x81" + text("PATH") + TOUCH + b"s",
    "ADDITEMS": named("foo", "Bar") + b")\x81(" + TOUCH + b"\x90",
    "a hooked dict": named("collections", "defaultdict") + SYSTEM + b"\x85R" + text("k") + TOUCH + b"s",
    "rebuild from type": (
        named("torch._tensor", "_rebuild_from_type_v2")
        + sequence(SYSTEM, named("os", "x"), TOUCH + b"\x85", b"}")
        + b"R"
    ),
    "hooks of a tensor": (
        named("torch._utils", "_rebuild_tensor_v2")
        + sequence(STORAGE, whole(0), b")", b")", b"\x89", SYSTEM + TOUCH + b"\x85R")
        + b"R"
    ),
}


def archive(path: Path, stream: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(zipfile.ZipInfo("a/data.pkl"), stream)
        zipped.writestr(zipfile.ZipInfo("a/data/0"), struct.pack("<6f", *range(6)))
    return path


def next_to_weights(payload: bytes, version: int = 4) -> bytes:
    """A checkpoint whose state dict does not depend on the payload."""
    weights = b"}" + text("w") + TENSOR + b"s"
    return proto(b"}" + text("evil") + payload + b"s" + text("state_dict") + weights + b"s", version)


@pytest.mark.parametrize("name", EVIL)
def test_what_a_hostile_object_calls_is_not_called_and_the_weights_open(tmp_path: Path, name: str) -> None:
    with open_checkpoint(archive(tmp_path / "evil.pt", next_to_weights(EVIL[name]))) as checkpoint:
        assert checkpoint.spec.state_key == "state_dict"
        (tensor,) = checkpoint.spec.tensors.values()
        assert tensor.shape == (2, 3)
        assert checkpoint.files[0].read(tensor.offset, 24) == struct.pack("<6f", *range(6))


@pytest.mark.parametrize("name", sorted(EVIL.keys() - {"hooks of a tensor"}))
def test_a_hostile_object_as_the_weights_is_refused(tmp_path: Path, name: str) -> None:
    stream = proto(b"}" + text("state_dict") + b"}" + text("evil") + EVIL[name] + b"ss", 4)
    with pytest.raises(CheckpointFormatError, match=r"expected a (state dict|plain tensor)") as caught:
        open_checkpoint(archive(tmp_path / "evil.pt", stream))
    assert caught.value.exit_code == 3


_AUDIT = """
import sys
from pathlib import Path
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.errors import CheckpointFormatError
control, benign, paths = sys.argv[1] == "control", sys.argv[2], sys.argv[3:]
import contextlib, pickle, zipfile
open_checkpoint(benign).close()  # whatever is imported late is imported now
with contextlib.suppress(Exception):
    open_checkpoint(__file__ if "__file__" in globals() else sys.executable)
if control:
    streams = [zipfile.ZipFile(path).read("a/data.pkl") for path in paths]
events, listening = [], True
def hook(event, arguments):
    if not listening:
        return
    if event == "open" and not isinstance(arguments[1], str) and arguments[2] & 3 == 0:
        return  # the checkpoint itself, read-only, by os.open
    if event != "builtins.id":
        events.append((event, str(arguments)[:200]))
sys.addaudithook(hook)
before = set(sys.modules)
for index, path in enumerate(paths):
    try:
        if control:
            unpickler = pickle._Unpickler(__import__("io").BytesIO(streams[index]))
            unpickler.persistent_load = lambda pid: None
            unpickler.load()
        else:
            open_checkpoint(path).close()
    except Exception as error:
        if not control and not isinstance(error, CheckpointFormatError):
            raise
listening = False
print(sorted({event for event, _ in events}))
print(events, sorted(set(sys.modules) - before), file=sys.stderr)
"""


def audit(folder: Path, mode: str) -> tuple[set[str], str]:
    """Opens every evil checkpoint under an audit hook, in a process of its own: the events, and their details."""
    benign = archive(folder / "benign.pt", next_to_weights(b"N"))
    paths = [archive(folder / f"{number}.pt", next_to_weights(payload)) for number, payload in enumerate(EVIL.values())]
    done = subprocess.run(
        [sys.executable, "-c", _AUDIT, mode, benign, *paths],
        capture_output=True, text=True, timeout=60, check=True, cwd=folder,
    )  # fmt: skip
    return set(json.loads(done.stdout.replace("'", '"'))), done.stderr


@pytest.mark.guarantee("no-code-runs")
def test_no_audited_event_happens(tmp_path: Path) -> None:
    """No import, exec, subprocess, socket, write, nor any other event that Python can report."""
    events, details = audit(tmp_path, "ours")
    assert not events, details
    assert not (tmp_path / "touched").exists()
    assert details.endswith("[]\n")


@pytest.mark.slow
@pytest.mark.guarantee("no-code-runs")
def test_the_audit_sees_what_the_standard_unpickler_does(tmp_path: Path) -> None:
    """The same hook over the same pickles, with a reader that does run them: the test above can fail."""
    events, _ = audit(tmp_path, "control")
    assert {"import", "os.system", "open", "exec", "pickle.find_class"} <= events
    assert (tmp_path / "touched").exists()


# --- opcodes on odd targets --------------------------------------------------------------------------------


@pytest.fixture
def extension() -> Iterator[None]:
    copyreg.add_extension("os", "system", 0x7F)
    try:
        yield
    finally:
        copyreg.remove_extension("os", "system", 0x7F)


@pytest.mark.guarantee("no-code-runs")
@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("code", [b"\x82\x7f", b"\x83\x7f\0", b"\x84\x7f\0\0\0"], ids=["EXT1", "EXT2", "EXT4"])
def test_extension_codes_are_refused_though_registered(code: bytes) -> None:
    assert "the pickle uses extension code 127" in refused(proto(code + TOUCH + b"\x85R"))


@pytest.mark.parametrize(
    "pid",
    [text("storage"), b"N", b")", b"(t", sequence(text("module"), b"N", b"N", b"N", b"N"), whole(3), b"]", TENSOR,
     sequence(text("storage"), named("os", "system"), text("0"), text("cpu"), whole(6)),
     sequence(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu")),
     sequence(text("storage"), named("torch", "FloatStorage"), whole(0), text("cpu"), whole(6)),
     sequence(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), text("6")),
     *(storage(numel=numel) for numel in (whole(-1), b"\x88", b"G" + bytes(8))),
     *(storage(kind) for kind in (named("collections", "OrderedDict"), text("FloatStorage")))],
)  # fmt: skip
def test_persistent_ids_that_name_no_storage(pid: bytes) -> None:
    assert "storage" in refused(proto(pid + b"Q"))


def test_a_persistent_id_as_text() -> None:
    assert "a persistent id of the pickle names no storage" in refused(b"Pevil\n.")


TARGETS = {
    "None": b"N",
    "int": b"K\1",
    "str": text("x"),
    "tuple": b")",
    "dtype": named("torch", "float32"),
    "function": named("torch._utils", "_rebuild_tensor_v2"),
    "class": named("os", "system"),
    "dict class": named("collections", "OrderedDict"),
    "storage class": named("torch", "FloatStorage"),
    "storage": STORAGE,
    "bytes": b"C\1x",
}
STATE = b"}" + text("name") + text("evil") + b"s" + text("__code__") + text("evil") + b"s"


@pytest.mark.parametrize("target", [*TARGETS, "list", "dict", "set"])
@pytest.mark.parametrize("state", [STATE, b"N" + STATE + b"\x86", b"N", TOUCH])
def test_build_on_what_takes_no_state(target: str, state: bytes) -> None:
    """No attribute of a function, class, dtype or storage can be set."""
    made = {**TARGETS, "list": b"]", "dict": b"}", "set": b"\x8f"}[target]
    assert "the pickle restores a state into a" in refused(proto(made + state + b"b", 4))
    assert vars(stand_ins._rebuild_tensor) == {}
    assert DTYPES["F32"].name == "F32"
    assert "evil" not in vars(Foreign).values()


@pytest.mark.parametrize("state", [STATE, b"}" + text("shape") + b"K\x63\x85s", b"N" + STATE + b"\x86", b"N"])
def test_build_on_a_tensor_changes_nothing(state: bytes) -> None:
    assert read_pickle(proto(TENSOR + state + b"b"), "file.pt") == EXPECTED


def test_build_on_an_ordered_dict_changes_nothing_but_its_items() -> None:
    """``_metadata`` of a state dict is set in this way; it is not needed."""
    state = b"}" + text("_metadata") + b"}s" + text("update") + SYSTEM + b"s"
    result = read_pickle(proto(named("collections", "OrderedDict") + b")R" + state + b"b", 4), "file.pt")
    assert result == {}
    assert not hasattr(result, "_metadata")


def test_build_on_a_foreign_object_is_kept_and_not_applied() -> None:
    result = read_pickle(proto(named("foo", "Bar") + b")\x81" + STATE + b"b", 4), "file.pt")
    assert isinstance(result, Foreign)
    assert result.described() == "foo.Bar"
    assert result.state == {"name": "evil", "__code__": "evil"}
    assert Foreign.__dict__["arguments"].__class__.__name__ == "member_descriptor"


def test_classes_of_one_name_are_the_same_and_others_are_not() -> None:
    stream = proto(sequence(named("a", "B"), named("a", "B"), named("a", "C")))
    first, again, other = read_pickle(stream, "file.pt")  # type: ignore[misc]
    assert first is again is not other


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("operation", "what"),
    [
        (TOUCH + b"a", "appends to"),
        (b"(" + TOUCH + b"e", "appends to"),
        (TOUCH + TOUCH + b"s", "sets an item of"),
        (b"(" + TOUCH + TOUCH + b"u", "sets an item of"),
        (b"(" + TOUCH + b"\x90", "adds to"),
    ],
    ids=["APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"],
)
def test_filling_what_is_no_container(target: str, operation: bytes, what: str) -> None:
    assert f"the pickle {what} a" in refused(proto(TARGETS[target] + operation, 4))


@pytest.mark.parametrize("target", sorted(TARGETS.keys() - {"function", "class", "dict class"}))
@pytest.mark.parametrize("operation", [b")R", b")\x81", b")}\x92"], ids=["REDUCE", "NEWOBJ", "NEWOBJ_EX"])
def test_calling_what_is_no_function(target: str, operation: bytes) -> None:
    assert "which is no function" in refused(proto(TARGETS[target] + operation, 4))


@pytest.mark.parametrize("made", [b"]", b"}", b"\x8f"], ids=["list", "dict", "set"])
def test_calling_a_container(made: bytes) -> None:
    refused(proto(made + b")R", 4))


@pytest.mark.parametrize("arguments", [b"]", b"N", TOUCH, b"}"])
def test_arguments_that_are_no_tuple(arguments: bytes) -> None:
    assert "without a tuple of arguments" in refused(proto(named("os", "system") + arguments + b"R", 4))


@pytest.mark.parametrize(
    "arguments", [b")", b"N\x85", b"K\1\x85", TOUCH + b"\x85", b"]K\1a\x85", b"]K\1\x85a\x85", sequence(*[b"N"] * 9)]
)
@pytest.mark.parametrize("key", sorted(stand_ins._FUNCTIONS), ids=lambda key: key[1])
def test_rebuilding_from_junk(key: tuple[str, str], arguments: bytes) -> None:
    """Wrong arguments of the functions that are known give the documented exception or an inert value."""
    stream = proto(named(*key) + arguments + b"R")
    try:
        result = read_pickle(stream, "file.pt")
    except CheckpointFormatError:
        return
    assert not isinstance(result, StoredTensor)


# --- damaged pickles ---------------------------------------------------------------------------------------


@pytest.mark.guarantee("damaged-pickles")
@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b".",
        b"N",
        b"\x80",
        b"\x80\x02",
        b"\x80\xff.",
        b"\x80\xffN.",
        b"\x80\x06N.",
        b"0.",
        b"1.",
        b"2.",
        b"R.",
        b"NR.",
        b"\x81.",
        b"\x92.",
        b"\x93.",
        b"\x85.",
        b"N\x86.",
        b"N\x87.",
        b"t.",
        b"(t",
        b"e.",
        b"]e.",
        b"u.",
        b"}(Nu.",
        b"(Nd.",
        b"s.",
        b"Ns.",
        b"b.",
        b"o.",
        b"(o.",
        b"\x90.",
        b"\x91.",
        b"h\x00.",
        b"g1\n.",
        b"j\x01\0\0\0.",
        b"q\x00.",
        b"\x94.",
        b"Np-1\n.",
        b"Npx\n.",
        b"\xff.",
        b"\x00.",
        b"I12",
        b"Iabc\n.",
        b"Labc\n.",
        b"L" + b"9" * 5000 + b"L\n.",
        b"Fx\n.",
        b"Sx\n.",
        b"S'\n.",
        b"S'\\x'\n.",
        b"V\\ud8\n.",
        b"X\xff\xff\xff\xffabc.",
        b"X\x01\0\0\0\xff.",
        b"T\xff\xff\xff\xff.",
        b"\x8b\xff\xff\xff\xff.",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x8a\xff.",
        b"\x8d" + b"\xff" * 8 + b".",
        b"\x8e" + b"\xff" * 8 + b".",
        b"\x96" + b"\xff" * 8 + b".",
        b"\x8d" + struct.pack("<Q", 2**62) + b".",
        b"\x95" + b"\xff" * 8 + b"N.",
        b"\x95" + struct.pack("<Q", 2**62) + b"N.",
        b"\x95" + struct.pack("<Q", 1) + b"N.",
        b"\x95" + struct.pack("<Q", 9) + b"N\x95" + struct.pack("<Q", 1) + b"N.",
        b"\x97.",
        b"\x98.",
        b"N\x98.",
        b"cos\n",
        b"cos\nsystem",
        b"c\xff\nx\n.",
        b"ios\nsystem\n.",
        b"K\1K\2\x93.",
        b"G\0\0.",
        b"J\0\0.",
        b"Q.",
    ],
    ids=lambda stream: repr(stream[:16]),
)
def test_damaged_pickles_are_refused(stream: bytes) -> None:
    """Truncation, underflow, no STOP, unknown operations and protocols, wrong lengths."""
    try:
        result = read_pickle(stream, "file.pt")
    except CheckpointFormatError as error:
        assert str(error).startswith("file.pt: ")
        assert len(str(error)) < 1000
    else:
        assert stream.endswith(b"."), "no STOP"
        assert stream[:1] in b"SLFVT\x8a\x8b\x95", f"accepted as {result!r}"


@pytest.mark.parametrize(
    ("stream", "fact"),
    [
        (b"\x80\x02N", "the pickle is truncated"),
        (b"\x80\xffN.", "unsupported pickle protocol: 255"),
        (b"\x80\x02N.N", "bytes follow the end of the pickle"),
        (b"\x80\x02N.\x80\x02N.", "bytes follow the end of the pickle"),
        (b"\x80\x04\x95" + struct.pack("<Q", 3) + b"N.N", "bytes follow the end of the pickle"),
        (b"\x80\x02\xc5.", "unknown pickle operation 0xc5"),
        (b"\x80\x02h\x07.", "Memo value not found at index 7"),
        (b"\x80\2X\4\0\0\0ab", "the pickle is truncated. Save or copy it again."),
        (b"\x80\2R.", "the pickle is damaged (IndexError: "),
        (b"\x80\2Np4294967296\n.", f"expected a memo index below 2³² in the pickle, got a larger one. {DISTRUST}"),
        (proto(named("builtins", "bytes") + whole(9) + b"\x85R"), f"the pickle makes bytes of something. {DISTRUST}"),
        (
            proto(named("_codecs", "encode") + text("x") + text("rot13") + b"\x86R"),
            f"the pickle encodes something other than bytes as latin1 text. {DISTRUST}",
        ),
    ],
)
def test_what_is_said_of_damage(stream: bytes, fact: str) -> None:
    assert fact in refused(stream)


@pytest.mark.guarantee("damaged-pickles")
def test_truncation_of_a_real_pickle_anywhere() -> None:
    stream = next_to_weights(EVIL["OBJ"])
    for end in range(len(stream)):
        refused(stream[:end])


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
    path = tmp_path / "step_1.pt"
    for stream in streams:
        path.write_bytes(archive_of(Member(b"a/data.pkl", stream), RECORD))
        with pytest.raises(CheckpointFormatError) as caught:
            open_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).isprintable()


# --- bombs -------------------------------------------------------------------------------------------------

_BOMB = """
import json, resource, sys, time
from pathlib import Path
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.pickles.unpickler import read_pickle
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.state_dict import find_state_dict
stream = sys.stdin.buffer.read()
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
start = time.process_time()
read_pickle(b"\\x80\\x04" + b"N0" * 200_000 + b"N.", "harmless")
harmless = time.process_time() - start
before, start = used(), time.process_time()
try:
    result = read_pickle(stream, "file.pt")
    find_state_dict(result, Path("file.pt"), Reading())
    said = "accepted"
except CheckpointFormatError as error:
    said = str(error)
seconds, memory = time.process_time() - start, used() - before
print(json.dumps([said, seconds / harmless, memory]), flush=True)
"""
LEVELS = 60
NESTED = 100_000
TUPLE_BOMB = b")" + b"2\x86" * LEVELS
COLLIDING = [(2**61 - 1) * number for number in range(1, 30_001)]
WIDE = b"(" + b"K\1" * 100_000 + b"t"
AGAIN = b"h\0h\1R" * 2_000


def frozen_chain() -> bytes:
    """Frozen sets of the two before them: two equal chains take exponential time to compare."""
    levels = b"".join(b"(h\0h\1\x91(h\0h\1K" + bytes([level]) + b"\x91q\x010q\x000" for level in range(LEVELS))
    return b"(K\x01\x91q\x000(K\x02\x91q\x010" + levels + b"h\0"


BOMBS: dict[str, bytes] = {
    "frozen sets compared": b"}(" + frozen_chain() + b"N" + frozen_chain() + b"Nu",
    "bytearray of 10^11 bytes": b"\x96" + struct.pack("<Q", 10**11),
    "bytearray of 2 GiB": b"\x96" + struct.pack("<Q", 2**31),
    "bytes of 2^62 bytes": b"\x8e" + struct.pack("<Q", 2**62),
    "text of 4 GiB": b"X\xff\xff\xff\xff",
    "frame of 2^62 bytes": b"\x95" + struct.pack("<Q", 2**62),
    "long of 2 GiB": b"\x8b\xff\xff\xff\x7f",
    "long of 1 MiB": b"\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20,
    "long text of 1 MiB": b"L" + b"7" * 2**20 + b"L\n",
    "memo at 2^32-1": b"Nr\xff\xff\xff\xff",
    "memo at 2^60": b"Np" + str(2**60).encode() + b"\n",
    "memo of colliding indices": b"N" + b"".join(b"p%d\n" % number for number in COLLIDING),
    "dict of colliding keys": b"}(" + b"".join(b"L%dL\nN" % number for number in COLLIDING) + b"u",
    "dict of colliding tuples": b"}(" + b"".join(b"L%dL\n\x85N" % number for number in COLLIDING) + b"u",
    "set of colliding keys": b"\x8f(" + b"".join(b"L%dL\n" % number for number in COLLIDING) + b"\x90",
    "billion laughs": b"](" + text("lol") + b"e" + b"q\0](h\0h\0h\0h\0h\0h\0h\0h\0h\0e" * 30,
    "nested lists": b"]" * NESTED + b"a" * (NESTED - 1),
    "nested tuples": b")" + b"\x85" * NESTED,
    "nested dicts": b"}K\1" * NESTED + b"N" + b"s" * NESTED,
    "nested dicts by name": (b"}" + text("a")) * NESTED + b"N" + b"s" * NESTED,
    "nested objects": named("foo", "Bar") + b"q\0)" + b"q\x010h\0h\1\x85R" * NESTED,
    "nested calls": (named("foo", "Bar") + b"(") * 20_000 + b"N" + b"tR" * 20_000,
    "nested states": named("foo", "Bar") + b"q\0)\x81" + (b"q\x010h\0)\x81h\1b") * NESTED,
    "marks": b"(" * 1_000_000,
    "shared tuple as a key": b"}" + TUPLE_BOMB + b"Ns",
    "shared tuple in a set": b"\x8f(" + TUPLE_BOMB + b"\x90",
    "shared tuple in a frozenset": b"(" + TUPLE_BOMB + b"\x91",
    "shared tuple in an ordered dict": (
        named("collections", "OrderedDict") + b"](" + TUPLE_BOMB + b"N\x86e\x85R"
    ),
    "shared tuple called": TUPLE_BOMB + b")R",
    "shared tuple called as an object": b"(" + TUPLE_BOMB + b"o",
    "shared tuple instantiated": TUPLE_BOMB + b")}\x92",
    "shared tuple as a rebuild function": (
        named("torch._tensor", "_rebuild_from_type_v2")
        + sequence(TUPLE_BOMB, named("torch", "Tensor"), b")", b"}") + b"R"
    ),
    "shared tuple as a storage": (
        named("torch._utils", "_rebuild_tensor_v2") + sequence(TUPLE_BOMB, b"K\0", b")", b")") + b"R"
    ),
    "shared tuple as a dtype": (
        named("torch._utils", "_rebuild_tensor_v3")
        + sequence(STORAGE, b"K\0", b")", b")", b"\x89", b"N", TUPLE_BOMB) + b"R"
    ),
    "shared tuple as a persistent id": TUPLE_BOMB + b"Q",
    "shared tuple as a name": TUPLE_BOMB + b"2\x93",
    "shared dict of dicts": b"}q\0" + b"".join(
        b"0}(" + b"".join(text(str(number)) + b"h\0" for number in range(100)) + b"uq\0" for _ in range(6)
    ),
    "dict of itself": b"}q\0(" + b"".join(text(str(number)) + b"h\0" for number in range(100)) + b"u",
    "long arguments, again and again": named("foo", "Bar") + b"q\0" + WIDE + b"q\1(" + AGAIN + b"t",
    "long shape, again and again": (
        named("torch", "Size") + b"q\0](" + b"K\1" * 100_000 + b"e\x85q\1(" + AGAIN + b"t"
    ),
    "long dict, again and again": (
        named("collections", "OrderedDict") + b"q\0}("
        + b"".join(whole(number) + b"N" for number in range(50_000)) + b"u\x85q\1(" + AGAIN + b"t"
    ),
    "many globals": b"".join(named("m", f"n{number}") + b"0" for number in range(LIMITS.pickle_globals + 1)) + b"N",
    "long global": named("m" * 2**20, "n" * 2**20) + b")\x81",
}  # fmt: skip


QUICK = ("frozen sets compared", "bytearray of 10^11 bytes", "billion laughs")


@pytest.mark.guarantee("no-code-runs", "pickle-bombs")
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in BOMBS if name not in QUICK)]
)
def test_bombs_end_soon_and_small(name: str) -> None:
    """At most what a harmless pickle of all allowed operations takes, 64 MiB and 4 × the pickle; never a crash."""
    stream = proto(BOMBS[name], 4)
    try:
        done = subprocess.run([sys.executable, "-c", _BOMB], input=stream, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        pytest.fail("it goes on and on")
    assert done.returncode == 0, done.stderr.decode()[-500:]
    said, ratio, memory = json.loads(done.stdout)
    assert said == "accepted" or said.startswith("file.pt: ")
    assert ratio < LIMITS.pickle_operations / 400_000
    assert memory < 64 * 2**20 + 4 * len(stream)


@pytest.mark.guarantee("pickle-bombs")
def test_the_limit_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_specs._Counted, "left", 100)
    assert read_pickle(proto(b"N0" * 48 + b"N"), "file.pt") is None
    message = refused(proto(b"N0" * 50 + b"N"))
    assert f"expected at most {LIMITS.pickle_operations:,} operations in the pickle, got more" in message
    assert "don't trust the file" in message


def test_the_limit_counts_each_pickle_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_specs._Counted, "left", 100)
    for _ in range(3):
        assert read_pickle(proto(b"N0" * 40 + b"N"), "file.pt") is None


@pytest.mark.guarantee("pickle-bombs")
def test_the_limit_of_globals() -> None:
    enough = b"".join(named("m", f"n{number}") + b"0" for number in range(LIMITS.pickle_globals))
    assert read_pickle(proto(enough + named("m", "n0") + b"0N"), "file.pt") is None
    message = refused(proto(enough + named("m", "one more") + b"0N"))
    assert "expected at most 10,000 names in the pickle, got more" in message


def test_an_object_made_by_another_object_is_inert() -> None:
    """Before protocol 4, objects with keyword arguments of ``__new__`` are pickled as a call of a partial."""
    result = read_pickle(pickle.dumps(Keyworded(size=2), 2), "file.pt")
    assert isinstance(result, Foreign)


class Keyworded:
    def __new__(cls, *, size: int) -> Keyworded:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"size": 2}


def test_a_deeply_shared_key_is_never_hashed() -> None:
    """Hashing it would take 2^60 steps; it has a key of its own instead."""
    result = read_pickle(proto(b"}" + b")" + b"2\x86" * 60 + b"Ns"), "x")
    assert list(result.values()) == [None]  # type: ignore[attr-defined]


def test_a_deeply_nested_archive_is_refused_not_crashed(tmp_path: Path) -> None:
    for payload in (b"]" * NESTED + b"a" * (NESTED - 1), b")" + b"\x85" * NESTED):
        with open_checkpoint(archive(tmp_path / "deep.pt", next_to_weights(payload))) as checkpoint:
            assert list(checkpoint.spec.tensors) == ["w"]


# --- mutated real files ------------------------------------------------------------------------------------

_FUZZ = settings(
    max_examples=120, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def _real(version: int) -> bytes:
    stream = io.BytesIO()
    weight = torch.arange(6.0).view(2, 3)
    contents = {
        "model": OrderedDict(w=weight, tied=weight, t=weight.t(), half=weight.half(), fp8=weight.to(torch.float8_e5m2)),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "epoch": 3,
        "keys": frozenset({1, "a"}),
        "parameter": torch.nn.Parameter(weight),
    }
    torch.save(contents, stream, pickle_protocol=version)
    return stream.getvalue()


ARCHIVES = [_real(version) for version in (2, 4)]
PICKLES = [zipfile.ZipFile(io.BytesIO(content)).read("archive/data.pkl") for content in ARCHIVES]
_edit = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 3), st.binary(max_size=3))
_opcode = st.sampled_from([bytes([value]) for value in pickle_specs._SpecUnpickler.dispatch])
_edits = st.lists(
    _edit | st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 1), _opcode), min_size=1, max_size=5
)


def edited(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for where, removed, inserted in edits:
        position = int(where * len(content))
        content = content[:position] + inserted + content[position + removed :]
    return content


@_FUZZ
@given(source=st.sampled_from(PICKLES), edits=_edits)
def test_mutated_pickles(source: bytes, edits: list[tuple[float, int, bytes]]) -> None:
    """Only the documented exception comes out, or a value."""
    try:
        read_pickle(edited(source, edits), "file.pt")
    except CheckpointFormatError as error:
        assert str(error).startswith("file.pt: ")


@_FUZZ
@given(st.lists(_opcode | st.binary(max_size=4), max_size=30).map(b"".join))
def test_random_opcodes(stream: bytes) -> None:
    try:
        read_pickle(stream, "file.pt")
    except CheckpointFormatError as error:
        assert str(error).startswith("file.pt: ")


@pytest.mark.parametrize(
    "inner", [pytest.param(False, marks=pytest.mark.slow), True], ids=["archive", "pickle in a sound archive"]
)
def test_mutated_archives(tmp_path: Path, inner: bool) -> None:
    """Every view of a file that opens is inside it."""
    path = tmp_path / "mutated.pt"

    @_FUZZ
    @given(number=st.integers(0, 1), edits=_edits)
    def check(number: int, edits: list[tuple[float, int, bytes]]) -> None:
        if inner:
            with zipfile.ZipFile(io.BytesIO(ARCHIVES[number])) as source, zipfile.ZipFile(path, "w") as target:
                for info in source.infolist():
                    content = source.read(info)
                    is_pickle = info.filename.endswith("data.pkl")
                    target.writestr(zipfile.ZipInfo(info.filename), edited(content, edits) if is_pickle else content)
        else:
            path.write_bytes(edited(ARCHIVES[number], edits))
        try:
            with open_checkpoint(path) as checkpoint:
                size: Any = path.stat().st_size
                for tensor in checkpoint.spec.tensors.values():
                    if tensor.numel:
                        steps = zip(tensor.shape, tensor.stride, strict=True)
                        last = sum((extent - 1) * step for extent, step in steps)
                        assert 0 <= tensor.offset <= tensor.offset + (last + 1) * tensor.dtype.itemsize <= size
        except CheckpointFormatError as error:
            assert str(error).startswith(f"{path}: ")

    check()
