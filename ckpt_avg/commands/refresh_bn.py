"""`refresh_weights`: the path of `average` with a single checkpoint, whose statistics are measured anew."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ckpt_avg.commands.average import average
from ckpt_avg.commands.results import AverageResult
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import UsageError
from ckpt_avg.progress import Progress
from ckpt_avg.runs.discover import discover
from ckpt_avg.text import listing, quote
from ckpt_avg.user_code.batches import ForwardBatch
from ckpt_avg.user_code.evaluate import Evaluate
from ckpt_avg.user_code.model import Batches, Model


def refresh_weights(
    weights: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: Model,
    data: Batches,
    state_key: str | None = None,
    ema: bool = False,
    strip_prefix: str | None = None,
    device: str = "auto",
    dtype: str = "keep",
    forward_batch: ForwardBatch | None = None,
    bn_batches: int | None = None,
    bn_estimator: str = "pooled",
    amp: str = "off",
    evaluate: Evaluate | None = None,
    require: str | Sequence[str] = (),
    sha256: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> AverageResult:
    """Writes weights to a safetensors file, their BatchNorm statistics measured anew and all else as it is.

    A safetensors file's own metadata is kept. For a model in memory there is `refresh_batch_norm`.

    Args:
        weights: one checkpoint of any kind that can be read.
        output, model, data, forward_batch, bn_batches, bn_estimator, amp: as for `average`.
        evaluate, require: measure the weights before and after, as for `average`.
        state_key, ema, strip_prefix, device, dtype, sha256, overwrite, dry_run, ranks, progress: as for `average`.

    Returns:
        What was done.

    Raises:
        CkptAvgError: as `average`; UsageError also where ``weights`` holds several checkpoints.
    """
    found = discover(weights).paths
    if len(found) != 1:
        raise UsageError(
            f"{weights}: expected one checkpoint, got {len(found)}: {listing(quote(path.name) for path in found)}. "
            "Name one of them; ckpt-avg average is for several."
        )
    return average(
        found,
        output,
        state_key=state_key,
        ema=ema,
        strip_prefix=strip_prefix,
        device=device,
        dtype=dtype,
        non_float="last",
        model=model,
        data=data,
        forward_batch=forward_batch,
        bn="refresh",
        bn_batches=bn_batches,
        bn_estimator=bn_estimator,
        amp=amp,
        evaluate=evaluate,
        require=require,
        sha256=sha256,
        overwrite=overwrite,
        dry_run=dry_run,
        ranks=ranks,
        progress=progress,
    )
