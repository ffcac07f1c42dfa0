"""`refresh_weights`: `average` of a single checkpoint, whose BatchNorm statistics are recomputed."""

from __future__ import annotations

from ckpt_avg.commands.average import average
from ckpt_avg.commands.draft import AverageResult
from ckpt_avg.commands.requests import RefreshRequest, takes
from ckpt_avg.errors import UsageError
from ckpt_avg.runs.discover import discover
from ckpt_avg.text import plural


@takes(RefreshRequest)
def refresh_weights(request: RefreshRequest) -> AverageResult:
    """Writes weights to a safetensors file, with recomputed BatchNorm statistics and everything else as it is.

    A safetensors file's own metadata is kept. For a model in memory there is `refresh_batch_norm`.

    Args:
        The fields of `RefreshRequest`.

    Returns:
        What was done.

    Raises:
        CkptAvgError: as `average`; UsageError also if ``weights`` holds several checkpoints.
    """
    found = discover(request.weights).paths
    if len(found) != 1:
        raise UsageError(
            f"{request.weights}: contains {plural(len(found), 'checkpoint')}. Name one, for example {found[-1]}, "
            "or use ckpt-avg average."
        )
    return average(found[0], **request.keywords())
