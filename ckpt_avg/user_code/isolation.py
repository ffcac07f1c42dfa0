"""A model lent to the user's code for a while, and found afterwards as it was."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

_SEED = 0


@dataclass(frozen=True, slots=True)
class RandomStates:
    """The states of the global random generators: torch's, Python's and, where it is in use, numpy's."""

    torch_cpu: torch.Tensor
    torch_cuda: dict[int, torch.Tensor]
    python: tuple[Any, ...]
    numpy: Any

    @classmethod
    def now(cls, cuda: tuple[int, ...] = ()) -> RandomStates:
        """Returns the present states; of CUDA those of the devices with these numbers."""
        numpy = sys.modules.get("numpy")
        return cls(
            torch.random.get_rng_state(),
            {number: torch.cuda.get_rng_state(number) for number in cuda},
            random.getstate(),
            numpy.random.get_state() if numpy else None,
        )

    def restore(self) -> None:
        """Sets the generators back."""
        torch.random.set_rng_state(self.torch_cpu)
        for number, state in self.torch_cuda.items():
            torch.cuda.set_rng_state(state, number)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


@contextlib.contextmanager
def seeded(device: torch.device | None = None) -> Iterator[None]:
    """Gives the user's code random states that are always the same; afterwards they are as before.

    A loader that shuffles then does so alike in every run. A generator of its own is not touched.
    """
    cuda = (torch.cuda.current_device() if device.index is None else device.index,) if _is_cuda(device) else ()
    states = RandomStates.now(cuda)
    try:
        torch.default_generator.manual_seed(_SEED)
        for number in cuda:
            with torch.cuda.device(number):
                torch.cuda.manual_seed(_SEED)
        random.seed(_SEED)
        if states.numpy is not None:
            sys.modules["numpy"].random.seed(_SEED)
        yield
    finally:
        states.restore()


def _is_cuda(device: torch.device | None) -> TypeGuard[torch.device]:
    return device is not None and device.type == "cuda"


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode; afterwards its modes, its buffers and all random states are as before.

    Random states are those of torch, on the CPU and on the model's CUDA devices, of Python and, where it is in use, of
    numpy. The values of parameters are not copied: without gradients and optimizer nothing should change them.
    """
    modes = [(module, module.training) for module in model.modules()]
    named = [
        (module, dict(module._buffers), dict(module._parameters), set(module._non_persistent_buffers_set))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # whose tensors cannot be exchanged for others
    ]
    contents = [(buffer, buffer.clone()) for buffer in model.buffers() if not _is_expanded(buffer)]
    tensors = [*model.parameters(), *model.buffers()]
    cuda = tuple(sorted({tensor.get_device() for tensor in tensors if tensor.is_cuda}))
    states = RandomStates.now(cuda)
    try:
        for module, _ in modes:
            # The attribute, not eval(): some models override train(), to keep layers frozen.
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, buffers, parameters, transient in named:
            # A forward may have put another tensor in the place of a buffer, or registered one.
            module._buffers.clear()
            module._buffers.update(buffers)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._non_persistent_buffers_set = transient
        with torch.no_grad():
            for buffer, values in contents:
                if buffer.shape == values.shape:
                    buffer.copy_(values)
                else:
                    buffer.data = values
        states.restore()


def _is_expanded(tensor: torch.Tensor) -> bool:
    """Whether several elements are one in memory; torch refuses to write to such tensors, so they stay as they are."""
    return any(step == 0 and extent > 1 for step, extent in zip(tensor.stride(), tensor.shape, strict=True))
