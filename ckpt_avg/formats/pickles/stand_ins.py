"""What stands for the objects of a pickle: plain containers, references to stored tensors, and inert classes.

Nothing here is imported or run because a checkpoint names it: `stand_in` maps a name to one of these, and the functions
among them only return a description of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar

from ckpt_avg.checkpoint.spec import BY_TORCH_NAME, DType
from ckpt_avg.formats.pickles.leaves import StorageRef, StoredTensor, UnreadableTensor, refuse
from ckpt_avg.formats.pickles.numpy_arrays import ARRAY_FUNCTIONS
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import quote


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
    """Stands for an object of a class that is not looked at; each class gets a subclass of its own.

    Attributes:
        module, qualname: the class, as the pickle names it.
        arguments: what it was called with.
        state: what it was to be restored from.
    """

    __slots__ = ("arguments", "state")
    module: ClassVar[str]
    qualname: ClassVar[str]
    arguments: tuple[object, ...]
    state: object

    def __new__(cls, *arguments: object, **_: object) -> Foreign:  # noqa: D102
        made = super().__new__(cls)
        made.arguments = arguments
        made.state = None
        return made

    def __init__(self, *_: object, **__: object) -> None:
        pass

    @classmethod
    def described(cls) -> str:
        """Returns the dotted name of the class that this one stands for."""
        return quote(f"{cls.module}.{cls.qualname}")[1:-1]


@dataclass(frozen=True, slots=True)
class StorageType:
    """Stands for a class of storages; ``dtype`` is None for an untyped one."""

    dtype: DType | None
    name: str


class Opaque:
    """Stands for a dict key or set item whose hash its author could choose: nobody looks it up by value here."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


def safe_key(key: object) -> object:
    """Returns what stands for a key in a dict or set.

    The hash of a deeply shared tuple takes time exponential in its depth, and large integers (multiples of 2⁶¹ − 1) and
    tuples can be made to collide by the thousand.
    """
    if type(key) in (str, bytes, bool, float, type(None)) or (type(key) is int and abs(key) < 2**60):
        return key
    return Opaque(key)


def is_known(function: object) -> bool:
    """Whether it is one of the functions that stand for torch's and numpy's."""
    # Asked for its type first, so that nothing hostile is hashed.
    return isinstance(function, FunctionType) and function in _FUNCTIONS


# --- what stands for the functions that rebuild tensors ----------------------------------------------------


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
        return UnreadableTensor("a lazily conjugated or negated tensor")
    return _view(storage, offset, shape, stride, getattr(storage, "dtype", None))


def _rebuild_tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    requires_grad: object,
    hooks: object,
    dtype: object,
    *rest: object,
) -> object:
    if isinstance(dtype, type) and issubclass(dtype, Foreign):
        return UnreadableTensor(f"a {dtype.described()} tensor")
    return _view(storage, offset, shape, stride, dtype if isinstance(dtype, DType) else None)


def _rebuild_parameter(tensor: object, *rest: object) -> object:
    return tensor


def _rebuild_from_type(function: object, kind: object, arguments: object, *rest: object) -> object:
    plain = isinstance(kind, type) and issubclass(kind, Foreign) and kind.described() in _PLAIN_TENSOR_TYPES
    if plain and is_known(function) and isinstance(arguments, tuple):
        return function(*arguments)  # type: ignore[operator]  # it is one of the functions of this module
    name = kind.described() if isinstance(kind, type) and issubclass(kind, Foreign) else "unknown"
    return UnreadableTensor(f"a tensor subclass ({name})")


def _unreadable(kind: str) -> Callable[..., UnreadableTensor]:
    def rebuild(*_: object) -> UnreadableTensor:
        return UnreadableTensor(kind)

    return rebuild


def _size(*arguments: object) -> tuple[int, ...]:
    return _integers(arguments[0]) if arguments else ()


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
_UNREADABLE_STORAGES = {
    "ComplexDoubleStorage": "a complex128 tensor, which safetensors cannot hold",
    **{f"{kind}Storage": "a quantized tensor" for kind in ("QUInt8", "QInt8", "QInt32", "QUInt4x2", "QUInt2x4")},
}
_TENSOR_FUNCTIONS: Mapping[tuple[str, str], Callable[..., object]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch._tensor", "_rebuild_from_type"): _rebuild_from_type,
    ("torch._utils", "_rebuild_qtensor"): _unreadable("a quantized tensor"),
    ("torch._utils", "_rebuild_sparse_tensor"): _unreadable("a sparse tensor"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _unreadable("a sparse tensor"),
    ("torch._utils", "_rebuild_nested_tensor"): _unreadable("a nested tensor"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _unreadable("a tensor subclass"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unreadable("a tensor on the meta device, without data"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _unreadable("a tensor of a device that saves numpy arrays"),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _unreadable("a tensor of another device"),
    ("torch.nn.parameter", "UninitializedParameter"): _unreadable("an uninitialised parameter"),
    ("torch", "Size"): _size,
    **ARRAY_FUNCTIONS,
}
_FUNCTIONS = frozenset(_TENSOR_FUNCTIONS.values())
_DICTS = {("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "Counter")}


def stand_in(module: str, name: str) -> object:
    """Returns what stands for the class or function that a pickle calls by this name."""
    if (function := _TENSOR_FUNCTIONS.get((module, name))) is not None:
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
        return UnreadableTensor(_UNREADABLE_STORAGES.get(name, f"a tensor of {quote(name)}"))
    return type("Foreign", (Foreign,), {"__slots__": (), "module": module, "qualname": name})
