"""Runs the user's code so that the model and the random states are afterwards as they were before."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator

import torch


@contextlib.contextmanager
def seeded(device: torch.device | None = None, seed: int = 0) -> Iterator[None]:
    """Sets the random states to the same seed each time, then restores them. A generator object is not touched.

    So a loader that shuffles gives the same order in every run. Of CUDA only the state of ``device`` is set.
    """
    cuda = []
    if device is not None and device.type == "cuda":
        cuda.append(torch.cuda.current_device() if device.index is None else device.index)
    with _random_states_restored(cuda):
        torch.default_generator.manual_seed(seed)
        for number in cuda:
            with torch.cuda.device(number):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed)
        yield


@contextlib.contextmanager
def _random_states_restored(cuda: Iterable[int]) -> Iterator[None]:
    """Restores the random states of torch, of CUDA devices with these numbers, of Python, and of numpy if loaded."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    torch_state = torch.get_rng_state()
    cuda_states = {number: torch.cuda.get_rng_state(number) for number in cuda}

    def restore() -> None:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        for number, state in cuda_states.items():
            torch.cuda.set_rng_state(state, number)

    with _in_the_end(restore):
        yield


@contextlib.contextmanager
def _in_the_end(restore: Callable[[], None]) -> Iterator[None]:
    """Calls ``restore``. After an error it may fail, too, as everything on CUDA then may: the first is raised."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):
            restore()
        raise
    restore()


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode, then restores its modes, its buffers and all random states.

    Values of parameters are not copied: without gradients and an optimizer nothing should change them.
    """
    modes = [(module, module.training) for module in model.modules()]
    named = [
        (module, dict(module._buffers), dict(module._parameters), set(module._non_persistent_buffers_set))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # its tensors cannot be replaced
    ]
    contents = [(buffer, buffer.clone()) for buffer in model.buffers() if not _is_expanded(buffer)]
    tensors = [*model.parameters(), *model.buffers()]

    def restore() -> None:
        for module, training in modes:
            module.training = training
        for module, buffers, parameters, transient in named:
            # A forward may have replaced a buffer by another tensor, or registered one.
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

    cuda = sorted({tensor.get_device() for tensor in tensors if tensor.is_cuda})
    with _random_states_restored(cuda), _in_the_end(restore):
        for module, _ in modes:
            # The attribute, not eval(): some models override train(), to keep layers frozen.
            module.training = False
        yield


def _is_expanded(tensor: torch.Tensor) -> bool:
    """Whether several elements share memory. torch refuses to write to such tensors, so they cannot change."""
    return any(step == 0 and extent > 1 for step, extent in zip(tensor.stride(), tensor.shape, strict=True))
