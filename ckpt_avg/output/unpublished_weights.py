"""The output's weights while they are written: one safetensors file, or shards with an index.

What is written has an offset in the plan's data section, of which each file has a part. The ranks fill all files
together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.output.digests import ReadAt, TreeDigest, digest_stream
from ckpt_avg.output.header import refuse_damaged
from ckpt_avg.output.shards import Shard, parts
from ckpt_avg.output.unpublished_file import UnpublishedFile, refuse_too_large, unpublished_files

if TYPE_CHECKING:
    import torch

# The shares of ranks begin at multiples of this. Some network file systems lose writes of two ranks to one page.
_PAGE = 64 * 1024

Known = list[list[tuple[int, str]]]  # of each file, as `TreeDigest.known` returns it


class UnpublishedWeights:
    """The files before they are published. Threads may write at the same time.

    Args:
        files: one for each shard.
        shards: what is in them; a single one if the output is one file.
        headers: the bytes before each file's data section, or as many.
        tied: tensors that are not stored: name → the name under which it is stored.
    """

    def __init__(
        self,
        files: Sequence[UnpublishedFile],
        shards: Sequence[Shard],
        headers: Sequence[bytes],
        tied: Mapping[str, str],
    ) -> None:
        self._files, self._shards, self._tied = files, shards, tied
        self._begins = [len(header) for header in headers]
        self._digests = [TreeDigest(shard.nbytes) for shard in shards]

    def write(self, contents: memoryview, offset: int) -> None:
        """Writes bytes at an offset in the data section. No byte may be written twice, except by `overwrite`."""
        for index, part, position in self._parts(contents, offset):
            self._files[index].write(part, self._begins[index] + position)
            self._digests[index].add(part, position)

    def overwrite(self, contents: memoryview, offset: int) -> None:
        """Writes bytes over others at an offset in the data section."""
        for index, part, position in self._parts(contents, offset):
            self._digests[index].invalidate(position, len(part))
            self._files[index].write(part, self._begins[index] + position)

    def _parts(self, contents: memoryview, offset: int) -> Iterator[tuple[int, memoryview, int]]:
        """Yields the bytes of each shard: its index, the bytes, and their offset in its own data section."""
        contents = contents.cast("B")
        for index, first, stop in parts(self._shards, offset, len(contents)):
            yield index, contents[first - offset : stop - offset], first - self._shards[index].begin

    def share(self, rank: int, size: int) -> range:
        """Returns the bytes of the data section that one of ``size`` ranks computes: an equal share, in whole pages."""
        return range(self._bound(rank, size), self._bound(rank + 1, size))

    def _bound(self, part: int, size: int) -> int:
        nbytes = self._shards[-1].begin + self._shards[-1].nbytes
        if part in (0, size) or not nbytes:
            return nbytes * (part > 0)
        end = nbytes * part // size
        for index, begin, _ in parts(self._shards, end, 1):
            in_file = self._begins[index] + end - self._shards[index].begin
            end = max(self._shards[index].begin, begin - in_file % _PAGE)
        return end

    def known_digests(self) -> Known:
        """Returns the digests of what this rank has written, for `add_digests` of another."""
        return [digest.known() for digest in self._digests]

    def add_digests(self, known: Known) -> None:
        """Adds the digests of another rank."""
        for digest, found in zip(self._digests, known, strict=True):
            digest.update(found)

    def sync(self) -> None:
        """Makes what this rank has written durable.

        Raises:
            OutputError: the system could not.
        """
        for file in self._files:
            file.sync()

    def drop_cache(self) -> None:
        """Drops the cached contents of the files, after other machines have written to them."""
        for file in self._files:
            file.drop_cache()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the tensors, read into memory; tied ones under each of their names."""
        from ckpt_avg.user_code.model import weights_in

        stored = {
            shard.prefix + name: tensor
            for file, shard in zip(self._files, self._shards, strict=True)
            for name, tensor in weights_in(file.readable_path).items()
        }
        return stored | {name: stored[kept] for name, kept in self._tied.items()}

    def data_digests(self, progress: Callable[[int], None]) -> list[str]:
        """Returns the digest of each data section, in hex; calls ``progress`` with the bytes of each read."""
        return [
            digest.finish(_reader(file, begin, progress))
            for digest, file, begin in zip(self._digests, self._files, self._begins, strict=True)
        ]

    def write_headers(self, headers: Sequence[bytes]) -> None:
        """Writes the bytes before each data section."""
        for file, header in zip(self._files, headers, strict=True):
            file.write(header, 0)

    def write_headers_of(self, share: range, headers: Sequence[bytes]) -> None:
        """Writes the headers before data that is in a rank's share, so that no two ranks write to the first page."""
        for file, shard, header in zip(self._files, self._shards, headers, strict=True):
            if shard.begin in share or (shard.nbytes == 0 and share.start == 0):
                file.write(header, 0)

    def refuse_damaged(self, headers: Sequence[bytes]) -> None:
        """Reads the headers back.

        Raises:
            OutputError: a file is not what was written, as `header.refuse_damaged` tells.
        """
        for file, shard, header in zip(self._files, self._shards, headers, strict=True):
            refuse_damaged(file.readable_path, header, len(header) + shard.nbytes, file.shown)

    def sha256(self, progress: Callable[[int], None]) -> list[str]:
        """Returns the plain SHA-256 of each file, in hex; calls ``progress`` with the bytes of each read."""
        return [
            digest_stream(_reader(file, 0, progress), begin + shard.nbytes)
            for file, begin, shard in zip(self._files, self._begins, self._shards, strict=True)
        ]

    def publish(self, *, overwrite: bool) -> bool:
        """Makes the files durable and gives them their names.

        Returns:
            Whether the names are durable, too, as `UnpublishedFile.publish` does.

        Raises:
            OutputError: as `UnpublishedFile.publish`.
        """
        synced = [file.publish(overwrite=overwrite) for file in self._files]
        return all(synced)

    def close(self) -> None:
        """Removes the files' hidden names, which must not be in a folder that is published."""
        for file in self._files:
            file.close()


def _reader(file: UnpublishedFile, begin: int, progress: Callable[[int], None]) -> ReadAt:
    def read(offset: int, length: int) -> bytes:
        progress(length)
        return file.read(begin + offset, length)

    return read


@contextlib.contextmanager
def unpublished_weights(
    targets: Sequence[Path],
    shards: Sequence[Shard],
    headers: Sequence[bytes],
    ranks: Ranks,
    *,
    shown: Sequence[Path] | None = None,
    tied: Mapping[str, str] | None = None,
) -> Iterator[UnpublishedWeights]:
    """Yields files with reserved space for the weights, which vanish unless they are published.

    Args:
        targets: their paths once they are published.
        shards, headers, tied: as `UnpublishedWeights` takes them.
        ranks: that fill them together.
        shown: what messages call the paths; by default themselves.

    Raises:
        OutputError, RankError: as `unpublished_files`.
    """
    sizes = [len(header) + shard.nbytes for header, shard in zip(headers, shards, strict=True)]
    if len(targets) > 1 and ranks.is_first:
        folder = next(each for each in targets[0].parents if each.is_dir())
        refuse_too_large(folder, sum(sizes), (shown or targets)[0].parent)
    with unpublished_files(targets, sizes, ranks, shown=shown) as files:
        yield UnpublishedWeights(files, shards, headers, tied or {})
