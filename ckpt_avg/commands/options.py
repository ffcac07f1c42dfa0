"""The options, each declared once: a field of a group, which is a dataclass that checks its own values.

The groups are `Selection` (in `runs.selection`), `Reading` (in `formats.reading`), `RefreshOptions` (in
`batchnorm.options`), and those below. Commands take several groups (`commands.requests`). From the fields follow the
keywords of the Python functions, the options of the command line, what the output's metadata records, and what ranks
compare.

To add an option, add a field to its group and use it: ``name: type = option(default, help, ...)``, with

- the help text, for ``--help``; without it the command line does not have the option
- ``doc``: the text for the Python docstring, if it says more
- ``flag``: the name on the command line, if not ``--`` and the field's name
- ``heading``: where ``--help`` lists it, if not with the others of its group
- ``everyday``: whether ``--help`` lists it first
- ``metavar``, ``choices``, ``least``, ``most``: the values
- ``recorded``: the output's metadata says what was given
- ``per_rank``: ranks may differ in it
- ``code``: an object of the user's; ranks compare its name
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from ckpt_avg.choices import IO, NonFloat, OutputDType, Windows
from ckpt_avg.errors import OptionGroup, UsageError, option
from ckpt_avg.progress import Progress
from ckpt_avg.text import parse_size

if TYPE_CHECKING:
    from ckpt_avg.distributed.ranks import Ranks
    from ckpt_avg.user_code.evaluate import Evaluate
    from ckpt_avg.user_code.gate import Requirement


_LEAST_SHARD = 1000  # bytes


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ResourceOptions(OptionGroup):
    """What a command may use. No byte of the output depends on it."""

    heading = "Performance"
    threads: int | None = option(
        None, "Use N threads (default: one per usable core).", metavar="N", least=1, most=1024, per_rank=True
    )
    memory: int = option(
        128 * 2**20,
        "Limit the working memory of all threads together.",
        doc="Bytes of working memory of all threads together.",
        metavar="SIZE",
        least=2**20,
        per_rank=True,
    )
    readers: int = option(
        16,
        "Read ahead with N threads.",
        doc="Threads that ask the system to load what is summed next, so that the storage has many requests at a time.",
        metavar="N",
        least=0,
        most=256,
        per_rank=True,
    )
    io: IO = option(
        "auto",
        "Map files into memory, or read them with pread.",
        doc="How the native engine gets the bytes: ``mmap`` maps files into memory, ``pread`` reads them; ``auto`` "
        "is ``pread``, which is faster.",
        choices=get_args(IO),
        per_rank=True,
    )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MeanOptions(ResourceOptions):
    """How the mean is computed."""

    heading = "Mean"
    device: str = option(
        "auto",
        "Sum, and run the model, on this device.",
        doc="Sum, and run the model, on ``cpu``, ``cuda`` or ``cuda:N``. ``auto`` sums on the CPU, and runs the model "
        "on CUDA if torch finds a CUDA device.",
        metavar="auto|cpu|cuda|cuda:N",
        heading=ResourceOptions.heading,
        per_rank=True,
    )
    dtype: OutputDType = option(
        "keep",
        "Set the dtype of the output's floating-point tensors.",
        choices=get_args(OutputDType),
        recorded=True,
    )
    non_float: NonFloat = option(
        "equal",
        "Require equal integer and bool tensors, or copy the last.",
        choices=get_args(NonFloat),
        recorded=True,
    )
    allow_nonfinite: bool = option(False, "Accept NaN and Inf instead of stopping.", recorded=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", str(self.device)):
            near = " Did you mean 'cuda'?" if re.match(r"gpu|\d|nvidia", str(self.device).lower()) else ""
            raise UsageError(f"--device: {str(self.device)!r} cannot be used. Use auto, cpu, cuda or cuda:N.{near}")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EvalOptions(OptionGroup):
    """What is measured, and what the average must reach."""

    heading = "Evaluation"
    evaluate: Evaluate | Sequence[Evaluate] = option(
        (),
        "Measure the weights with this function. Repeatable.",
        doc="Called with the model in evaluation mode; returns a number or a dict of them. It measures the last "
        "checkpoint, and the average before and after the refresh. Several functions may measure the same metrics, "
        "for example on several test sets: the mean counts.",
        flag="--eval",
        metavar="MODULE:FUNCTION",
        everyday=True,
    )
    evaluate_all: bool = option(
        False,
        "Measure every checkpoint, not only the last.",
        doc="Measure every checkpoint, not only the last. With a refresh this costs one refresh each.",
        flag="--eval-all",
    )
    eval_repeats: int = option(
        1,
        "Refresh and measure N times, with N random seeds.",
        doc="Refresh and measure N times, with N seeds for the loader and ``evaluate``, to see how much is chance. The "
        "output's statistics are those of the first.",
        metavar="N",
        least=1,
    )
    require: str | Sequence[str] = option(
        (),
        "Publish only if this holds, for example 'accuracy>=last'. Repeatable.",
        doc="Publish only if this holds, for example ``accuracy>=last`` or ``loss<=mean+0.01``: a metric, ``>=``, "
        "``>``, ``<=`` or ``<``, and ``last``, ``best``, ``mean`` (of the checkpoints, with their statistics refreshed "
        "if those of the average are), ``last-saved`` (the last one as it was saved) or a number.",
        metavar="'METRIC>=last'",
    )
    split: str | None = option(
        None,
        "Record on which split the checkpoints were chosen.",
        doc="The name of the split of the data on which the checkpoints were chosen, for the metadata and the result.",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "require", (self.require,) if isinstance(self.require, str) else tuple(self.require))
        given = {
            "--require": self.requirements,
            "--eval-all": self.evaluate_all,
            "--eval-repeats": self.eval_repeats > 1,
        }
        if not self.functions and any(given.values()):
            flag = next(flag for flag, value in given.items() if value)
            raise UsageError(f"{flag} needs a metric. Add --eval MODULE:FUNCTION.")

    @property
    def functions(self) -> tuple[Evaluate, ...]:
        """What measures the weights."""
        if isinstance(self.evaluate, (tuple, list)):
            return tuple(self.evaluate)
        return (self.evaluate,)  # type: ignore[return-value] # `prepare` refuses what cannot be called

    @functools.cached_property
    def requirements(self) -> tuple[Requirement, ...]:
        """What the average must reach."""
        from ckpt_avg.user_code.gate import parse_requirement

        return tuple(map(parse_requirement, self.require))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OutputOptions(OptionGroup):
    """What is written."""

    heading = "Output"
    overwrite: bool = option(False, "Replace existing output files.")
    dry_run: bool = option(
        False,
        "Check everything and report, but write nothing.",
        doc="Check and plan, but write nothing, and read of the tensors only what the plan depends on.",
        everyday=True,
    )
    sha256: bool = option(
        False,
        "Write OUT.sha256, and digests of the sources into the metadata.",
        doc="Write ``OUTPUT.sha256``, for ``sha256sum -c``, and SHA-256 of the checkpoints' files into the output's "
        "metadata. Both are read once more for it.",
    )
    max_shard_size: int | str | None = option(
        None,
        "Write a folder with shards of up to SIZE.",
        doc="Write a folder. If its weights are larger than this, they are shards of up to this size with an index, as "
        "huggingface_hub writes them: bytes, or a text such as ``5GB`` (10^9 bytes) or ``5GiB`` (2^30).",
        metavar="SIZE",
    )
    push_to_hub: str | None = option(
        None,
        "Upload the folder to this repository of the Hub.",
        doc="Write a folder, and upload it to this repository of the Hugging Face Hub, for example ``org/name``. It is "
        "created if there is none. Needs huggingface_hub (the extra ``hub``) and its token.",
        metavar="ORG/NAME",
    )
    private: bool = option(
        False,
        "Make a repository that --push-to-hub creates private.",
        doc="Whether a repository that ``push_to_hub`` creates is private.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.private and self.push_to_hub is None:
            raise UsageError("--private: is about a repository of the Hub. Add --push-to-hub ORG/NAME.")
        if self.largest_shard is not None and self.largest_shard < _LEAST_SHARD:
            raise UsageError(f"--max-shard-size: {self.max_shard_size} is out of range. Use 1KB or more, such as 5GB.")

    @functools.cached_property
    def largest_shard(self) -> int | None:
        """How many bytes of tensors are in a shard, unless it has only one; None without shards."""
        if not isinstance(self.max_shard_size, str):
            return self.max_shard_size
        try:
            return parse_size(self.max_shard_size)
        except ValueError as error:
            raise UsageError(f"--max-shard-size: {error}. Write for example 5GB.") from None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ChoiceOptions(OptionGroup):
    """By what averages are compared."""

    heading = "Evaluation"
    maximize: str | None = option(None, "Prefer the highest value of this metric.", metavar="METRIC", everyday=True)
    minimize: str | None = option(None, "Prefer the lowest value of this metric.", metavar="METRIC", everyday=True)
    resume: str | os.PathLike[str] | None = option(
        None,
        "Keep the results in this file, or continue from it.",
        doc="A JSON file that keeps what is measured. If it exists, what is in it is not measured again.",
        metavar="FILE.json",
        heading="Output",
    )
    hold: int = option(
        2 * 2**30,
        "Hold up to SIZE of averages in memory.",
        heading=ResourceOptions.heading,
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

    @property
    def sign(self) -> float:
        """What to multiply the metric by, so that higher is better."""
        return -1.0 if self.maximize is None else 1.0


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SweepOptions(ChoiceOptions):
    """Which windows are compared, and by what."""

    windows: Windows = option("both", "Average the last k, the first k, or both.", choices=get_args(Windows))
    weightings: str | Iterable[str] = option(
        (),
        "Compare these rules for weights, for example mean,ema:1000.",
        doc="Rules for weights to compare, separated by commas, in each window: ``mean``, ``linear``, ``minus-sqrt``, "
        "``cosine``, ``ema:HALF-LIFE`` and ``power:WIDTH``. By default only that of ``weighting``.",
        metavar="RULE,RULE:NUMBER,...",
    )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SoupOptions(ChoiceOptions):
    """By what a checkpoint is kept."""

    tolerance: float = option(
        0.0,
        "Keep checkpoints that make the metric worse by up to X.",
        doc="Keep a checkpoint also if the metric gets worse by it, by at most this much. What counts is the best soup "
        "so far, so the metric never falls by more in all.",
        metavar="X",
        least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isinf(self.tolerance):
            raise UsageError("--tolerance: inf is out of range. Use a finite number.")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ProgressOptions(OptionGroup):
    """Callbacks for Python callers."""

    heading = "Progress"
    progress: Progress | bool | None = option(
        None,
        doc="True shows progress, results and notices on stderr, in a notebook as bars. Or your own callbacks.",
        per_rank=True,
    )

    @property
    def callbacks(self) -> Progress:
        """What to call."""
        return self.progress if isinstance(self.progress, Progress) else Progress()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RankOptions(OptionGroup):
    """The ranks that share the work. An option that is not allowed is an error on all of them."""

    heading = "Ranks"
    ranks: Ranks | None = option(
        None,
        doc="From `join_ranks`, if several processes share the work. Each calls this function with the same arguments; "
        "rank 0 measures and publishes.",
        per_rank=True,
    )

    def __post_init__(self) -> None:
        share_errors = getattr(self.ranks, "share_errors", contextlib.nullcontext)  # it may be of another type
        with share_errors():
            super().__post_init__()
