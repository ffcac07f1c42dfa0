"""Results of evaluations and sweeps for the tests of what is printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from ckpt_avg.commands.sweep import Measured, SweepResult
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.user_code.evaluate import Evaluation

VALUES = {("last", 1): 0.5, ("last", 2): 0.75, ("last", 3): 0.625, ("first", 1): 0.25, ("first", 2): 0.5}


def single(name: str, **metrics: float) -> Evaluation:
    return Evaluation(name, Path("run") / name, metrics)


def mean_of(name: str, **metrics: float) -> Evaluation:
    return Evaluation(name, None, metrics)


def swept(
    values: Mapping[tuple[str, int], float], best: tuple[str, int], *, last: float, mode: str = "max", total: int = 3
) -> SweepResult:
    paths = tuple(Path("run") / f"step_{number}.pt" for number in range(1, total + 1))
    windows = {
        (side, size): Measured(side, paths[-size:] if side == "last" else paths[:size], {"m": value, "other": math.nan})  # type: ignore[arg-type]
        for (side, size), value in values.items()
    }
    return SweepResult(
        checkpoints=paths,
        skipped=(Skipped(Path("run/log.txt"), "no checkpoint"),),
        last=Evaluation("step_3.pt", paths[-1], {"m": last, "other": 1.0}),
        windows=tuple(windows.values()),
        metric="m",
        mode=mode,
        best=windows[best],
        refreshed=True,
        passes=2,
        notices=("a notice",),
    )
