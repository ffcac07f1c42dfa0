"""The engine that computes the mean: ``native``, the compiled mean/kernel.c, or ``torch``. Both give the same bytes."""

from __future__ import annotations

import os
from types import ModuleType

from ckpt_avg.errors import UsageError

try:
    from ckpt_avg import _kernel
except ImportError:  # there was no C compiler
    _kernel = None  # type: ignore[assignment]

_CHOICE = "CKPT_AVG_ENGINE"


def kernel() -> ModuleType | None:
    """Returns the compiled kernel; None if it was not built, or the environment variable CKPT_AVG_ENGINE is ``torch``.

    Raises:
        UsageError: the variable has another value, or is ``native`` and there is no kernel.
    """
    chosen = os.environ.get(_CHOICE, "")
    if chosen not in ("", "native", "torch"):
        raise UsageError(f"{_CHOICE}={chosen}: no such engine. Use native or torch.")
    if chosen == "native" and _kernel is None:
        raise UsageError(
            f"{_CHOICE}=native: this installation has no native engine. Install ckpt-avg again with a C compiler, or "
            f"unset {_CHOICE}."
        )
    return None if chosen == "torch" else _kernel


def engine_for(device: str) -> str:
    """Returns ``native`` or ``torch``, the engine that sums on a device."""
    return "native" if device == "cpu" and kernel() is not None else "torch"
