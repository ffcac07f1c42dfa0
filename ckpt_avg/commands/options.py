"""What each command is asked for. Every option is declared once, as a field of one of the groups.

A group is a dataclass that checks its own values: `Selection` (in `runs.selection`), `Reading` (in `formats.reading`),
`RefreshOptions` (in `batchnorm.options`), and those below. A request consists of groups. Its fields give the keywords
of the Python function (`takes`), the options of the command (`cli.options`), what the output's metadata records
(`RecordedOptions`), and what ranks compare (`agreement`).

To add an option, add a field to its group and use it: ``name: type = option(default, help, ...)``, with

- the help text, for ``--help``; without it the command line does not have the option
- ``doc``: the text for the Python docstring, if it says more
- ``flag``: the name on the command line, if not ``--`` and the field's name
- ``metavar``, ``choices``, ``least``, ``most``: the values
- ``recorded``: the output's metadata says what was given
- ``own``: ranks may differ in it
- ``code``: an object of the user's; ranks compare its name
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ckpt_avg.batchnorm.options import RefreshOptions
from ckpt_avg.errors import OptionGroup, UsageError, option
from ckpt_avg.formats.reading import Reading
from ckpt_avg.runs.selection import Selection
from ckpt_avg.text import suggestion

if TYPE_CHECKING:
    from ckpt_avg.distributed.ranks import Ranks
    from ckpt_avg.files.input_file import IO
    from ckpt_avg.progress import Progress
    from ckpt_avg.runs.discover import Sources
    from ckpt_avg.user_code.evaluate import Evaluate
    from ckpt_avg.user_code.gate import Requirement

_Arguments = ParamSpec("_Arguments")
_Request = TypeVar("_Request")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class ResourceOptions(OptionGroup):
    """What a command may use. No byte of the output depends on it."""

    heading = "How to compute"
    threads: int | None = option(
        None, "Use N threads (default: one per usable core).", metavar="N", least=1, most=1024, own=True
    )
    memory: int = option(
        128 * 2**20,
        "Limit the working memory of all threads together.",
        doc="Bytes of working memory of all threads together.",
        metavar="SIZE",
        least=2**20,
        own=True,
    )
    io: IO = option(
        "auto",
        "Map files into memory, or read them with pread.",
        doc="``mmap`` maps files into memory, ``pread`` reads them. ``auto`` maps them, except on network storage and "
        "where the system refuses it.",
        choices=("auto", "mmap", "pread"),
        own=True,
    )


@dataclass(frozen=True, kw_only=True)
class MeanOptions(ResourceOptions):
    """How the mean is computed."""

    device: str = option(
        "auto",
        "Sum, and run the model, on this device.",
        doc="Sum, and run the model, on ``cpu``, ``cuda`` or ``cuda:N``. ``auto`` sums on the CPU, and runs the model "
        "on CUDA if torch finds a CUDA device.",
        metavar="auto|cpu|cuda|cuda:N",
        own=True,
    )
    dtype: str = option(
        "keep",
        "Set the dtype of the output's floating-point tensors.",
        choices=("keep", "float64", "float32", "bfloat16", "float16"),
        recorded=True,
    )
    non_float: str = option(
        "equal",
        "Require equal integer and bool tensors, or copy the last.",
        choices=("equal", "last"),
        recorded=True,
    )
    allow_nonfinite: bool = option(False, "Accept NaN and Inf instead of stopping.", recorded=True)


@dataclass(frozen=True, kw_only=True)
class EvalOptions(OptionGroup):
    """What is measured, and what the average must reach."""

    heading = "Measure"
    evaluate: Evaluate | None = option(
        None,
        "Measure the weights with this function.",
        doc="Called with the model in evaluation mode; returns a number or a dict of them. It measures the last "
        "checkpoint, and the average before and after the refresh.",
        flag="--eval",
        metavar="MODULE:FUNCTION",
        code=True,
    )
    evaluate_all: bool = option(False, "Measure every checkpoint, not only the last.", flag="--eval-all")
    require: str | Sequence[str] = option(
        (),
        "Publish only if this holds, for example 'accuracy>=last'. Repeatable.",
        doc="Publish only if this holds, for example ``accuracy>=last`` or ``loss<=mean+0.01``: a metric, ``>=``, "
        "``>``, ``<=`` or ``<``, and ``last``, ``best``, ``mean`` or a number.",
        metavar="'METRIC>=last'",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "require", (self.require,) if isinstance(self.require, str) else tuple(self.require))
        given = {"--require": self.requirements, "--eval-all": self.evaluate_all}
        if self.evaluate is None and any(given.values()):
            flag = next(flag for flag, value in given.items() if value)
            raise UsageError(f"{flag} needs a metric. Add --eval MODULE:FUNCTION.")

    @functools.cached_property
    def requirements(self) -> tuple[Requirement, ...]:
        """What the average must reach."""
        from ckpt_avg.user_code.gate import parse_requirement

        return tuple(map(parse_requirement, self.require))


@dataclass(frozen=True, kw_only=True)
class OutputOptions(OptionGroup):
    """What is written."""

    heading = "Output"
    overwrite: bool = option(False, "Replace existing output files.")
    dry_run: bool = option(
        False,
        "Check everything and report, but write nothing.",
        doc="Check and plan, but read no tensors (except BatchNorm statistics) and write nothing.",
    )
    sha256: bool = option(
        False,
        "Write OUT.sha256, and digests of the sources into the metadata.",
        doc="Write ``OUTPUT.sha256``, for ``sha256sum -c``, and SHA-256 of the checkpoints' files into the output's "
        "metadata. Both are read once more for it.",
    )


@dataclass(frozen=True, kw_only=True)
class SweepOptions(OptionGroup):
    """Which windows are compared, and by what."""

    heading = "Which windows"
    maximize: str | None = option(None, "Prefer the highest value of this metric.", metavar="METRIC")
    minimize: str | None = option(None, "Prefer the lowest value of this metric.", metavar="METRIC")
    windows: str = option("both", "Average the last k, the first k, or both.", choices=("last", "first", "both"))
    hold: int = option(
        2 * 2**30,
        "Hold up to SIZE of averages in memory.",
        doc="Bytes of averages to hold in memory at once. The more, the fewer passes over the checkpoints.",
        metavar="SIZE",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.maximize is None) == (self.minimize is None):
            raise UsageError(
                f"--maximize, --minimize: got {'neither' if self.maximize is None else 'both'}. Add one: --maximize "
                "METRIC for an accuracy, --minimize METRIC for a loss."
            )

    @property
    def target(self) -> tuple[str, str]:
        """The option that names the metric to compare by, and that metric."""
        return ("--minimize", self.minimize or "") if self.maximize is None else ("--maximize", self.maximize)


@dataclass(frozen=True, kw_only=True)
class ProgressOptions(OptionGroup):
    """What a Python caller is told while the command runs."""

    heading = "Progress"
    progress: Progress | None = option(None, doc="Callbacks.", own=True)


@dataclass(frozen=True, kw_only=True)
class RankOptions(OptionGroup):
    """Who shares the work. They are told of options that are not allowed."""

    heading = "Ranks"
    ranks: Ranks | None = option(
        None,
        doc="From `join_ranks`, if several processes share the work. Each calls this function with the same arguments; "
        "rank 0 measures and publishes.",
        own=True,
    )

    def __post_init__(self) -> None:
        with self.ranks.share_errors() if self.ranks is not None else contextlib.nullcontext():
            super().__post_init__()


@dataclass(frozen=True)
class MeanRequest(Selection, Reading, MeanOptions, RefreshOptions, EvalOptions):
    """What the commands that average are asked for."""

    sources: Sources = field(
        metadata={
            "doc": "Checkpoint files and checkpoint folders, in the order given, and run folders, in the order of "
            "their steps."
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate is not None and self.model is None:
            raise UsageError("--eval needs a model. Add --model MODULE:FACTORY.")


@dataclass(frozen=True)
class AverageRequest(RankOptions, MeanRequest, OutputOptions, ProgressOptions):
    """What `average` is asked for."""

    output: str | os.PathLike[str] = field(metadata={"doc": "The safetensors file to write."})


@dataclass(frozen=True)
class RefreshRequest(RankOptions, Reading, MeanOptions, RefreshOptions, EvalOptions, OutputOptions, ProgressOptions):
    """What `refresh_weights` is asked for."""

    weights: str | os.PathLike[str] = field(metadata={"doc": "One checkpoint of any kind that can be read."})
    output: str | os.PathLike[str] = field(metadata={"doc": "The safetensors file to write."})
    non_float: str = field(default="last", init=False)
    bn: str = field(default="refresh", init=False)
    evaluate_all: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, given in (("--model", self.model), ("--data", self.data)):
            if given is None:
                raise UsageError(f"{flag} is missing. Add {flag} MODULE:FACTORY to measure the statistics.")

    def keywords(self) -> dict[str, Any]:
        """Returns the keywords with which `average` does the same."""
        names = {each.name for each in fields(AverageRequest)} & {each.name for each in fields(self)}
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class SweepRequest(MeanRequest, SweepOptions, ProgressOptions):
    """What `sweep` is asked for."""

    evaluate_all: bool = field(default=False, init=False)
    require: str | Sequence[str] = field(default=(), init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluate is None:
            raise UsageError("--eval is missing. Add --eval MODULE:FUNCTION to measure each average.")


@dataclass(frozen=True)
class VerifyRequest(ResourceOptions, ProgressOptions):
    """What `verify` is asked for."""

    path: str | os.PathLike[str] = field(metadata={"doc": "The file."})
    sources: Sources | None = field(
        default=None,
        kw_only=True,
        metadata={
            "doc": "Checkpoint files, checkpoint folders and run folders. The mean of those that the file records is "
            "computed again and compared bit for bit, except statistics that a refresh measured."
        },
    )


@dataclass(frozen=True)
class CheckRequest(Selection, Reading):
    """What `check` is asked for."""

    sources: Sources = field(metadata={"doc": "Checkpoint files, checkpoint folders and run folders."})


@dataclass(frozen=True)
class InspectRequest(Reading):
    """What `inspect` is asked for."""

    path: str | os.PathLike[str] = field(
        metadata={"doc": "A checkpoint file, a checkpoint folder, a run folder, or any other folder."}
    )


def options_of(request: Any) -> Iterator[tuple[str, Field[Any]]]:
    """Yields the heading and the field of each argument of a request, group by group."""
    declared = {each.name: each for each in fields(request) if each.init}
    for group in request.__mro__:
        for name in vars(group).get("__annotations__", {}):
            if name in declared:
                yield group.heading, declared.pop(name)


def takes(
    request: Callable[_Arguments, _Request],
) -> Callable[[Callable[[_Request], _Result]], Callable[_Arguments, _Result]]:
    """Gives a function of one request the request's fields as its arguments.

    In its docstring, ``{arguments}`` is replaced by what the fields' metadata say of them.
    """
    signature = inspect.signature(request)
    declared = {each.name: each for _, each in options_of(request)}
    names = [name for name in signature.parameters if not declared[name].kw_only]
    names += [name for name in declared if name not in names]
    parameters = [signature.parameters[name] for name in names]
    lines = (f"{name}: {_described(declared[name])}" for name in names)
    text = "\n".join(textwrap.fill(line, 112, subsequent_indent=" " * 4) for line in lines)
    text = textwrap.indent(text, " " * 8).lstrip()

    def decorate(function: Callable[[_Request], _Result]) -> Callable[_Arguments, _Result]:
        @functools.wraps(function)
        def with_arguments(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
            try:
                signature.bind(*arguments, **options)
            except TypeError as error:
                unknown = next((name for name in options if name not in names), "")
                raise TypeError(f"{function.__name__}() {error}.{suggestion(unknown, names)}") from None
            return function(request(*arguments, **options))

        returned = inspect.signature(function).return_annotation
        vars(with_arguments)["__signature__"] = signature.replace(parameters=parameters, return_annotation=returned)
        with_arguments.__doc__ = (function.__doc__ or "").replace("{arguments}", text)
        with_arguments.__annotations__ = {}
        return with_arguments

    return decorate


def _described(declared: Field[Any]) -> str:
    text = str(declared.metadata.get("doc") or declared.metadata["help"])
    choices = declared.metadata.get("choices", ())
    quoted = [f"``{choice}``" for choice in choices]
    if quoted and not any(choice in text for choice in quoted):
        text += f" One of {', '.join(quoted)}."
    return text


@dataclass(frozen=True)
class RecordedOptions(Reading, MeanOptions):
    """The options that an output's metadata records: its bytes depend on them."""

    @classmethod
    def values(cls, request: Any) -> dict[str, Any]:
        """Returns what a request says of these options."""
        return {each.name: getattr(request, each.name) for each in fields(cls) if each.metadata.get("recorded")}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> RecordedOptions | None:
        """Returns recorded options; None if they are none that could have been recorded."""
        known = {each.name: each.default for each in fields(cls) if each.metadata.get("recorded")}
        for name, value in values.items():
            kinds = (type(None), str) if known.get(name, "") is None else (type(known.get(name)),)
            if name not in known or not isinstance(value, kinds):
                return None
        try:
            return cls(**values)
        except UsageError:
            return None
