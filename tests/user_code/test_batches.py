"""The user's batches, of any kind: what reaches the model, and which are refused."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections import UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batchnorm.oracles import assert_measured, randn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from user_code.everything import changed, snapshot

from ckpt_avg import UserCodeError, refresh_batch_norm
from ckpt_avg.text import type_of

Pair = namedtuple("Pair", ["images", "labels"])
SAMPLES = randn(10, 3) + 2
LABELS = torch.arange(10)


class Named(nn.Module):
    """Takes its input by position or by keyword, and a second argument that it does not need."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.norm(images)


def failure_of(batches: Any, **options: Any) -> str:
    model = Named()
    before = snapshot(model)
    with pytest.raises(UserCodeError) as caught:
        refresh_batch_norm(model, batches, **options)
    assert changed(before, snapshot(model)) == set()
    if caught.value.__cause__ is not None:
        # torch's error refers to itself; its loader, found by the garbage collector, would wait 5 s for each worker.
        traceback.clear_frames(caught.value.__cause__.__traceback__)
    return str(caught.value)


@pytest.mark.guarantee("batch-kinds")
@pytest.mark.parametrize(
    "batch_of",
    [
        lambda images, labels: images,
        lambda images, labels: (images, labels),
        lambda images, labels: [images, labels],
        lambda images, labels: [images],
        Pair,
        lambda images, labels: {"images": images},
        lambda images, labels: {"labels": labels, "images": images},
        lambda images, labels: UserDict(images=images, labels=labels),
    ],
    ids=["tensor", "tuple", "list", "list of one", "namedtuple", "dict", "dict of two", "mapping that is no dict"],
)
def test_each_kind_of_batch_reaches_the_model(batch_of: Callable[[Tensor, Tensor], Any]) -> None:
    pairs = zip(SAMPLES.split([6, 4]), LABELS.split([6, 4]), strict=True)
    report = refresh_batch_norm(Named(), [batch_of(images, labels) for images, labels in pairs])
    assert_measured(report.statistics["norm"], SAMPLES)
    assert report.samples == 10


@pytest.mark.guarantee("batch-kinds")
def test_forward_batch_takes_any_batch() -> None:
    class Graph:
        def __init__(self, nodes: Tensor) -> None:
            self.nodes = nodes

    given: list[object] = []

    def forward_batch(model: nn.Module, batch: Graph) -> None:
        given.append(model)
        model(batch.nodes)

    model = Named()
    report = refresh_batch_norm(model, [Graph(part) for part in SAMPLES.split(5)], forward_batch=forward_batch)
    assert_measured(report.statistics["norm"], SAMPLES)
    assert given == [model, model]
    assert report.batches == 2


def test_forward_batch_that_raises_is_named() -> None:
    def forward_batch(model: nn.Module, batch: Tensor) -> None:
        raise KeyError("pixel_values")

    message = failure_of([SAMPLES], forward_batch=forward_batch)
    assert "batch 1" in message
    assert "KeyError: 'pixel_values'" in message


@pytest.mark.guarantee("batch-kinds")
@pytest.mark.parametrize("batch", ["text", 3, None, (), [], {1.5}, object()], ids=lambda batch: type(batch).__name__)
def test_other_batches_are_refused_with_what_is_accepted(batch: object) -> None:
    message = failure_of([batch])
    assert f"batch 1: got {type_of(batch)}" in message
    for accepted in ("a tensor", "a tuple or list", "a mapping", "forward_batch(model, batch)"):
        assert accepted in message


def test_a_mapping_with_other_keywords_names_them() -> None:
    message = failure_of([{"pixels": SAMPLES}])
    assert "the model raised at batch 1 (a mapping with the keys 'pixels')" in message
    assert "TypeError" in message
    assert "def forward_batch(model, batch): model(batch['pixels'])" in message


# -- Worker processes -----------------------------------------------------------------------------------------------


class Rows(Dataset[Tensor]):
    def __init__(self, trouble: str = "") -> None:
        self.trouble = trouble

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, index: int) -> Tensor:
        if index == 5 and self.trouble == "raise":
            raise ValueError("row 5 is bad")
        if index == 5 and self.trouble == "die":
            time.sleep(0.2)  # what was queued before is delivered, so no lock dies with the process
            os.kill(os.getpid(), signal.SIGKILL)
        return SAMPLES[index]


def loader(workers: int, trouble: str = "") -> DataLoader[Tensor]:
    return DataLoader(Rows(trouble), batch_size=2, num_workers=workers, multiprocessing_context="fork")


on_any_machine = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@on_any_machine
def test_loader_workers_deliver_every_batch() -> None:
    assert_measured(refresh_batch_norm(Named(), loader(2)).statistics["norm"], SAMPLES)


@on_any_machine
def test_a_worker_that_raises_is_named() -> None:
    message = failure_of(loader(2, "raise"))
    assert "the dataloader raised at batch 3" in message
    assert "row 5 is bad" in message


@on_any_machine
@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_and_no_hang() -> None:
    message = failure_of(loader(2, "die"))
    assert "the dataloader raised at batch" in message
    assert "exited unexpectedly" in message or "killed" in message
