"""Did averaging help? The user's own metric, of single checkpoints and of their average."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckpt_avg.errors import UserCodeError
from ckpt_avg.messages import listing, quote
from ckpt_avg.models import load_weights
from ckpt_avg.undisturbed import undisturbed
from ckpt_avg.user_code import blaming

Evaluate = Callable[[torch.nn.Module], object]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the user's function measured of one set of weights.

    Attributes:
        name: what was measured, in words.
        path: the checkpoint; None for an average.
        metrics: name → number, as the function returned them.
    """

    name: str
    path: Path | None
    metrics: Mapping[str, float]


def evaluate_weights(
    function: Evaluate,
    model: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    *,
    name: str,
    device: torch.device,
) -> dict[str, float]:
    """Loads weights into the model and calls the function with it. Each call begins with the same random states.

    Args:
        function: called with the model, in evaluation mode and without gradients. It returns a number or a mapping of
            names to numbers.
        model: takes the weights.
        weights: the state dict.
        name: whose weights they are, for messages.
        device: where the model is to be.

    Raises:
        IncompatibleError: the model does not take the weights.
        UserCodeError: the function raised, or returned something else.
    """
    load_weights(model, weights)
    model.to(device)
    with undisturbed(model), torch.no_grad(), blaming(f"the --eval function raised for {name}:"):
        returned = function(model)
    return _as_metrics(returned, getattr(function, "__name__", type(function).__name__))


def _as_metrics(returned: Any, function: str) -> dict[str, float]:
    """Returns what the function returned as floats; a lone number gets the function's name."""
    named = returned if isinstance(returned, Mapping) else {function: returned}
    metrics: dict[str, float] = {}
    wrong: list[str] = []
    for name, value in named.items():
        number = _as_number(value)
        if number is None:
            wrong.append(f"{quote(name)} is a {type(value).__name__}")
        else:
            metrics[str(name)] = number
    if wrong or not metrics:
        raise UserCodeError(
            "the --eval function: expected a number or a dict of names to numbers, got "
            f"{listing(wrong) if wrong else 'an empty dict'}. Return for example {{'accuracy': 0.93}}."
        )
    return metrics


def _as_number(value: Any) -> float | None:
    if isinstance(value, numbers.Real):  # int, float, bool, Fraction, numpy's own
        return float(value)
    if hasattr(value, "item") and getattr(value, "shape", ()) in ((), (1,)):
        item = value.item()
        return float(item) if isinstance(item, numbers.Real) else None
    return None
