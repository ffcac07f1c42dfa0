"""``--device``: where the sums are computed and where the model runs. Every device gives the same bytes.

The inputs of the CUDA tests are also averaged on the CPU, so that a fault in them shows on a machine without a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mean.inputs import every_dtype, many_magnitudes, save
from safetensors.torch import load_file

from ckpt_avg import NonFiniteError, average
from ckpt_avg.distributed.launch import Launch
from ckpt_avg.mean.arithmetic import round_to
from ckpt_avg.mean.devices import choose_mean_device, choose_model_device

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
ELEMENTS = {"cpu": 300_001, "cuda": 3_000_001}  # several chunks of each device

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
    assert (choose_mean_device(asked, launch), choose_model_device(asked, launch)) == (sums, model)


def test_without_cuda_all_is_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (choose_mean_device("auto"), choose_model_device("auto")) == ("cpu", "cpu")


# -- The same bytes on each -----------------------------------------------------------------------------------------


@pytest.mark.guarantee("same-bytes")
@on_each_device
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"memory": 8 * 2**20, "threads": 5}], ids=str)
def test_the_device_does_not_change_the_bytes(tmp_path: Path, device: str, count: int, options: dict[str, Any]) -> None:
    """A multiplication by the reciprocal, or another rounding, would change some of these numbers."""
    paths = save(tmp_path, every_dtype(count, ELEMENTS[device]))
    average(paths, tmp_path / "expected", device="cpu", threads=1, dtype=options.get("dtype", "keep"))
    assert average(paths, tmp_path / "found", device=device, **options).device == device
    assert (tmp_path / "expected").read_bytes() == (tmp_path / "found").read_bytes()


@on_each_device
def test_casts_round_as_on_the_cpu(device: str) -> None:
    values = many_magnitudes(1_000_000, range(-160, 120), seed=0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        on_device = round_to(values.to(device), dtype).cpu()
        assert torch.equal(on_device.view(torch.uint8), round_to(values, dtype).view(torch.uint8)), dtype


@pytest.mark.guarantee("nonfinite")
@on_each_device
def test_nan_is_found(tmp_path: Path, device: str) -> None:
    states = every_dtype(2, ELEMENTS[device])
    states[1]["torch.float16"][ELEMENTS[device] - 3] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"'torch\.float16'(.|\n)*1 of .* index {ELEMENTS[device] - 3:,}"):
        average(save(tmp_path, states), tmp_path / "out", device=device)


@pytest.mark.guarantee("cuda-memory")
@needs_cuda
@pytest.mark.parametrize("mebibytes", [4, 40])
def test_a_full_device_gives_the_same_bytes(tmp_path: Path, mebibytes: int) -> None:
    """Another program may have the GPU's memory: chunks get smaller, and nothing else changes."""
    paths = save(tmp_path, every_dtype(3, ELEMENTS["cuda"]))
    average(paths, tmp_path / "cpu", device="cpu")
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(mebibytes * 2**20 / total)
    try:
        average(paths, tmp_path / "cuda", device="cuda", memory=2**30, threads=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "cuda").read_bytes()


@needs_cuda
def test_auto_sums_on_the_cpu(tmp_path: Path) -> None:
    assert average(save(tmp_path, every_dtype(2, 1000)), tmp_path / "out", device="auto").device == "cpu"


@needs_cuda
def test_the_refresh_agrees_with_the_cpu(tmp_path: Path, run_folder: Path, train: Any) -> None:
    """Convolutions round differently there, so within float32 only; the averaged weights are the same bytes."""
    for device in ("cpu", "cuda"):
        average(run_folder, tmp_path / device, last=8, device=device, model=train.make_model, data=train.train_loader)
    cpu, cuda = load_file(tmp_path / "cpu"), load_file(tmp_path / "cuda")
    for name, values in cpu.items():
        if "running" in name:
            torch.testing.assert_close(cuda[name], values, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(cuda[name], values), name
