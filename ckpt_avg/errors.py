"""The exceptions, and the exit code that each gives on the command line.

Every message says where, what was expected, what was found and what to do. An exception that is none of these is a bug
of ours: it keeps its traceback and exits with 1.
"""

from __future__ import annotations

import dataclasses
import errno
import sys
from typing import Any, ClassVar, NoReturn, TypeVar

from ckpt_avg.argument_types import as_python, expected_instead
from ckpt_avg.text import one_line, quote, size, suggestion, type_of
from ckpt_avg.wording import declare, flag_of, worded

_Value = TypeVar("_Value")

_OUT_OF_MEMORY = (  # in the words of Python, torch, the dynamic loader and CUDA (page-locked memory, a full GPU)
    *("can't start new thread", "can't allocate memory", "std::bad_alloc"),
    *("failed to map segment", "annot allocate memory", " error: out of memory", "_STATUS_ALLOC_FAILED"),
)


class CkptAvgError(Exception):
    """Base of every error that this package raises on purpose.

    Its message is one line, whatever names it contains; only some kinds may have several. It is worded for the caller
    (see `wording`), unless it is ``verbatim``.

    Attributes:
        exit_code: of the command.
        document: what ``--json`` still reports of the result; the command sets it.
    """

    exit_code = 1
    _may_have_lines = False

    def __init__(self, message: str, *, lines: bool = False, verbatim: bool = False) -> None:
        message = message if verbatim else worded(message)
        super().__init__(message if lines or self._may_have_lines else one_line(message))
        self.document: dict[str, Any] = {}


class UsageError(CkptAvgError):
    """The command line or the arguments are invalid."""

    exit_code = 2


class CheckpointFormatError(CkptAvgError):
    """An input is corrupt, unsafe, unreadable or of an unknown kind."""

    exit_code = 3


class NoWeightsError(CheckpointFormatError):
    """A sound file that contains no state dict. In a run folder it is skipped."""


class PartError(CheckpointFormatError):
    """A file that has a part of a checkpoint, such as that of one rank."""


class ChangedWhileReadingError(CheckpointFormatError):
    """An input was truncated or overwritten while it was being read."""


class IncompatibleError(CkptAvgError):
    """The checkpoints don't fit together, or there is nothing to average."""

    exit_code = 4


class NonFiniteError(IncompatibleError):
    """An input contains NaN or Inf, or the mean does not fit the output dtype."""


class OutputError(CkptAvgError):
    """The output could not be written; an existing file is left unchanged."""

    exit_code = 5


class ResourceError(CkptAvgError):
    """Memory, file descriptors or another resource ran out."""

    exit_code = 6


class TooManyFilesError(ResourceError):
    """More files have to be open at once than the system allows.

    Args:
        where: what needs them.
        needed: how many files, at least.
        limit: the hard limit of open files.
    """

    def __init__(self, where: str, needed: int, limit: int) -> None:
        super().__init__(
            f"{where}: at least {needed:,} files have to be open at once, but the limit is {limit:,}. Allow more with "
            f"`ulimit -n {needed + 100}` (as root), or average fewer checkpoints."
        )
        self.limit = limit


class UserCodeError(CkptAvgError):
    """The user's model, dataloader or metric failed, or the BatchNorm refresh could not be done."""

    exit_code = 7
    _may_have_lines = True  # what the user's code raised is shown as it is


class RankError(CkptAvgError):
    """Another rank failed or was lost, or the ranks were started differently."""

    exit_code = 8
    _may_have_lines = True  # another rank's words


class RequirementError(CkptAvgError):
    """The average does not meet a requirement, so it is not published.

    Attributes:
        result: the `AverageResult`, with what was measured.
    """

    exit_code = 9

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


class VerificationError(CkptAvgError):
    """A file is damaged, was not written here, or is not the mean of these checkpoints."""

    exit_code = 9


def fail(
    where: object, problem: str, advice: str = "The file is damaged: save or copy it again", *, tensor: object = None
) -> NoReturn:
    """Raises CheckpointFormatError with a message that says where, what is wrong and what to do."""
    name = "" if tensor is None else f"tensor {quote(tensor)}: "
    raise CheckpointFormatError(f"{where}: {name}{problem}. {advice}.")


class OptionGroup:
    """Base of the dataclasses that declare options (see `commands.options`): each checks its own values.

    Raises:
        UsageError: a value is not allowed.
    """

    heading: ClassVar[str]

    def __init_subclass__(cls) -> None:
        declare(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type] # every group is a dataclass
            value = as_python(str(field.type), getattr(self, field.name))
            if value is None and field.default is not dataclasses.MISSING:
                value = field.default  # None: as if the option was not given
            object.__setattr__(self, field.name, value)
            _check(field, value)


def option(default: _Value, help: str = "", **facts: object) -> _Value:
    """Returns a field of an option group: its default, its help text and what else is known of it."""
    return dataclasses.field(default=default, metadata={"help": help, **facts})


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    choices, least, most = (field.metadata.get(key) for key in ("choices", "least", "most"))
    if expected := expected_instead(str(field.type), value):
        given = "None" if value is None else f"{quote(value)}, {type_of(value)}"
        raise UsageError(f"{flag_of(field.name, field)}: got {given}. Give {expected}.")
    if value is None:
        return
    if choices is not None and value not in choices:
        near = suggestion(value, choices, cutoff=0.5)  # fp16 is meant for float16
        raise UsageError(f"{flag_of(field.name, field)}: {str(value)!r} is not one of {', '.join(choices)}.{near}")
    if least is not None and not least <= value <= (value if most is None else most):
        shown = size if field.metadata.get("metavar") == "SIZE" else "{:,}".format
        allowed = f"{shown(least)} or more" if most is None else f"{shown(least)} to {shown(most)}"
        raise UsageError(f"{flag_of(field.name, field)}: {shown(value)} is out of range. Use {allowed}.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the exception says that memory ran out, in Python's words or torch's."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    torch = sys.modules.get("torch")
    return (torch is not None and isinstance(error, getattr(torch, "OutOfMemoryError", ()))) or (
        isinstance(error, (RuntimeError, ImportError)) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )
