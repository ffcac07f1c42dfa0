"""Reports for the tests of the page, as large and as odd as wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def made_report(
    checkpoints: int = 6,
    tensors: int = 8,
    *,
    layers: int = 3,
    name: str = "step_{}.pt",
    tensor: str = "layer.{}.weight",
    metric: str = "loss",
    notices: Sequence[str] = (),
) -> dict[str, Any]:
    """The report of an average of the last half of a run of ``2 * checkpoints``, measured and refreshed."""
    paths = [f"run/{name.format(number)}" for number in range(1, checkpoints + 1)]
    steps = [1000 * number for number in range(1, 2 * checkpoints + 1)]
    places = range(checkpoints)

    def measured(label: str, path: str | None, value: float, refreshed: bool) -> dict[str, Any]:
        return {"name": label, "path": path, "metrics": {metric: value}, "refreshed": refreshed, "samples": {}}

    def moment(place: int) -> dict[str, Any]:
        return {
            "step": steps[place],
            "epoch": None,
            "metrics": {metric: 1 / (place + 1)},
            "learning_rate": 0.1 * 0.9**place,
        }

    last = paths[-1]
    return {
        "ckpt_avg": "0.1.0",
        "schema": "ckpt-avg report",
        "schema_version": 1,
        "kind": "average",
        "command_line": ["ckpt-avg", "average", *paths[:3]],
        "output": "out/swa.safetensors",
        "written": True,
        "checkpoints": paths,
        "steps": steps[checkpoints:],
        "unit": "step",
        "weights": [1.0 / checkpoints] * checkpoints,
        "skipped": [{"path": paths[0], "reason": "a copy"}],
        "tensors": tensors,
        "bytes": 4096,
        "device": "cpu",
        "engine": "native",
        "data_digest": "0" * 64,
        "sha256": None,
        "split": None,
        "batch_norm": {
            "statistics": "refreshed", "layers": [], "frozen": [], "untracked": [], "batches": 4, "samples": 512,
            "estimator": "pooled", "amp": "off",
        },
        "spectral_norms": [],
        "evaluations": [
            measured(name.format(checkpoints), last, 0.5, False),
            measured(f"{name.format(checkpoints)}, statistics refreshed", last, 0.45, True),
            measured("average, statistics refreshed", None, 0.4, True),
        ],
        "comparison": {
            "averaging": [{"metric": metric, "difference": -0.05, "spread": None, "verdict": "better"}],
            "refresh": [{"metric": metric, "difference": -0.05, "spread": 0.1, "verdict": "within the spread"}],
        },
        "requirements": [{"requirement": "loss<=last", "value": 0.4, "threshold": 0.45, "met": True}],
        "notices": list(notices),
        "sources": [
            {"path": path, "name": path, **moment(checkpoints + place), "weight": 1 / checkpoints, "bytes": 100,
             "header_sha256": "0" * 64, "sha256": None}
            for place, path in enumerate(paths)
        ],
        "run": [{**moment(place), "selected": place >= checkpoints} for place in range(2 * checkpoints)],
        "rates": [[step, 0.1] for step in range(1000)],
        "batch_norm_changes": [
            {"layer": tensor.format(f"bn{number}"), "channels": 8, "mean_before": 0.1, "mean_after": 0.2,
             "variance_before": 1.0, "variance_after": 1.5, "shift": 0.1 * number, "largest_shift": 0.3 * number,
             "ratio": 1.5, "least_ratio": 0.5, "largest_ratio": 3.0}
            for number in range(layers)
        ],
        "compared": {
            "checkpoints": [
                {"path": path, "step": steps[checkpoints + place], "epoch": None, "norm": 10.0 + place,
                 "to_mean": 1.0 + place, "relative": 0.1 + place / 100, "to_previous": 0.5 if place else None,
                 "plane": [math.cos(place), math.sin(place)], "statistics_to_mean": 0.1, "nonfinite": 0}
                for place, path in enumerate(paths)
            ],
            "skipped": [],
            "elements": 1000,
            "norm": 10.0,
            "distances": [[abs(row - column) + 0.0 for column in places] for row in places],
            "cosines": [[1.0 for _ in places] for _ in places],
            "centred_cosines": [[1.0 for _ in places] for _ in places],
            "shares": [0.7, 0.2],
            "straightness": 0.5,
            "tensors": [
                {"name": tensor.format(number), "shape": [8, 8], "group": "weights", "norm": 3.0,
                 "to_mean": [0.1] * checkpoints, "relative": 0.3 / (number + 1)}
                for number in range(tensors)
            ],
            "not_compared": 0,
            "findings": [{"kind": "detour", "checkpoints": [paths[1]], "text": f"{paths[1]}: is far off."}],
            "notices": [],
        },
        "compare_failure": None,
        "provenance": {"method": "mean", "options": {"ema": False}},
    }  # fmt: skip
