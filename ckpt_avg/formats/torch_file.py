"""What a torch file contains → its `CheckpointSpec`: choose the state dict, strip its names, locate its tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_avg.checkpoint.spec import Checkpoint, DType, TensorSpec
from ckpt_avg.checkpoint.training_record import as_number
from ckpt_avg.errors import CheckpointFormatError, fail
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.pickles.stand_ins import StoredTensor
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.state_dict import StateDict, find_state_dict
from ckpt_avg.formats.tensor_names import settle_names
from ckpt_avg.formats.trainers.records import record_of
from ckpt_avg.formats.trainers.trainer import Contents
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import listing, plural, quote

RUNNING_AVERAGE = "a running average of weights"

ByteRange = tuple[int, int]  # (first byte, bytes)


@dataclass(frozen=True, slots=True)
class FileContents:
    """What a torch file contains.

    Attributes:
        objects: what its pickle describes.
        storage: storage key → its bytes; None if there is none.
        digest: SHA-256 of the pickle, in hex.
    """

    objects: object
    storage: Callable[[str], ByteRange | None]
    digest: str


def open_torch_file(
    file: InputFile, form: str, contents: FileContents, reading: Reading, *, strip: bool = True
) -> Checkpoint:
    """Returns the open checkpoint of a torch file; ``form`` is the name of its format.

    Raises:
        CheckpointFormatError: there is no single state dict, or a tensor is damaged.
    """
    found = find_state_dict(contents.objects, file.path, reading)
    stored = {name: tensor for name, tensor in found.tensors.items() if isinstance(tensor, StoredTensor)}
    names = settle_names(stored, reading.strip_prefix, file.path, found.trainer, strip=strip)
    tensors = {new: locate(file.path, new, stored[old], contents) for old, new in names.renamed.items()}

    def scalar(value: object) -> float | None:
        if not isinstance(value, StoredTensor) or value.shape not in ((), (1,)):
            return as_number(value)
        try:
            spec = locate(file.path, "(recorded)", value, contents)
        except CheckpointFormatError:
            return None  # a damaged number next to the weights does them no harm
        return element(spec.dtype, file.read(spec.offset, spec.dtype.itemsize))

    spec = names.make_spec(
        file.path,
        form,
        tensors,
        averaged=names.averaged or describe_ema(found),
        notes=(*found.notes, *note_without_weights(found.others)),
        keys=top_keys(contents.objects, found.key),
        state_key=found.key,
        record=record_of(Contents(_beside(contents.objects, found), scalar), found.trainer),
        metadata=plain_values(contents.objects),
        digest=contents.digest,
    )
    return Checkpoint(spec, (file,))


def locate(path: Path, name: str, tensor: StoredTensor, contents: FileContents) -> TensorSpec:
    """Returns where the elements of a tensor are, checked against its storage.

    Raises:
        CheckpointFormatError: the storage is missing or has another size, or the view is not inside it.
    """
    storage, itemsize = tensor.storage, tensor.dtype.itemsize
    found = contents.storage(storage.key)
    if found is None:
        fail(path, f"expected the record {quote(storage.key)}, got none", "Copy the file again", tensor=name)
    begin, length = found
    expected = storage.numel * (storage.dtype.itemsize if storage.dtype else 1)
    if length != expected:
        fail(path, f"expected a record of {quote(expected)} bytes, got {length:,}", tensor=name)
    shape, stride, offset = tensor.shape, tensor.stride, tensor.offset
    numbers = (*shape, *stride, offset)
    if len(shape) != len(stride) or len(shape) > LIMITS.rank or min(numbers) < 0 or max(numbers) > LIMITS.elements:
        got = f"shape {quote(shape)}, stride {quote(stride)}, offset {quote(offset)}"
        fail(path, f"expected sizes and strides from 0 to 2⁶³−1, got {got}", "Save it again", tensor=name)
    spec = TensorSpec(name, tensor.dtype, shape, stride, 0, begin + offset * itemsize, (begin, length))
    if math.prod(max(extent, 1) for extent in shape) * itemsize > LIMITS.elements:
        fail(path, f"shape {quote(shape)} overflows 63 bits", "Save it again", tensor=name)
    if 0 in shape:
        return spec
    last = offset + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
    if (end := (last + 1) * itemsize) > length:
        problem = f"expected elements inside a record of {length:,} bytes, got a view that ends at byte {end:,}"
        fail(path, problem, "Save it again", tensor=name)
    if spec.nbytes > max(length, LIMITS.expanded):
        problem = f"expected at most the {length:,} bytes of its record, got an expanded view of {spec.nbytes:,} bytes"
        fail(path, problem, "Save tensor.contiguous() instead", tensor=name)
    return spec


def note_without_weights(names: Sequence[str]) -> tuple[str, ...]:
    """Returns a note on the entries of a state dict that are not weights, if there are any."""
    if not names:
        return ()
    return (f"{plural(len(names), 'entry')} without weights skipped: {listing(map(quote, names))}",)


def _beside(contents: object, found: StateDict) -> object:
    """Returns what a file contains next to the weights: a scalar of a bare state dict is a weight, not a metric."""
    if found.key is None and isinstance(contents, dict):
        return {key: value for key, value in contents.items() if key not in found.tensors}
    return contents


def top_keys(contents: object, state_key: str | None) -> tuple[str, ...]:
    """Returns the keys at the top of a torch file that is not a bare state dict."""
    if not isinstance(contents, dict) or state_key is None:
        return ()
    return tuple(key if isinstance(key, str) else quote(key) for key in contents)


def describe_ema(found: StateDict) -> str:
    """Returns how weights that are an EMA show that; nothing for others."""
    return f"{RUNNING_AVERAGE}, under {quote(found.key)}" if found.ema else ""


def plain_values(root: object) -> dict[str, str | int | float | bool | None]:
    """Returns the plain values at the top of a torch file: epoch, step, metric, version and the like."""
    if not isinstance(root, dict):
        return {}
    return {
        key: value
        for key, value in root.items()
        if isinstance(key, str)
        # What JSON cannot contain is skipped: NaN, Inf, integers of thousands of digits.
        and (isinstance(value, (str, bool, type(None))) or (isinstance(value, (int, float)) and abs(value) < 2.0**1000))
    }


def element(dtype: DType, content: bytes) -> float | None:
    """Returns the value of one stored element of a float or integer dtype."""
    if dtype.name == "BF16":
        content, letter = b"\0\0" + content, "f"
    else:
        letter = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}.get(
            dtype.name, ""
        )
    if not letter or struct.calcsize(letter) != len(content):
        return None
    return as_number(struct.unpack(f"<{letter}", content)[0])
