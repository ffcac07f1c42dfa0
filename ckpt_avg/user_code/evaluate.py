"""Measures weights with the user's own metric: single checkpoints, and their average."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.modules.lazy import LazyModuleMixin

from ckpt_avg.errors import UserCodeError
from ckpt_avg.text import listing, quote, type_of
from ckpt_avg.user_code.isolation import seeded, undisturbed
from ckpt_avg.user_code.load import user_errors
from ckpt_avg.user_code.model import batch_norm_modules, load_weights, move_model

Evaluate = Callable[[torch.nn.Module], object]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
_LAZY = "lazy"  # the first forward of such a module changes its class


def evaluate_weights(
    function: Evaluate,
    model: torch.nn.Module,
    weights: Mapping[str, torch.Tensor],
    *,
    name: str,
    device: torch.device,
    notice: Callable[[str], None] = lambda text: None,
    seed: int = 0,
) -> dict[str, float]:
    """Loads weights into the model and calls the function with it, with the random states of a seed.

    Args:
        function: called with the model, in evaluation mode and without gradients. It returns a number or a mapping of
            names to numbers. Its changes to modes, buffers and random states are undone.
        model: the model.
        weights: the state dict.
        name: what the weights are called in messages.
        device: the device to move the model to.
        notice: called with what the user should know about the function.

    Raises:
        IncompatibleError: the weights don't fit the model.
        UserCodeError: the function raised, returned something else, or changed the model's dtypes, modules or hooks.
    """
    load_weights(model, weights)
    move_model(model, device)
    before = _structure_of(model)
    in_train_mode: set[str] = set()
    with (
        undisturbed(model),
        seeded(device, seed),
        torch.no_grad(),
        user_errors(f"the --eval function raised for {name}:", call="It is called with the model alone."),
    ):
        with contextlib.ExitStack() as hooks:
            for layer, module in batch_norm_modules(model).items():
                hooks.enter_context(module.register_forward_pre_hook(_note_train_mode(layer, in_train_mode)))
            returned = function(model)
        metrics = _as_metrics(returned, getattr(function, "__name__", type(function).__name__))
    if in_train_mode:
        notice(
            f"the --eval function ran BatchNorm layers in train mode ({listing(map(quote, sorted(in_train_mode)))}), "
            "so its numbers don't depend on their statistics. Remove model.train()."
        )
    after = _structure_of(model)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key) and before.get(key) != _LAZY]
    if changed:
        raise UserCodeError(
            f"the --eval function changed the model ({listing(changed)}), which is needed again. Use "
            "copy.deepcopy(model) in the function."
        )
    return metrics


def _note_train_mode(layer: str, in_train_mode: set[str]) -> Callable[[torch.nn.Module, object], None]:
    """Returns a hook that adds the layer to the set if it is called in train mode."""
    return lambda module, _: in_train_mode.add(layer) if module.training else None


def refuse_other_metrics(before: Mapping[str, float], now: Mapping[str, float], name: str) -> None:
    """Raises UserCodeError if the function returned other metrics than for earlier weights."""
    if before.keys() != now.keys():
        raise UserCodeError(
            f"the --eval function: expected the metrics {listing(map(quote, before))} each time, got "
            f"{listing(map(quote, now))} for {name}."
        )


def _structure_of(model: torch.nn.Module) -> dict[str, object]:
    """Returns what loading weights does not restore: dtypes, modules, hooks and replaced methods, by name."""
    found: dict[str, object] = {
        f"parameter {quote(name)}": (id(tensor), tensor.dtype) for name, tensor in model.named_parameters()
    }
    for name, module in model.named_modules():
        hooks = [tuple(vars(module).get(kind, ())) for kind in _HOOKS]
        shape = (id(module), type(module), id(vars(module).get("forward")), hooks)
        found[f"module {quote(name)}"] = _LAZY if isinstance(module, LazyModuleMixin) else shape
    return found


def _as_metrics(returned: Any, function: str) -> dict[str, float]:
    """Returns the metrics as floats. A single number gets the function's name."""
    is_mapping = isinstance(returned, Mapping)
    named = returned if is_mapping else {function: returned}
    metrics: dict[str, float] = {}
    wrong: list[str] = []
    for name, value in named.items():
        number = _as_number(value)
        if str(name) in metrics:
            wrong.append(f"{quote(str(name))} twice")
        elif number is None:
            wrong.append(f"{quote(name)} is {_kind(value)}" if is_mapping else _kind(value))
        else:
            metrics[str(name)] = number
    if wrong or not metrics:
        several = any(getattr(value, "shape", ()) for value in named.values())
        raise UserCodeError(
            f"the --eval function {function}: expected it to return a number or a dict of names to numbers, got "
            f"{listing(wrong) if wrong else 'an empty dict'}. {'Is there a return? ' if returned is None else ''}"
            f"{'Reduce a tensor to one number, for example with .mean(). ' if several else ''}"
            "Return for example {'accuracy': 0.93}."
        )
    return metrics


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type_of(value) + (f" of shape {list(shape)}" if shape else "")


def _as_number(value: Any) -> float | None:
    if isinstance(value, numbers.Real):  # int, float, bool, Fraction, and numpy's numbers
        return float(value)
    if hasattr(value, "item") and getattr(value, "shape", ()) in ((), (1,)):
        item = value.item()
        return float(item) if isinstance(item, numbers.Real) else None
    return None
