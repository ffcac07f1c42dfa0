"""`refresh_weights`: `average` of a single checkpoint, whose BatchNorm statistics are recomputed."""

from __future__ import annotations

from ckpt_avg.commands.average import average
from ckpt_avg.commands.publish import AverageResult
from ckpt_avg.commands.requests import RefreshRequest, takes
from ckpt_avg.errors import UsageError
from ckpt_avg.runs.discover import discover
from ckpt_avg.text import listing, quote


@takes(RefreshRequest)
def refresh_weights(request: RefreshRequest) -> AverageResult:
    """Writes weights to a safetensors file, with recomputed BatchNorm statistics and everything else as it is.

    A safetensors file's own metadata is kept. For a model in memory there is `refresh_batch_norm`.

    Args:
        {arguments}

    Returns:
        What was done.

    Raises:
        CkptAvgError: as `average`; UsageError also if ``weights`` holds several checkpoints.
    """
    found = discover(request.weights).paths
    if len(found) != 1:
        raise UsageError(
            f"{request.weights}: expected one checkpoint, got {len(found)}: "
            f"{listing(quote(path.name) for path in found)}. Name one of them; ckpt-avg average is for several."
        )
    return average(found[0], **request.keywords())
