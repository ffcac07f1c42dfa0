"""The user's batches, of any kind: fetches them, moves them to the device, runs the model on them, counts samples."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from ckpt_avg.errors import UserCodeError
from ckpt_avg.text import listing, quote, type_of
from ckpt_avg.user_code.load import user_errors
from ckpt_avg.wording import either

ForwardBatch = Callable[[torch.nn.Module, Any], object]

_LEAST_PINNED = 64 * 1024  # bytes


def _accepted() -> str:
    where = either(", in the module of --model,", "")
    return (
        "Accepted batches: a tensor, a tuple or list (its first element is the input), a mapping (passed as keywords), "
        f"or anything that a function forward_batch(model, batch){where} takes."
    )


def expected_batches(batches: Iterable[Any], at_most: int | None) -> int | None:
    """Returns how many batches to expect, if the iterable tells. Only the progress display uses it."""
    try:
        hint = operator.length_hint(batches, -1)
    except Exception:  # an iterable may raise anything here, and nothing depends on it
        hint = -1
    if hint < 0:
        return at_most
    return hint if at_most is None else min(hint, at_most)


def fetch(batches: Iterable[Any], at_most: int | None) -> Iterator[Any]:
    """Yields the batches. If the loader raises, the error names the batch."""
    number = 1
    with user_errors(f"the dataloader raised at batch {number}:"):
        iterator = iter(batches)
    while at_most is None or number <= at_most:
        with user_errors(f"the dataloader raised at batch {number}:"):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch
        number += 1


def run_batch(model: torch.nn.Module, batch: Any, forward_batch: ForwardBatch | None, number: int) -> None:
    """Calls the model with a batch, in the way that suits its kind. If the model raises, the error names the batch."""
    with user_errors(f"the model raised at batch {number} ({_shape(batch)}):", call=_other_call(batch)):
        if forward_batch is not None:
            forward_batch(model, batch)
        elif isinstance(batch, torch.Tensor):
            model(batch)
        elif isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, (tuple, list)) and batch:
            model(batch[0])
        else:
            raise UserCodeError(f"BatchNorm refresh: batch {number}: got {_shape(batch)}. {_accepted()}")


def _other_call(batch: Any) -> str:
    """Says what to do if the model does not take a batch as it is."""
    if not isinstance(batch, Mapping):
        return _accepted()
    first = next((name for name, value in batch.items() if isinstance(value, torch.Tensor)), "image")
    return (
        f"The mapping was passed as keywords. Add a function to {either('the module of --model', 'the call')}: def "
        f"forward_batch(model, batch): model(batch[{first!r}])"
    )


def _shape(batch: Any) -> str:
    if isinstance(batch, torch.Tensor):
        return f"a tensor of shape {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a mapping with the keys {listing(map(quote, batch))}"
    if isinstance(batch, (tuple, list)) and batch:
        return f"{type_of(batch)} of {len(batch)}, the first {_shape(batch[0])}"
    return type_of(batch)


def to_device(batch: Any, device: torch.device | str | None) -> Any:
    """Returns the batch with every tensor in it on the device.

    Handles tensors, and tuples, lists and mappings of them. Other objects must have a method ``to``, as the batches of
    Hugging Face's tokenizers and of graph libraries have; otherwise they are not moved.
    """
    if device is None or str(device) == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return _pinned(batch).to(device, non_blocking=True)
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, MutableMapping):
        moved = copy.copy(batch)  # keeps the class, whose attributes forward_batch may use
        for key, value in batch.items():
            moved[key] = to_device(value, device)
        return moved
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(item, device) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(item, device) for item in batch)
    return batch


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor in page-locked memory, so that the copy to CUDA overlaps with computation, unless it is small.

    torch keeps such memory for the next batch.
    """
    is_plain = tensor.device.type == "cpu" and tensor.layout is torch.strided
    is_worth_it = is_plain and tensor.nbytes >= _LEAST_PINNED and torch.cuda.is_available()
    return tensor.pin_memory() if is_worth_it and not tensor.is_pinned() else tensor


def count_samples(batch: Any) -> int:
    """Returns the length of the first tensor of a batch: by convention, the number of samples."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else 0
    items: Iterable[Any] = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    )
    return next(filter(None, map(count_samples, items)), 0)
