"""Did averaging help? The user's own metric, of single checkpoints and of their average."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin

from ckpt_avg.errors import UserCodeError
from ckpt_avg.text import listing, quote
from ckpt_avg.user_code.isolation import seeded, undisturbed
from ckpt_avg.user_code.load import blaming
from ckpt_avg.user_code.model import batch_norm_modules, load_weights, place

Evaluate = Callable[[torch.nn.Module], object]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
_LAZY = "lazy"  # such a module becomes another class in its first forward


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
    notice: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Loads weights into the model and calls the function with it. Each call begins with the same random states.

    Args:
        function: called with the model, in evaluation mode and without gradients. It returns a number or a mapping of
            names to numbers.
        model: takes the weights.
        weights: the state dict.
        name: whose weights they are, for messages.
        device: where the model is to be.
        notice: told what the user should know of the function.

    Raises:
        IncompatibleError: the model does not take the weights.
        UserCodeError: the function raised, returned something else, or changed the model itself (its dtype, its
            modules, its hooks): what it does to modes, buffers and random states is undone.
    """
    load_weights(model, weights)
    place(model, device)
    before = _shape_of(model)
    in_train_mode: set[str] = set()
    with undisturbed(model), seeded(device), torch.no_grad(), blaming(f"the --eval function raised for {name}:"):
        with _watching(model, in_train_mode):
            returned = function(model)
        metrics = _as_metrics(returned, getattr(function, "__name__", type(function).__name__))
    if in_train_mode:
        notice(
            f"the --eval function ran BatchNorm layers in train mode ({listing(map(quote, sorted(in_train_mode)))}), "
            "so its numbers don't depend on their statistics; leave out model.train()"
        )
    after = _shape_of(model)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key) and before.get(key) != _LAZY]
    if changed:
        raise UserCodeError(
            f"the --eval function changed the model ({listing(changed)}), which is still to be measured or refreshed. "
            "Let it work on copy.deepcopy(model)."
        )
    return metrics


@contextlib.contextmanager
def _watching(model: torch.nn.Module, in_train_mode: set[str]) -> Iterator[None]:
    """Notes the BatchNorm layers that are called in train mode."""

    def note(name: str) -> Callable[[torch.nn.Module, object], None]:
        return lambda module, _: in_train_mode.add(name) if module.training else None

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in batch_norm_modules(model).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refuse_other_metrics(before: Mapping[str, float], now: Mapping[str, float], name: str) -> None:
    """Raises UserCodeError where the function returned other metrics than for the weights before."""
    if before.keys() != now.keys():
        raise UserCodeError(
            f"the --eval function: expected the metrics {listing(map(quote, before))} each time, got "
            f"{listing(map(quote, now))} for {name}."
        )


def _shape_of(model: torch.nn.Module) -> dict[str, object]:
    """Returns what of a model weights cannot put back, by what it is: dtypes, modules, hooks, replaced methods."""
    found: dict[str, object] = {
        f"parameter {quote(name)}": (id(tensor), tensor.dtype) for name, tensor in model.named_parameters()
    }
    for name, module in model.named_modules():
        hooks = [tuple(vars(module).get(kind, ())) for kind in _HOOKS]
        shape = (id(module), type(module), id(vars(module).get("forward")), hooks)
        found[f"module {quote(name)}"] = _LAZY if isinstance(module, LazyModuleMixin) else shape
    return found


def _as_metrics(returned: Any, function: str) -> dict[str, float]:
    """Returns what the function returned as floats; a lone number gets the function's name."""
    named = returned if isinstance(returned, Mapping) else {function: returned}
    metrics: dict[str, float] = {}
    wrong: list[str] = []
    for name, value in named.items():
        number = _as_number(value)
        if str(name) in metrics:
            wrong.append(f"{quote(str(name))} is there twice")
        elif number is None:
            wrong.append(f"{quote(name)} is {_kind(value)}")
        else:
            metrics[str(name)] = number
    if wrong or not metrics:
        raise UserCodeError(
            "the --eval function: expected a number or a dict of names to numbers, got "
            f"{listing(wrong) if wrong else 'an empty dict'}. Return for example {{'accuracy': 0.93}}."
        )
    return metrics


def _kind(value: Any) -> str:
    if value is None:
        return "None (is there a return?)"
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {list(shape)}" if shape else "")


def _as_number(value: Any) -> float | None:
    if isinstance(value, numbers.Real):  # int, float, bool, Fraction, numpy's own
        return float(value)
    if hasattr(value, "item") and getattr(value, "shape", ()) in ((), (1,)):
        item = value.item()
        return float(item) if isinstance(item, numbers.Real) else None
    return None
