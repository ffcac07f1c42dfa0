"""`refresh_weights`: `average` of a single checkpoint, whose BatchNorm statistics are recomputed."""

from __future__ import annotations

from ckpt_avg.commands.average import average
from ckpt_avg.commands.draft import AverageResult
from ckpt_avg.commands.requests import RefreshRequest, takes


@takes(RefreshRequest)
def refresh_weights(request: RefreshRequest) -> AverageResult:
    """Writes weights to a safetensors file, with recomputed BatchNorm statistics and everything else as it is.

    A safetensors file's own metadata is kept. For a model in memory there is `refresh_batch_norm`.

    Args:
        The fields of `RefreshRequest`.

    Returns:
        What was done.

    Raises:
        CkptAvgError: as `average`; UsageError also if ``weights`` contains several checkpoints.
    """
    return average(request.discover().paths[0], **request.keywords())
