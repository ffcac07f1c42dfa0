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
from ckpt_avg.checkpoint.tensor_reads import stream

Command = Callable[..., tuple[int, str, str]]
State = Mapping[str, torch.Tensor]


def read(path: Path, **options: Any) -> State:
    """Every tensor that the reader finds, copied."""
    found = {}
    with open_checkpoint(path, **options) as checkpoint:
        for name, tensor in checkpoint.spec.tensors.items():
            parts = [part.clone() for _, part in stream(checkpoint, tensor, 5)]
            found[name] = (torch.cat(parts) if parts else torch.empty(0)).view(tensor.shape)
    return found


def assert_same(found: State, expected: State) -> None:
    """The same names, dtypes, shapes and bits."""

    def bits(tensor: torch.Tensor) -> bytes:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

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


def refusal(path: Path, **options: Any) -> str:
    """The message of a refusal with exit code 3."""
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(path, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 3
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
