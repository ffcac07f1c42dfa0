"""The digest of a data section: the same whatever the order and the pieces, and as a shell's tools have it."""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from formats.test_sharded import write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.output import digests
from ckpt_avg.output.digests import CHUNK, TreeDigest, digest_data, digest_files, digest_stream


def expected(data: bytes, chunk: int = CHUNK) -> str:
    chunks = [data[start : start + chunk] for start in range(0, len(data), chunk)]
    return hashlib.sha256(b"".join(hashlib.sha256(each).digest() for each in chunks)).hexdigest()


def never(offset: int, length: int) -> bytes:
    raise AssertionError(f"{length} bytes at {offset} are read a second time")


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 70), st.lists(st.integers(0, 70), max_size=12), st.randoms(use_true_random=False))
def test_any_pieces_in_any_order_give_the_digest(size: int, cuts: list[int], order: random.Random) -> None:
    """If it failed, the digest would depend on threads, memory or ranks."""
    data = bytes(order.randrange(256) for _ in range(size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "CHUNK", 16)
        bounds = sorted({0, size, *(min(cut, size) for cut in cuts)})
        pieces = list(itertools.pairwise(bounds))
        order.shuffle(pieces)
        digest = TreeDigest(size)
        for start, stop in pieces:
            digest.add(memoryview(data)[start:stop], start)
        assert digest.finish(never) == expected(data, 16)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(0, 69), st.integers(1, 20), st.integers(0, 70))
def test_what_is_written_again_is_read_again(size: int, start: int, length: int, share: int) -> None:
    """If it failed, an output whose BatchNorm statistics were refreshed would not verify, nor one of many ranks."""
    data = bytearray(range(size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "CHUNK", 16)
        first, second = TreeDigest(size), TreeDigest(size)
        share = min(share, size)
        first.add(memoryview(bytes(data))[:share], 0)
        second.add(memoryview(bytes(data))[share:], share)
        first.update(second.known())
        for index in range(min(start, size), min(start + length, size)):
            data[index] ^= 0xFF
        if start < size:
            first.invalidate(start, min(length, size - start))
        read = []
        found = first.finish(lambda offset, count: read.append(count) or bytes(data[offset : offset + count]))
        assert found == expected(bytes(data), 16)
        assert sum(read) <= length + 32 + 16


def test_threads_may_share_it() -> None:
    data = random.Random(0).randbytes(3 * CHUNK + 17)
    digest = TreeDigest(len(data))
    step = 100_003

    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(data), step):
            pool.submit(digest.add, memoryview(data)[start : start + step], start)
    assert digest.finish(never) == expected(data)


@pytest.mark.parametrize("nbytes", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_data_of_a_file_is_digested_by_many_threads(tmp_path: Path, nbytes: int, threads: int) -> None:
    data = random.Random(nbytes).randbytes(nbytes)
    (tmp_path / "file").write_bytes(b"header" + data)
    read: list[int] = []
    with InputFile(tmp_path / "file") as file:
        assert digest_data(file, 6, threads=threads, progress=read.append) == expected(data)
        assert digest_stream(file.read, file.size) == hashlib.sha256(b"header" + data).hexdigest()
    assert sum(read) == nbytes


@pytest.mark.skipif(not all(map(shutil.which, ("split", "xxd"))), reason="needs split and xxd")
def test_the_tools_of_a_shell_give_the_same(tmp_path: Path) -> None:
    """As the documentation says how to recompute it."""
    data = random.Random(1).randbytes(2 * CHUNK + 99)
    (tmp_path / "data").write_bytes(data)
    line = "split -b 1M --filter=sha256sum | cut -c -64 | xxd -r -p | sha256sum"
    with (tmp_path / "data").open("rb") as file:
        printed = subprocess.run(["sh", "-c", line], stdin=file, capture_output=True, text=True, check=True).stdout
    assert printed.split()[0] == expected(data)


def test_files_are_named_as_in_their_checkpoint(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    index = write(tmp_path / "sharded", {"a": torch.ones(2)}, {"b": torch.ones(3)})
    with open_checkpoint(tmp_path / "a.pt") as one, open_checkpoint(index.parent) as sharded:
        found = digest_files([one, sharded], threads=2)
    shards = sorted(index.parent.glob("*.safetensors"))
    assert found == [
        {"a.pt": hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest()},
        {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards},
    ]


def test_a_torch_file_whose_bytes_are_not_those_that_were_saved_is_refused(tmp_path: Path) -> None:
    """If it failed, --sha256 would vouch for a damaged checkpoint."""
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.find(torch.arange(1000.0).numpy().tobytes()) + 1999] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    expected = r"a\.pt: member 'a/data/0': expected CRC-32 [0-9a-f]{8}, got"
    with (
        open_checkpoint(tmp_path / "a.pt") as checkpoint,
        pytest.raises(CheckpointFormatError, match=expected) as error,
    ):
        digest_files([checkpoint], threads=1)
    assert error.value.exit_code == 3


def test_shards_of_two_formats_are_digested(tmp_path: Path) -> None:
    """CRC-32 is checked only in files that are archives."""
    index = write(tmp_path / "sharded", {"a": torch.ones(2)}, {"b": torch.ones(3)}, suffix="bin", stem="pytorch_model")
    shard = index.parent / "pytorch_model-00002-of-00002.bin"
    save_file({"b": torch.ones(3)}, shard)
    with open_checkpoint(index.parent) as checkpoint:
        assert len(digest_files([checkpoint], threads=2)[0]) == 2


def test_a_torch_file_saved_without_checksums_passes(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(1000.0)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert len(digest_files([checkpoint], threads=1)) == 1
