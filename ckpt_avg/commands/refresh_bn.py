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

    Example:
        >>> import sys
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> sys.path.insert(0, "fixtures/mnist_cnn")
        >>> from train import make_model
        >>> batches = [torch.rand(8, 1, 28, 28) for _ in range(3)]
        >>> weights = "fixtures/mnist_cnn/epoch_20.pt"
        >>> with TemporaryDirectory() as folder:
        ...     result = refresh_weights(weights, f"{folder}/new.safetensors", model=make_model, data=batches)
        >>> result.statistics, result.batch_norm.samples
        ('refreshed', 24)
    """
    return average(request.discover().paths[0], **request.keywords())
