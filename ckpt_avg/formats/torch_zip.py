"""The zip file that ``torch.save`` writes since torch 1.6.

``<root>/data.pkl`` describes the objects and ``<root>/data/<key>`` contains each storage, uncompressed, so a tensor's
bytes are located without reading any of them. The pickle is read by `pickles.unpickler`, which runs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from ckpt_avg.errors import fail
from ckpt_avg.files.input_file import Readable
from ckpt_avg.formats.pickles.mappings import with_dicts
from ckpt_avg.formats.pickles.unpickler import read_pickle
from ckpt_avg.formats.torch_file import ByteRange, FileContents
from ckpt_avg.formats.zip_directory import Member, check_crc, read_members
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import listing, quote

MAGIC = b"PK\x03\x04"
BYTE_ORDER = "expected little-endian tensors, got another byte order"
CONVERT = "Save it again on a little-endian machine (torch.load converts)"


def read_contents(file: Readable, *, is_part: bool = False) -> FileContents:
    """Reads the directory and the pickle; the archive of one part of a tensor has few members and a short pickle.

    Raises:
        CheckpointFormatError: the archive or its pickle is damaged, or torch did not write it.
    """
    most = LIMITS.part_pickle if is_part else LIMITS.pickle
    members = read_members(file, LIMITS.part_members if is_part else LIMITS.tensors)
    root = _root(file, members)
    byteorder = members.get(f"{root}/byteorder")
    if byteorder is not None and file.read(byteorder.offset, min(byteorder.size, 16)) != b"little":
        fail(file.path, BYTE_ORDER, CONVERT)
    record = members[f"{root}/data.pkl"]
    if record.size > most:
        problem = f"expected a pickle of at most {most:,} bytes, got {record.size:,}"
        fail(file.path, problem, "Save only the state dict")

    def storage(key: str) -> ByteRange | None:
        member = members.get(f"{root}/data/{key}")
        return (member.offset, member.size) if member else None

    pickle = file.read(record.offset, record.size)
    check_crc(file, record, [pickle])
    objects = with_dicts(read_pickle(pickle, str(file.path)))
    return FileContents(objects, storage, hashlib.sha256(pickle).hexdigest())


def _root(file: Readable, members: Mapping[str, Member]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        got = f"got one with {listing(map(quote, members))}"
        fail(file.path, f"expected a zip written by torch.save, {got}", "Name a checkpoint file")
    return roots[0]
