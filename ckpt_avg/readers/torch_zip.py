"""The zip file that ``torch.save`` has written since torch 1.6.

``<root>/data.pkl`` describes the objects and ``<root>/data/<key>`` holds each storage, uncompressed, so a tensor's
bytes are found without reading any of them. The pickle goes through `pickle_specs`, which runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.limits import LIMITS
from ckpt_avg.mapped import MappedFile
from ckpt_avg.messages import listing, plural, quote
from ckpt_avg.readers.names import check_name
from ckpt_avg.readers.pickle_specs import read_pickle
from ckpt_avg.readers.stand_ins import StoredTensor
from ckpt_avg.readers.state_dict import find_state_dict, plain_values
from ckpt_avg.readers.zip_directory import Member, read_members
from ckpt_avg.spec import CheckpointSpec, TensorSpec

MAGIC = b"PK\x03\x04"


def read_spec(file: MappedFile, state_key: str | None) -> CheckpointSpec:
    """Reads the directory and the pickle, and checks every tensor against the record that holds it.

    Raises:
        CheckpointFormatError: the archive or its pickle is damaged, is not torch's, or holds no state dict.
    """
    members = read_members(file)
    root = _root(file, members)
    byteorder = members.get(f"{root}/byteorder")
    if byteorder is not None and file.read(byteorder.offset, min(byteorder.size, 16)) != b"little":
        raise CheckpointFormatError(
            f"{file.path}: expected little-endian tensors, got another byte order. Save it again on a "
            "little-endian machine (torch.load converts)."
        )
    record = members[f"{root}/data.pkl"]
    if record.size > LIMITS.pickle:
        raise CheckpointFormatError(
            f"{file.path}: expected a pickle of at most {LIMITS.pickle:,} bytes, got {record.size:,}. "
            "Save only the state dict."
        )
    contents = read_pickle(file.read(record.offset, record.size), str(file.path))
    found = find_state_dict(contents, file.path, state_key)
    tensors = {
        name: _tensor(file, name, tensor, members.get(f"{root}/data/{tensor.storage.key}"))
        for name, tensor in found.tensors.items()
    }
    notes = found.notes
    if found.others:
        notes += (
            f"{plural(len(found.others), 'entry')} without a tensor left out: {listing(map(quote, found.others))}",
        )
    return CheckpointSpec(file.path, "torch zip", tensors, found.key, plain_values(contents), notes)


def _root(file: MappedFile, members: Mapping[str, Member]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointFormatError(
            f"{file.path}: expected a zip written by torch.save, got one with {listing(map(quote, members))}. "
            "Name a checkpoint file."
        )
    return roots[0]


def _tensor(file: MappedFile, name: str, tensor: StoredTensor, record: Member | None) -> TensorSpec:
    where = f"{file.path}: tensor {quote(name)}"
    check_name(name, where)
    storage, itemsize = tensor.storage, tensor.dtype.itemsize
    if record is None:
        raise CheckpointFormatError(
            f"{where}: expected the record {quote(storage.key)}, got none. Copy the file again."
        )
    expected = storage.numel * (storage.dtype.itemsize if storage.dtype else 1)
    if record.size != expected:
        raise CheckpointFormatError(
            f"{where}: expected a record of {quote(expected)} bytes, got {record.size:,}. Copy or save the file again."
        )
    shape, stride, offset = tensor.shape, tensor.stride, tensor.offset
    numbers = (*shape, *stride, offset)
    if len(shape) != len(stride) or len(shape) > LIMITS.rank or min(numbers) < 0 or max(numbers) > LIMITS.elements:
        raise CheckpointFormatError(
            f"{where}: expected sizes and strides from 0 to 2⁶³−1, got shape {quote(shape)}, stride {quote(stride)}, "
            f"offset {quote(offset)}. Save it again."
        )
    spec = TensorSpec(
        name, tensor.dtype, shape, stride, 0, record.offset + offset * itemsize, (record.offset, record.size)
    )
    if prod(max(extent, 1) for extent in shape) * itemsize > LIMITS.elements:
        raise CheckpointFormatError(f"{where}: shape {quote(shape)} overflows 63 bits. Save it again.")
    if 0 in shape:
        return spec
    last = offset + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
    if (last + 1) * itemsize > record.size:
        raise CheckpointFormatError(
            f"{where}: expected its elements inside a record of {record.size:,} bytes, got a view that ends at byte "
            f"{(last + 1) * itemsize:,}. Save it again."
        )
    if spec.nbytes > max(record.size, LIMITS.expanded):
        raise CheckpointFormatError(
            f"{where}: expected a tensor no larger than its record of {record.size:,} bytes, got an expanded view of "
            f"{spec.nbytes:,} bytes. Save tensor.contiguous() instead."
        )
    return spec
