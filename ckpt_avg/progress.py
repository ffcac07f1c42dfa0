"""Callbacks that tell a caller how far the work is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the work that may take long.

    Attributes:
        title: what is done, for example ``averaging 8 × 1.0 GB``.
        total: how much there is to do; None if that is unknown.
        unit: what ``total`` counts, in the plural: ``bytes``, ``batches``, ``checkpoints``, ``windows``, ….
        left: how many phases follow; None until the checkpoints are open.
    """

    title: str
    total: int | None = None
    unit: str = ""
    left: int | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Callbacks; each may be called from several threads, one at a time.

    Attributes:
        phase: a phase starts, so the one before it is done.
        step: a part of the phase starts, such as the refresh of one of its averages.
        advance: so much more of the step is done, or of the phase if that has no steps.
        measured: weights were measured; with their name and the metrics. If the phase counts several of them, one more
            of them is done.
        notice: there is something that the user should know.

    Example:
        >>> from ckpt_avg import average
        >>> progress = Progress(phase=lambda phase: print(phase.title, phase.left))
        >>> run = "fixtures/mnist_cnn"
        >>> result = average(run, "release.safetensors", last=8, bn="keep", dry_run=True, progress=progress)
        opening checkpoints None
    """

    phase: Callable[[Phase], None] = lambda phase: None
    step: Callable[[Phase], None] = lambda step: None
    advance: Callable[[int], None] = lambda amount: None
    measured: Callable[[str, Mapping[str, float]], None] = lambda name, metrics: None
    notice: Callable[[str], None] = lambda text: None
