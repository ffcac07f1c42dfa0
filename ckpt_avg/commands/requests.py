"""What each command takes: groups of options and arguments of its own. These are the signatures of the public API.

Requests and groups of options have no ``__eq__`` and ``__repr__``, which nobody uses: to make them for so many fields
delays ``--help``.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ckpt_avg.batchnorm.options import RefreshOptions
from ckpt_avg.choices import IO, BatchNormMode, NonFloat, WeightingBy, WeightingRule
from ckpt_avg.commands.options import (
    EvalOptions,
    MeanOptions,
    OutputOptions,
    ProgressOptions,
    RankOptions,
    ResourceOptions,
    SoupOptions,
    SweepOptions,
)
from ckpt_avg.errors import UsageError
from ckpt_avg.formats.reading import AllModels, Reading
from ckpt_avg.mean.weighting import Weighting
from ckpt_avg.runs.selection import Selection
from ckpt_avg.text import plural, suggestion
from ckpt_avg.wording import in_python

if TYPE_CHECKING:
    from pathlib import Path

    from ckpt_avg.runs.discover import Discovery, Sources

_OUTPUT = (
    "The safetensors file to write; or a folder, which gets the side files of the last checkpoint, too: a path that "
    "ends in ``/``, or an empty folder."
)
_Arguments = ParamSpec("_Arguments")
_Request = TypeVar("_Request")
_Result = TypeVar("_Result")
_TYPE_HOMES = {  # of the types in signatures that are not exported by the package
    "Iterable": "collections.abc",
    "ListedWeights": "ckpt_avg.mean.listed_weights",
    "Mapping": "collections.abc",
    "PathLike": "os",
    "Sequence": "collections.abc",
}


@dataclass(frozen=True, eq=False, repr=False)
class MeanRequest(Selection, Reading, Weighting, MeanOptions, RefreshOptions, EvalOptions):
    """The arguments that `average`, `sweep` and `soup` share."""

    sources: Sources = field(
        metadata={
            "doc": "Checkpoint files and checkpoint folders, in the order given, and run folders, in the order of "
            "their steps."
        }
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.functions and self.model is None:
            raise UsageError("--eval needs a model. Add --model MODULE:FACTORY.")

    def discover(self) -> Discovery:
        """Lists the checkpoints of the sources, as `runs.discover.discover` does."""
        from ckpt_avg.runs.discover import discover  # not for --help

        return discover(self.sources, self.include)


@dataclass(frozen=True, eq=False, repr=False)
class AverageRequest(RankOptions, MeanRequest, OutputOptions, ProgressOptions):
    """The arguments of `average`."""

    output: str | os.PathLike[str] = field(metadata={"doc": _OUTPUT})

    @property
    def models(self) -> bool:
        """Whether folders of several models can be averaged: only if the output is a folder."""
        from ckpt_avg.output.folder_paths import names_folder  # not for --help

        return names_folder(self.output) or self.max_shard_size is not None or self.push_to_hub is not None


@dataclass(frozen=True, eq=False, repr=False)
class LoadRequest(MeanRequest, ProgressOptions):
    """The arguments of `load_average`."""

    evaluate: tuple[()] = field(default=(), init=False)
    evaluate_all: bool = field(default=False, init=False)
    eval_repeats: int = field(default=1, init=False)
    require: tuple[()] = field(default=(), init=False)
    split: None = field(default=None, init=False)


@dataclass(frozen=True, eq=False, repr=False)
class RefreshRequest(RankOptions, Reading, MeanOptions, RefreshOptions, EvalOptions, OutputOptions, ProgressOptions):
    """The arguments of `refresh_weights`."""

    weights: str | os.PathLike[str] = field(metadata={"doc": "One checkpoint of any kind that can be read."})
    output: str | os.PathLike[str] = field(metadata={"doc": _OUTPUT})
    non_float: NonFloat = field(default="last", init=False)
    bn: BatchNormMode = field(default="refresh", init=False)
    evaluate_all: bool = field(default=False, init=False)
    split: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, given in (("--model", self.model), ("--data", self.data)):
            if given is None:
                raise UsageError(f"{flag} is missing. Add {flag} MODULE:FACTORY to measure the statistics.")

    def discover(self) -> Discovery:
        """Lists the only checkpoint. Raises UsageError if there are several."""
        from ckpt_avg.runs.discover import discover  # not for --help

        discovery = discover(self.weights)
        if len(discovery.paths) != 1:
            raise UsageError(
                f"{self.weights}: contains {plural(len(discovery.paths), 'checkpoint')}. Name one, for example "
                f"{discovery.paths[-1]}, or use ckpt-avg average."
            )
        return discovery

    def keywords(self) -> dict[str, Any]:
        """Returns the keywords with which `average` does the same."""
        names = {each.name for each in fields(AverageRequest)} & {each.name for each in fields(self)} - {"weights"}
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, eq=False, repr=False)
class SweepRequest(MeanRequest, SweepOptions, ProgressOptions):
    """The arguments of `sweep`."""

    evaluate_all: bool = field(default=False, init=False)
    require: str | Sequence[str] = field(default=(), init=False)
    weights: None = field(default=None, init=False)  # the windows differ in their number of checkpoints
    normalize: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.functions:
            raise UsageError("--eval is missing. Add --eval MODULE:FUNCTION to measure each average.")
        if self.weightings and self.weighting != "mean":
            raise UsageError(
                f"--weightings, --weighting {self.weighting}: both choose rules. Add this one to --weightings."
            )
        self.rules  # noqa: B018 (checks the option)

    @property
    def has_rule(self) -> bool:
        """Whether some rule may give the checkpoints unequal weights."""
        return bool(self.weightings) or self.weighting != "mean"

    @functools.cached_property
    def rules(self) -> dict[str, Weighting]:
        """The rules for weights to compare, by their short forms."""
        from ckpt_avg.mean.weighting_rules import parse_rules, rule_of

        return parse_rules(self.weightings, self.weighting_by) if self.weightings else {rule_of(self): self}


@dataclass(frozen=True, eq=False, repr=False)
class SoupRequest(MeanRequest, SoupOptions, OutputOptions, ProgressOptions):
    """The arguments of `soup`."""

    output: str | os.PathLike[str] = field(metadata={"doc": _OUTPUT})
    evaluate_all: bool = field(default=False, init=False)
    weighting: WeightingRule = field(default="mean", init=False)
    weighting_by: WeightingBy = field(default="auto", init=False)
    half_life: str | float | None = field(default=None, init=False)
    width: float | None = field(default=None, init=False)
    weights: None = field(default=None, init=False)
    normalize: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.functions:
            raise UsageError("--eval is missing. Add --eval MODULE:FUNCTION to measure each checkpoint.")
        if not isinstance(self.sources, (str, os.PathLike)):
            object.__setattr__(self, "sources", tuple(self.sources))  # a dry run lists them twice

    def as_average(self, checkpoints: Sequence[Path] = ()) -> AverageRequest:
        """Returns the request to average the same, or only these checkpoints, which need no selection then."""
        selected = {each.name for each in fields(Selection)} - {"keep_order"} if checkpoints else set()
        names = {each.name for each in fields(AverageRequest) if each.init} & {each.name for each in fields(self)}
        given = {name: getattr(self, name) for name in names - selected}
        return AverageRequest(**{**given, "sources": checkpoints or self.sources})


@dataclass(frozen=True, eq=False, repr=False)
class VerifyRequest(ResourceOptions, ProgressOptions):
    """The arguments of `verify`."""

    path: str | os.PathLike[str] = field(metadata={"doc": "The file."})
    sources: Sources | None = field(
        default=None,
        kw_only=True,
        metadata={
            "doc": "Checkpoint files, checkpoint folders and run folders. The mean of those that the file records is "
            "computed again and compared bit for bit, except statistics that a refresh measured."
        },
    )


@dataclass(frozen=True, eq=False, repr=False)
class CheckRequest(Selection, AllModels, ProgressOptions):
    """The arguments of `check`."""

    sources: Sources = field(metadata={"doc": "Checkpoint files, checkpoint folders and run folders."})


@dataclass(frozen=True, eq=False, repr=False)
class CompareRequest(Selection, AllModels, ResourceOptions, ProgressOptions):
    """The arguments of `compare`."""

    sources: Sources = field(metadata={"doc": "Checkpoint files, checkpoint folders and run folders."})
    memory: int = field(default=0, init=False)
    io: IO = field(default="pread", init=False)


@dataclass(frozen=True, eq=False, repr=False)
class InspectRequest(Selection, AllModels, ProgressOptions):
    """The arguments of `inspect`."""

    shows_log = True
    path: Sources = field(
        metadata={"doc": "A checkpoint file, a checkpoint folder, a run folder, or any other folder; or several."}
    )


def options_of(request: Any) -> Iterator[tuple[str, Field[Any]]]:
    """Yields the heading and the field of each argument of a request, group by group."""
    declared = {each.name: each for each in fields(request) if each.init}
    for group in request.__mro__:
        for name in inspect.get_annotations(group):
            if name in declared:
                found = declared.pop(name)
                yield found.metadata.get("heading", group.heading), found


def takes(
    request: Callable[_Arguments, _Request],
) -> Callable[[Callable[[_Request], _Result]], Callable[_Arguments, _Result]]:
    """Gives a function of one request the request's fields as its arguments.

    In its docstring, the line ``The fields of `…`.`` is replaced by a list of them.
    """
    signature = inspect.signature(request)
    declared = {each.name: each for _, each in options_of(request)}
    positional = [name for name in signature.parameters if not declared[name].kw_only]
    names = list(positional)
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
                advice = suggestion(unknown, names)
                if len(arguments) > len(positional):
                    advice = f" Name all but {' and '.join(positional)}."
                raise TypeError(f"{function.__name__}() {error}.{advice}") from None
            made = request(*arguments, **options)
            with _shown_progress(made):
                return function(made)

        returned = inspect.signature(function).return_annotation
        vars(with_arguments)["__signature__"] = signature.replace(parameters=parameters, return_annotation=returned)
        with_arguments.__doc__ = (function.__doc__ or "").replace(f"The fields of `{request.__name__}`.", text)
        with_arguments.__annotations__ = {each.name: _importable(each.annotation) for each in parameters} | {
            "return": f"__import__({function.__module__!r}, fromlist=[{returned!r}]).{returned}"
        }
        return with_arguments

    return decorate


@contextlib.contextmanager
def _shown_progress(request: Any) -> Iterator[None]:
    """Replaces ``progress=True`` by callbacks that show it."""
    given = getattr(request, "progress", None)
    if not isinstance(given, bool):
        yield
        return
    from ckpt_avg.commands.notebook_bars import shown_on_request

    with shown_on_request() if given else contextlib.nullcontext() as progress:
        object.__setattr__(request, "progress", progress)
        yield


def _importable(annotation: str) -> str:
    """Returns a type as `typing.get_type_hints` finds it, which looks only into the module of the function.

    The types of the user's code need torch, so they are imported no earlier than somebody asks.
    """

    def imported(found: re.Match[str]) -> str:
        name = found[0]
        module = _TYPE_HOMES.get(name, "ckpt_avg")
        return name if hasattr(builtins, name) else f"__import__({module!r}, fromlist=[{name!r}]).{name}"

    return re.sub(r"(?<![\w.])[A-Za-z]\w*", imported, annotation.replace("os.PathLike", "PathLike"))


def _described(declared: Field[Any]) -> str:
    text = str(declared.metadata.get("doc") or declared.metadata["help"])
    choices = declared.metadata.get("choices", ())
    quoted = [f"``{choice}``" for choice in choices]
    if quoted and not any(choice in text for choice in quoted):
        text += f" One of {', '.join(quoted)}."
    return in_python(text)


@dataclass(frozen=True)
class RecordedOptions(AllModels, MeanOptions):
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
