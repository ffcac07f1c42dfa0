"""Callbacks that tell a caller how far the work is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Callbacks; each may be called from several threads, one at a time.

    Attributes:
        start: a pass over the inputs starts; with the bytes to read.
        read: some bytes of the inputs have been averaged; with how many.
        refreshing: a BatchNorm refresh starts; with the number of its batches, None if unknown.
        refreshed: a batch has been run; with the batches and the samples so far.
        evaluating: a measurement starts; with the name of the weights.
        notice: there is something that the user should know.
    """

    start: Callable[[int], None] = lambda total: None
    read: Callable[[int], None] = lambda nbytes: None
    refreshing: Callable[[int | None], None] = lambda batches: None
    refreshed: Callable[[int, int], None] = lambda batches, samples: None
    evaluating: Callable[[str], None] = lambda name: None
    notice: Callable[[str], None] = lambda text: None
