"""A checkpoint's pickle, read without importing or running anything that it names.

`read_pickle` runs the opcodes on the standard library's pickle machine, changed in three ways:

- ``find_class`` imports nothing and returns a stand-in (`stand_ins`). The few functions that rebuild tensors return a
  `StoredTensor`. Every other class or function is an inert `Foreign` class that keeps what it is given.
- Every opcode that calls, builds or fills an object accepts only these stand-ins and plain containers, so a hostile
  pickle can reach no attribute of a live object.
- Operations, names and bytes are limited (`limits`), and nothing is hashed whose hash the pickle's author could choose.

``torch.load(weights_only=True)`` has an allow list of real types instead (compare CVE-2025-32434), and refuses a file
with any other class.

The machine is ``pickle._Unpickler``, which is private: the opcodes of the public class, written in C, can't be
replaced. A new Python version may change it; tests/system/fuzz would show that.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.pickles.stand_ins import (
    Foreign,
    NumpyDType,
    PickledTensor,
    PlainDict,
    StorageRef,
    StorageType,
    UnreadableTensor,
    is_known,
    refuse,
    safe_key,
    stand_in,
)
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import quote

_SAVE_AGAIN = "Save it again: torch.save(torch.load(path, weights_only=True), new_path)"
_SIZED = (dict, list, tuple, set, frozenset)


Source = io.BufferedIOBase  # whose read must not allocate more bytes than there are


def read_pickle(stream: bytes, where: str) -> object:
    """Returns the object that a pickle describes, made of plain values and stand-ins.

    Raises:
        CheckpointFormatError: the pickle is damaged, hostile or exceeds a limit; the message names ``where``.
    """
    source = io.BytesIO(stream)
    result, _ = read_next_pickle(source, where)
    if source.tell() < len(stream):
        raise CheckpointFormatError(f"{where}: bytes follow the end of the pickle. Save the checkpoint again.")
    return result


def read_next_pickle(source: Source, where: str) -> tuple[object, Mapping[str, StorageRef | UnreadableTensor]]:
    """Reads one of several consecutive pickles: the object as `read_pickle` returns it, and its storages by key."""
    machine = _SpecUnpickler(source)
    try:
        result = machine.load()
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{where}: {error}") from None
    except MemoryError:
        raise
    except EOFError:
        raise CheckpointFormatError(f"{where}: the pickle is truncated. Save or copy it again.") from None
    except Exception as error:
        # Malformed input can raise any exception in the machine.
        raise CheckpointFormatError(
            f"{where}: the pickle is damaged ({type(error).__name__}: {str(error)[:200]}). Save or copy it again."
        ) from error
    if machine.frame_continues():
        raise CheckpointFormatError(f"{where}: bytes follow the end of the pickle. Save the checkpoint again.")
    return result, machine.storages


# An empty container takes 60 to 220 bytes, a hundred times its opcode, so it counts as several operations.
_CONTAINERS = {code[0] for code in (pickle.EMPTY_SET, pickle.EMPTY_DICT, pickle.EMPTY_LIST)}
_CONTAINER_COST = 20


class _Counted(dict[int, Callable[[Any], None]]):
    """The opcode table, which also limits how many opcodes run."""

    left = LIMITS.pickle_operations

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= _CONTAINER_COST if code in _CONTAINERS else 1
        if self.left < 0:
            raise CheckpointFormatError(
                f"expected at most {LIMITS.pickle_operations:,} operations in the pickle, got more. Save the state "
                "dict alone; if that is what this is, don't trust the file."
            )
        try:
            return super().__getitem__(code)
        except KeyError:
            refuse(f"unknown pickle operation {code:#04x}")


class _SpecUnpickler(pickle._Unpickler):
    """The standard library's machine over stand-ins."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    memo: dict[int, Any]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    _unframer: Any
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, source: Source) -> None:
        self._source = source
        super().__init__(source, encoding="utf-8", errors="surrogateescape")
        self.storages: dict[str, StorageRef | UnreadableTensor] = {}
        self._globals: dict[tuple[str, str], object] = {}
        self._budget = _Counted(type(self).dispatch)
        self.dispatch = self._budget  # type: ignore[misc]  # counted per instance

    def frame_continues(self) -> bool:
        """Whether bytes follow STOP in the last frame."""
        frame = self._unframer.current_frame
        return bool(frame is not None and frame.read(1))

    def find_class(self, module: str, name: str) -> object:
        """Returns the stand-in for a global; nothing is imported."""
        key = (module, name)
        if key not in self._globals:
            if len(self._globals) >= LIMITS.pickle_globals:
                refuse(f"expected at most {LIMITS.pickle_globals:,} names in the pickle, got more")
            self._globals[key] = stand_in(module, name)
        return self._globals[key]

    def get_extension(self, code: int) -> NoReturn:
        """Refuses codes of the process-wide copyreg registry."""
        refuse(f"the pickle uses extension code {code}")

    def persistent_load(self, pid: object) -> object:
        """Returns a reference to the storage of ``("storage", type, key, device, numel)``.

        Streams of torch before 1.6 add the view of a storage, and give a module's class with its source.
        """
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            refuse("a persistent id of the pickle names no storage")
        kind, key, numel = pid[1], pid[2], pid[4]
        if type(key) is not str:
            refuse("a storage of the pickle has no known type, name or size")
        if isinstance(kind, UnreadableTensor):
            return self.storages.setdefault(key, kind)
        if not isinstance(kind, StorageType) or type(numel) is not int or numel < 0:
            refuse("a storage of the pickle has no known type, name or size")
        if len(pid) > 5 and pid[5] is not None:
            return self.storages.setdefault(
                key, UnreadableTensor("a view of a storage, as torch 0.3 saved it", _SAVE_AGAIN)
            )
        storage = StorageRef(key, kind.dtype, numel)
        if isinstance(known := self.storages.setdefault(key, storage), StorageRef) and known != storage:
            refuse(f"storage {quote(key)} has two types or sizes in the pickle")
        return known

    def _call(self, function: Any, arguments: Any) -> None:
        if isinstance(function, Foreign):
            function = type(function)  # what an unknown object returns is unknown, too
        stand_in = isinstance(function, type) and issubclass(function, (Foreign, PlainDict))
        if not stand_in and not is_known(function):
            refuse(f"the pickle calls {quote(type(function).__name__)}, which is no function")
        if not isinstance(arguments, tuple):
            refuse("the pickle calls a function without a tuple of arguments")
        # A call may copy its arguments, and the same long argument can be given many times.
        sizes = [len(arguments), *(len(each) for each in arguments if isinstance(each, _SIZED))]
        self._budget.left -= 5 * sum(size for size in sizes if size > LIMITS.rank)
        self._budget.left -= sum(len(each) for each in arguments if isinstance(each, (str, bytes, bytearray))) // 8
        self.append(function(*arguments))

    def load_bytearray8(self) -> None:
        """BYTEARRAY8: allocates the bytes that exist, not those that are claimed."""
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(min(length, LIMITS.pickle))))

    def load_put(self) -> None:
        """PUT: a memo index as text, of any size."""
        index = int(self.readline()[:-1])
        if not 0 <= index < 2**32:
            refuse("expected a memo index below 2³² in the pickle, got a larger one")
        self.memo[index] = self.stack[-1]

    def load_reduce(self) -> None:
        """REDUCE: function and arguments from the stack."""
        arguments = self.stack.pop()
        self._call(self.stack.pop(), arguments)

    def load_newobj_ex(self) -> None:
        """NEWOBJ_EX: keywords say nothing about tensors, so they are dropped."""
        self.stack.pop()
        self.load_reduce()

    def _instantiate(self, klass: object, arguments: Any) -> None:
        self._call(klass, tuple(arguments))

    def load_build(self) -> None:
        """BUILD: restores a stand-in."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Foreign):
            target.state = state
        elif isinstance(target, NumpyDType):
            target.restore(state)
        elif not isinstance(target, (PlainDict, PickledTensor)):
            refuse(f"the pickle restores a state into a {type(target).__name__}")

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
            refuse(f"the pickle appends to a {type(target).__name__}")

    def load_setitem(self) -> None:
        """SETITEM: one key and value."""
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def load_setitems(self) -> None:
        """SETITEMS: the keys and values above the mark."""
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Foreign):
            if target.items is None:
                target.items = PlainDict()
            target = target.items
        if not isinstance(target, dict):
            refuse(f"the pickle sets an item of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[safe_key(key)] = value

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
            target.update(map(safe_key, items))
        elif not isinstance(target, Foreign):
            refuse(f"the pickle adds to a {type(target).__name__}")

    def load_frozenset(self) -> None:
        """FROZENSET of the items above the mark."""
        items = self.pop_mark()  # first: it changes the stack that self.append appends to
        self.append(frozenset(map(safe_key, items)))


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
