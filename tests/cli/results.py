"""Results of evaluations and sweeps for the tests of what is printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ckpt_avg.commands.sweep import Measured, SweepResult
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.user_code.comparison import Evaluation, compare

VALUES = {("last", 1): 0.5, ("last", 2): 0.75, ("last", 3): 0.625, ("first", 1): 0.25, ("first", 2): 0.5}


def single(name: str, **metrics: float) -> Evaluation:
    return Evaluation(name, Path("run") / name, metrics)


def mean_of(name: str, **metrics: float) -> Evaluation:
    return Evaluation(name, None, metrics)


def swept(
    values: Mapping[tuple[str, int], float] = VALUES,
    best: tuple[str, int] = ("last", 2),
    *,
    last: float = 0.5,
    mode: str = "max",
    metric: str = "m",
    name: str = "step_3.pt",
) -> SweepResult:
    """A sweep of three checkpoints: ``values`` by side and number of checkpoints; ``last`` is that of the reference."""
    paths = tuple(Path("run") / f"step_{number}.pt" for number in (1, 2, 3))
    windows = {
        (side, size): Measured(
            side,  # type: ignore[arg-type]
            paths[-size:] if side == "last" else paths[:size],
            {metric: value, "other": math.nan},
        )
        for (side, size), value in values.items()
    }
    saved = Evaluation(name, paths[-1], {metric: last - 0.125, "other": 1.0})
    reference = Evaluation(f"{name}, statistics refreshed", paths[-1], {metric: last, "other": 1.0}, True)
    average = Evaluation("", None, windows[best].metrics)
    return SweepResult(
        checkpoints=paths,
        steps=(1, 2, 3),
        unit="step",
        skipped=(Skipped(Path("run/log.txt"), "no checkpoint"),),
        last=saved,
        reference=reference,
        weightings=("mean",),
        windows=tuple(windows.values()),
        metric=metric,
        mode=mode,
        split=None,
        best=windows[best],
        change=compare(reference, average, {metric: mode == "max"})[0],
        refreshed=True,
        passes=2,
        engine="native",
        notices=("a notice",),
    )


def with_rule(result: SweepResult, rule: str, more: float) -> SweepResult:
    """The same sweep that also compared a rule, with which each metric is higher; the best is the last one with it."""
    windows: list[Measured] = []
    for window in result.windows:
        count = len(window.checkpoints)
        weights = tuple(2.0 ** (index - count + (index == 0)) for index in range(count)) if count > 1 else None
        metrics = {name: value + more for name, value in window.metrics.items()}
        windows += [window, replace(window, metrics=metrics, weighting=rule, weights=weights)]
    return replace(result, weightings=(*result.weightings, rule), windows=tuple(windows), best=windows[-1])
