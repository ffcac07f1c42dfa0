"""What opening, inspecting and averaging give, for the tests of formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import Saved
from safetensors.torch import load_file

from ckpt_avg import CheckpointFormatError, open_checkpoint
from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import stream

Command = Callable[..., tuple[int, str, str]]
State = Mapping[str, torch.Tensor]


def read(path: Path, **options: Any) -> State:
    """Every tensor that the reader finds, copied."""
    found = {}
    with open_checkpoint(path, **options) as checkpoint:
        for name, tensor in checkpoint.spec.tensors.items():
            parts = [part.clone() for _, part in stream(checkpoint, tensor, 5 if tensor.numel < 1000 else 100_001)]
            dtype = getattr(torch, tensor.dtype.torch_name)
            found[name] = (torch.cat(parts) if parts else torch.empty(0, dtype=dtype)).view(tensor.shape)
    return found


def assert_as_torch_loads(
    path: Path, key: str | None = None, given: str | None = None, *, form: str = "torch zip"
) -> Checkpoint:
    """Names, order, dtypes, shapes and bits are those that torch.load gives; returns the checkpoint, closed."""
    expected = torch.load(path, weights_only=False)
    for part in key.split(".") if key else ():
        expected = expected[part]
    expected = expected.state_dict() if isinstance(expected, torch.nn.Module) else expected
    expected = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    with open_checkpoint(path, state_key=given) as checkpoint:
        assert (checkpoint.spec.format, checkpoint.spec.state_key) == (form, key)
        assert list(checkpoint.spec.tensors) == list(expected)
    assert_same(read(path, state_key=given), expected)
    return checkpoint


def assert_same(found: State, expected: State) -> None:
    """The same names, dtypes, shapes and bits."""

    def bits(tensor: torch.Tensor) -> bytes:
        flat = tensor.detach().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""

    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def check_saved(saved: Saved, kind: str | None, **options: Any) -> None:
    """A checkpoint is recognised, and its weights and its record are the true ones."""
    assert_same(read(saved.path, **options), saved.raw)
    with open_checkpoint(saved.path, **options) as checkpoint:
        spec = checkpoint.spec
    assert (spec.kind, spec.state_key) == (kind, saved.state_key)
    assert (spec.record.step, spec.record.epoch) == (saved.step, saved.epoch), saved.path.name
    assert bool(spec.averaged) == (kind == "Ultralytics")  # which saves nothing but its EMA


def mean(states: Sequence[State]) -> State:
    """The mean in float64, rounded once; counters are the last one's."""
    result = dict(states[-1])
    for name, last in states[-1].items():
        if last.is_floating_point():
            total = torch.zeros(last.shape, dtype=torch.float64)
            for each in states:
                total += each[name].double()
            result[name] = (total / len(states)).to(last.dtype)
    return result


def refusal(path: Path, kind: type[CheckpointFormatError] | None = None, **options: Any) -> str:
    """The message of a refusal with exit code 3, and of that class."""
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(path, **options)
    message = str(caught.value)
    assert kind in (None, type(caught.value))
    assert caught.value.exit_code == 3
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 2000
    return message


def listed(in_process: Command, folder: Path) -> dict[str, Any]:
    """What ``inspect --json`` prints."""
    code, output, errors = in_process("inspect", folder, "--json")
    assert code == 0, errors
    shown: dict[str, Any] = json.loads(output)
    return shown


def names(entries: list[dict[str, Any]]) -> list[str]:
    """The names of listed checkpoints."""
    return [Path(entry["path"]).name for entry in entries]


def averaged(in_process: Command, *arguments: object) -> State:
    """The average that the command writes."""
    first = next(argument for argument in arguments if isinstance(argument, Path))
    out = first.with_name(f"{first.name}.average.safetensors")
    code, _, errors = in_process("average", *arguments, "-o", out, "--bn", "keep", "--overwrite")
    assert code == 0, errors
    return load_file(out)
