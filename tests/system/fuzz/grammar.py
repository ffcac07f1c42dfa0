"""Pickles of a grammar: each operation finds on the stack what the machine needs, whatever it then makes of it.

The names are of harmless functions and of dangerous ones with harmless arguments, so that the standard unpickler can
be let loose on the same pickles as a control.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random

from formats.pickles.opcodes import STOP, named, tensor, text, whole

NAMES = [("os", "system"), ("os", "getcwd"), ("posix", "times"), ("subprocess", "getoutput"), ("builtins", "eval")]
NAMES += [("builtins", "exec"), ("builtins", "compile"), ("builtins", "getattr"), ("builtins", "open")]
NAMES += [("__hello__", "main"), ("colorsys", "rgb_to_hsv"), ("importlib", "import_module"), ("operator", "attrgetter")]
NAMES += [("no_such", "name"), ("collections", "OrderedDict"), ("collections", "defaultdict"), ("builtins", "set")]
NAMES += [("argparse", "Namespace"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._tensor", "_rebuild_from_type_v2")]
NAMES += [("torch", "FloatStorage"), ("torch", "Size"), ("torch._utils", "_rebuild_parameter"), ("numpy", "dtype")]
NAMES += [("numpy", "ndarray"), ("numpy._core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "scalar")]
NAMES += [("_codecs", "encode")]
STRINGS = ["true", "1+1", "a", "latin1", "storage", "0", "cpu", "f4", "r", "__setstate__", "__class__", "__dict__", "é"]
_BOTTOM = 4  # nothing below is popped, so that there is always a value to end with


class Pickle:
    """A pickle in the making. ``depth`` counts values; a mark ends a stack of its own."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.body = bytearray(b"\x80\x04")
        self.depths = [0]
        self.memo = 0

    def put(self, code: bytes, *, takes: int = 0, gives: int = 0) -> None:
        """Appends an operation, with what it does to the stack."""
        self.body += code
        self.depths[-1] += gives - takes

    def has(self, count: int) -> bool:
        """Whether so many values stand above the last mark."""
        return self.depths[-1] >= count


def generate(rng: Random) -> bytes:
    """Returns a pickle that ends in STOP, with one value or more on the stack."""
    made = Pickle(rng)
    for _ in range(_BOTTOM):
        _value(made)
    for _ in range(rng.randrange(3, 40)):
        rng.choice(_STEPS)(made)
    while len(made.depths) > 1:
        _close(made)
    return bytes(made.body) + STOP


def _value(made: Pickle) -> None:
    rng = made.rng
    plain = [b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f", b"K\1", whole(rng.randrange(-3, 300)), b"C\1x"]
    plain += [b"G" + struct.pack(">d", 0.5), text(rng.choice(STRINGS)), text(rng.choice(STRINGS)), b"S'true'\n"]
    made.put(rng.choice(plain), gives=1)


def _name(made: Pickle) -> None:
    module, name = made.rng.choice(NAMES)
    stacked = text(module) + text(name) + b"\x93"
    made.put(made.rng.choice((named(module, name), stacked)), gives=1)


def _tuple(made: Pickle) -> None:
    count = made.rng.randrange(4)
    if made.has(count):
        made.put((b")", b"\x85", b"\x86", b"\x87")[count], takes=count, gives=1)


def _call(made: Pickle) -> None:
    """A name, its arguments, and one of the operations that call."""
    _name(made)
    count = made.rng.choice((0, 1, 1, 1, 2, 3))
    for _ in range(count):
        made.rng.choice((_string, _string, _value, _name, _again))(made)
    made.put((b")", b"\x85", b"\x86", b"\x87")[count], takes=count, gives=1)
    made.put(made.rng.choice((b"R", b"R", b"R", b"\x81", b"}\x92")), takes=2, gives=1)


def _string(made: Pickle) -> None:
    made.put(text(made.rng.choice(STRINGS)), gives=1)


def _call_whatever(made: Pickle) -> None:
    if made.has(_BOTTOM + 1):
        _value(made)
        made.put(b"\x85")
        made.put(made.rng.choice((b"R", b"\x81")), takes=2, gives=1)


def _instance(made: Pickle) -> None:
    """INST and OBJ, with their own mark."""
    module, name = made.rng.choice(NAMES)
    argument = text(made.rng.choice(STRINGS))
    inst = b"(" + argument + f"i{module}\n{name}\n".encode()
    made.put(made.rng.choice((inst, b"(" + named(module, name) + argument + b"o")), gives=1)


def _build(made: Pickle) -> None:
    if made.has(_BOTTOM):
        state = b"}" + text(made.rng.choice(STRINGS)) + named(*made.rng.choice(NAMES)) + b"s"
        made.put(made.rng.choice((state, b"N" + state + b"\x86", text("true"))) + b"b")


def _fill(made: Pickle) -> None:
    """APPEND, SETITEM and their plural forms, on whatever is there."""
    if made.has(_BOTTOM):
        pair = text(made.rng.choice(STRINGS)) + b"K\2"
        ways = (b"K\1a", b"(K\1K\2e", pair + b"s", b"(" + pair + pair + b"u", b"(K\1\x90")
        start = made.rng.choice((b"", b"]", b"}", b"\x8f"))
        made.put(start + made.rng.choice(ways), gives=bool(start))


def _remember(made: Pickle) -> None:
    if made.has(1):
        ways = (b"\x94", b"q" + bytes([made.memo]), f"p{made.memo}\n".encode(), b"r" + struct.pack("<I", made.memo))
        made.put(made.rng.choice(ways if made.memo < 250 else ways[:1]))
        made.memo += 1


def _again(made: Pickle) -> None:
    """GET in its forms; MEMOIZE may have counted otherwise, so the index may be unknown."""
    if made.memo:
        index = made.rng.randrange(min(made.memo, 250))
        ways = (b"h" + bytes([index]), f"g{index}\n".encode(), b"j" + struct.pack("<I", index))
        made.put(made.rng.choice(ways), gives=1)
    else:
        _value(made)


def _open(made: Pickle) -> None:
    made.body += b"("
    made.depths.append(0)
    for _ in range(_BOTTOM):
        _value(made)


def _close(made: Pickle) -> None:
    if len(made.depths) > 1:
        even = made.depths.pop() % 2 == 0
        made.put(made.rng.choice((b"t", b"l", b"\x91", *[b"d"] * even)), gives=1)


def _drop(made: Pickle) -> None:
    if made.has(_BOTTOM + 1):
        made.put(b"0", takes=1)
    else:
        made.put(b"2", gives=1)


def _persistent(made: Pickle) -> None:
    kind = named(*made.rng.choice((("torch", "FloatStorage"), ("os", "system"))))
    storage = b"(" + text("storage") + kind + text("0") + text("cpu") + whole(6) + b"tQ"
    made.put(made.rng.choice((storage, tensor("0", (2, 3)), storage, b"Ptrue\n", text("true") + b"Q")), gives=1)


def _extension(made: Pickle) -> None:
    if made.rng.random() < 0.2:
        made.put(made.rng.choice((b"\x82\x7f", b"\x83\x7f\0", b"\x84\x7f\0\0\0")), gives=1)


_STEPS: list[Callable[[Pickle], None]] = [_value, _value, _name, _tuple, _call, _call, _call, _call_whatever, _instance]
_STEPS += [_build, _fill, _remember, _remember, _again, _open, _close, _drop, _persistent, _extension]
