"""What fuzzing found, as small as it could be made: each was once accepted, or refused after much time or memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
from formats.pickles.opcodes import listed, mapping, proto, restored, text
from system.fuzz.corpus import safetensors_file

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.open import open_checkpoint

_OPEN = """
import resource, sys, time
from pathlib import Path
from system.fuzz.campaign import limit_memory
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.open import open_checkpoint

limit_memory(64 * 2**20 + 4 * int(sys.argv[2]))
resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 3, 10))
try:
    open_checkpoint(Path(sys.argv[1]))
except CheckpointFormatError as error:
    print(error)
"""

pytestmark = pytest.mark.guarantee("hostile-bytes")
linux = pytest.mark.skipif(sys.platform != "linux", reason="processor time and memory are limited by Linux's means")


def refused(path: Path, header: int) -> str:
    """Opens what must be refused within 64 MiB + 4 × the header and some 2 seconds; returns the message."""
    command = [sys.executable, "-c", _OPEN, str(path), str(header)]
    tests = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tests, timeout=60, check=False)
    assert done.returncode >= 0, f"killed by signal {-done.returncode} for its processor time"
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.startswith(f"{path}")
    return done.stdout


BODIES = {
    "lists": b"[" + b"[]," * 3_000_000 + b"0]",
    "objects": b"[" + b"{}," * 3_000_000 + b"0]",
    "names": b"{" + b",".join(b'"%x":0' % number for number in range(1_000_000)) + b"}",
}


@pytest.mark.slow
@linux
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_an_index_of_very_many_values_stays_in_memory_bounds(tmp_path: Path, body: bytes) -> None:
    """An empty list takes three bytes of the file and some seventy of memory, a name of no file ten and 150."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b'{"weight_map":' + body + b"}")
    assert "expected " in refused(index, index.stat().st_size)


@pytest.mark.slow
@linux
def test_metadata_whose_tensors_share_their_parts_is_read_in_bounded_time(tmp_path: Path) -> None:
    """16 KB name 1,000 tensors, all of the same 3,000 parts: looking at each part of each is three million steps."""
    chunk = restored("m", "Chunk", {"offsets": b"K\0\x85", "sizes": b"K\1\x85"})
    entry = restored("m", "Tensor", {"size": b"K\1\x85", "chunks": listed(chunk + b"q\1", *[b"h\1"] * 2_999)})
    names = {text(str(number)): b"h\2" if number else entry + b"q\2" for number in range(1_000)}
    metadata = restored("m", "Metadata", {"state_dict_metadata": mapping(names), "storage_data": b"}"})
    (tmp_path / ".metadata").write_bytes(proto(metadata))
    assert refused(tmp_path, (tmp_path / ".metadata").stat().st_size)


@pytest.mark.parametrize("number", [b"-0", b"100000000000000000000"])
def test_metadata_that_is_a_number_is_refused_whatever_the_number(tmp_path: Path, number: bytes) -> None:
    """Numbers that are no sizes stay text for the message that refuses them; in metadata that text was taken."""
    path = tmp_path / "input.safetensors"
    path.write_bytes(safetensors_file(b'{"__metadata__":{"":%s}}' % number, b""))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(path.read_bytes())
    with pytest.raises(CheckpointFormatError, match="__metadata__: expected an object of strings") as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 3
