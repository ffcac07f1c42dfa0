"""The options that say which checkpoints are used."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, get_args

from ckpt_avg.choices import BestMode
from ckpt_avg.errors import OptionGroup, UsageError, option
from ckpt_avg.wording import setting


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LogOptions(OptionGroup):
    """Where metrics are that the checkpoints do not record."""

    heading = "Selection"
    log: str | os.PathLike[str] | None = option(
        None,
        "Take the metrics from this log (CSV or JSON lines).",
        doc="Take the metrics from this log, a CSV file or JSON lines, and not from the checkpoints.",
        metavar="FILE",
    )
    log_step: str | None = option(
        None,
        "Find the log's steps or epochs in this column (default: step).",
        doc="The column of the log with the steps (default: ``step``), or with the epochs if its name says so. "
        "``step+1`` adds a number to them; ``epoch=COLUMN`` says that they are epochs.",
        metavar="COLUMN",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log is None and self.log_step is not None:
            raise UsageError(f"{setting('--log-step', self.log_step)} needs --log. Add --log FILE.")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Selection(LogOptions):
    """Which checkpoints are used.

    The options apply in this order: include and exclude, from_step and to_step, at_lr_minima, every, min_interval,
    last, best.
    """

    heading = "Selection"
    shows_log: ClassVar[bool] = False  # whether a log is of use without ``best``
    last: int | None = option(None, "Keep the last N checkpoints.", metavar="N", least=1, everyday=True)
    every: int | None = option(None, "Keep every K-th checkpoint, counted from the last.", metavar="K", least=1)
    from_step: int | None = option(None, "Skip checkpoints before step S (or epoch S).", metavar="S")
    to_step: int | None = option(None, "Skip checkpoints after step S (or epoch S).", metavar="S")
    min_interval: int | None = option(
        None,
        "Keep checkpoints at least STEPS (or epochs) apart.",
        doc="Keep checkpoints that are at least so many steps apart, counted back from the last; epochs if the run "
        "records no steps.",
        metavar="STEPS",
        least=1,
    )
    best: int | None = option(
        None, "Keep the N best checkpoints by --metric and --mode.", metavar="N", least=1, everyday=True
    )
    metric: str | None = option(None, "Use this metric for --best.", metavar="NAME")
    mode: BestMode | None = option(None, "Say whether --best means low or high.", choices=get_args(BestMode))
    include: str | Iterable[str] = option((), "Keep only file names that match. Repeatable.", metavar="GLOB")
    exclude: str | Iterable[str] = option((), "Skip file names that match. Repeatable.", metavar="GLOB")
    at_lr_minima: bool = option(False, "Keep checkpoints at the minima of the learning rate.")
    keep_order: bool = option(
        False,
        "Sum in the order given, not in that of the steps.",
        doc="Sum the checkpoints in the order of the sources, not in that of their steps. The last is still the one "
        "with the latest step.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("include", "exclude"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        if self.best is None:
            for option, given in (("--metric", self.metric), ("--mode", self.mode), ("--log", self.log)):
                if given is not None and not (option == "--log" and self.shows_log):
                    raise UsageError(f"{setting(option, given)} needs --best. Add --best N.")
        elif self.mode is None:
            raise UsageError(
                f"--best {self.best} needs --mode. Add --mode min (for a loss) or --mode max (for an accuracy)."
            )
        if self.from_step is not None and self.to_step is not None and self.from_step > self.to_step:
            raise UsageError(f"--from-step {self.from_step} is greater than --to-step {self.to_step}. Swap them.")

    @property
    def bounds(self) -> str:
        """The options that bound the steps, as on the command line."""
        given = {"--from-step": self.from_step, "--to-step": self.to_step}
        return " ".join(f"{option} {step}" for option, step in given.items() if step is not None)

    @property
    def selects(self) -> bool:
        """Whether an option that may skip checkpoints was given."""
        rules = (self.last, self.every, self.from_step, self.to_step, self.min_interval, self.best)
        return any(rule is not None for rule in rules) or bool(self.include or self.exclude or self.at_lr_minima)

    def wants(self, name: str) -> bool:
        """Whether a file name passes ``include`` and ``exclude``."""
        return not self.pattern_against(name)

    def pattern_against(self, name: str) -> str:
        """Returns the option that skips a file name, or an empty string."""
        if self.include and not any(fnmatchcase(name, pattern) for pattern in self.include):
            return setting("--include", *self.include)
        against = next((pattern for pattern in self.exclude if fnmatchcase(name, pattern)), None)
        return "" if against is None else setting("--exclude", against)
