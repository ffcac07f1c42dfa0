"""A pickled ``nn.Module``: its tensors under the names that ``state_dict()`` would give, from inert stand-ins.

``Module.state_dict`` takes a module's own parameters, then its persistent buffers, then its submodules, each with its
name in front (torch/nn/modules/module.py). A class that overrides this is not asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.pickles.stand_ins import Foreign, refuse
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import quote

_DEEPEST = 100


def is_module(value: object) -> bool:
    """Whether it represents a module with its state, or one that torch.compile has wrapped."""
    value = _unwrapped(value)
    return (
        isinstance(value, Foreign)
        and isinstance(value.state, dict)
        and all(isinstance(value.state.get(part), dict) for part in ("_parameters", "_buffers", "_modules"))
    )


def _unwrapped(value: Any) -> Any:
    """Returns the module inside torch.compile's OptimizedModule, which is pickled as a call with it."""
    if isinstance(value, Foreign) and value.qualname == "OptimizedModule" and value.arguments:
        return value.arguments[0]
    return value


def module_tensors(module: Foreign) -> dict[str, object]:
    """Returns the parameters and persistent buffers by name.

    Raises:
        CheckpointFormatError: modules nest without end.
    """
    found: dict[str, object] = {}
    module = _unwrapped(module)
    _collect(module, "", found, _DEEPEST, itertools.count())
    return found


def _collect(module: Foreign, prefix: str, found: dict[str, object], depth: int, visits: Iterator[int]) -> None:
    state = module.state
    _refuse_quantized(module, prefix)
    if not isinstance(state, dict):
        return
    # A module that occurs several times is visited each time, so a few can make very many.
    at = [next(visits) for _ in range(10)][-1]  # a module costs as much as ten tensors
    if depth == 0 or len(found) > LIMITS.tensors or at > LIMITS.module_items:
        refuse(f"expected at most {LIMITS.module_items:,} modules and tensors, {_DEEPEST} deep, got more")
    passing = _strings(state.get("_non_persistent_buffers_set"), visits)
    for part in ("_parameters", "_buffers"):
        for name, tensor in state[part].items():
            for _ in range(1 + len(prefix) // 256):  # long names take memory, too
                next(visits)
            if not isinstance(name, str) or len(prefix) + len(name) > LIMITS.name:
                refuse(f"expected names of at most {LIMITS.name:,} characters in a pickled module, got another")
            passes = part == "_buffers" and name in passing
            if tensor is not None and not passes:
                found[f"{prefix}{name}"] = tensor
    for name, inner in state["_modules"].items():
        if not isinstance(inner, Foreign):
            continue  # None, or what holds no tensors
        _refuse_quantized(inner, f"{prefix}{name}")
        if not is_module(inner) or not isinstance(name, str) or len(prefix) + len(name) > LIMITS.name:
            refuse(f"expected modules in a pickled module, got {inner.described()} as {quote(f'{prefix}{name}')}")
        _collect(_unwrapped(inner), f"{prefix}{name}.", found, depth - 1, visits)


def _refuse_quantized(module: Foreign, name: str) -> None:
    if module.module.startswith("torch.") and ".quantized." in f"{module.module}.":
        where = f" as {quote(name.removesuffix('.'))}" if name else ""
        raise CheckpointFormatError(
            f"expected a module with plain weights, got the quantized {module.described()}{where}. Average the "
            "checkpoints before quantisation."
        )


def _strings(value: object, visits: Iterator[int]) -> set[object]:
    """Returns the strings of a set, which pickles before protocol 4 write as a call of ``set`` with a list."""
    if isinstance(value, Foreign) and value.qualname == "set" and value.arguments:
        value = value.arguments[0]
    if not isinstance(value, (set, frozenset, list)):
        return set()
    for _ in value:
        next(visits)
    return {each for each in value if isinstance(each, str)}
