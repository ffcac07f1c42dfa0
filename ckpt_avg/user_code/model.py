"""The user's model and data: builds them, checks that the model takes the tensors, and loads weights into it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ckpt_avg.checkpoint.spec import Checkpoint, DType
from ckpt_avg.checkpoint.tensor_reads import read_ranges, torch_dtype
from ckpt_avg.errors import IncompatibleError, UserCodeError
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.tensor_names import without_wrappers
from ckpt_avg.text import listing, quote, type_of
from ckpt_avg.user_code.isolation import seeded
from ckpt_avg.user_code.load import returned, user_errors
from ckpt_avg.wording import setting

_WRAPPERS = ("OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")

Model = torch.nn.Module | Callable[[], torch.nn.Module]
Batches = Iterable[Any] | Callable[[], Iterable[Any]]
_StateDict = Mapping[str, Any]  # names to tensors and extra state


def build_model(
    model: Model, tensors: Mapping[str, tuple[DType, tuple[int, ...]]], *, stripped: str | None = None
) -> torch.nn.Module:
    """Builds the model, or copies it, and checks that it takes tensors of these dtypes and shapes (`load_weights`).

    ``stripped`` is the prefix that the user had stripped from the names. Raises UserCodeError if the factory raised, or
    returned something else.
    """
    if not callable(model):
        raise UserCodeError(
            f"the model: expected a torch.nn.Module or a function that returns one, got {type_of(model)}. "
            "Give the class or the function itself."
        )
    with user_errors("the model factory raised", call="Name one that needs no arguments."):
        built = copy.deepcopy(model) if isinstance(model, torch.nn.Module) else model()
    if not isinstance(built, torch.nn.Module):
        raise UserCodeError(f"the model factory: expected it to return a torch.nn.Module, got {returned(built)}")
    named = (*built.named_parameters(), *built.named_buffers())
    if without_values := [name for name, tensor in named if tensor.is_meta]:
        raise UserCodeError(
            f"the model {type(built).__name__}: tensors on the device meta have no memory for the weights: "
            f"{listing(map(quote, without_values))}. Make it without torch.device('meta') or init_empty_weights()."
        )
    # One expanded zero per tensor shows whether names and shapes fit, including the model's own hooks.
    load_weights(
        built,
        {name: torch.zeros((), dtype=torch_dtype(dtype)).expand(shape) for name, (dtype, shape) in tensors.items()},
        stripped=stripped,
    )
    return built


def batch_norm_modules(model: torch.nn.Module) -> dict[str, _BatchNorm]:
    """Returns the BatchNorm layers that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


def load_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], *, stripped: str | None = None) -> None:
    """Loads a state dict strictly, except for the names of wrappers (`matching_names`).

    Raises IncompatibleError with torch's list of names and shapes that differ.
    """
    with user_errors("loading the weights into the model raised"):
        try:
            names = matching_names(model, tensors)
            renamed = {ours: theirs for theirs, ours in names.items()}
            model.load_state_dict({renamed.get(name, name): each for name, each in tensors.items()}, strict=True)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            lines = [line.strip() for line in str(error).splitlines()[1:]]
            raise IncompatibleError(
                f"the checkpoints don't fit the model {type(model).__name__}:\n  "
                + listing((line if len(line) < 2000 else line[:2000] + " …" for line in lines), separator="\n  ")
                + f"\n{_advice_on_names(tensors, model.state_dict(), stripped)}",
                lines=True,
            ) from error


def _advice_on_names(given: _StateDict, expected: _StateDict, stripped: str | None) -> str:
    """Says what to do about a checkpoint's names that are not those that the model expects."""
    if prefix := _common_prefix(given, expected):
        whole = ".".join(each.strip(".") for each in (stripped, prefix) if each)
        others = sorted(given.keys() - {prefix + name for name in expected})
        if not others:
            return f"All names begin with {quote(prefix)}. Use {setting('--strip-prefix', whole)}"
        return (
            f"The model's names are under {quote(prefix)}, next to {listing(map(quote, others))}. Let --model return "
            "the module that contains both, for example the LightningModule."
        )
    prefix = _common_prefix(expected, given)
    if prefix and len(given) == len(expected):
        return (
            f"All names of the model begin with {quote(prefix)}. Let --model return the module under that name, as "
            f"Lightning's model.{prefix.removesuffix('.')} is."
        )
    return "Use the --model that was trained, or choose other weights with --state-key."


def _common_prefix(longer: _StateDict, shorter: _StateDict) -> str:
    """Returns the prefix, with its dot, with which the first has all names of the second, and a shape of them; or "".

    Without a common shape, a small model of other weights would be found in any part with a weight and a bias.
    """
    known = max(shorter, key=len, default="")
    for prefix in sorted({name.removesuffix(known) for name in longer if name.endswith(f".{known}")}):
        names = {name: prefix + name for name in shorter}
        if longer.keys() >= set(names.values()) and any(
            _shape(longer[ours]) == _shape(shorter[name]) for name, ours in names.items()
        ):
            return prefix
    return ""


def _shape(value: object) -> object:
    """Returns a tensor's shape; None for extra state, and for a lazy tensor, which has none yet."""
    return value.shape if isinstance(value, torch.Tensor) and not is_lazy(value) else None


def matching_names(model: torch.nn.Module, names: Collection[str]) -> dict[str, str]:
    """Returns for each name in the model's state dict the tensor that it belongs to, if there is one.

    Names may differ by wrappers, such as ``_orig_mod.`` of torch.compile or ``module.`` of DataParallel, if that leaves
    one tensor for each name. The model itself may have a part called ``module``.
    """
    expected = list(model.state_dict())
    same = {name: name for name in expected if name in names}
    if len(same) == len(expected) == len(names):
        return same
    ours = {without_wrappers(name): name for name in names}
    theirs = {without_wrappers(name): name for name in expected}
    if len(ours) < len(names) or len(theirs) < len(expected):
        return same
    return {theirs[name]: ours[name] for name in theirs if name in ours}


def notice_other_names(model: torch.nn.Module, names: Collection[str], notice: Callable[[str], None]) -> None:
    """Says that the names lack the prefix of a part of the model that is called as a wrapper's, such as ``module``."""
    prefixes = {theirs.removesuffix(ours) for theirs, ours in matching_names(model, names).items()}
    if len(prefixes) == 1 and any(prefixes) and type(model).__name__ not in _WRAPPERS:
        notice(
            f"all names of the model begin with {quote(*prefixes)}, those of the output don't. Add --strip-prefix '' "
            "to keep it, since it is a part of the model"
        )


def weights_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Returns a checkpoint's tensors, read into memory."""
    return {
        name: read_ranges(checkpoint, [(tensor, 0, tensor.numel)])[0].view(tensor.shape)
        for name, tensor in checkpoint.spec.tensors.items()
    }


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a file, as `weights_of` does, under the names in it."""
    with open_checkpoint(path, strip_prefix="") as checkpoint:
        return weights_of(checkpoint)


def move_model(model: torch.nn.Module, device: torch.device) -> None:
    """Moves the model. Raises UserCodeError if that fails."""
    with user_errors(f"moving the model to {device} raised"):
        model.to(device)


class Passes:
    """The user's batches, for one or several passes over the data.

    Args:
        data: an iterable of batches, or a factory of one. The factory is called at once, and again for each later
            pass, with the same random states each time, so that every pass has the same batches. A
            LightningDataModule gives its training batches.

    Raises:
        UserCodeError: the factory raised, or returned something else.
    """

    def __init__(self, data: Batches) -> None:
        self._factory = data if callable(data) else None
        self._batches: Iterable[Any] = self._call(data) if callable(data) else data
        if _is_data_module(self._batches):
            self._factory = self._set_up(self._batches)
            self._batches = self._call(self._factory)
        self._is_fresh = True
        if not isinstance(self._batches, Iterable):
            raise UserCodeError(
                f"the data{' factory: expected it to return' if self._factory else ': expected'} an iterable of "
                f"batches, got {returned(self._batches)}{_of_dataset(self._batches)}"
            )

    @property
    def is_single(self) -> bool:
        """Whether only one pass is possible: an iterator without a factory."""
        return self._factory is None and isinstance(self._batches, Iterator)

    def next_pass(self, seed: int = 0) -> Iterable[Any]:
        """Returns the batches for the next pass; with another seed they may differ."""
        if self._factory is not None and (seed or not self._is_fresh):
            self._batches = self._call(self._factory, seed)
        self._is_fresh = False
        return self._batches

    @staticmethod
    def _call(factory: Callable[[], Iterable[Any]], seed: int = 0) -> Iterable[Any]:
        with seeded(seed=seed), user_errors("the data factory raised", call="Name one that needs no arguments."):
            return factory()

    @staticmethod
    def _set_up(module: Any) -> Callable[[], Iterable[Any]]:
        """Prepares a LightningDataModule as its trainer does; returns its function that makes the training batches."""
        with seeded(), user_errors("the LightningDataModule raised"):
            module.prepare_data()
            module.setup("fit")
        factory: Callable[[], Iterable[Any]] = module.train_dataloader
        return factory


def _of_dataset(value: object) -> str:
    """Returns what to do with a torch Dataset, which has samples, not batches."""
    return " Give a DataLoader of it." if isinstance(value, torch.utils.data.Dataset) else ""


def _is_data_module(value: Any) -> bool:
    """Whether it is a LightningDataModule, of whichever package."""
    return not isinstance(value, Iterable) and all(
        callable(getattr(value, name, None)) for name in ("prepare_data", "setup", "train_dataloader")
    )
