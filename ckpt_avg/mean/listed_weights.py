"""The weights that the user lists: read, checked, and matched with the checkpoints."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from fractions import Fraction
from pathlib import Path
from typing import Any

from ckpt_avg.errors import UsageError
from ckpt_avg.mean.weight_formulas import normalized
from ckpt_avg.text import distinct_names, ends, escaped, listing, plural, quote, suggestion, type_of

_NEAR = Fraction(1, 10**6)  # how far from 1 a sum may be because weights were written with few digits
_ROUNDING = Fraction(1, 2**52)  # relative to the sum of the magnitudes


class ListedWeights(tuple[tuple[str | None, float], ...]):
    """Pairs of a checkpoint's name and its weight; the names are None if the weights are in order."""

    __slots__ = ()


def read_weights(
    given: str | os.PathLike[str] | Iterable[float] | Mapping[str, float] | ListedWeights, *, normalize: bool
) -> ListedWeights:
    """Returns listed weights, which sum to 1.

    Args:
        given: numbers with commas, a JSON file of names and weights, or the numbers or the mapping themselves.
        normalize: divide by the sum, whatever it is.

    Raises:
        UsageError: these are no weights, or their sum is not 1.
    """
    if isinstance(given, ListedWeights):
        return given
    where = "--weights"
    if isinstance(given, os.PathLike) or (isinstance(given, str) and given.endswith(".json")):
        where = os.fspath(given)
        given = _from_file(where)
    pairs: list[tuple[str | None, Any]]
    if isinstance(given, Mapping):
        pairs = [(str(name), value) for name, value in given.items()]
    elif isinstance(given, str):
        pairs = [(None, _number(text)) for text in given.split(",")]
    elif isinstance(given, Iterable) and not isinstance(given, (Set, bytes)):  # a set has no order
        pairs = [(None, value) for value in given]
    else:
        raise UsageError(f"--weights: got {type_of(given)}. Give numbers, or a mapping of names to numbers.")
    values = [_checked(value, where, name) for name, value in pairs]
    total = sum(map(Fraction, values), Fraction(0))
    if not any(values):
        raise UsageError(f"{where}: {'all weights are 0' if values else 'no weights'}. Give at least one above 0.")
    if normalize and total <= 0:
        raise UsageError(f"{where}: the sum {_shown(total)} cannot be made 1. Use weights of a sum above 0.")
    if not normalize and abs(total - 1) > _NEAR:
        count = plural(len(values), "weight")
        raise UsageError(f"{where}: {count} with the sum {_shown(total)}, not 1. Add --normalize to divide by it.")
    return ListedWeights((name, value) for (name, _), value in zip(pairs, values, strict=True))


def weights_listed(
    listed: ListedWeights, paths: Sequence[Path], given: Sequence[int], notice: Callable[[str], None]
) -> list[float]:
    """Returns the weights of checkpoints, in order, divided by their sum unless it is 1, to rounding.

    Args:
        listed: by name, or in the order of ``given``.
        paths: of the checkpoints.
        given: the indices of the checkpoints in the order in which the user listed them.
        notice: called with what the user should know.

    Raises:
        UsageError: they do not match the checkpoints.
    """
    names = distinct_names(paths)
    if any(name is not None for name, _ in listed):
        values = _by_name(listed, paths, names)
    else:
        if len(listed) != len(paths):
            raise UsageError(
                f"--weights: expected {plural(len(paths), 'weight')}, one for each of {ends(list(map(escaped, names)))}"
                f", got {len(listed)}. Select as many checkpoints as weights, or name them in a JSON file."
            )
        values = [0.0] * len(paths)
        for index, (_, value) in zip(given, listed, strict=True):
            values[index] = value
        if list(given) != sorted(given):
            shown = listing(f"{escaped(names[index])} {values[index]:.6g}" for index in given)
            notice(f"the weights are in the order in which the checkpoints were listed: {shown}")
    total = sum(map(Fraction, values), Fraction(0))
    if abs(total - 1) > _ROUNDING * sum(map(abs, map(Fraction, values))):
        notice(f"the weights sum to {_shown(total)}, and were divided by it")
        values = normalized(values)
    if negative := [f"{escaped(name)} {value:.6g}" for name, value in zip(names, values, strict=True) if value < 0]:
        notice(f"negative weights, so values may be outside the range of the checkpoints: {listing(negative)}")
    return values


def _shown(total: Fraction) -> str:
    most = Fraction(sys.float_info.max)
    return f"{float(max(-most, min(most, total))):.9g}"


def _by_name(listed: ListedWeights, paths: Sequence[Path], names: Sequence[str]) -> list[float]:
    found: dict[int, float] = {}
    for name, value in listed:
        matches = [
            index for index, path in enumerate(paths) if name in (path.name, names[index]) or Path(name or "") == path
        ]
        if not matches:
            raise UsageError(
                f"--weights: {quote(name)} is none of the checkpoints {ends(list(map(escaped, names)))}."
                f"{suggestion(name, names) or ' Remove it, or select the checkpoint.'}"
            )
        if len(matches) > 1 or matches[0] in found:
            meant = listing(quote(str(paths[index])) for index in matches)
            raise UsageError(
                f"--weights: {quote(name)}: each weight must be of one checkpoint, got {meant}. Use paths."
            )
        found[matches[0]] = value
    if lacking := [quote(name) for index, name in enumerate(names) if index not in found]:
        raise UsageError(f"--weights: no weight for {listing(lacking)}. Add it; 0 leaves a checkpoint out of the sum.")
    return [found[index] for index in range(len(paths))]


def _from_file(path: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"{path}: {quote(repeated[0])} has several weights. Keep one.")
        return dict(pairs)

    try:
        found = json.loads(Path(path).read_bytes(), object_pairs_hook=unique)
    except OSError as error:
        raise UsageError(f"--weights {quote(path)}: cannot be read: {error.strerror}. Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f'{path}: cannot be read as JSON ({error}). Write for example {{"epoch_1.pt": 0.4, "epoch_2.pt": 0.6}}.'
        ) from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected an object of names and weights, got {type_of(found)}.")
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"--weights: {quote(text.strip())} is not a number. Write for example 0.2,0.3,0.5 or FILE.json."
        ) from None


def _checked(value: Any, where: str, name: str | None) -> float:
    """Returns a weight as float64."""
    of = "" if name is None else f"{quote(name)}: "
    try:
        number = None if isinstance(value, (bool, str, bytes)) else float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):  # as of a tensor with several elements
        number = None
    if number is None:
        raise UsageError(f"{where}: {of}expected a number, got {type_of(value)}.")
    if not math.isfinite(number):
        raise UsageError(f"{where}: {of}{number:g} is no weight. Give a finite number.")
    return number
