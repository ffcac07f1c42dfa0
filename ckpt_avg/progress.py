"""What a caller may want to be told while the work goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Callbacks; each may be called from several threads, one at a time.

    Attributes:
        start: the input bytes that will be read.
        read: input bytes that have just been averaged.
        refreshing: a BatchNorm refresh begins; with the number of its batches, if that is known.
        refreshed: batches and samples that have passed the model so far.
        evaluating: what is being measured now.
        notice: something that the user should know.
    """

    start: Callable[[int], None] = lambda total: None
    read: Callable[[int], None] = lambda nbytes: None
    refreshing: Callable[[int | None], None] = lambda batches: None
    refreshed: Callable[[int, int], None] = lambda batches, samples: None
    evaluating: Callable[[str], None] = lambda name: None
    notice: Callable[[str], None] = lambda text: None
