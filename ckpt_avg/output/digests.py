"""SHA-256 digests: of the output's data section as a tree, and of files as ``sha256sum`` prints them.

The data section is cut into chunks of 1 MiB from its first byte; the last chunk may be shorter. Its digest is the
SHA-256 of the chunks' SHA-256 digests, 32 bytes each, in order. So several threads can compute it while writing, and
anyone can recompute it with ``split`` and ``sha256sum``.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.torch_zip import MAGIC
from ckpt_avg.formats.zip_directory import refuse_damaged
from ckpt_avg.machine import SharedItems, run_workers

CHUNK = 2**20
_DIGEST = 32  # bytes

ReadAt = Callable[[int, int], bytes]
Item = TypeVar("Item")


class TreeDigest:
    """The digest of a data section of ``nbytes``, which is written in any order by several threads.

    A chunk that is written in several parts is assembled in memory. There are never many of these, because writers go
    from the front to the back. Each chunk takes 33 bytes.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        count = -(-nbytes // CHUNK)
        self._digests = bytearray(_DIGEST * count)
        self._known = bytearray(count)
        self._incomplete: dict[int, tuple[bytearray, list[int]]] = {}  # chunk → its bytes, how many are missing
        self._lock = threading.Lock()

    def add(self, contents: memoryview, offset: int) -> None:
        """Adds the bytes that were written at ``offset``. No byte may be added twice."""
        contents = contents.cast("B")
        begin, end = offset, offset + len(contents)
        while begin < end:
            chunk = begin // CHUNK
            first, stop = self._bounds(chunk)
            part = contents[begin - offset : min(end, stop) - offset]
            complete = part if len(part) == stop - first else self._assemble(chunk, part, begin - first)
            if complete is not None:
                self._set(chunk, hashlib.sha256(complete).digest())
            begin = stop

    def invalidate(self, offset: int, length: int) -> None:
        """Forgets bytes that are written again: `finish` reads their chunks."""
        with self._lock:
            for chunk in range(offset // CHUNK, -(-(offset + length) // CHUNK)):
                self._known[chunk] = 0
                self._incomplete.pop(chunk, None)

    def known(self) -> list[tuple[int, str]]:
        """Returns what another rank needs for `update`: the first chunk of each sequence, and its digests in hex."""
        found: list[tuple[int, str]] = []
        chunk = 0
        while (chunk := self._known.find(1, chunk)) >= 0:
            end = self._known.find(0, chunk)
            end = len(self._known) if end < 0 else end
            found.append((chunk, self._digests[_DIGEST * chunk : _DIGEST * end].hex()))
            chunk = end
        return found

    def update(self, known: Iterable[tuple[int, str]]) -> None:
        """Adds the digests of another rank."""
        for chunk, digests in known:
            found = bytes.fromhex(digests)
            self._digests[_DIGEST * chunk : _DIGEST * chunk + len(found)] = found
            self._known[chunk : chunk + len(found) // _DIGEST] = b"\1" * (len(found) // _DIGEST)

    def finish(self, read: ReadAt) -> str:
        """Returns the digest in hex; ``read(offset, length)`` returns bytes of chunks that are not known."""
        chunk = 0
        while (chunk := self._known.find(0, chunk)) >= 0:
            first, stop = self._bounds(chunk)
            self._set(chunk, hashlib.sha256(read(first, stop - first)).digest())
        return hashlib.sha256(self._digests).hexdigest()

    def _bounds(self, chunk: int) -> tuple[int, int]:
        return chunk * CHUNK, min(self._nbytes, (chunk + 1) * CHUNK)

    def _set(self, chunk: int, digest: bytes) -> None:
        with self._lock:
            self._digests[_DIGEST * chunk : _DIGEST * (chunk + 1)] = digest
            self._known[chunk] = 1

    def _assemble(self, chunk: int, part: memoryview, position: int) -> bytearray | None:
        """Adds a part of a chunk; returns the chunk if it is complete."""
        with self._lock:
            first, stop = self._bounds(chunk)
            contents, missing = self._incomplete.setdefault(chunk, (bytearray(stop - first), [stop - first]))
            contents[position : position + len(part)] = part
            missing[0] -= len(part)
            if missing[0]:
                return None
            del self._incomplete[chunk]
            return contents


def digest_data(
    file: InputFile, begin: int, *, threads: int, progress: Callable[[int], None] = lambda nbytes: None
) -> str:
    """Returns the tree digest of a file's data section, from byte ``begin`` to its end, in hex.

    ``progress`` is called with the bytes that were read, by one thread at a time.

    Raises:
        CheckpointFormatError: the file cannot be read, or changed.
    """
    nbytes = file.size - begin
    digest = TreeDigest(nbytes)

    def add(offset: int, read: Callable[[InputFile, int, int], bytes]) -> None:
        digest.add(memoryview(read(file, begin + offset, min(CHUNK, nbytes - offset))), offset)

    _for_each(range(0, nbytes, CHUNK), add, threads=threads, progress=progress)
    return digest.finish(lambda offset, length: file.read(begin + offset, length))


def digest_files(
    checkpoints: Sequence[Checkpoint], *, threads: int, progress: Callable[[int], None] = lambda nbytes: None
) -> list[dict[str, str]]:
    """Returns, for each checkpoint, the SHA-256 of each file of its tensors, by the file's name in the checkpoint.

    The CRC-32 that ``torch.save`` recorded is checked as well, because all bytes are read anyway. ``progress`` is
    called with the bytes that were read, by one thread at a time.

    Raises:
        CheckpointFormatError: a file cannot be read, changed, or is damaged.
    """
    named = [
        {name_in(checkpoint, file.path): file for file in checkpoint.files if isinstance(file, InputFile)}
        for checkpoint in checkpoints
    ]
    digests: dict[int, str] = {}

    def digest(file: InputFile, read: Callable[[InputFile, int, int], bytes]) -> None:
        digests[id(file)] = digest_stream(lambda offset, length: read(file, offset, length), file.size)

    _for_each((file for each in named for file in each.values()), digest, threads=threads, progress=progress)
    for checkpoint in checkpoints:
        if "torch zip" in checkpoint.spec.format:
            for file in checkpoint.files:
                if isinstance(file, InputFile) and file.read(0, min(file.size, 4)) == MAGIC:
                    refuse_damaged(file)
    return [{name: digests[id(file)] for name, file in each.items()} for each in named]


def _for_each(
    items: Iterable[Item],
    do: Callable[[Item, Callable[[InputFile, int, int], bytes]], None],
    *,
    threads: int,
    progress: Callable[[int], None],
) -> None:
    """Calls ``do(item, read)`` for each item, in several threads; ``read(file, offset, length)`` reports progress."""
    lock = threading.Lock()

    def work(shared: SharedItems[Item]) -> None:
        def read(file: InputFile, offset: int, length: int) -> bytes:
            shared.check()
            found = file.read(offset, length)
            with lock:
                progress(length)
            return found

        for item in shared:
            do(item, read)

    run_workers(threads, items, work)


def name_in(checkpoint: Checkpoint, path: Path) -> str:
    """Returns the name of a checkpoint's file, relative to its folder, as text."""
    folder = checkpoint.spec.path if checkpoint.spec.path.is_dir() else checkpoint.spec.path.parent
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
    return os.fsencode(name).decode(errors="backslashreplace")


def digest_stream(read: ReadAt, nbytes: int) -> str:
    """Returns the plain SHA-256 of ``nbytes`` bytes, in hex."""
    digest = hashlib.sha256()
    for offset in range(0, nbytes, CHUNK):
        digest.update(read(offset, min(CHUNK, nbytes - offset)))
    return digest.hexdigest()
