"""A GPU gives the bytes that the CPU gives. Skipped where torch finds none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckpt_avg import NonFiniteError, average
from ckpt_avg.mean.arithmetic import round_to

pytestmark = [
    pytest.mark.guarantee("same-bytes"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def _checkpoints(folder: Path, count: int) -> list[Path]:
    """Every averaged dtype, over many magnitudes, in more than one chunk."""
    paths = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        values = torch.randn(3_000_001, generator=generator, dtype=torch.float64)
        values *= torch.exp2(torch.randint(-30, 8, values.shape, generator=generator).double())
        tensors = {str(dtype): values.to(dtype) for dtype in DTYPES if not dtype.is_complex}
        tensors["complex64"] = torch.view_as_complex(values[:-1].float().view(-1, 2).contiguous())
        tensors["integers"] = torch.arange(1000)
        tensors["scalar"] = values[0]
        paths.append(folder / f"step_{index}.safetensors")
        save_file(tensors, paths[-1])
    return paths


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"memory": 8 * 2**20, "threads": 5}], ids=str)
def test_same_bytes_as_the_cpu(tmp_path: Path, count: int, options: dict[str, Any]) -> None:
    """A multiplication by the reciprocal, or another rounding, would change some of these numbers."""
    paths = _checkpoints(tmp_path, count)
    for device in ("cpu", "cuda"):
        average(paths, tmp_path / device, device=device, **options)
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "cuda").read_bytes()


def test_casts_round_as_on_the_cpu() -> None:
    values = torch.randn(1_000_000, dtype=torch.float64) * torch.exp2(torch.randint(-160, 120, (1_000_000,)).double())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        on_device = round_to(values.cuda(), dtype).cpu()
        assert torch.equal(on_device.view(torch.uint8), round_to(values, dtype).view(torch.uint8)), dtype


@pytest.mark.guarantee("cuda-memory")
@pytest.mark.parametrize("mebibytes", [4, 40])
def test_a_full_device_gives_the_same_bytes(tmp_path: Path, mebibytes: int) -> None:
    """Another program may have the GPU's memory: chunks get smaller, and nothing else changes."""
    paths = _checkpoints(tmp_path, 3)
    average(paths, tmp_path / "cpu", device="cpu")
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(mebibytes * 2**20 / total)
    try:
        average(paths, tmp_path / "cuda", device="cuda", memory=2**30, threads=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "cuda").read_bytes()


def test_auto_sums_on_the_cpu(tmp_path: Path) -> None:
    assert average(_checkpoints(tmp_path, 2), tmp_path / "out", device="auto").device == "cpu"


def test_nan_is_found_there_too(tmp_path: Path) -> None:
    paths = _checkpoints(tmp_path, 2)
    save_file({"w": torch.ones(10)}, paths[0])
    save_file({"w": torch.tensor([1.0] * 9 + [float("nan")])}, paths[1])
    with pytest.raises(NonFiniteError, match="index 9"):
        average(paths, tmp_path / "out", device="cuda")


def test_the_refresh_agrees_with_the_cpu(tmp_path: Path, run_folder: Path, train: Any) -> None:
    """Convolutions round differently there, so within float32 only; the averaged weights are the same bytes."""
    from safetensors.torch import load_file

    for device in ("cpu", "cuda"):
        average(run_folder, tmp_path / device, last=8, device=device, model=train.make_model, data=train.train_loader)
    cpu, cuda = load_file(tmp_path / "cpu"), load_file(tmp_path / "cuda")
    for name, values in cpu.items():
        if "running" in name:
            torch.testing.assert_close(cuda[name], values, rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(cuda[name], values), name
