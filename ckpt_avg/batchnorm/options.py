"""The options of the BatchNorm refresh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from ckpt_avg.choices import AMP, BatchNormMode, Estimator
from ckpt_avg.errors import OptionGroup, option

if TYPE_CHECKING:
    from ckpt_avg.user_code.batches import ForwardBatch
    from ckpt_avg.user_code.model import Batches, Model


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RefreshOptions(OptionGroup):
    """Whether and how BatchNorm statistics are recomputed."""

    heading = "BatchNorm"
    model: Model | None = option(
        None,
        "Use the model that this function returns.",
        doc="The model, or a function that returns it, for the refresh and ``evaluate``. A model is copied, not "
        "changed.",
        metavar="MODULE:FACTORY",
        code=True,
        everyday=True,
    )
    data: Batches | None = option(
        None,
        "Refresh over these batches, or over those it returns.",
        doc="The training batches of the refresh: an iterable, or a function that returns one.",
        metavar="MODULE:FACTORY",
        code=True,
        everyday=True,
    )
    forward_batch: ForwardBatch | None = option(
        None,
        doc="Called as ``forward_batch(model, batch)`` if a batch needs more than ``model(batch)``. The command line "
        "uses the function of this name in the module of ``--model``.",
        code=True,
    )
    bn: BatchNormMode = option(
        "auto",
        "Recompute BatchNorm statistics, or average them (keep).",
        doc="``auto`` and ``refresh`` recompute running statistics, ``keep`` averages them like weights. ``auto`` "
        "keeps those of a single checkpoint if there is no ``data``.",
        choices=get_args(BatchNormMode),
        everyday=True,
    )
    bn_batches: int | None = option(None, "Refresh over at most N batches.", metavar="N", least=1)
    bn_estimator: Estimator = option(
        "pooled",
        "Pool all values, or average the batches' statistics.",
        doc="``pooled`` uses all values together, ``batch-mean`` averages the statistics of the batches, as "
        "`torch.optim.swa_utils.update_bn` does.",
        choices=get_args(Estimator),
    )
    amp: AMP = option("off", "Run the refresh in automatic mixed precision.", choices=get_args(AMP))
