"""The zip file that ``torch.save`` has written since torch 1.6.

``<root>/data.pkl`` describes the objects and ``<root>/data/<key>`` holds each storage, uncompressed, so a tensor's
bytes are found without reading any of them. The pickle goes through `pickle_specs`, which runs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.input_file import Readable
from ckpt_avg.formats.pickles.unpickler import read_pickle
from ckpt_avg.formats.place import FileContents, Place
from ckpt_avg.formats.zip_directory import Member, read_members
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import listing, quote

MAGIC = b"PK\x03\x04"


def read_contents(file: Readable, *, is_part: bool = False) -> FileContents:
    """Reads the directory and the pickle.

    Args:
        file: the archive.
        is_part: whether it holds one part of a tensor, so that few members and a short pickle are expected.

    Raises:
        CheckpointFormatError: the archive or its pickle is damaged, or is not torch's.
    """
    most = LIMITS.part_pickle if is_part else LIMITS.pickle
    members = read_members(file, LIMITS.part_members if is_part else LIMITS.tensors)
    root = _root(file, members)
    byteorder = members.get(f"{root}/byteorder")
    if byteorder is not None and file.read(byteorder.offset, min(byteorder.size, 16)) != b"little":
        raise CheckpointFormatError(
            f"{file.path}: expected little-endian tensors, got another byte order. Save it again on a "
            "little-endian machine (torch.load converts)."
        )
    record = members[f"{root}/data.pkl"]
    if record.size > most:
        raise CheckpointFormatError(
            f"{file.path}: expected a pickle of at most {most:,} bytes, got {record.size:,}. Save only the state dict."
        )

    def place_of(key: str) -> Place | None:
        member = members.get(f"{root}/data/{key}")
        return (member.offset, member.size) if member else None

    pickle = file.read(record.offset, record.size)
    return FileContents(read_pickle(pickle, str(file.path)), place_of, hashlib.sha256(pickle).hexdigest())


def _root(file: Readable, members: Mapping[str, Member]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointFormatError(
            f"{file.path}: expected a zip written by torch.save, got one with {listing(map(quote, members))}. "
            "Name a checkpoint file."
        )
    return roots[0]
