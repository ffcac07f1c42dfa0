"""docs/weights.md: two running averages give the mean over the steps between them, as if every step had been kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import ckpt_avg
from ckpt_avg import UsageError

PAGE = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
State = dict[str, Tensor]


def run_example(name: str, **user: Any) -> None:
    """Runs an example of the page in the working folder, with what the reader has in the place of his own."""
    found = re.search(rf"<!-- python: {name} -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert found
    exec(found[1], user)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def batches(count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    yield from (torch.randn(16, 3, generator=generator) for _ in range(count))


def train_loader() -> list[Tensor]:
    return list(batches(20))


def trained(steps: int) -> Iterator[tuple[int, nn.Module]]:
    """A training run: yields each step, from 1, and the model after it."""
    torch.manual_seed(0)
    model = make_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step, batch in enumerate(batches(steps), 1):
        optimizer.zero_grad()
        (model(batch) - batch.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        yield step, model


def kept(model: nn.Module) -> State:
    return {name: value.detach().double().clone() for name, value in model.named_parameters()}


def mean_of(states: list[State]) -> State:
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def assert_is_that_mean(found: State, expected: State, last: State) -> None:
    """To float32's rounding of the running averages, which the weights magnify; and it is not just the last weights."""
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=2e-6)
    assert max((last[name] - value).abs().max().item() for name, value in expected.items()) > 0.01


@pytest.mark.parametrize("use_buffers", [False, True])
def test_two_averaged_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_buffers: bool) -> None:
    monkeypatch.chdir(tmp_path)
    states: list[State] = []
    average: AveragedModel | None = None
    for step, model in trained(60):
        average = average or AveragedModel(model, use_buffers=use_buffers)
        average.update_parameters(model)
        states.append(kept(model))
        if step in (40, 60):
            torch.save(average.state_dict(), f"swa_{step * 100}.pt")
    run_example("AveragedModel", make_model=make_model, train_loader=train_loader)
    found = load_file("between.safetensors")
    assert_is_that_mean(found, mean_of(states[40:]), states[-1])
    oracle = make_model()
    oracle.load_state_dict(found)
    inputs = torch.cat(train_loader())
    with torch.no_grad():
        expected = oracle[0](inputs)  # type: ignore[index]
    torch.testing.assert_close(found["1.running_mean"], expected.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["1.running_var"], expected.var(0), rtol=1e-4, atol=1e-5)


def test_averages_of_torch_without_a_refresh_say_how_to_get_one(tmp_path: Path) -> None:
    average: AveragedModel | None = None
    paths = []
    for step, model in trained(6):
        average = average or AveragedModel(model, use_buffers=True)
        average.update_parameters(model)
        if step in (4, 6):
            paths.append(tmp_path / f"swa_{step}.pt")
            torch.save(average.state_dict(), paths[-1])
    with pytest.raises(UsageError, match=r"'1\.running_var'\. Add --model and --data to recompute those of BatchNorm"):
        ckpt_avg.average(paths, tmp_path / "out.safetensors", weights=[-2, 3], bn="keep")


def test_two_averages_of_icefall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its running average takes the weights at every fifth step; checkpoints are saved at any step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp").mkdir()
    period, states = 5, dict[int, State]()
    average: dict[str, Tensor] = {}
    for step, model in trained(97):
        now = model.state_dict()
        if step == 1:
            average = {name: value.clone() for name, value in now.items()}
        if step % period == 0:
            states[step] = kept(model)
            for name, value in average.items():
                if value.is_floating_point():
                    value.mul_(1 - period / step).add_(now[name] * (period / step))
        if step in (43, 97):
            saved = {
                "model": model.state_dict(),
                "model_avg": {name: value.clone() for name, value in average.items()},
                "batch_idx_train": step,
                "average_period": period,
                "cur_epoch": 20 if step == 43 else 30,
            }
            torch.save(saved, f"exp/epoch-{saved['cur_epoch']}.pt")
    run_example("icefall", make_model=make_model, train_loader=train_loader)
    between = [state for step, state in states.items() if 40 < step <= 95]
    assert len(between) == 11
    assert_is_that_mean(load_file("between.safetensors"), mean_of(between), states[95])


def test_the_command_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("swa_4000.pt", 1.0), ("swa_6000.pt", 3.0)):
        torch.save({"n_averaged": torch.tensor(int(name[4:8])), "module.w": torch.full((2,), value)}, name)
    words = re.search(r"`ckpt-avg (average swa_4000\.pt .*?)`", PAGE)
    assert words
    code, out, err = in_process(*words[1].split())
    assert code == 0, err
    assert load_file("between.safetensors")["w"].tolist() == [7.0, 7.0]
    assert "negative weights, so values may be outside the range of the checkpoints: swa_4000.pt -2" in err
    assert "swa_4000.pt  4000  -2" in out
