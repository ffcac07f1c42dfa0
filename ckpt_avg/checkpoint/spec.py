"""What a checkpoint holds, read from its header alone: names, dtypes, shapes and where the bytes lie.

Nothing here imports torch, so that ``inspect`` and ``check`` answer at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

from ckpt_avg.checkpoint.training_record import Record

Kind = Literal["float", "float8", "complex", "exact"]


@dataclass(frozen=True, slots=True)
class DType:
    """One dtype of the safetensors format.

    Attributes:
        name: as a safetensors header spells it.
        itemsize: bytes of one element.
        torch_name: the attribute of ``torch``.
        kind: ``float`` and ``complex`` are averaged; ``float8`` is too, unless scale tensors sit beside
            it; ``exact`` (integers, bool, bare exponents) never is.
    """

    name: str
    itemsize: int
    torch_name: str
    kind: Kind


# In the order of the data section of a file that safetensors writes: larger items first.
DTYPES: Mapping[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("U64", 8, "uint64", "exact"),
        DType("I64", 8, "int64", "exact"),
        DType("F64", 8, "float64", "float"),
        DType("C64", 8, "complex64", "complex"),
        DType("F32", 4, "float32", "float"),
        DType("U32", 4, "uint32", "exact"),
        DType("I32", 4, "int32", "exact"),
        DType("BF16", 2, "bfloat16", "float"),
        DType("F16", 2, "float16", "float"),
        DType("U16", 2, "uint16", "exact"),
        DType("I16", 2, "int16", "exact"),
        DType("F8_E5M2FNUZ", 1, "float8_e5m2fnuz", "float8"),
        DType("F8_E4M3FNUZ", 1, "float8_e4m3fnuz", "float8"),
        DType("F8_E8M0", 1, "float8_e8m0fnu", "exact"),
        DType("F8_E4M3", 1, "float8_e4m3fn", "float8"),
        DType("F8_E5M2", 1, "float8_e5m2", "float8"),
        DType("I8", 1, "int8", "exact"),
        DType("U8", 1, "uint8", "exact"),
        DType("BOOL", 1, "bool", "exact"),
    )
}
# The metadata key that marks a safetensors file as an average made here.
METHOD_KEY = "ckpt_avg.method"
ORIGIN = "ckpt_avg.origin"  # of a changed copy of an average: what that was the mean of
SUB_BYTE_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")
BY_TORCH_NAME: Mapping[str, DType] = {dtype.torch_name: dtype for dtype in DTYPES.values()}


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor, stored apart from the rest (a shard).

    Attributes:
        starts: the index of its first element along each dimension of the whole tensor.
        tensor: the box itself: its shape, and where it lies.
    """

    starts: tuple[int, ...]
    tensor: TensorSpec


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor.

    Attributes:
        name: its name in the state dict.
        dtype: its dtype.
        shape: its dimensions; ``()`` for a scalar.
        stride: steps between neighbours along each dimension, in elements, never negative.
        file: the index of its file in ``Checkpoint.files``.
        offset: where its first element lies in that file, in bytes.
        storage: (first byte, bytes) of the storage that it is a view of. Equal storages with equal
            offset, shape and stride are tied tensors.
        parts: where the tensor is stored in several boxes, these; its own stride, file, offset and storage then
            say nothing of where elements lie.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    file: int
    offset: int
    storage: tuple[int, int]
    parts: tuple[Part, ...] = ()

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, side by side."""
        return self.numel * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        if self.parts:
            return False
        expected = 1
        for extent, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1 and step != expected and self.numel:
                return False
            expected *= extent
        return True


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the row-major stride of a shape, in elements."""
    steps: list[int] = []
    step = 1
    for extent in reversed(shape):
        steps.append(step)
        step *= max(extent, 1)
    return tuple(reversed(steps))


@dataclass(frozen=True, slots=True)
class CheckpointSpec:
    """One checkpoint, as its header describes it.

    Attributes:
        path: where it was opened: a file or a folder.
        format: how it is stored: ``safetensors``, ``torch zip``, ``torch stream``, ``pickle``, ``torch DCP``, …
        tensors: name → spec, in the order of the file.
        kind: the trainer or library that left it, where that shows.
        keys: the keys at the top of a torch file.
        state_key: the dotted key under which a torch file holds the state dict; None where the file is
            the state dict itself.
        prefix: what was stripped from the front of every name, such as ``module.``; empty if nothing was.
        lacks_prefix: whether no name carried the prefix that was to be stripped.
        record: step, epoch, metrics and learning rate.
        averaged: how it shows that the weights are an average already; empty if it does not.
        metadata: what the file says of itself: ``__metadata__`` of a safetensors file; plain values
            (epoch, step, metric, …) beside the state dict of a torch file.
        notes: what a user should know of how it was read.
        digest: SHA-256, in hex, of what says where the tensors lie: the JSON of a safetensors header, the pickle of a
            torch file; of a checkpoint in several files, of the index and the digests of its parts.
    """

    path: Path
    format: str
    tensors: Mapping[str, TensorSpec]
    kind: str | None = None
    keys: tuple[str, ...] = ()
    state_key: str | None = None
    prefix: str = ""
    lacks_prefix: bool = False
    record: Record = field(default_factory=Record)
    averaged: str = ""
    metadata: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    digest: str = ""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return name_of(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def tied(self) -> list[tuple[str, ...]]:
        """Returns the groups of names that share one stored tensor (zero-size tensors never do)."""
        places = Counter((tensor.file, tensor.offset) for tensor in self.tensors.values())
        groups: dict[tuple[object, ...], list[str]] = {}
        for tensor in self.tensors.values():
            # Nearly every tensor begins where no other does, and is done with here.
            if tensor.parts or (places[tensor.file, tensor.offset] > 1 and tensor.numel):
                where: tuple[object, ...] = (tensor.dtype, tensor.shape, tensor.parts)
                if not tensor.parts:
                    where += (tensor.file, tensor.storage, tensor.offset, tensor.stride)
                if tensor.numel:
                    groups.setdefault(where, []).append(tensor.name)
        return [tuple(names) for names in groups.values() if len(names) > 1]


def name_of(path: Path) -> str:
    """Returns the last part of a path: also of ``.``, which has none of its own."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def batch_norm_layers(names: Mapping[str, object]) -> list[str]:
    """Returns the layers whose running statistics are among ``names``, in order.

    A layer is a prefix with both ``running_mean`` and ``running_var``; the empty prefix is a model that
    is itself one layer.
    """
    suffix = "running_mean"
    layers = []
    for name in names:
        if name == suffix or name.endswith("." + suffix):
            prefix = name[: -len(suffix)]
            if prefix + "running_var" in names:
                layers.append(prefix.removesuffix("."))
    return layers


def batch_norm_buffer(layer: str, buffer: str) -> str:
    """Returns the name of a layer's buffer: ``("features.1", "running_var")`` → ``features.1.running_var``."""
    return f"{layer}.{buffer}" if layer else buffer
