"""The weights of selected checkpoints, or of some of them."""

from __future__ import annotations

from collections.abc import Callable

from ckpt_avg.mean.weighting import Weighting, Weights, choose_weights
from ckpt_avg.runs.order import unit_of
from ckpt_avg.runs.select import Selected


def weighting_of(
    options: Weighting, selected: Selected, window: range, notice: Callable[[str], None] = lambda text: None
) -> Weights | None:
    """Returns the weights that the checkpoints of a window get, in their order; None if all are equal.

    Raises:
        CkptAvgError: as `choose_weights`.
    """
    records = [selected.records[index] for index in window]
    steps = [record.step for record in records if record.step is not None]
    return choose_weights(
        options,
        [selected.checkpoints[index].spec.path for index in window],
        steps if unit_of(records) == "step" else None,
        before=selected.steps_before[window.start],
        places=[selected.places[index] for index in window],
        listed=[index - window.start for index in selected.listed if index in window],
        has_units=not any(record.is_lone_number for record in records),
        notice=notice,
    )
