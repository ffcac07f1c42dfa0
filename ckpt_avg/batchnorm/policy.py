"""Where the output's running statistics come from: a refresh, the mean of the checkpoints, or a checkpoint as it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Literal

from ckpt_avg.batchnorm.options import RefreshOptions
from ckpt_avg.checkpoint.spec import Checkpoint, batch_norm_buffer
from ckpt_avg.errors import UsageError
from ckpt_avg.mean.equal_tensors import differing
from ckpt_avg.mean.plan import Plan
from ckpt_avg.mean.recognisers import is_spread
from ckpt_avg.text import listing, plural, quote

if TYPE_CHECKING:
    import torch

    from ckpt_avg.batchnorm.refresh import BatchNormReport
    from ckpt_avg.batchnorm.refresh_output import PreparedRefresh
    from ckpt_avg.user_code.model import Passes

Statistics = Literal["none", "refreshed", "mean", "frozen", "copied"]
COUNTS_ROOM = 2 * 15  # bytes by which the metadata may grow once the refresh has counted batches and samples


def frozen_buffers(checkpoints: Sequence[Checkpoint], plan: Plan, bn: str) -> frozenset[str]:
    """Returns the running statistics of the layers in which they are the same in each of several checkpoints."""
    if len(checkpoints) < 2 or bn == "refresh":  # one doesn't show whether they ever change; the user wants all
        return frozenset()
    pairs = [
        (batch_norm_buffer(layer, "running_mean"), batch_norm_buffer(layer, "running_var")) for layer in plan.batch_norm
    ]
    moving = differing(checkpoints, (name for pair in pairs for name in pair))
    return frozenset(name for pair in pairs if not any(name in moving for name in pair) for name in pair)


def moving_layers(plan: Plan, frozen: Collection[str]) -> list[str]:
    """Returns the layers with running statistics that are not frozen."""
    return [layer for layer in plan.batch_norm if batch_norm_buffer(layer, "running_mean") not in frozen]


def needs_refresh(
    plan: Plan, frozen: Collection[str], *, bn: str, has_model: bool, has_data: bool, notice: Callable[[str], None]
) -> bool:
    """Whether statistics are to be recomputed. Raises UsageError if they are, and the model or the data is missing."""
    moving = moving_layers(plan, frozen)
    if len(moving) < len(plan.batch_norm):
        kept = [layer for layer in plan.batch_norm if layer not in moving]
        notice(
            f"{plural(len(kept), 'frozen BatchNorm layer')} kept, because the statistics are the same in every "
            f"checkpoint: {listing(map(quote, kept))}"
        )
    if plan.checkpoints == 1 and not has_data and bn != "refresh":
        return False  # a copy of the weights keeps the statistics that belong to them
    if not moving or bn == "keep":
        if not plan.batch_norm and (has_data or bn == "refresh"):
            notice("the checkpoints contain no BatchNorm statistics, so there is nothing to refresh")
        elif moving and plan.checkpoints > 1:
            advice = "Omit --bn keep" if has_data else "Add --model and --data"
            notice(
                f"the running statistics of {plural(len(moving), 'BatchNorm layer')} are the mean of the checkpoints', "
                f"not those of the averaged weights. {advice} to recompute them."
            )
        return False
    given = {"--model MODULE:FACTORY": has_model, "--data MODULE:FACTORY": has_data}
    if missing := [option for option, is_given in given.items() if not is_given]:
        examples = ", ".join(map(quote, moving[:2])) + (", …" if len(moving) > 2 else "")
        raise UsageError(
            f"running statistics of {plural(len(moving), 'BatchNorm layer')} ({examples}): must be recomputed for "
            f"averaged weights. Add {' and '.join(missing)}, or --bn keep to average them."
        )
    return True


def choose_refresh(
    plan: Plan, frozen: Collection[str], model: torch.nn.Module, passes: Passes, notice: Callable[[str], None]
) -> PreparedRefresh | None:
    """Returns the prepared refresh; None if the model has none of the layers with moving statistics."""
    moving = moving_layers(plan, frozen)
    from ckpt_avg.batchnorm.refresh_output import prepare_refresh

    prepared = prepare_refresh(model, passes, plan)
    names = {name for buffers in prepared.buffers.values() for name in buffers["running_mean"]}
    others = [layer for layer in moving if batch_norm_buffer(layer, "running_mean") not in names]
    if others:
        notice(
            f"{plural(len(others), 'layer')} with running statistics are no BatchNorm layers of the model, so their "
            f"statistics are the mean of the checkpoints': {listing(map(quote, others))}"
        )
    return prepared if len(others) < len(moving) else None


def source_of_statistics(plan: Plan, frozen: frozenset[str], refresh: PreparedRefresh | None) -> Statistics:
    """Returns where the output's running statistics come from."""
    if not plan.batch_norm:
        return "none"
    if refresh is not None:
        return "refreshed"
    if plan.checkpoints == 1:
        return "copied"
    return "frozen" if len(frozen) == 2 * len(plan.batch_norm) else "mean"


def refuse_negative_variances(
    plan: Plan, weights: Sequence[float], frozen: Collection[str], refresh: PreparedRefresh | None
) -> None:
    """Raises UsageError if a weight is negative, and a variance would be averaged, which might become negative."""
    if min(weights) >= 0:
        return
    measured = (
        set()
        if refresh is None
        else {name for buffers in refresh.buffers.values() for names in buffers.values() for name in names}
    )
    averaged = [
        tensor.name
        for tensor in plan.tensors
        if tensor.rule == "mean"
        and is_spread(tensor.name)
        and tensor.name not in frozen
        and tensor.name not in measured
    ]
    if averaged:
        raise UsageError(
            f"--weights: with negative ones, running variances might become negative: {listing(map(quote, averaged))}. "
            "Add --model and --data to recompute those of BatchNorm, or use weights of 0 and above."
        )


def summary(
    statistics: Statistics, report: BatchNormReport | None, options: RefreshOptions
) -> dict[str, object] | None:
    """Returns the metadata on BatchNorm, with counts of 0 while there is no report; None without BatchNorm layers."""
    if statistics == "none":
        return None
    if statistics != "refreshed":
        return {"statistics": statistics}
    return {
        "statistics": "refreshed",
        "estimator": options.bn_estimator,
        "amp": options.amp,
        "batches": report.batches if report else 0,
        "samples": report.samples if report else 0,
        "data": getattr(options.data, "__qualname__", type(options.data).__name__),
    }
