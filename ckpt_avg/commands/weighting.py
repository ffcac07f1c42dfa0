"""The weights of selected checkpoints, or of some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.mean.weighting import Moments, Weighting, Weights, choose_weights
from ckpt_avg.runs.order import Unit, position, unit_of
from ckpt_avg.runs.select import Selected
from ckpt_avg.text import listing


def weighting_of(
    options: Weighting, selected: Selected, window: range, notice: Callable[[str], None] = lambda text: None
) -> Weights | None:
    """Returns the weights that the checkpoints of a window get, in their order; None if all are equal.

    Raises:
        CkptAvgError: as `choose_weights`.
    """
    if options.weights is not None and selected.copies:
        notice(f"--weights: no weight belongs to {listing(selected.copies)}: skipped, as another has the same weights")
    places = [selected.places[index] for index in window]
    unit = unit_of(selected.run[place] for place in places)
    return choose_weights(
        options,
        [selected.checkpoints[index].spec.path for index in window],
        None if unit is None else _moments(selected.run, places, unit),
        places=places,
        listed=[index - window.start for index in selected.listed if index in window],
        notice=notice,
    )


def _moments(run: Sequence[Record], places: Sequence[int], unit: Unit) -> Moments:
    known = [record.step if unit == "step" else record.epoch for record in run]
    # Epochs counted from 0 end one later.
    late = int(unit == "epoch" and 0 in known)
    chosen = [position(run[place], unit) + late for place in places]
    before = [each + late for each in known[: places[0]] if each is not None and each + late < chosen[0]]
    is_lone = any(run[place].is_lone_number for place in places)
    return Moments(tuple(chosen), max(before, default=0), unit, is_in_steps=unit == "step" and not is_lone)
