"""A model lent to the user's code for a while, and found afterwards as it was."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode; afterwards its modes, its buffers and all random states are as before.

    Random states are those of torch, on the CPU and on the model's CUDA devices, of Python and, where it is in use, of
    numpy. Parameters are not copied: without gradients and optimizer nothing should change them.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    tensors = [*model.parameters(), *(buffer for _, _, buffer, _ in buffers)]
    cuda = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), _python_and_numpy_random():
        try:
            for module, _ in modes:
                # The attribute, not eval(): some models override train(), to keep layers frozen.
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    setattr(module, name, buffer)  # a forward may have put another tensor in its place
                    buffer.copy_(before)


@contextlib.contextmanager
def _python_and_numpy_random() -> Iterator[None]:
    before = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_before = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(before)
        if numpy:
            numpy.random.set_state(numpy_before)
