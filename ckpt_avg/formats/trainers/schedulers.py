"""Learning-rate schedulers of torch: the rate of the last step, where the state in a checkpoint tells it."""

from __future__ import annotations

import math

from ckpt_avg.checkpoint.training_record import measure


def rate_of_last_step(state: object, step: int | None, epoch: int | None) -> float | None:
    """Returns the rate of the last step out of the state of a CosineAnnealingWarmRestarts; None for other schedulers.

    At the end of a cycle this scheduler has already set the rate of the next step, the top of the next cycle.
    η = η_min + (η_0 − η_min)·(1 + cos(π·T_cur/T_i))/2 (Loshchilov & Hutter 2017).
    """
    if not isinstance(state, dict):
        return None
    rates = state.get("base_lrs")
    found = [measure(state.get(name)) for name in ("T_cur", "T_i", "T_mult", "eta_min", "last_epoch")]
    found.append(measure(rates[0]) if isinstance(rates, list) and rates else None)
    numbers = [number for number in found if number is not None]
    if len(numbers) < len(found):
        return None
    now, length, growth, lowest, done, highest = numbers
    if not done or done not in (step, None if epoch is None else epoch + 1):
        return None  # it counts something else, or has not stepped yet
    if now < 1:  # a cycle has just begun: the last step was the last of the one before
        now = length = max(1.0, length / max(growth, 1.0))
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * (now - 1) / max(length, 1.0))) / 2
