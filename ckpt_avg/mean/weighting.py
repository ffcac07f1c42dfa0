"""How much each checkpoint counts: the options, and the weights that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, get_args

from ckpt_avg.choices import WeightingBy, WeightingRule
from ckpt_avg.errors import IncompatibleError, OptionGroup, UsageError, option
from ckpt_avg.mean.weight_formulas import decay_weights, ema_weights, exponent_of, power_weights
from ckpt_avg.text import distinct_names, ends, escaped, listing, quote

if TYPE_CHECKING:
    import os

    from ckpt_avg.mean.listed_weights import ListedWeights

RULES: tuple[WeightingRule, ...] = get_args(WeightingRule)
_WIDEST = 1 / math.sqrt(12)  # of `power`: that of the uniform distribution, which has the exponent 0
_NARROWEST = 1e-6  # of `power`: all weight is on the last checkpoint long before
_SHORTEST = 1e-9  # half-life: all weight is on the last checkpoint long before


@dataclass(frozen=True, kw_only=True)
class Weighting(OptionGroup):
    """How much each checkpoint counts. By default all count the same."""

    heading = "Weights"
    weighting: WeightingRule = option("mean", "Weigh the checkpoints by this rule.", choices=RULES)
    weighting_by: WeightingBy = option(
        "auto",
        "Apply the rule to steps, or to positions.",
        doc="Apply the rule to the recorded steps, or to positions, as if the steps were evenly spaced. ``auto`` uses "
        "the steps if every checkpoint records one.",
        choices=get_args(WeightingBy),
    )
    half_life: str | float | None = option(
        None,
        "Halve the weights of ema after so many steps.",
        doc="After how many steps ``ema`` halves the weight, or after how many percent of the steps between the first "
        "checkpoint and the last: ``1000`` or ``10%``.",
        metavar="STEPS|PERCENT%",
    )
    width: float | None = option(
        None,
        "Set the relative width of power, for example 0.1.",
        doc="The relative width of ``power``: the standard deviation of the weights over the training, divided by its "
        "length, below 0.289.",
        metavar="SIGMA",
    )
    weights: str | os.PathLike[str] | Iterable[float] | Mapping[str, float] | ListedWeights | None = option(
        None,
        "Give each checkpoint its own weight.",
        doc="The weights, one for each checkpoint: in the order of the sources, or by the checkpoint's name. Or a JSON "
        "file of an object of names and weights. They must sum to 1.",
        metavar="W,W,...|FILE.json",
    )
    normalize: bool = option(False, "Divide the --weights by their sum.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, flag, rule, example in (
            ("half_life", "--half-life", "ema", "1000 (steps), or 10%"),
            ("width", "--width", "power", "0.1"),
        ):
            value = getattr(self, name)
            if value is None and self.weighting == rule:
                raise UsageError(f"--weighting {rule} needs {flag}. Add for example {flag} {example}.")
            if value is not None and self.weighting != rule:
                raise UsageError(f"{flag} {value} needs --weighting {rule}. Add it, or remove {flag}.")
        if self.weighting_by != "auto" and not self.has_rule:
            raise UsageError(f"--weighting-by {self.weighting_by} needs another --weighting than mean. Add one.")
        if self.width is not None and not _NARROWEST <= self.width < _WIDEST:
            raise UsageError(
                f"--width {self.width:g}: no power has this width. Use {_NARROWEST:g} or more, and less than "
                f"{_WIDEST:.4f}, for example 0.1."
            )
        if self.half_life is not None:
            is_in_percent = str(self.half_life).strip().endswith("%")
            object.__setattr__(self, "half_life", f"{_half_life(self.half_life):.17g}{'%' * is_in_percent}")
        if self.normalize and self.weights is None:
            raise UsageError("--normalize needs --weights. Add --weights W,W,... or remove --normalize.")
        if self.weights is not None:
            if self.weighting != "mean":
                raise UsageError(f"--weights and --weighting {self.weighting}: both choose weights. Use one of them.")
            from ckpt_avg.mean.listed_weights import read_weights  # not for --help

            object.__setattr__(self, "weights", read_weights(self.weights, normalize=self.normalize))

    @property
    def half_life_in_percent(self) -> bool:
        """Whether the half-life is a share of the steps from the first checkpoint to the last."""
        return str(self.half_life).endswith("%")

    @property
    def has_rule(self) -> bool:
        """Whether a rule gives the checkpoints unequal weights."""
        return self.weighting != "mean"


@dataclass(frozen=True, slots=True)
class Weights:
    """Unequal weights.

    Attributes:
        values: one for each checkpoint, in float64; their sum is 1, to rounding.
        method: how they were made, as the output's metadata records it.
    """

    values: tuple[float, ...]
    method: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Moments:
    """When checkpoints were saved.

    Attributes:
        values: the step or epoch of each.
        before: that of the checkpoint before them in the run, 0 if they begin with its first.
        unit: ``step`` or ``epoch``.
        is_in_steps: False also of numbers in names that no word explains, which may be epochs.
    """

    values: tuple[int, ...]
    before: int = 0
    unit: str = "step"
    is_in_steps: bool = True


def choose_weights(
    options: Weighting,
    paths: Sequence[Path],
    moments: Moments | None,
    *,
    places: Sequence[int] | None = None,
    listed: Sequence[int] | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Weights | None:
    """Returns the weights of checkpoints, in order; None if all are equal, so that the mean divides by the number.

    Args:
        options: what the user has chosen.
        paths: of the checkpoints.
        moments: when they were saved; None if not all record it.
        places: their indices in the run; by default they are the whole run.
        listed: their indices in the order of the sources; by default in order.
        notice: called with what the user should know.

    Raises:
        UsageError: listed weights do not match the checkpoints.
        IncompatibleError: the rule needs steps that increase, and the checkpoints do not record them.
    """
    count = len(paths)
    places = range(count) if places is None else places
    if options.weights is not None:
        from ckpt_avg.mean.listed_weights import read_weights, weights_listed

        read = read_weights(options.weights, normalize=options.normalize)
        method = {"weighting": "listed"}
        values: Sequence[float] = weights_listed(read, paths, range(count) if listed is None else listed, notice)
    elif options.weighting == "mean" or count == 1:
        return None
    else:
        used = _moments_used(options, paths, moments, places, notice)
        method = _method(options, used.unit)
        values = _weights_by_rule(options, paths, used, notice)
    return None if len(set(values)) == 1 else Weights(tuple(values), method)


def _moments_used(
    options: Weighting,
    paths: Sequence[Path],
    moments: Moments | None,
    places: Sequence[int],
    notice: Callable[[str], None],
) -> Moments:
    """Returns the steps or epochs that a rule applies to, or positions; says if these are no steps."""
    rule, by = f"--weighting {options.weighting}", options.weighting_by
    if options.half_life is not None and not options.half_life_in_percent:
        is_in_steps = moments is not None and (moments.is_in_steps or by == "step")
        if by == "index" or not is_in_steps:
            _refuse_half_life(options, paths, moments)
    if by != "index" and moments is not None:
        if moments.unit == "epoch":
            in_epochs = options.half_life is not None and not options.half_life_in_percent
            counted = f", and --half-life {options.half_life} counts epochs" if in_epochs else ""
            notice(f"{rule}: the run records no steps, so its epochs are used{counted}")
        _refuse_equal(moments.values, paths, rule)
        return moments
    if by == "step":
        raise IncompatibleError(
            f"{rule} --weighting-by step: expected a step or an epoch in every checkpoint, got none in at least one of "
            f"{_names(paths)}. Use --weighting-by index, or --weights."
        )
    if by == "auto":
        notice(f"{rule}: not every checkpoint records a step or an epoch, so they are taken as evenly spaced")
    if options.weighting == "power":  # the run begins at 0, wherever the window does
        return Moments(tuple(place + 1 for place in places), places[0], "index")
    return Moments(tuple(range(len(paths))), 0, "index")


def _weights_by_rule(
    options: Weighting, paths: Sequence[Path], moments: Moments, notice: Callable[[str], None]
) -> list[float]:
    times = moments.values
    if options.half_life is not None:
        number = _half_life(options.half_life)
        return ema_weights(times, number / 100 * (times[-1] - times[0]) if options.half_life_in_percent else number)
    if options.width is None:
        return decay_weights(times, options.weighting)
    if moments.unit != "index" and moments.before == 0 and times[0] > 2 * (times[1] - times[0]):
        notice(
            f"--weighting power: {escaped(paths[0].name)} counts for all {moments.unit}s up to its own, {times[0]}, "
            "because no checkpoint before it is known. Name the run folder if there are some"
        )
    return power_weights(times, exponent_of(options.width), moments.before)


def _method(options: Weighting, by: str) -> dict[str, str]:
    """Returns what the output's metadata records of a rule."""
    given = {"weighting": options.weighting, "by": by}
    if options.half_life is not None:
        given["half_life"] = str(options.half_life)
    if options.width is not None:
        given["width"] = repr(float(options.width))
    return given


def summed(
    order: Sequence[int], weights: Sequence[float] | Mapping[int, float] | None
) -> tuple[list[int], tuple[float, ...] | None]:
    """Returns which checkpoints are summed, and their weights; None if these are equal, so that the mean divides.

    Args:
        order: the checkpoints' indices in the order of the sum.
        weights: by index; None if all are equal. A checkpoint of weight 0 is not summed.
    """
    if weights is None:
        return list(order), None
    indices = [index for index in order if weights[index] != 0]
    chosen = tuple(weights[index] for index in indices)
    return indices, None if len(set(chosen)) == 1 else chosen


def _half_life(value: str | float) -> float:
    """Returns the number of steps, or of percent."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not _SHORTEST <= number < math.inf:
        raise UsageError(f"--half-life: {quote(text)} is no half-life. Write for example 1000 (steps), or 10%.")
    return number


def _names(paths: Sequence[Path]) -> str:
    return ends([escaped(name) for name in distinct_names(paths)])


def _refuse_equal(times: Sequence[int], paths: Sequence[Path], rule: str) -> None:
    """Raises IncompatibleError if steps or epochs do not increase."""
    equal = [index for index in range(1, len(times)) if times[index] <= times[index - 1]]
    if equal:
        names = distinct_names(paths)
        shown = listing(
            f"{quote(names[index - 1])} ({times[index - 1]}), {quote(names[index])} ({times[index]})" for index in equal
        )
        raise IncompatibleError(
            f"{rule}: expected steps that increase, got {shown}. Skip one of these with --exclude, or use "
            "--weighting-by index."
        )


def _refuse_half_life(options: Weighting, paths: Sequence[Path], moments: Moments | None) -> NoReturn:
    """Raises an error for a half-life in steps where there are none."""
    problem = f"--half-life {options.half_life} counts steps"
    names = _names(paths)
    if options.weighting_by == "index":
        raise UsageError(f"{problem}, and --weighting-by index uses none. Use a percentage, or remove --weighting-by.")
    if moments is None:
        raise IncompatibleError(
            f"{problem}, and not every checkpoint records one: {names}. Use a percentage, for example --half-life 10%."
        )
    if moments.unit == "epoch":
        raise IncompatibleError(
            f"{problem}, and the checkpoints record only epochs: {names}. Add --weighting-by step to count epochs, or "
            "use a percentage, for example --half-life 10%."
        )
    raise IncompatibleError(
        f"{problem}, and the unit of the numbers in the checkpoints' names is unknown: {names}. If they are steps, add "
        "--weighting-by step; otherwise use a percentage, for example --half-life 10%."
    )
