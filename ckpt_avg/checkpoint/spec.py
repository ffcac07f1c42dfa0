"""What a checkpoint is: its tensors (name, dtype, shape and where their bytes are stored), and its open files.

A reader of `formats` makes the specs from the header alone. Nothing here imports torch, so `inspect` and `check` start
fast.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.results import Result, Rows, attributes, notices_counted, paths_counted, plain
from ckpt_avg.text import escaped, plural, size

Kind = Literal["float", "float8", "complex", "exact"]


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """One dtype of the safetensors format: there is one object for each, so that they are compared by identity.

    Attributes:
        name: the name in a safetensors header.
        itemsize: bytes of one element.
        torch_name: the attribute of ``torch``.
        kind: ``float`` and ``complex`` are averaged; ``float8`` too, unless other tensors contain its scales;
            ``exact`` (integers, bool, exponents without a mantissa) never.
    """

    name: str
    itemsize: int
    torch_name: str
    kind: Kind

    def __reduce__(self) -> tuple[Callable[[str], DType], tuple[str]]:
        """Copies, and what another process unpickles, are the object that there is."""
        return _dtype, (self.name,)


def _dtype(name: str) -> DType:
    return DTYPES[name]


# In the order in which safetensors writes tensors: larger items first.
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
METHOD_KEY = "ckpt_avg.method"  # the metadata key of a safetensors file that this tool wrote
ORIGIN_KEY = "ckpt_avg.origin"  # the same of a file that was made from such a file
SAMPLE_COUNTS = ("count", "_count", "current_count", "num_samples")  # next to statistics of the inputs
SUB_BYTE_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")
BY_TORCH_NAME: Mapping[str, DType] = {dtype.torch_name: dtype for dtype in DTYPES.values()}


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor that is stored on its own, as in a sharded checkpoint.

    Attributes:
        starts: the index of its first element along each dimension of the complete tensor.
        tensor: its shape, and where it is stored.
    """

    starts: tuple[int, ...]
    tensor: TensorSpec


# Nothing changes one. But to make a frozen object takes ten times as long, and there are hundreds of thousands.
@dataclass(slots=True, unsafe_hash=True)
class TensorSpec:
    """One stored tensor.

    Attributes:
        name: the name in the state dict.
        shape: the dimensions; ``()`` for a scalar.
        stride: steps between neighbours along each dimension, in elements, never negative.
        file: the index of its file in ``Checkpoint.files``.
        offset: of its first element in that file, in bytes.
        storage: (first byte, bytes) of the storage that it is a view of. Tensors with equal storage, offset, shape and
            stride are tied.
        parts: the boxes, if the tensor is stored in several; then stride, file, offset and storage have no meaning.
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
        """Bytes of all elements."""
        return self.numel * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements are stored in row-major order without gaps."""
        if self.parts:
            return False
        if self.stride == contiguous_stride(self.shape):  # nearly all
            return True
        expected = 1
        for extent, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if extent != 1 and step != expected and self.numel:
                return False
            expected *= extent
        return True


@functools.lru_cache(maxsize=1024)  # most tensors of a model have one of a few shapes
def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the row-major stride of a shape, in elements."""
    steps: list[int] = []
    step = 1
    for extent in reversed(shape):
        steps.append(step)
        step *= max(extent, 1)
    return tuple(reversed(steps))


@dataclass(frozen=True, slots=True, repr=False)
class CheckpointSpec(Result):
    """One checkpoint, as its header describes it.

    Attributes:
        path: the file or folder that was opened.
        format: ``safetensors``, ``torch zip``, ``torch stream``, ``pickle``, ``torch DCP``, …
        tensors: name → spec, in the order of the file.
        kind: the trainer or library that wrote it, if known.
        keys: the top-level keys of a torch file.
        state_key: the dotted key of the state dict in a torch file; None if the file is the state dict itself.
        prefix: what was stripped from the front of the names, such as ``module.``; empty if nothing was.
        lacks_prefix: whether no name has the prefix that was to be stripped.
        record: step, epoch, metrics and learning rate.
        settings: what the trainer stores next to the weights and must be equal in all checkpoints: key → value as JSON.
        averaged: what shows that the weights are already an average; empty if nothing does.
        metadata: ``__metadata__`` of a safetensors file; plain values (epoch, step, metric, …) next to the state
            dict of a torch file.
        notes: what a user should know about how it was read.
        model: the name of one model of several in a checkpoint folder, such as ``unet``.
        digest: SHA-256, in hex, of what says where the tensors are stored: the JSON of a safetensors header, the pickle
            of a torch file; of several files, of the index and the digests of the files.
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
    settings: Mapping[str, str] = field(default_factory=dict)
    averaged: str = ""
    metadata: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    model: str = ""
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
        tensors = self.tensors.values()
        if len(set(map(attrgetter("offset"), tensors))) == len(tensors) and not any(map(attrgetter("parts"), tensors)):
            return []
        offsets = Counter((tensor.file, tensor.offset) for tensor in tensors)
        groups: dict[tuple[object, ...], list[str]] = {}
        for tensor in tensors:
            # Nearly every tensor has an offset of its own and needs no more than this check.
            if (tensor.parts or offsets[tensor.file, tensor.offset] > 1) and tensor.numel:
                where: tuple[object, ...] = (tensor.dtype, tensor.shape, tensor.parts)
                if not tensor.parts:
                    where += (tensor.file, tensor.storage, tensor.offset, tensor.stride)
                groups.setdefault(where, []).append(tensor.name)
        return [tuple(names) for names in groups.values() if len(names) > 1]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as ``ckpt-avg inspect --json`` prints them of one checkpoint."""
        tensors = [
            {
                "name": tensor.name,
                "dtype": tensor.dtype.name,
                **attributes(tensor, ("shape", "stride", "offset")),
                "parts": len(tensor.parts) or 1,
            }
            for tensor in self.tensors.values()
        ]
        return {
            **attributes(self, ("path", "format", "kind", "keys", "state_key", "prefix")),
            **attributes(self.record, ("step", "epoch", "metrics", "learning_rate")),
            "averaged": self.averaged or None,
            "bytes": self.nbytes,
            "dtypes": sorted({tensor.dtype.name for tensor in self.tensors.values()}),
            "metadata": plain(self.metadata),
            "batch_norm_layers": batch_norm_layers(self.tensors),
            "tied": plain(self.tied()),
            "notes": list(self.notes),
            "tensors": tensors,
        }

    def _title(self) -> str:
        return f"{escaped(self.path.name or str(self.path))}, {self.format}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "path", str(self.path)
        yield "kind", self.kind or ""
        dtypes = ", ".join(sorted({tensor.dtype.name for tensor in self.tensors.values()}))
        yield "tensors", f"{len(self.tensors):,}, {size(self.nbytes)}, {dtypes}"
        yield "state_key", self.state_key or ""
        yield "prefix", self.prefix
        yield "record", self.record._title()
        yield "averaged", self.averaged
        yield "notes", notices_counted(self.notes)

    def _tables(self) -> Iterator[Rows]:
        rows = [(each.name, each.dtype.name, str(list(each.shape))) for each in self.tensors.values()]
        yield Rows("tensors", ("name", "dtype", "shape"), rows)


@dataclass(frozen=True, slots=True, repr=False)
class Checkpoint(Result):
    """An open checkpoint: its spec and the files that contain its tensors. Use it as a context manager.

    Attributes:
        models: of a folder with several models, each of them by name; their files are those of the checkpoint.
    """

    spec: CheckpointSpec
    files: Sequence[InputFile]
    models: Mapping[str, Checkpoint] = field(default_factory=dict)

    def check_unchanged(self) -> None:
        """Raises ChangedWhileReadingError if a file was truncated or modified since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        """Closes the files."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def to_dict(self) -> dict[str, Any]:
        """Returns what the spec returns."""
        return self.spec.to_dict()

    def _title(self) -> str:
        return f"{self.spec._title()}, {plural(len(self.files), 'file')}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "spec", f"{plural(len(self.spec.tensors), 'tensor')}, {size(self.spec.nbytes)}"
        yield "files", paths_counted([file.path for file in self.files])


def name_of(path: Path) -> str:
    """Returns the last part of a path; for ``.`` the name of that folder."""
    return path.name if path.name not in ("", "..") else path.resolve().name


def batch_norm_layers(names: Mapping[str, object]) -> list[str]:
    """Returns the layers whose running statistics are among ``names``, in order.

    A layer is a prefix with both ``running_mean`` and ``running_var``. If the model is itself one layer, its prefix is
    empty. With a count of samples and no ``num_batches_tracked`` they are statistics of the inputs, of no such layer.
    """
    suffix = "running_mean"
    layers = []
    for name in [name for name in names if name.endswith(suffix)]:
        prefix = name[: -len(suffix)]
        if prefix == "" or prefix.endswith("."):
            counts_samples = any(prefix + count in names for count in SAMPLE_COUNTS)
            is_layer = prefix + "num_batches_tracked" in names or not counts_samples
            if prefix + "running_var" in names and is_layer:
                layers.append(prefix.removesuffix("."))
    return layers


def batch_norm_buffer(layer: str, buffer: str) -> str:
    """Returns the name of a layer's buffer: ``("features.1", "running_var")`` → ``features.1.running_var``."""
    return f"{layer}.{buffer}" if layer else buffer


def is_extra_state(name: str) -> bool:
    """Whether a tensor is a module's extra state, whose length may change during a run."""
    return name.rpartition(".")[2] == "_extra_state"
