"""SHA-256 of a data section as a tree of two levels, so that many hands can compute it while they write.

The data section is cut into leaves of 1 MiB, counted from its first byte; the last may be shorter. The digest is
SHA-256 over the SHA-256 digests of the leaves, 32 bytes each, one after the other. Anyone can recompute it with
``split`` and ``sha256sum``.
"""

from __future__ import annotations

import functools
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
from ckpt_avg.mean.workers import SharedItems, run_workers

LEAF = 2**20
_DIGEST = 32  # bytes

ReadAt = Callable[[int, int], bytes]
Item = TypeVar("Item", int, InputFile)


class TreeDigest:
    """The digest of a data section that is written in any order, in pieces of any size. Threads may share it.

    A leaf that comes in several pieces is put together in memory; there are never many, since writers go from the
    front to the back. It takes 33 bytes for each leaf.

    Args:
        nbytes: of the data section.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        count = -(-nbytes // LEAF)
        self._digests = bytearray(_DIGEST * count)
        self._known = bytearray(count)
        self._parts: dict[int, tuple[bytearray, list[int]]] = {}
        self._lock = threading.Lock()

    def add(self, contents: memoryview, offset: int) -> None:
        """Takes bytes that stand at ``offset`` of the data section from now on. No byte comes twice."""
        contents = contents.cast("B")
        begin, end = offset, offset + len(contents)
        while begin < end:
            leaf = begin // LEAF
            first, stop = self._bounds(leaf)
            piece = contents[begin - offset : min(end, stop) - offset]
            whole = piece if len(piece) == stop - first else self._collect(leaf, piece, begin - first)
            if whole is not None:
                self._set(leaf, hashlib.sha256(whole).digest())
            begin = stop

    def forget(self, offset: int, length: int) -> None:
        """Says that these bytes are being written again: their leaves are read anew in the end."""
        with self._lock:
            for leaf in range(offset // LEAF, -(-(offset + length) // LEAF)):
                self._known[leaf] = 0
                self._parts.pop(leaf, None)

    def known(self) -> list[tuple[int, str]]:
        """Returns what is known, as (first leaf, digests of it and those behind it, in hex)."""
        runs: list[tuple[int, str]] = []
        leaf = 0
        while (leaf := self._known.find(1, leaf)) >= 0:
            end = self._known.find(0, leaf)
            end = len(self._known) if end < 0 else end
            runs.append((leaf, self._digests[_DIGEST * leaf : _DIGEST * end].hex()))
            leaf = end
        return runs

    def join(self, runs: Iterable[tuple[int, str]]) -> None:
        """Takes what another rank knows."""
        for leaf, digests in runs:
            found = bytes.fromhex(digests)
            self._digests[_DIGEST * leaf : _DIGEST * leaf + len(found)] = found
            self._known[leaf : leaf + len(found) // _DIGEST] = b"\1" * (len(found) // _DIGEST)

    def finish(self, read: ReadAt) -> str:
        """Returns the digest in hex.

        Args:
            read: returns so many bytes from an offset of the data section; called for leaves that are not known.
        """
        leaf = 0
        while (leaf := self._known.find(0, leaf)) >= 0:
            first, stop = self._bounds(leaf)
            self._set(leaf, hashlib.sha256(read(first, stop - first)).digest())
        return hashlib.sha256(self._digests).hexdigest()

    def _bounds(self, leaf: int) -> tuple[int, int]:
        return leaf * LEAF, min(self._nbytes, (leaf + 1) * LEAF)

    def _set(self, leaf: int, digest: bytes) -> None:
        with self._lock:
            self._digests[_DIGEST * leaf : _DIGEST * (leaf + 1)] = digest
            self._known[leaf] = 1

    def _collect(self, leaf: int, piece: memoryview, position: int) -> bytearray | None:
        """Adds a piece of a leaf; returns the leaf once it is whole."""
        with self._lock:
            first, stop = self._bounds(leaf)
            whole, missing = self._parts.setdefault(leaf, (bytearray(stop - first), [stop - first]))
            whole[position : position + len(piece)] = piece
            missing[0] -= len(piece)
            if missing[0]:
                return None
            del self._parts[leaf]
            return whole


def digest_data(
    file: InputFile, begin: int, *, threads: int, progress: Callable[[int], None] = lambda nbytes: None
) -> str:
    """Returns the digest of a file's data section, from byte ``begin`` to its end, in hex.

    Args:
        file: the file.
        begin: where its data begins.
        threads: workers.
        progress: called with the bytes that have just been read, by one worker at a time.

    Raises:
        CheckpointFormatError: the file cannot be read, or was truncated meanwhile.
    """
    nbytes = file.size - begin
    digest = TreeDigest(nbytes)

    def one(offset: int, read: ReadAt) -> None:
        digest.add(memoryview(read(begin + offset, min(LEAF, nbytes - offset))), offset)

    leaves = ((offset, file) for offset in range(0, nbytes, LEAF))  # a million of them in a terabyte
    _for_each(leaves, one, threads=threads, progress=progress)
    return digest.finish(lambda offset, length: file.read(begin + offset, length))


def digest_files(
    checkpoints: Sequence[Checkpoint], *, threads: int, progress: Callable[[int], None] = lambda nbytes: None
) -> list[dict[str, str]]:
    """Returns, for each checkpoint, SHA-256 of each file that holds its tensors, by the file's name in it.

    Since all bytes are read, what ``torch.save`` recorded of them (CRC-32) is compared, too.

    Args:
        checkpoints: open checkpoints.
        threads: workers.
        progress: called with the bytes that have just been read, by one worker at a time.

    Raises:
        CheckpointFormatError: a file cannot be read, was truncated meanwhile, or is damaged.
    """
    named = [
        {name_in(checkpoint, file.path): file for file in checkpoint.files if isinstance(file, InputFile)}
        for checkpoint in checkpoints
    ]
    digests: dict[int, str] = {}

    def one(file: InputFile, read: ReadAt) -> None:
        digests[id(file)] = digest_stream(read, file.size)

    files = [(file, file) for each in named for file in each.values()]
    _for_each(files, one, threads=threads, progress=progress)
    for checkpoint in checkpoints:
        if "torch zip" in checkpoint.spec.format:
            for file in checkpoint.files:
                if isinstance(file, InputFile) and file.read(0, min(file.size, 4)) == MAGIC:
                    refuse_damaged(file)
    return [{name: digests[id(file)] for name, file in each.items()} for each in named]


def _for_each(
    items: Iterable[tuple[Item, InputFile]],
    do: Callable[[Item, ReadAt], None],
    *,
    threads: int,
    progress: Callable[[int], None],
) -> None:
    """Calls ``do(item, read)`` for each item, with what reads its file, by so many threads, until one fails."""
    lock = threading.Lock()

    def work(shared: SharedItems[tuple[Item, InputFile]]) -> None:
        for item, file in shared:
            do(item, functools.partial(read, shared, file))

    def read(shared: SharedItems[tuple[Item, InputFile]], file: InputFile, offset: int, length: int) -> bytes:
        shared.check()
        found = file.read(offset, length)
        with lock:
            progress(length)
        return found

    run_workers(threads, items, work)


def name_in(checkpoint: Checkpoint, path: Path) -> str:
    """Returns what a file of a checkpoint is called in its folder, as text."""
    folder = checkpoint.spec.path if checkpoint.spec.path.is_dir() else checkpoint.spec.path.parent
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
    return os.fsencode(name).decode(errors="backslashreplace")


def digest_stream(read: ReadAt, nbytes: int) -> str:
    """Returns plain SHA-256 of ``nbytes`` bytes, in hex, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    for offset in range(0, nbytes, LEAF):
        digest.update(read(offset, min(LEAF, nbytes - offset)))
    return digest.hexdigest()
