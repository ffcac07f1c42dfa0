"""How much each checkpoint counts: the options, and the weights that follow from them, in float64.

Checkpoints are numbered 0 … n−1, the oldest first. docs/weights.md has the formulas with their sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_avg.errors import IncompatibleError, OptionGroup, UsageError, option
from ckpt_avg.text import distinct_names, ends, escaped, listing, quote

if TYPE_CHECKING:
    import os

    from ckpt_avg.mean.listed_weights import ListedWeights

RULES = ("mean", "linear", "minus-sqrt", "cosine", "ema", "power")
_WIDEST = 1 / math.sqrt(12)  # of `power`: that of the uniform distribution, which has the exponent 0
_NARROWEST = 1e-6  # of `power`: all weight is on the last checkpoint long before


@dataclass(frozen=True, kw_only=True)
class Weighting(OptionGroup):
    """How much each checkpoint counts. By default all count the same."""

    heading = "How to weigh"
    weighting: str = option("mean", "Weigh the checkpoints by this rule.", choices=RULES)
    weighting_by: str = option(
        "auto",
        "Apply the rule to steps, or to positions.",
        doc="Apply the rule to the recorded steps, or to positions, as if the steps were evenly spaced. ``auto`` uses "
        "the steps if every checkpoint records one.",
        choices=("auto", "index", "step"),
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
        if self.weighting_by != "auto" and self.weighting == "mean":
            raise UsageError(f"--weighting-by {self.weighting_by} needs another --weighting than mean. Add one.")
        if self.width is not None and not _NARROWEST <= self.width < _WIDEST:
            raise UsageError(
                f"--width {self.width:g}: no power has this width. Use {_NARROWEST:g} or more, and less than "
                f"{_WIDEST:.4f}, for example 0.1."
            )
        if self.half_life is not None:
            number, is_percent = _half_life(self.half_life)
            object.__setattr__(self, "half_life", f"{number:.17g}{'%' * is_percent}")
        if self.normalize and self.weights is None:
            raise UsageError("--normalize needs --weights. Add --weights W,W,... or remove --normalize.")
        if self.weights is not None:
            if self.weighting != "mean":
                raise UsageError(f"--weights and --weighting {self.weighting}: both choose weights. Use one of them.")
            from ckpt_avg.mean.listed_weights import read_weights  # not for --help

            object.__setattr__(self, "weights", read_weights(self.weights, normalize=self.normalize))


@dataclass(frozen=True, slots=True)
class Weights:
    """Unequal weights.

    Attributes:
        values: one for each checkpoint, in float64; their sum is 1, to rounding.
        method: how they were made, as the output's metadata records it.
    """

    values: tuple[float, ...]
    method: Mapping[str, str]


def choose_weights(
    options: Weighting,
    paths: Sequence[Path],
    steps: Sequence[int] | None,
    *,
    before: int = 0,
    places: Sequence[int] | None = None,
    listed: Sequence[int] | None = None,
    has_units: bool = True,
    notice: Callable[[str], None] = lambda text: None,
) -> Weights | None:
    """Returns the weights of checkpoints, in order; None if all are equal, so that the mean divides by the number.

    Args:
        options: what the user has chosen.
        paths: of the checkpoints.
        steps: that they record; None if not all do.
        before: the step of the checkpoint before them in the run, 0 if they begin with its first.
        places: their indices in the run; by default they are the whole run.
        listed: their indices in the order of the sources; by default in order.
        has_units: False if the steps are numbers in names that no word explains, which may be epochs.
        notice: called with what the user should know.

    Raises:
        UsageError: listed weights do not match the checkpoints.
        IncompatibleError: the rule needs steps that increase, and the checkpoints do not record them.
    """
    count = len(paths)
    method = {"weighting": options.weighting}
    moments: Sequence[int]
    if options.weights is not None:
        from ckpt_avg.mean.listed_weights import read_weights, weights_listed

        read = read_weights(options.weights, normalize=options.normalize)
        values = weights_listed(read, paths, range(count) if listed is None else listed, notice)
        method = {"weighting": "listed"}
    elif options.weighting == "mean" or count == 1:
        return None
    else:
        by_step = options.weighting_by == "step" or (options.weighting_by == "auto" and steps is not None)
        method["by"] = "step" if by_step else "index"
        if by_step:
            moments = _increasing(steps, paths, options)
        else:
            moments, before = range(count), 0
        if options.weighting == "ema":
            method["half_life"] = str(options.half_life)
            number, is_percent = _half_life(str(options.half_life))
            if not is_percent and not (by_step and (has_units or options.weighting_by == "step")):
                _refuse_half_life(options, paths, steps)
            half_life = number / 100 * (moments[-1] - moments[0]) if is_percent else number
            values = ema_weights(moments, half_life)
        elif options.weighting == "power":
            method["width"] = repr(float(options.width or 0))
            if not by_step and places is not None:  # the run begins at 0, wherever the window does
                moments, before = [place + 1 for place in places], places[0]
            values = power_weights(moments, exponent_of(float(options.width or 0)), before)
            if by_step and before == 0 and moments[0] > 2 * (moments[1] - moments[0]):
                notice(
                    f"power: {paths[0].name} counts for all steps up to its own, {moments[0]}, because no checkpoint "
                    "before it is known. Name the run folder if there are some"
                )
        else:
            values = decay_weights(moments, options.weighting)
        if not by_step and options.weighting_by == "auto":
            notice("not every checkpoint records a step, so the weights are those of evenly spaced checkpoints")
    return None if len(set(values)) == 1 else Weights(tuple(values), method)


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


# -- The formulas -----------------------------------------------------------------------------------------------------


def decay_weights(steps: Sequence[int], decay: str) -> list[float]:
    """Returns s(xᵢ) − s(xᵢ₊₁) for a decay s from s(0) = 1 to s(1) = 0; the steps, and one more, become 0 … 1 on x.

    Args:
        steps: increasing.
        decay: ``linear``: 1 − x; ``minus-sqrt``: 1 − √x; ``cosine``: (1 + cos πx) / 2.

    Example:
        >>> [round(weight, 3) for weight in decay_weights(range(4), "minus-sqrt")]
        [0.5, 0.207, 0.159, 0.134]
    """
    if len(steps) == 1:
        return [1.0]
    begins = [step - steps[0] for step in steps]
    ends = [*begins[1:], 2 * begins[-1] - begins[-2]]
    length = ends[-1]

    def weight(begin: int, end: int) -> float:
        # No formula subtracts two numbers that are nearly equal, so that every weight is as precise as float64.
        if decay == "cosine":
            return math.sin(math.pi * (begin + end) / (2 * length)) * math.sin(math.pi * (end - begin) / (2 * length))
        share = (end - begin) / length
        return share if decay == "linear" else share / (math.sqrt(end / length) + math.sqrt(begin / length))

    return [weight(begin, end) for begin, end in zip(begins, ends, strict=True)]


def ema_weights(steps: Sequence[int], half_life: float) -> list[float]:
    """Returns weights in proportion to 2^((t − T) / half_life), T being the last step.

    Example:
        >>> ema_weights([100, 200, 300], 100)
        [0.14285714285714285, 0.2857142857142857, 0.5714285714285714]
    """
    from ckpt_avg.mean.listed_weights import normalized

    return normalized([2.0 ** ((step - steps[-1]) / half_life) for step in steps])


def power_weights(steps: Sequence[int], exponent: float, before: int = 0) -> list[float]:
    """Returns weights in proportion to the integral of t^exponent from the step before each checkpoint to its own.

    Args:
        steps: increasing, 0 or more.
        exponent: γ in Karras et al. 2024.
        before: the step from which the first checkpoint counts.

    Example:
        >>> power_weights([1, 2, 3, 4], 1.0)
        [0.0625, 0.1875, 0.3125, 0.4375]
    """
    from ckpt_avg.mean.listed_weights import normalized

    def weight(begin: int, end: int) -> float:
        if end == 0:
            return 0.0
        ratio = math.log1p((begin - end) / end) if 2 * begin > end else math.log(begin / end) if begin else -math.inf
        return math.pow(end / steps[-1], exponent + 1) * -math.expm1((exponent + 1) * ratio)

    return normalized([weight(begin, end) for begin, end in zip([before, *steps], steps, strict=False)])


def exponent_of(width: float) -> float:
    """Returns γ of a relative width: the positive root of γ³ + 7γ² + (16 − σ⁻²)γ + 12 − σ⁻².

    Example:
        >>> [round(exponent_of(width), 2) for width in (0.05, 0.10, 0.15, 0.20)]
        [16.97, 6.94, 3.56, 1.83]
    """
    linear, constant = 16 - width**-2, 12 - width**-2
    root = 1 / width
    while True:  # Newton's method from above the only root of a convex function: it decreases until it is there
        value = ((root + 7) * root + linear) * root + constant
        lower = root - value / ((3 * root + 14) * root + linear)
        if not lower < root:
            return root
        root = lower


def _half_life(value: str | float) -> tuple[float, bool]:
    """Returns the number, and whether it is in percent."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UsageError(f"--half-life: {quote(text)} is no half-life. Write for example 1000 (steps), or 10%.")
    return number, text.endswith("%")


def _increasing(steps: Sequence[int] | None, paths: Sequence[Path], options: Weighting) -> Sequence[int]:
    how = f"--weighting {options.weighting}"
    if steps is None:
        raise IncompatibleError(
            f"{how} --weighting-by step: expected a step in every checkpoint, got none in at least one of "
            f"{ends([escaped(name) for name in distinct_names(paths)])}. Use --weighting-by index, or --weights."
        )
    equal = [index for index in range(1, len(steps)) if steps[index] <= steps[index - 1]]
    if equal:
        names = distinct_names(paths)
        shown = listing(
            f"{quote(names[index - 1])} ({steps[index - 1]}), {quote(names[index])} ({steps[index]})" for index in equal
        )
        raise IncompatibleError(
            f"{how}: expected steps that increase, got {shown}. Skip one of these with --exclude, or use "
            "--weighting-by index."
        )
    return steps


def _refuse_half_life(options: Weighting, paths: Sequence[Path], steps: Sequence[int] | None) -> None:
    problem = f"--half-life {options.half_life} counts steps"
    if steps is None:
        names = ends([escaped(name) for name in distinct_names(paths)])
        raise IncompatibleError(
            f"{problem}, and not every checkpoint records one: {names}. Use a percentage, for example --half-life 10%."
        )
    if options.weighting_by == "index":
        raise UsageError(f"{problem}, and --weighting-by index uses none. Use a percentage, or remove --weighting-by.")
    raise IncompatibleError(
        f"{problem}, and the unit of the numbers in the checkpoints' names is unknown ({paths[-1].name}). If they are "
        "steps, add --weighting-by step; otherwise use a percentage, for example --half-life 10%."
    )
