"""Measures the input of each BatchNorm layer while batches run through a model, and makes it normalise by the batch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_avg.batchnorm.moments import moments_of
from ckpt_avg.batchnorm.pools import Measurements, refuse
from ckpt_avg.text import quote
from ckpt_avg.user_code.isolation import undisturbed


@contextlib.contextmanager
def measuring(model: torch.nn.Module, layers: Mapping[str, _BatchNorm], measurements: Measurements) -> Iterator[None]:
    """Makes only these layers normalise by the batch, and measures their inputs. Everything is restored in the end."""
    # Code that torch.compile has compiled before would run without the hooks.
    compiler = sys.modules.get("torch._dynamo")
    eager = torch.compiler.set_stance("force_eager") if compiler else contextlib.nullcontext()
    with undisturbed(model), eager, contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(_hook(name, measurements), with_kwargs=True))
            layer.training = not _can_use_statistics(layer)
        yield


def _can_use_statistics(layer: _BatchNorm) -> bool:
    """Whether a layer may run in evaluation mode with the batch's statistics in its buffers, instead of in train mode.

    So it need not measure the batch again. torch's own layers in evaluation mode compute
    (x − running_mean) / √(running_var + ε); with the batch's mean and biased variance that equals train mode. The
    user's own forward may do anything, and a buffer of half precision would round the statistics.
    """
    own = "forward" not in vars(layer) and type(layer).forward in (_BatchNorm.forward, torch.nn.SyncBatchNorm.forward)
    wide = (torch.float32, torch.float64)
    return own and all(
        buffer is not None and buffer.dtype in wide for buffer in (layer.running_mean, layer.running_var)
    )


def _hook(name: str, measurements: Measurements) -> Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def measure(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        values = next(iter((*arguments, *keywords.values()))).detach()
        mean, variance = module.running_mean, module.running_var
        if values.dim() < 2 or values.numel() <= values.shape[1]:
            unusable(
                values,
                "more than one value per channel",
                "Use larger batches, or drop_last=True if only the last batch is so small",
            )
        channels = mean.numel() if isinstance(mean, torch.Tensor) else values.shape[1]
        if values.shape[1] != channels:
            unusable(values, f"{channels:,} channels in dimension 1", "Other layouts aren't supported")
        moments = moments_of(values)
        measurements.add(name, moments)
        if not module.training and isinstance(mean, torch.Tensor) and isinstance(variance, torch.Tensor):
            mean.copy_(moments.mean)
            variance.copy_(moments.biased_variance)

    def unusable(values: torch.Tensor, expected: str, advice: str) -> NoReturn:
        got = f"got an input of shape {list(values.shape)}"
        refuse(f"layer {quote(name)}, batch {measurements.batch}: expected {expected}, {got}", advice)

    return measure
