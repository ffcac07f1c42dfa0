"""What stands for numpy's arrays, dtypes and scalars in a pickle: the bytes that the pickle itself holds.

numpy is not imported. The forms are those of ``ndarray.__reduce__`` and ``__reduce_ex__(5)``, ``dtype.__reduce__`` and
``generic.__reduce__`` (numpy/_core/src/multiarray). Protocol 2 has no bytes, so they come as text through
``_codecs.encode(text, "latin1")``.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from math import prod

from ckpt_avg.checkpoint.spec import BY_TORCH_NAME, DType, contiguous_stride
from ckpt_avg.formats.pickles.leaves import Leaf, UnreadableTensor, refuse
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import quote

_CODES: Mapping[str, tuple[str, str]] = {
    "f2": ("float16", "e"),
    "f4": ("float32", "f"),
    "f8": ("float64", "d"),
    "i1": ("int8", "b"),
    "i2": ("int16", "h"),
    "i4": ("int32", "i"),
    "i8": ("int64", "q"),
    "u1": ("uint8", "B"),
    "u2": ("uint16", "H"),
    "u4": ("uint32", "I"),
    "u8": ("uint64", "Q"),
    "b1": ("bool", "?"),
    "c8": ("complex64", ""),
}
_NATIVE = "<" if sys.byteorder == "little" else ">"


class ArrayDType:
    """Stands for a ``numpy.dtype``: its code, such as ``f4``, and its byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "|"

    def restore(self, state: object) -> None:
        """Takes the state of ``dtype.__setstate__``: (version, byte order, …)."""
        if isinstance(state, tuple) and len(state) > 1 and isinstance(state[1], str):
            self.order = state[1]

    @property
    def known(self) -> DType | None:
        """The dtype, where it is a plain little-endian one."""
        if self.code not in _CODES or self.order == ">" or (self.order == "=" and _NATIVE != "<"):
            return None
        return BY_TORCH_NAME[_CODES[self.code][0]]


class StoredArray(Leaf):
    """Stands for a ``numpy.ndarray``; empty until the pickle restores it.

    Attributes:
        dtype, shape, stride: of the array; strides count elements.
        contents: its bytes.
    """

    __slots__ = ("contents", "dtype", "problem", "shape", "stride")

    def __init__(self) -> None:
        self.dtype: DType | None = None
        self.shape: tuple[int, ...] = (0,)
        self.stride: tuple[int, ...] = (1,)
        self.contents: bytes | bytearray = b""
        self.problem = "a numpy array without contents"

    def restore(self, state: object) -> None:
        """Takes the state of ``ndarray.__setstate__``: (version, shape, dtype, Fortran order, bytes)."""
        if not isinstance(state, tuple) or len(state) != 5:
            refuse("a numpy array of the pickle has an unknown form")
        self.fill(state[4], state[2], state[1], fortran=bool(state[3]))

    def fill(self, contents: object, dtype: object, shape: object, *, fortran: bool) -> None:
        """Takes bytes, dtype and shape, which must fit each other."""
        contents = _raw(contents)
        if not isinstance(dtype, ArrayDType) or dtype.known is None or not isinstance(contents, (bytes, bytearray)):
            kind = f"{dtype.order}{dtype.code}" if isinstance(dtype, ArrayDType) else type(dtype).__name__
            self.problem = f"a numpy array of dtype {quote(kind)}"
            return
        if not isinstance(shape, tuple) or len(shape) > LIMITS.rank:
            refuse(f"expected the shape of a numpy array, got {quote(shape)}")
        if any(type(extent) is not int or not 0 <= extent <= LIMITS.elements for extent in shape):
            refuse(f"expected the shape of a numpy array, got {quote(shape)}")
        if prod(shape) * dtype.known.itemsize != len(contents):
            refuse(f"expected {prod(shape) * dtype.known.itemsize:,} bytes in a numpy array, got {len(contents):,}")
        self.dtype, self.shape, self.contents, self.problem = dtype.known, shape, contents, ""
        self.stride = contiguous_stride(shape[::-1])[::-1] if fortran else contiguous_stride(shape)


def _raw(contents: object) -> object:
    """Returns the bytes of a string of Python 2, which were decoded as UTF-8 with what is none escaped."""
    return contents.encode("utf-8", "surrogateescape") if isinstance(contents, str) else contents


def _dtype(*arguments: object) -> object:
    code = arguments[0] if arguments else None
    return ArrayDType(code if isinstance(code, str) and len(code) <= 16 else "unknown")


def _reconstruct(*_: object) -> StoredArray:
    return StoredArray()


def _from_buffer(contents: object, dtype: object, shape: object, order: object, *_: object) -> StoredArray:
    array = StoredArray()
    array.fill(contents, dtype, shape, fortran=order == "F")
    return array


def _scalar(dtype: object, contents: object = b"", *_: object) -> object:
    contents = _raw(contents)
    if isinstance(dtype, ArrayDType) and dtype.known is not None and isinstance(contents, bytes):
        letter = _CODES[dtype.code][1]
        if letter and len(contents) == dtype.known.itemsize:
            return struct.unpack(f"<{letter}", contents)[0]
    return UnreadableTensor("a numpy scalar")


def _bytes(*arguments: object) -> bytes:
    if arguments:
        refuse("the pickle makes bytes of something")  # protocol 2 writes only the empty ones like this
    return b""


def _encode(text: object, encoding: object = "", *_: object) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        refuse("the pickle encodes something other than bytes as latin1 text")
    return text.encode("latin1")


ARRAY_FUNCTIONS: Mapping[tuple[str, str], Callable[..., object]] = {
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _bytes,
    ("builtins", "bytes"): _bytes,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}
