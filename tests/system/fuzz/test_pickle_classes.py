"""No code of a checkpoint runs: every published way past the pickle scanners, and pickles of a grammar.

Everything is opened under an audit hook, in a process of its own. Apart from reading the file, nothing may happen.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from formats.pickles.opcodes import MAGIC, called, large, listed, mapping, proto, tensor, text, whole
from system.fuzz.bypasses import BYPASSES, INDIRECT, PARSED_OTHERWISE, SYSTEM, TOUCH, UNLISTED
from system.fuzz.corpus import FLOATS, array, checkpoint_pickle, stored_zip, torch_zip

pytestmark = pytest.mark.slow

EVIL = called(SYSTEM, TOUCH)
LIVE = proto(EVIL)


def audited(*arguments: object, timeout: float = 120) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "system.fuzz.audited", *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def zipped(payload: bytes) -> bytes:
    return torch_zip(checkpoint_pickle({text("evil"): payload}))


def streamed(payload: bytes) -> bytes:
    start = proto(large(MAGIC)) + proto(whole(1001)) + proto(mapping({text("little_endian"): b"\x88"}))
    weights = mapping({text("w"): tensor("0", (2, 3), view=True)})
    contents = proto(mapping({text("model"): weights, text("evil"): payload}), 4)
    return start + contents + proto(listed(text("0"))) + struct.pack("<q", 6) + FLOATS


def bare(payload: bytes) -> bytes:
    return proto(mapping({text("model"): mapping({text("w"): array()}), text("evil"): payload}), 4)


FORMS = {"zip": zipped, "stream": streamed, "bare": bare}


def _changed(content: bytes, signature: bytes, offset: int, raw: bytes) -> bytes:
    """Changes the first record of a kind."""
    at = content.index(signature) + offset
    return content[:at] + raw + content[at + len(raw) :]


def around() -> dict[str, bytes]:
    """Files whose form, not whose pickle, has misled a scanner."""
    sound, evil = torch_zip(checkpoint_pickle({})), zipped(EVIL)
    members = {"a/data.pkl": checkpoint_pickle({}), "a/data/0": FLOATS, "a/data/1": bytes(8)}
    return {
        "flag of encryption in the directory": _changed(evil, b"PK\1\2", 8, b"\1\0"),
        "flag of encryption in the local header": _changed(evil, b"PK\3\4", 6, b"\1\0"),
        "unknown flags": _changed(evil, b"PK\1\2", 8, b"\x20\0"),
        "another name in the local header": _changed(evil, b"PK\3\4", 30, b"b/data.pkl"),
        "another name in the directory": _changed(evil, b"PK\1\2", 46, b"b/data.pkl"),
        "a wrong CRC in the directory": _changed(evil, b"PK\1\2", 16, b"\0\0\0\0"),
        "a wrong CRC in both": _changed(_changed(evil, b"PK\1\2", 16, b"ABCD"), b"PK\3\4", 14, b"ABCD"),
        "a method that is none": _changed(evil, b"PK\1\2", 10, b"\x63\0"),
        "a second pickle of another name": stored_zip({**members, "a/extra.pkl": LIVE, "a/x.bin": LIVE, "b.dat": LIVE}),
        "a pickle for constants": stored_zip({**members, "a/constants.pkl": LIVE}),
        "two pickles": stored_zip({**members, "b/data.pkl": LIVE}),
        "a version that is a pickle": stored_zip({**members, "a/version": LIVE, "a/byteorder": b"little"}),
        "bytes before the archive": b"\x80\x04" + evil,
        "a pickle before the archive": LIVE + evil,
        "a pickle after the archive": sound + LIVE,
        "a pickle after the pickle": proto(mapping({text("w"): array()}), 4) + LIVE,
        "a pickle before the pickle": LIVE + proto(mapping({text("w"): array()}), 4),
        "a pickle after the stream": streamed(b"N") + LIVE,
        "a pickle for the keys of a stream": streamed(b"N").replace(proto(listed(text("0"))), LIVE),
        "a pickle for the version of a stream": streamed(b"N").replace(proto(whole(1001)), LIVE),
        "a compressed container": b"7z\xbc\xaf\x27\x1c\0\4" + evil,
        "protocol 0 without its first byte": b"cos\nsystem\n(S'touch touched'\ntR.",
    }


def written(folder: Path, files: Mapping[str, bytes], suffix: str = "") -> dict[str, str]:
    """Writes files under numbers, since the names of payloads are no names of files; returns number → name."""
    names = {}
    for number, (name, content) in enumerate(files.items()):
        names[f"{number:03}{suffix}"] = name
        (folder / f"{number:03}{suffix}").write_bytes(content)
    return names


@pytest.mark.guarantee("no-code-runs")
@pytest.mark.parametrize("form", FORMS)
def test_a_published_bypass_does_nothing(tmp_path: Path, form: str) -> None:
    """No import, exec, process, socket, write, nor another event, and the weights next to the payload open."""
    files = {name: FORMS[form](payload) for name, payload in BYPASSES.items()}
    names = written(tmp_path, files, ".pickle" if form == "bare" else "")
    answers = {names[number]: answer for number, answer in audited("ours", tmp_path).items()}
    assert len(answers) == len(BYPASSES)
    assert {name: events for name, (_, events) in answers.items() if events} == {}
    opened = {name for name, (accepted, _) in answers.items() if accepted}
    assert (UNLISTED.keys() | INDIRECT.keys()) - opened == set()
    assert len(opened & PARSED_OTHERWISE.keys()) > 20


@pytest.mark.guarantee("no-code-runs")
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".txt", ".safetensors", ".pickle", ""])
def test_a_misleading_file_does_nothing(tmp_path: Path, suffix: str) -> None:
    """A scanner chooses what to look at by names, flags and checksums; here none of them starts anything."""
    names = written(tmp_path, around(), suffix)
    answers = {names[number]: answer for number, answer in audited("ours", tmp_path).items()}
    assert {name: events for name, (_, events) in answers.items() if events} == {}


def let_loose(folder: Path, names: list[str]) -> tuple[set[str], int, set[str]]:
    """Loads payloads by the standard unpickler: which were silent, how many did their work, the kinds of events."""
    numbers = written(folder, {name: proto(BYPASSES[name], 4) for name in names})
    answers = {numbers[number]: answer for number, answer in audited("standard", folder, timeout=600).items()}
    kinds = {event.partition(" ")[0] for _, events in answers.values() for event in events}
    silent = {name for name, (_, events) in answers.items() if not events}
    return silent, sum(touched for touched, _ in answers.values()), kinds


def test_the_standard_unpickler_runs_some_of_them(tmp_path: Path) -> None:
    """The same hook over every seventh payload: they are live, and the tests above can fail."""
    silent, touched, kinds = let_loose(tmp_path, list(BYPASSES)[2::7])
    assert silent <= {"EXT1"}  # nobody has registered the code
    assert touched >= 5
    assert {"os.system", "exec", "compile", "import", "open", "pickle.find_class"} <= kinds


@pytest.mark.guarantee("no-code-runs")
@pytest.mark.campaign
def test_the_standard_unpickler_runs_them(tmp_path: Path) -> None:
    silent, touched, kinds = let_loose(tmp_path, list(BYPASSES))
    assert silent <= {"EXT1"}  # nobody has registered the code
    assert touched >= 60
    assert {"subprocess.Popen", "os.posix_spawn", "socket.connect", "pty.spawn"} <= kinds


def test_generated_pickles_do_nothing() -> None:
    answer = audited("grammar", 0, 500)
    assert (answer["heard"], answer["imported"]) == ({}, [])
    assert answer["accepted"] > 20


@pytest.mark.guarantee("no-code-runs")
@pytest.mark.campaign
def test_a_hundred_thousand_generated_pickles_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    answer = audited("grammar", 1, 100_000, timeout=3600)
    with capsys.disabled():
        print(f"\n{answer}")
    assert (answer["heard"], answer["imported"]) == ({}, [])
    assert answer["count"] == 100_000


def test_the_standard_unpickler_runs_generated_pickles() -> None:
    """The grammar reaches names and calls: most of its pickles look names up, and many call what they found."""
    answer = audited("wild", 0, 40)
    assert answer["active"] >= 30
    assert {"import", "pickle.find_class", "exec"} <= set(answer["kinds"])
