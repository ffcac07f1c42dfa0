"""``--device auto``: CUDA only where it is worth starting, and only if it wins the race."""

from __future__ import annotations

import pytest
import torch

from ckpt_avg.mean import race
from ckpt_avg.mean.race import WORTH, choose_by_race, rate

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")


def choose(asked: str, device: torch.device, nbytes: int, told: list[str]) -> torch.device:
    return choose_by_race(asked, device, nbytes, threads=2, memory=2**27, notice=told.append)


@pytest.mark.parametrize(("on_cpu", "on_cuda", "winner"), [(7e9, 5e9, CPU), (7e9, 9e9, CUDA), (7e9, 0.0, CPU)])
def test_the_faster_one_is_taken_and_named(
    monkeypatch: pytest.MonkeyPatch, on_cpu: float, on_cuda: float, winner: torch.device
) -> None:
    monkeypatch.setattr(race, "rate", lambda device, threads, memory: on_cpu if device == CPU else on_cuda)
    told: list[str] = []
    assert choose("auto", CUDA, WORTH, told) == winner
    assert told == [
        f"the mean is computed on {winner}: 7.0 GB/s on cpu and {on_cuda / 1e9:.1f} GB/s on cuda:1, measured here"
    ]


@pytest.mark.parametrize(
    ("asked", "device", "nbytes", "expected"),
    [("auto", CUDA, WORTH - 1, CPU), ("auto", CPU, 10 * WORTH, CPU), ("cuda:1", CUDA, 1, CUDA), ("cpu", CPU, 1, CPU)],
)
def test_without_a_race(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: torch.device, nbytes: int, expected: torch.device
) -> None:
    """CUDA is not started for a small model, nor where the user has chosen."""
    monkeypatch.setattr(race, "rate", lambda *arguments: pytest.fail("raced"))
    told: list[str] = []
    assert choose(asked, device, nbytes, told) == expected
    assert told == []


def test_the_cpu_is_measured_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_ELEMENTS", 300_000)
    before = torch.get_num_threads()
    assert 1e6 < rate(CPU, 2, 2**24) < 1e13
    assert torch.get_num_threads() == before


def test_a_device_without_room_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, *arguments: object, **options: object) -> None:
            pass

        def average(self, *arguments: object) -> None:
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(race, "Averager", Full)
    assert rate(CPU, 2, 2**24) == 0.0
