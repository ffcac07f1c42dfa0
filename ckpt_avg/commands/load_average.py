"""`load_average`: the tensors of an average in memory, the same bits as in the file that `average` writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt_avg.commands.context import Context, reading
from ckpt_avg.commands.evaluations import Meter
from ckpt_avg.commands.prepare import prepare
from ckpt_avg.commands.requests import LoadRequest, takes
from ckpt_avg.mean.memory_output import MemoryOutput, write_tensors
from ckpt_avg.mean.stream import Mean, write_means
from ckpt_avg.mean.weighting import summed
from ckpt_avg.progress import Phase

if TYPE_CHECKING:
    import torch


@takes(LoadRequest)
def load_average(request: LoadRequest) -> dict[str, torch.Tensor]:
    """Returns the mean of checkpoints as a state dict in memory. Nothing is written.

    The tensors have the bits that `average` writes with the same options, and ``safetensors.torch.load_file`` reads.
    They are on the CPU. Memory contains them once, and the blocks that are being averaged (``memory``).

    Args:
        The fields of `LoadRequest`.

    Returns:
        The tensors by name, for ``model.load_state_dict``. They share one piece of memory, which is freed with the last
        of them.

    Raises:
        CkptAvgError: as `average`.

    Example:
        >>> import sys
        >>> sys.path.insert(0, "fixtures/mnist_cnn")
        >>> from train import make_model
        >>> model = make_model()
        >>> model.load_state_dict(load_average("fixtures/mnist_cnn", last=8, bn="keep"))
        <All keys matched successfully>
    """
    with Context(progress=request.callbacks) as context:
        context.phase(Phase("opening checkpoints"))
        request, prepared = prepare(request.discover(), request, context)
        plan = prepared.plan
        output = MemoryOutput(plan)
        indices, unequal = summed(prepared.selected.sum_order, prepared.weights)
        context.phases_left = 1 + bool(plan.spectral_norms) + (prepared.refresh is not None)
        context.phase(reading("averaging", len(prepared.checkpoints), plan.source_nbytes))
        write_means(
            prepared.checkpoints,
            plan,
            [Mean(indices, output.write, unequal)],
            device=prepared.mean_device,
            threads=prepared.threads,
            memory=request.memory,
            readers=request.readers,
            allow_nonfinite=request.allow_nonfinite,
            progress=context.progress.advance,
        )
        if plan.spectral_norms:
            from ckpt_avg.mean.spectral_norm import leading_vectors

            context.phase(Phase("computing spectral norm"))
            write_tensors(leading_vectors(plan, prepared.last, output.tensors(), context.notice), plan, output.write)
        if prepared.refresh is not None:
            context.phase(Phase("refreshing BatchNorm"))
            statistics = Meter(request, prepared, context).refresh(output.tensors(), prepared.frozen)[1]
            write_tensors(statistics, plan, output.write)
        return output.tensors()
