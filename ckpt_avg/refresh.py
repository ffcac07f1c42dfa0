"""The BatchNorm refresh as a step of averaging.

The model is loaded from the unpublished output, so it holds the very weights that users will load, and the measured
statistics replace the buffers in that file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckpt_avg.batches import ForwardBatch
from ckpt_avg.batchnorm import BatchNormReport, batch_norm_modules, refresh_batch_norm, rounded_statistic
from ckpt_avg.elements import read_ranges, torch_dtype
from ckpt_avg.errors import IncompatibleError, UserCodeError
from ckpt_avg.messages import listing, quote
from ckpt_avg.plan import Plan
from ckpt_avg.readers import open_checkpoint
from ckpt_avg.user_code import blaming

Model = torch.nn.Module | Callable[[], torch.nn.Module]
Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class PreparedRefresh:
    """A model that takes the checkpoints' tensors, and the batches to run through it.

    Attributes:
        model: the model.
        batches: the batches.
        buffers: BatchNorm layer → its buffer (``running_mean``, …) → the output tensors that hold it. A module that
            is reachable under several names has several.
    """

    model: torch.nn.Module
    batches: Iterable[Any]
    buffers: Mapping[str, Mapping[str, tuple[str, ...]]]


def prepare_refresh(model: Model, data: Batches, plan: Plan) -> PreparedRefresh:
    """Builds the model and the dataloader, and checks that the model takes the tensors of the plan.

    All that can fail before hours of averaging fails here.

    Raises:
        UserCodeError: a factory raised, or returned something else.
        IncompatibleError: the model's names or shapes are not the checkpoints'.
    """
    built = _call(lambda: copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model(), "model")
    if not isinstance(built, torch.nn.Module):
        raise UserCodeError(f"the model factory: expected it to return a torch.nn.Module, got {type(built).__name__}.")
    batches = _call(data, "data") if callable(data) else data
    if not isinstance(batches, Iterable):
        raise UserCodeError(
            f"the data factory: expected it to return an iterable of batches, got {type(batches).__name__}."
        )
    # One zero per tensor, expanded: it tells whether names and shapes fit, hooks of the model included.
    _load(
        built,
        {tensor.name: torch.zeros((), dtype=torch_dtype(tensor.dtype)).expand(tensor.shape) for tensor in plan.tensors},
    )
    names: dict[int, list[str]] = {}
    for name, value in built.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    planned = plan.by_name()
    buffers: dict[str, dict[str, tuple[str, ...]]] = {}
    for layer, module in batch_norm_modules(built).items():
        buffers[layer] = {
            buffer: tuple(name for name in names.get(id(value), ()) if name in planned)
            for buffer, value in module.named_buffers(recurse=False)
        }
        if not all(buffers[layer].get(buffer) for buffer in ("running_mean", "running_var")):
            raise UserCodeError(
                f"BatchNorm refresh: layer {quote(layer)}: expected its running statistics among the checkpoints' "
                "tensors, got none. Save the checkpoints from model.state_dict()."
            )
    return PreparedRefresh(built, batches, buffers)


def frozen_layers(prepared: PreparedRefresh, frozen: Collection[str]) -> tuple[str, ...]:
    """Returns the model's layers whose statistics lie in output tensors named in ``frozen``."""
    return tuple(
        layer for layer, buffers in prepared.buffers.items() if all(name in frozen for name in buffers["running_mean"])
    )


def refresh_output(
    prepared: PreparedRefresh,
    plan: Plan,
    unpublished: Path,
    write: Callable[[memoryview, int], None],
    *,
    frozen: Collection[str],
    device: torch.device,
    max_batches: int | None,
    forward_batch: ForwardBatch | None,
    progress: Callable[[int, int], None],
) -> BatchNormReport:
    """Loads the averaged weights, measures, and writes the statistics over those in the file.

    Args:
        prepared: the model and the batches.
        plan: the output's tensors.
        unpublished: where the output can be read.
        write: takes bytes and their offset in the data section.
        frozen: layers to leave as they are.
        device: where the model runs.
        max_batches, forward_batch, progress: as for `refresh_batch_norm`.

    Raises:
        UserCodeError: the loader or the model failed, or the refresh could not be done.
    """
    model = prepared.model
    _load_weights(model, unpublished)
    model.to(device)
    report = refresh_batch_norm(
        model,
        prepared.batches,
        max_batches=max_batches,
        frozen=frozen,
        device=device,
        forward_batch=forward_batch,
        progress=progress,
    )
    planned = plan.by_name()
    for layer, statistics in report.statistics.items():
        values = {
            "running_mean": statistics.mean,
            "running_var": statistics.variance,
            "num_batches_tracked": torch.tensor(report.batches),
        }
        for buffer, measured in values.items():
            for name in prepared.buffers[layer].get(buffer, ()):
                dtype = torch_dtype(planned[name].dtype)
                exact = buffer == "num_batches_tracked"
                value = measured.to(dtype) if exact else rounded_statistic(layer, buffer, measured.cpu(), dtype)
                write(memoryview(bytes(value.reshape(-1).view(torch.uint8).tolist())), planned[name].offset)
    return report


def _call(factory: Callable[[], Any], what: str) -> Any:
    with blaming(f"the {what} factory raised"):
        return factory()


def _load(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise IncompatibleError(
            f"the checkpoints don't fit the model {type(model).__name__}:\n  "
            + listing((line if len(line) < 2000 else line[:2000] + " …" for line in lines), separator="\n  ")
            + "\nGive the --model that was trained, or choose the weights with --state-key."
        ) from error


def _load_weights(model: torch.nn.Module, path: Path) -> None:
    with open_checkpoint(path) as output:
        tensors = {
            name: read_ranges(output, [(tensor, 0, tensor.numel)])[0].view(tensor.shape)
            for name, tensor in output.spec.tensors.items()
        }
        _load(model, tensors)
