"""``--device``: where the sums are computed, and where the model runs."""

from __future__ import annotations

import pytest
import torch

from ckpt_avg.distributed.launch import Launch
from ckpt_avg.mean.devices import choose_devices

SIXTH_OF_EIGHT = Launch(9, 16, 5, 8)  # with local rank 5 of 8 on this machine


@pytest.mark.parametrize(
    ("asked", "launch", "sums", "model"),
    [
        ("auto", None, "cpu", "cuda"),
        ("auto", SIXTH_OF_EIGHT, "cpu", "cuda:1"),
        ("cuda", None, "cuda", "cuda"),
        ("cuda", SIXTH_OF_EIGHT, "cuda:1", "cuda:1"),
        ("cuda:3", SIXTH_OF_EIGHT, "cuda:3", "cuda:3"),
        ("cpu", SIXTH_OF_EIGHT, "cpu", "cpu"),
    ],
)
def test_sums_and_model_have_their_devices(
    monkeypatch: pytest.MonkeyPatch, asked: str, launch: Launch | None, sums: str, model: str
) -> None:
    """``auto`` sums on the CPU and runs the model on CUDA; each rank of a machine has its own GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert tuple(map(str, choose_devices(asked, launch))) == (sums, model)


def test_without_cuda_all_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuple(map(str, choose_devices("auto"))) == ("cpu", "cpu")
