"""A checkpoint's pickle, read without importing or running anything that it names.

`read_pickle` walks the opcodes with the standard library's own machine, changed in three ways:
- ``find_class`` imports nothing. The few functions that rebuild tensors become functions of this module that
  return `StoredTensor`; ordered dicts become `PlainDict`; every other class or function becomes an inert
  `Foreign` class that keeps what it is given and does nothing.
- Every opcode that calls, builds or fills an object works on these stand-ins and on plain containers alone, so
  a hostile pickle can reach no attribute of a live object.
- Operations, names and bytes are bounded (`limits`), and nothing is hashed whose hash the pickle's author could choose.

``torch.load(weights_only=True)`` guards the same door with an allow list of real types; here no real type is
behind it (compare CVE-2025-32434).
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, ClassVar, NoReturn

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.limits import LIMITS
from ckpt_avg.messages import quote
from ckpt_avg.spec import BY_TORCH_NAME, DType


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
                self[_safe_key(key)] = value


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
class StorageRef:
    """A record of the archive. ``dtype`` is None for an untyped storage, whose ``numel`` counts bytes."""

    key: str
    dtype: DType | None
    numel: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A view of a storage, not yet checked against its record."""

    storage: StorageRef
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UnreadableTensor:
    """A tensor of a kind that has no plain elements in one storage; ``kind`` says which."""

    kind: str


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: DType | None
    name: str


def read_pickle(stream: bytes, where: str) -> object:
    """Returns the object that the pickle describes, made of plain values and stand-ins.

    Args:
        stream: the bytes of the pickle, from first opcode to STOP.
        where: what to name in errors.

    Raises:
        CheckpointFormatError: the pickle is damaged, hostile beyond reading, or over a limit.
    """
    machine = _SpecUnpickler(io.BytesIO(stream))
    try:
        result = machine.load()
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{where}: {error}") from None
    except Exception as error:
        # The machine meets malformed input with whatever exception its Python happens to raise.
        raise CheckpointFormatError(
            f"{where}: the pickle is damaged ({type(error).__name__}: {str(error)[:200]}). Save or copy it again."
        ) from error
    if machine.bytes_follow():
        raise CheckpointFormatError(f"{where}: bytes follow the end of the pickle. Save the checkpoint again.")
    return result


def _refuse(what: str) -> NoReturn:
    raise CheckpointFormatError(f"{what}. Don't trust this file; save the weights again where they come from.")


class _Opaque:
    """Stands for a dict key or set item whose hash its author could choose: nobody looks it up by value here."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


def _safe_key(key: object) -> object:
    """Returns what stands for a key in a dict or set.

    The hash of a deeply shared tuple takes time exponential in its depth, and large integers (multiples of 2⁶¹ − 1) and
    tuples can be made to collide by the thousand.
    """
    if type(key) in (str, bytes, bool, float, type(None)) or (type(key) is int and abs(key) < 2**60):
        return key
    return _Opaque(key)


def _is_known(function: object) -> bool:
    # Asked for its type first, so that nothing hostile is hashed.
    return isinstance(function, FunctionType) and function in _FUNCTIONS


# --- what stands for the functions that rebuild tensors ----------------------------------------------------


def _integers(values: object) -> tuple[int, ...]:
    if isinstance(values, (tuple, list)) and len(values) > LIMITS.rank:
        _refuse(f"expected a shape or stride of at most {LIMITS.rank} integers, got {len(values):,}")
    if not isinstance(values, (tuple, list)) or not all(type(value) is int for value in values):
        _refuse(f"expected a tuple of integers as shape or stride, got {quote(type(values).__name__)}")
    return tuple(values)


def _view(storage: object, offset: object, shape: object, stride: object, dtype: DType | None) -> object:
    if isinstance(storage, UnreadableTensor):
        return storage
    if not isinstance(storage, StorageRef) or type(offset) is not int or dtype is None:
        _refuse("a tensor of the pickle refers to no storage")
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
    if plain and _is_known(function) and isinstance(arguments, tuple):
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
}
_SIZED = (dict, list, tuple, set, frozenset)
_FUNCTIONS = frozenset(_TENSOR_FUNCTIONS.values())
_DICTS = {("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "Counter")}


# --- the machine -------------------------------------------------------------------------------------------


class _Counted(dict[int, Callable[[Any], None]]):
    """The opcode table, which also bounds how many opcodes are carried out."""

    left = LIMITS.pickle_operations

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            _refuse(f"expected at most {LIMITS.pickle_operations:,} operations in the pickle, got more")
        try:
            return super().__getitem__(code)
        except KeyError:
            _refuse(f"unknown pickle operation {code:#04x}")


class _SpecUnpickler(pickle._Unpickler):
    """The standard library's machine over stand-ins. Its Python form: the C form's opcodes can't be changed."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    memo: dict[int, Any]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    _unframer: Any
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, source: io.BytesIO) -> None:
        self._source = source
        super().__init__(source, encoding="utf-8", errors="surrogateescape")
        self._globals: dict[tuple[str, str], object] = {}
        self._budget = _Counted(type(self).dispatch)
        self.dispatch = self._budget  # type: ignore[misc]  # counted per instance

    def bytes_follow(self) -> bool:
        """Whether there is more after STOP, in the last frame or after it."""
        frame = self._unframer.current_frame
        return bool((frame is not None and frame.read(1)) or self._source.read(1))

    def find_class(self, module: str, name: str) -> object:
        """Returns the stand-in for a global; nothing is imported."""
        key = (module, name)
        if key not in self._globals:
            if len(self._globals) >= LIMITS.pickle_globals:
                _refuse(f"expected at most {LIMITS.pickle_globals:,} names in the pickle, got more")
            self._globals[key] = _stand_in(module, name)
        return self._globals[key]

    def get_extension(self, code: int) -> NoReturn:
        """Refuses codes of the process-wide copyreg registry."""
        _refuse(f"the pickle uses extension code {code}")

    def persistent_load(self, pid: object) -> object:
        """Turns ``("storage", type, key, device, numel)`` into a reference to a record of the archive."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            _refuse("a persistent id of the pickle names no storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        if isinstance(kind, UnreadableTensor):
            return kind
        if not isinstance(kind, _StorageType) or type(key) is not str or type(numel) is not int or numel < 0:
            _refuse("a storage of the pickle has no known type, name or size")
        return StorageRef(key, kind.dtype, numel)

    def _call(self, function: Any, arguments: Any, keywords: Any = None) -> None:
        if isinstance(function, Foreign):
            function = type(function)  # what an unknown object returns is as unknown
        stand_in = isinstance(function, type) and issubclass(function, (Foreign, PlainDict))
        if not stand_in and not _is_known(function):
            _refuse(f"the pickle calls {quote(type(function).__name__)}, which is no function")
        if not isinstance(arguments, tuple):
            _refuse("the pickle calls a function without a tuple of arguments")
        # A call may copy what it is given, and the same long argument can be given again and again.
        self._budget.left -= 5 * (len(arguments) + sum(len(each) for each in arguments if isinstance(each, _SIZED)))
        self.append(function(*arguments))

    def load_bytearray8(self) -> None:
        """BYTEARRAY8: allocates what is there, not what is claimed."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(min(length, len(self._source.getbuffer()) + 1))))

    def load_put(self) -> None:
        """PUT: a memo index as text, of any size."""
        index = int(self.readline()[:-1])
        if not 0 <= index < 2**32:
            _refuse("expected a memo index below 2³² in the pickle, got a larger one")
        self.memo[index] = self.stack[-1]

    def load_reduce(self) -> None:
        """REDUCE: function and arguments from the stack."""
        arguments = self.stack.pop()
        self._call(self.stack.pop(), arguments)

    def load_newobj_ex(self) -> None:
        """NEWOBJ_EX: keywords tell nothing about tensors, so they are dropped."""
        self.stack.pop()
        self.load_reduce()

    def _instantiate(self, klass: object, arguments: Any) -> None:
        self._call(klass, tuple(arguments))

    def load_build(self) -> None:
        """BUILD: only a stand-in takes a state."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Foreign):
            target.state = state
        elif not isinstance(target, (PlainDict, UnreadableTensor, StoredTensor)):
            _refuse(f"the pickle restores a state into a {type(target).__name__}")

    def load_append(self) -> None:
        """APPEND one item."""
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        """APPENDS the items above the mark."""
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Foreign):
            _refuse(f"the pickle appends to a {type(target).__name__}")

    def load_setitem(self) -> None:
        """SETITEM: one key and value."""
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def load_setitems(self) -> None:
        """SETITEMS: the keys and values above the mark."""
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_safe_key(key)] = value
        elif not isinstance(target, Foreign):
            _refuse(f"the pickle sets an item of a {type(target).__name__}")

    def load_dict(self) -> None:
        """DICT: a new dict of the keys and values above the mark."""
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def load_additems(self) -> None:
        """ADDITEMS to a set."""
        items = self.pop_mark()
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(map(_safe_key, items))
        elif not isinstance(target, Foreign):
            _refuse(f"the pickle adds to a {type(target).__name__}")

    def load_frozenset(self) -> None:
        """FROZENSET of the items above the mark."""
        items = self.pop_mark()  # first, since it changes the stack that self.append appends to
        self.append(frozenset(map(_safe_key, items)))


for _opcode, _method in (
    (pickle.BYTEARRAY8, _SpecUnpickler.load_bytearray8),
    (pickle.PUT, _SpecUnpickler.load_put),
    (pickle.REDUCE, _SpecUnpickler.load_reduce),
    (pickle.NEWOBJ, _SpecUnpickler.load_reduce),
    (pickle.NEWOBJ_EX, _SpecUnpickler.load_newobj_ex),
    (pickle.BUILD, _SpecUnpickler.load_build),
    (pickle.APPEND, _SpecUnpickler.load_append),
    (pickle.APPENDS, _SpecUnpickler.load_appends),
    (pickle.SETITEM, _SpecUnpickler.load_setitem),
    (pickle.SETITEMS, _SpecUnpickler.load_setitems),
    (pickle.DICT, _SpecUnpickler.load_dict),
    (pickle.ADDITEMS, _SpecUnpickler.load_additems),
    (pickle.FROZENSET, _SpecUnpickler.load_frozenset),
):
    _SpecUnpickler.dispatch[_opcode[0]] = _method


def _stand_in(module: str, name: str) -> object:
    if (function := _TENSOR_FUNCTIONS.get((module, name))) is not None:
        return function
    if (module, name) in _DICTS:
        return PlainDict
    if module == "torch" and name in BY_TORCH_NAME:
        return BY_TORCH_NAME[name]
    if module == "torch" and name in _STORAGE_TYPES:
        return _StorageType(BY_TORCH_NAME[_STORAGE_TYPES[name]], name)
    if (module, name) in (("torch.storage", "UntypedStorage"), ("torch", "UntypedStorage")):
        return _StorageType(None, name)
    if module == "torch" and name.endswith("Storage"):
        return UnreadableTensor(_UNREADABLE_STORAGES.get(name, f"a tensor of {quote(name)}"))
    return type("Foreign", (Foreign,), {"__slots__": (), "module": module, "qualname": name})
