"""The user's model: built, checked against the tensors to be, and loaded with weights from anywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from ckpt_avg.checkpoint.spec import Checkpoint, DType
from ckpt_avg.checkpoint.tensor_reads import read_ranges, torch_dtype
from ckpt_avg.errors import IncompatibleError, UserCodeError
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.text import listing
from ckpt_avg.user_code.isolation import seeded
from ckpt_avg.user_code.load import blaming

Model = torch.nn.Module | Callable[[], torch.nn.Module]
Batches = Iterable[Any] | Callable[[], Iterable[Any]]


def build_model(model: Model, tensors: Mapping[str, tuple[DType, tuple[int, ...]]]) -> torch.nn.Module:
    """Builds the model, or copies the one that was passed in, and checks that it takes these tensors.

    Args:
        model: the user's.
        tensors: the dtype and shape of each tensor that will be loaded.

    Raises:
        UserCodeError: the factory raised, or returned something else.
        IncompatibleError: the model's names or shapes are not the checkpoints'.
    """
    if not callable(model):
        raise UserCodeError(
            f"the model: expected a torch.nn.Module or a function that returns one, got a {type(model).__name__}."
        )
    with blaming("the model factory raised"):
        built = copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model()
    if not isinstance(built, torch.nn.Module):
        raise UserCodeError(f"the model factory: expected it to return a torch.nn.Module, got {type(built).__name__}.")
    # One zero per tensor, expanded: it tells whether names and shapes fit, hooks of the model included.
    load_weights(
        built,
        {name: torch.zeros((), dtype=torch_dtype(dtype)).expand(shape) for name, (dtype, shape) in tensors.items()},
    )
    return built


def batch_norm_modules(model: torch.nn.Module) -> dict[str, _BatchNorm]:
    """Returns the BatchNorm layers that keep running statistics, by their name in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


def load_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Loads a state dict, strictly.

    Raises:
        IncompatibleError: names or shapes differ; the message has torch's list of them.
        UserCodeError: the model's own code failed.
    """
    with blaming("loading the weights into the model raised"):
        try:
            model.load_state_dict(tensors, strict=True)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            lines = [line.strip() for line in str(error).splitlines()[1:]]
            raise IncompatibleError(
                f"the checkpoints don't fit the model {type(model).__name__}:\n  "
                + listing((line if len(line) < 2000 else line[:2000] + " …" for line in lines), separator="\n  ")
                + "\nGive the --model that was trained, or choose the weights with --state-key.",
                lines=True,
            ) from error


def weights_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Returns a checkpoint's tensors, where they lie: views of the mapped file, not to be written to."""
    return {
        name: read_ranges(checkpoint, [(tensor, 0, tensor.numel)])[0].view(tensor.shape)
        for name, tensor in checkpoint.spec.tensors.items()
    }


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file, where they lie."""
    with open_checkpoint(path) as checkpoint:
        return weights_of(checkpoint)


def place(model: torch.nn.Module, device: torch.device) -> None:
    """Moves the model.

    Raises:
        UserCodeError: it cannot be moved; one on the device ``meta`` has no weights.
    """
    with blaming(f"moving the model to {device} raised"):
        model.to(device)


class Passes:
    """The user's batches, for one pass after another.

    Args:
        data: an iterable of batches, or a factory of one. The factory is called at once, and again for each later pass,
            each time from the same random states, so that every pass sees the same.

    Raises:
        UserCodeError: the factory raised, or returned something else.
    """

    def __init__(self, data: Batches) -> None:
        self._factory = data if callable(data) else None
        self._batches: Iterable[Any] = self._call(data) if callable(data) else data
        self._is_fresh = True
        if not isinstance(self._batches, Iterable):
            raise UserCodeError(
                f"the data factory: expected it to return an iterable of batches, got {type(self._batches).__name__}."
            )

    @property
    def is_single(self) -> bool:
        """Whether there is one pass only: an iterator without a factory."""
        return self._factory is None and isinstance(self._batches, Iterator)

    def next_pass(self) -> Iterable[Any]:
        """Returns the batches for the next pass."""
        if not self._is_fresh and self._factory is not None:
            self._batches = self._call(self._factory)
        self._is_fresh = False
        return self._batches

    @staticmethod
    def _call(factory: Callable[[], Iterable[Any]]) -> Iterable[Any]:
        with seeded(), blaming("the data factory raised"):
            return factory()
