"""Stand-ins for the objects of a pickle: plain containers, references to stored tensors, and inert classes.

Nothing is imported or run because a checkpoint names it. `stand_in` maps each name to one of these stand-ins, and the
functions among them only return descriptions of tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar, NoReturn

from ckpt_avg.checkpoint.spec import BY_TORCH_NAME, DType
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import escaped, quote


class PickledTensor:
    """A tensor of any kind in a pickle."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage. ``dtype`` is None for an untyped storage, whose ``numel`` counts bytes."""

    key: str
    dtype: DType | None
    numel: int


@dataclass(frozen=True, slots=True)
class StoredTensor(PickledTensor):
    """A view of a storage, not yet checked against the bytes of the storage."""

    storage: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UnreadableTensor(PickledTensor):
    """A tensor without plain elements in one storage; ``kind`` says which, ``advice`` what to save instead."""

    kind: str
    advice: str


def refuse(problem: str) -> NoReturn:
    """Raises the error on a hostile or damaged pickle; the caller adds the file."""
    raise CheckpointFormatError(f"{problem}. Don't trust this file; save the weights again where they come from.")


class PlainDict(dict[Any, Any]):
    """Stands for OrderedDict and its relatives."""

    def __init__(self, *arguments: object) -> None:
        super().__init__()
        for source in arguments:
            pairs: Iterable[Any] = ()
            if isinstance(source, dict):
                pairs = source.items()
            elif isinstance(source, (list, tuple)):
                pairs = source
            for key, value in pairs:
                self[safe_key(key)] = value


class Foreign:
    """Stands for an object of any other class; each class gets its own subclass.

    Attributes:
        module, qualname: the class, as the pickle names it.
        arguments: what it was called with.
        state: what it was to be restored from.
        items: the items that were set in it, as in a subclass of dict; None if none were.
    """

    __slots__ = ("arguments", "items", "state")
    module: ClassVar[str]
    qualname: ClassVar[str]
    arguments: tuple[object, ...]
    state: object
    items: dict[Any, Any] | None

    def __new__(cls, *arguments: object, **_: object) -> Foreign:  # noqa: D102
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = made.items = None
        return made

    def __init__(self, *_: object, **__: object) -> None:
        pass

    @classmethod
    def described(cls) -> str:
        """Returns the dotted name of the class that this one represents."""
        return escaped(f"{cls.module}.{cls.qualname}")


@dataclass(frozen=True, slots=True)
class StorageType:
    """Stands for a class of storages; ``dtype`` is None for an untyped one."""

    dtype: DType | None
    name: str


class NumpyDType:
    """Stands for a ``numpy.dtype``: its code, such as ``f4``, and its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: object) -> None:
        self.code = code if isinstance(code, str) else ""
        self.order: object = "|"

    def restore(self, state: object) -> None:
        """Reads the state of ``dtype.__setstate__``: (version, byte order, …)."""
        if isinstance(state, tuple) and len(state) > 1:
            self.order = state[1]


class Opaque:
    """Stands for a dict key or set item whose hash the pickle's author could choose; it is never looked up by value."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return _shown(self.value)


def _shown(value: object, depth: int = 2) -> str:
    """Returns a short text for a key. Sets are not shown: Python sorts them first, which may take for ever."""
    if isinstance(value, tuple) and depth:
        inner = [_shown(each, depth - 1) for each in value[:10]]
        return f"({', '.join(inner)}{',' * (len(value) == 1)}{', …' * (len(value) > 10)})"
    if isinstance(value, type) and issubclass(value, Foreign):
        return value.described()
    if isinstance(value, DType):
        return f"torch.{value.torch_name}"
    is_plain = isinstance(value, (str, bytes, int, float, type(None)))
    return quote(value) if is_plain else f"<{type(value).__name__}>"


def safe_key(key: object) -> object:
    """Returns what represents a key in a dict or set.

    Hashing a deeply shared tuple takes time exponential in its depth, and large integers (multiples of 2⁶¹ − 1) and
    tuples can be made to collide by the thousand.
    """
    if type(key) in (str, bytes, bool, float, type(None)) or (type(key) is int and abs(key) < 2**60):
        return key
    return Opaque(key)


def is_known(function: object) -> bool:
    """Whether it is one of the functions that represent torch's and numpy's."""
    # The type is checked first, so that nothing hostile is hashed.
    return isinstance(function, FunctionType) and function in _KNOWN


# --- stand-ins for the functions that rebuild tensors -------------------------------------------------------


def _integers(values: object) -> tuple[int, ...]:
    if isinstance(values, (tuple, list)) and len(values) > LIMITS.rank:
        refuse(f"expected a shape or stride of at most {LIMITS.rank} integers, got {len(values):,}")
    if not isinstance(values, (tuple, list)) or not all(type(value) is int for value in values):
        refuse(f"expected a tuple of integers as shape or stride, got {quote(type(values).__name__)}")
    return tuple(values)


def _view(storage: object, offset: object, shape: object, stride: object, dtype: DType | None) -> object:
    if isinstance(storage, UnreadableTensor):
        return storage
    if not isinstance(storage, StorageRef) or type(offset) is not int or dtype is None:
        refuse("a tensor of the pickle refers to no storage")
    return StoredTensor(storage, dtype, offset, _integers(shape), _integers(stride))


def _rebuild_tensor(storage: object, offset: object, shape: object, stride: object, *rest: object) -> object:
    if len(rest) > 2 and isinstance(rest[2], dict) and (rest[2].get("conj") or rest[2].get("neg")):
        return UnreadableTensor("a lazily conjugated or negated tensor", "Save tensor.resolve_conj().resolve_neg()")
    return _view(storage, offset, shape, stride, getattr(storage, "dtype", None))


def _rebuild_tensor_v3(storage: object, offset: object, shape: object, stride: object, *rest: object) -> object:
    dtype = rest[2] if len(rest) > 2 else None  # after requires_grad and the hooks
    if isinstance(dtype, type) and issubclass(dtype, Foreign):
        return UnreadableTensor(f"a {dtype.described()} tensor", _COMMON_DTYPE)
    return _view(storage, offset, shape, stride, dtype if isinstance(dtype, DType) else None)


def _rebuild_parameter(tensor: object, *rest: object) -> object:
    return tensor


def _rebuild_from_type(function: object, kind: object, arguments: object, *rest: object) -> object:
    plain = isinstance(kind, type) and issubclass(kind, Foreign) and kind.described() in _PLAIN_TENSOR_TYPES
    if plain and is_known(function) and isinstance(arguments, tuple):
        return function(*arguments)  # type: ignore[operator]  # it is one of the functions of this module
    return _subclass(kind)


def _subclass(kind: object, *_: object) -> UnreadableTensor:
    name = kind.described() if isinstance(kind, type) and issubclass(kind, Foreign) else "unknown"
    return UnreadableTensor(f"a tensor subclass ({name})", plain_tensor_advice(name))


def plain_tensor_advice(kind: str) -> str:
    """Returns how tensors of a class can be saved as plain ones."""
    if "DTensor" in kind or "ShardedTensor" in kind:
        return (
            "It may be one rank's part. Save with torch.distributed.checkpoint, or gather the weights on every rank: "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
        )
    if "quant" in kind.lower() or "torchao" in kind:
        return _BEFORE_QUANTISATION
    return "Save a plain tensor (for example tensor.dequantize() or torch.Tensor(tensor))"


def _from_cpu(tensor: object, dtype: object, *_: object) -> object:
    """A tensor of XLA and similar devices, whose values are stored as those of a tensor on the CPU."""
    is_same = isinstance(tensor, StoredTensor) and tensor.dtype == dtype
    return tensor if is_same else UnreadableTensor("a tensor of another device", _ON_CPU)


def _unreadable(kind: str, advice: str) -> Callable[..., UnreadableTensor]:
    return lambda *_: UnreadableTensor(kind, advice)


def _size(*arguments: object) -> tuple[int, ...]:
    return _integers(arguments[0]) if arguments else ()


# --- stand-ins for numpy's dtypes and scalars ---------------------------------------------------------------
# Metrics are often numpy scalars. numpy is not imported; the forms are those of dtype.__reduce__ and
# generic.__reduce__ (numpy/_core/src/multiarray). Protocol 2 has no bytes: they are text in _codecs.encode(text,
# "latin1"), or in pickles of Python 2 text that was decoded as UTF-8 with other bytes escaped.


def _numpy_dtype(code: object = None, *_: object) -> NumpyDType:
    return NumpyDType(code)


def _numpy_scalar(dtype: object, contents: object = b"", *_: object) -> object:
    contents = contents.encode("utf-8", "surrogateescape") if isinstance(contents, str) else contents
    if isinstance(dtype, NumpyDType) and isinstance(contents, bytes):
        form = (">" if dtype.order == ">" else "<") + _STRUCT_LETTERS.get(dtype.code, "")
        if len(form) == 2 and len(contents) == struct.calcsize(form):
            return struct.unpack(form, contents)[0]
    return UnreadableTensor("a numpy scalar", "Save torch.tensor(value) in its place")


def _bytes(*arguments: object) -> bytes:
    if arguments:
        refuse("the pickle makes bytes of something")  # protocol 2 writes only the empty ones like this
    return b""


def _encode(text: object, encoding: object = "", *_: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        refuse("the pickle encodes something other than bytes as latin1 text")
    return text.encode("latin1")


_STRUCT_LETTERS = {
    **{"f2": "e", "f4": "f", "f8": "d", "b1": "?"},
    **{"i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
}
_PLAIN_TENSOR_TYPES = {
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
}
_STORAGE_TYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
}
_BEFORE_QUANTISATION = "Average the checkpoints before quantisation"
_COMMON_DTYPE = "Save it in a dtype that safetensors has, such as float32 or complex64"
_ON_CPU = "Save tensor.cpu()"
_UNREADABLE_STORAGES = {
    "ComplexDoubleStorage": ("a complex128 tensor, which safetensors cannot store", "Save tensor.to(torch.complex64)"),
    **{
        f"{kind}Storage": ("a quantized tensor", _BEFORE_QUANTISATION)
        for kind in ("QUInt8", "QInt8", "QInt32", "QUInt4x2", "QUInt2x4")
    },
}
_UNREADABLE = {
    "qtensor": ("a quantized tensor", _BEFORE_QUANTISATION),
    "sparse_tensor": ("a sparse tensor", "Save tensor.to_dense()"),
    "sparse_csr_tensor": ("a sparse tensor", "Save tensor.to_dense()"),
    "nested_tensor": ("a nested tensor", "Save its parts, tensor.unbind(), or a padded tensor"),
    "meta_tensor_no_storage": ("a tensor on the meta device, without data", "Load the weights before you save them"),
    "device_tensor_from_numpy": ("a tensor of another device, saved as a numpy array", _ON_CPU),
    "xla_tensor": ("a tensor of another device, saved as a numpy array", _ON_CPU),
}
_numpy_array = _unreadable("a numpy array", "Save torch.from_numpy(array) in its place")
_FUNCTIONS: Mapping[tuple[str, str], Callable[..., object]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch._tensor", "_rebuild_from_type"): _rebuild_from_type,
    **{("torch._utils", f"_rebuild_{name}"): _unreadable(*facts) for name, facts in _UNREADABLE.items()},
    ("torch._utils", "_rebuild_wrapper_subclass"): _subclass,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _from_cpu,
    ("torch.nn.parameter", "UninitializedParameter"): _unreadable(
        "an uninitialised parameter", "Run the model once before you save it"
    ),
    ("torch", "Size"): _size,
    ("numpy", "dtype"): _numpy_dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _bytes,
    ("builtins", "bytes"): _bytes,
    **{(f"numpy.{core}.multiarray", "scalar"): _numpy_scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _numpy_array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _numpy_array for core in ("core", "_core")},
}
_KNOWN = frozenset(_FUNCTIONS.values())
_DICTS = {("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "Counter")}


def stand_in(module: str, name: str) -> object:
    """Returns the stand-in for the class or function that a pickle calls by this name."""
    if (function := _FUNCTIONS.get((module, name))) is not None:
        return function
    if (module, name) in _DICTS:
        return PlainDict
    if module == "torch" and name in BY_TORCH_NAME:
        return BY_TORCH_NAME[name]
    if module == "torch" and name in _STORAGE_TYPES:
        return StorageType(BY_TORCH_NAME[_STORAGE_TYPES[name]], name)
    if (module, name) in (("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")):
        return StorageType(None, name)
    if module == "torch" and name.endswith("Storage"):
        return UnreadableTensor(*_UNREADABLE_STORAGES.get(name, (f"a tensor of {quote(name)}", _COMMON_DTYPE)))
    return type("Foreign", (Foreign,), {"__slots__": (), "module": module, "qualname": name})
