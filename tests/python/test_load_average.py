"""`load_average`: the tensors that `average` writes, without the file."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks.harness import run
from benchmarks.inputs import layout, write_run
from safetensors.torch import load_file, save_file

from ckpt_avg import IncompatibleError, NonFiniteError, UsageError, average, load_average

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64)


def refuse_other_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


def save_run(folder: Path, count: int = 4) -> Path:
    """A run with every averaged dtype, an integer, a scalar, an empty tensor, and tied weights in a torch file."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(7)
    for step in range(1, count + 1):
        state: dict[str, torch.Tensor] = {
            f"layer{number}.weight": torch.randn(33, 7, generator=generator).to(dtype)
            for number, dtype in enumerate(DTYPES)
        }
        state |= {"count": torch.tensor(5), "scale": torch.randn((), generator=generator), "none": torch.empty(0, 3)}
        state["head.weight"] = state["layer1.weight"]
        torch.save(state, folder / f"step_{step}.pt")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"last": 1},
        {"last": 2, "every": 2},
        {"weights": [0.1, 0.2, 0.3, 0.4]},
        {"weighting": "ema", "half_life": 2},
        {"dtype": "float32"},
        {"dtype": "bfloat16"},
        {"threads": 1, "memory": 2**20, "io": "pread"},
        {"keep_order": True},
    ],
    ids=str,
)
@pytest.mark.guarantee("same-bytes")
def test_the_tensors_are_those_of_the_file(options: dict[str, Any], tmp_path: Path) -> None:
    """A program that loads them, and one that reads the file, have the same model."""
    folder = save_run(tmp_path / "run")
    output = average(folder, tmp_path / "out.safetensors", **options).output
    refuse_other_bits(load_average(folder, **options), load_file(output))


@pytest.mark.parametrize("bn", ["keep", "refresh"])
@pytest.mark.guarantee("same-bytes")
def test_the_refresh_is_that_of_the_file(bn: str, run_folder: Path, train: ModuleType, tmp_path: Path) -> None:
    batches = [torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    options: dict[str, Any] = {"last": 4, "bn": bn}
    if bn == "refresh":
        options |= {"model": train.make_model, "data": batches}
    output = average(run_folder, tmp_path / "out.safetensors", **options).output
    found = load_average(run_folder, **options)
    refuse_other_bits(found, load_file(output))
    model = train.make_model()
    model.load_state_dict(found)
    assert model.state_dict()["features.bn1.running_mean"].equal(found["features.bn1.running_mean"])


def test_spectral_norm_is_that_of_the_file(tmp_path: Path) -> None:
    """Its vectors are computed after the mean."""
    for step in (1, 2):
        torch.manual_seed(step)
        layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(5, 4))
        save_file(layer.state_dict(), tmp_path / f"step_{step}.safetensors")
    sources = sorted(tmp_path.glob("*.safetensors"))
    output = average(sources, tmp_path / "out.safetensors").output
    found = load_average(sources)
    refuse_other_bits(found, load_file(output))
    layer.load_state_dict(found)


def test_the_tensors_are_a_models_own(tmp_path: Path) -> None:
    """They can be trained, changed and saved, and tied names are separate tensors, as those of the file are."""
    folder = save_run(tmp_path / "run")
    found = load_average(folder)
    found["head.weight"].zero_()
    assert found["layer1.weight"].abs().sum() > 0
    save_file(found, tmp_path / "saved.safetensors")
    module = torch.nn.Linear(7, 33, bias=False)
    module.load_state_dict({"weight": found["layer1.weight"]}, assign=True)
    module(torch.ones(1, 7)).sum().backward()
    assert module.weight.grad is not None


def test_another_process_does_not_change_them(tmp_path: Path) -> None:
    """A data loader's worker, which is forked, has a copy of its own, as of any tensor."""
    if not hasattr(torch, "multiprocessing") or sys.platform == "win32":
        pytest.skip("needs fork")
    import os

    found = load_average(save_run(tmp_path / "run"))
    child = os.fork()
    if child == 0:
        found["scale"].fill_(123.0)
        os._exit(0)
    os.waitpid(child, 0)
    assert found["scale"].item() != 123.0


def test_errors_are_those_of_average(tmp_path: Path, run_folder: Path) -> None:
    with pytest.raises(UsageError, match="must be recomputed for averaged weights"):
        load_average(run_folder)
    with pytest.raises(IncompatibleError):
        load_average(run_folder, last=50, bn="keep")
    for step, value in ((1, 1.0), (2, float("nan"))):
        save_file({"w": torch.tensor([value])}, tmp_path / f"step_{step}.safetensors")
    with pytest.raises(NonFiniteError):
        load_average(tmp_path)
    assert load_average(tmp_path, allow_nonfinite=True)["w"].isnan()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures the peak resident set as Linux counts it")
def test_memory_is_the_output_and_blocks(tmp_path: Path) -> None:
    """More checkpoints take no more memory; a larger model as much more as its tensors."""
    code = "import sys, ckpt_avg; ckpt_avg.load_average(sys.argv[1:], threads=2, io='pread')"
    peaks = {}
    for size, count in ((64, 2), (64, 8), (256, 2)):
        paths = write_run(tmp_path / f"{size}-{count}", layout(size * 2**20), count)
        peaks[size, count] = run([sys.executable, "-c", code, *map(str, paths)]).peak
    assert peaks[64, 8] < 1.08 * peaks[64, 2]
    assert peaks[256, 2] - peaks[64, 2] < 1.15 * 192
