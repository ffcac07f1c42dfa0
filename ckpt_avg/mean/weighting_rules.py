"""Rules for weights in a few letters, such as ``ema:1000``: what `sweep --weightings` lists."""

from __future__ import annotations

from collections.abc import Iterable

from ckpt_avg.choices import WeightingBy
from ckpt_avg.errors import UsageError
from ckpt_avg.mean.weighting import RULES, Weighting
from ckpt_avg.text import quote, suggestion

_EXAMPLES = {"ema": "ema:1000 (steps), or ema:10%", "power": "power:0.1"}


def parse_rules(given: str | Iterable[str], by: WeightingBy) -> dict[str, Weighting]:
    """Returns the options for each of several rules, by the rule's short form.

    Args:
        given: rules, separated by commas: ``mean``, ``minus-sqrt``, ``ema:HALF-LIFE``, ``power:WIDTH``, …
        by: as `Weighting.weighting_by`.

    Raises:
        UsageError: one is none, or is listed twice.

    Example:
        >>> list(parse_rules("mean, ema:1000,power:0.10", "auto"))
        ['mean', 'ema:1000', 'power:0.1']
    """
    rules: dict[str, Weighting] = {}
    for text in ",".join([given] if isinstance(given, str) else given).split(","):
        options = _parse(text.strip(), by)
        if rule_of(options) in rules:
            raise UsageError(f"--weightings: {rule_of(options)} is listed twice. List it once.")
        rules[rule_of(options)] = options
    return rules


def rule_of(options: Weighting) -> str:
    """Returns the short form of a rule with its number."""
    number = options.half_life if options.width is None else repr(options.width)
    return options.weighting if number is None else f"{options.weighting}:{number}"


def options_of_rule(options: Weighting) -> list[str]:
    """Returns the options of `average` for a rule."""
    given = {
        "--weighting": options.weighting,
        "--half-life": options.half_life,
        "--width": options.width,
        "--weighting-by": None if options.weighting_by == "auto" else options.weighting_by,
    }
    if options.weighting == "mean":
        return []
    return [word for flag, value in given.items() if value is not None for word in (flag, str(value))]


def _parse(text: str, by: WeightingBy) -> Weighting:
    given, colon, number = text.partition(":")
    name = next((rule for rule in RULES if rule == given), None)
    if name is None:
        raise UsageError(f"--weightings: {quote(given)} is not one of {', '.join(RULES)}.{suggestion(given, RULES)}")
    if bool(colon) != (name in _EXAMPLES):
        example = _EXAMPLES.get(name, name)
        raise UsageError(f"--weightings: {quote(text)}: {name} takes {'no' if colon else 'a'} number. Write {example}.")
    if name == "power":
        try:
            width = float(number)
        except ValueError:
            raise UsageError(f"--weightings: {quote(text)}: expected a width, for example power:0.1.") from None
        return Weighting(weighting=name, weighting_by=by, width=width)
    return Weighting(
        weighting=name, weighting_by="auto" if name == "mean" else by, half_life=number if name == "ema" else None
    )
