"""numpy's arrays and scalars in a pickle: scalars are read without numpy, arrays are skipped or refused."""

from __future__ import annotations

import codecs
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats.pickles.opcodes import deep
from formats.reading import assert_same, read, refusal
from layouts import save
from torch import nn

from ckpt_avg.errors import CheckpointFormatError, NoWeightsError
from ckpt_avg.formats.open import open_checkpoint


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_numpy_numbers_are_metrics_steps_and_rates(tmp_path: Path, protocol: int) -> None:
    """Many scripts save ``np.mean(losses)``: without it there would be nothing to rank by."""
    contents = {
        "model": {"w": torch.ones(2)},
        "epoch": np.int64(3),
        "global_step": np.int32(70),
        "val_loss": np.float32(0.5),
        "accuracy": np.float64(0.75),
        "half": np.float16(0.25),
        "wide": np.array(1.5),
        "big": np.dtype(">f4").type(8),
        "optimizer": {"param_groups": [{"lr": np.float64(0.125)}]},
        "broken": np.float64("nan"),
        "good": np.bool_(True),
        "complex": np.complex64(1),
    }
    for stream in (False, True):
        with open_checkpoint(save(contents, tmp_path / "a.pt", stream=stream, protocol=protocol)) as checkpoint:
            record = checkpoint.spec.record
            assert (record.epoch, record.step, record.learning_rate) == (3, 70, 0.125)
            expected = {"val_loss": 0.5, "accuracy": 0.75, "half": 0.25, "big": 8.0, "broken": math.nan}
            assert dict(record.metrics) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


ARRAYS: dict[str, Any] = {
    "float": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
    "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "scalar": np.array(2.5),
    "no elements": np.zeros((0, 3)),
    "object": np.array([1, "a", None], dtype=object),
    "tensors": np.array([torch.ones(1)], dtype=object),
    "big-endian": np.arange(3.0).astype(">f4"),
    "text": np.array(["a", "b"]),
    "dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
    "fields": np.zeros(2, dtype=[("x", "f4"), ("y", "i4")]),
    "complex128": np.zeros(2, dtype=np.complex128),
    "long double": np.zeros(2, dtype=np.longdouble),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_arrays_are_refused_as_weights_only(tmp_path: Path, name: str, protocol: int, stream: bool) -> None:
    """Next to the weights they do no harm; among them the error names one and says what to save."""
    array = ARRAYS[name]
    path = save({"model": {"w": torch.ones(1), "odd": array}}, tmp_path / "a.pt", stream=stream, protocol=protocol)
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == (
        f"{path}: key 'model': tensor 'odd': expected a plain tensor, got a numpy array. Save torch.from_numpy(array) "
        "in its place."
    )
    contents = {"model": {"w": torch.ones(1)}, "odd": array, "rng_state": ("MT19937", array, 3)}
    save(contents, path, stream=stream, protocol=protocol)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.spec.tensors) == ["w"]


class Forged:
    """An array, a scalar or bytes as a pickle makes them, from arguments and a state that its author chose."""

    def __init__(self, function: object, arguments: tuple[object, ...], state: object = None) -> None:
        self.made = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.made


RECONSTRUCT, FROM_BUFFER = np.arange(0).__reduce__()[0], np.arange(2.0).__reduce_ex__(5)[0]
SCALAR = np.float32(0).__reduce__()[0]
FLOAT = np.dtype("f4")
FORGED: dict[str, object] = {
    "an array of too few bytes": Forged(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (3,), FLOAT, False, b"\1" * 8)),
    "an array of an endless shape": Forged(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (deep(),), FLOAT, False, b"")),
    "an array of a short state": Forged(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (2,), FLOAT)),
    "a buffer of nothing": Forged(FROM_BUFFER, (None, None, deep(), 7)),
    "a scalar of too few bytes": Forged(SCALAR, (FLOAT, b"\1")),
    "a scalar of no dtype": Forged(SCALAR, (None, b"\1" * 4)),
    "a scalar of text that is not bytes": Forged(SCALAR, (FLOAT, "ab\u2028")),
    "a dtype of an endless code": Forged(np.dtype, (deep(),), (3, deep(), None)),
    "a dtype of a long code": Forged(SCALAR, (Forged(np.dtype, ("f4" * 10**5,)), b"\1" * 4)),
}


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("forged", FORGED)
def test_forged_arrays_and_scalars_are_never_values(tmp_path: Path, forged: str, protocol: int) -> None:
    """Next to the weights they are skipped, whatever they claim; a number is never made of them."""
    path = save({"model": {"w": torch.ones(1)}, "val_loss": FORGED[forged]}, tmp_path / "a.pt", protocol=protocol)
    with open_checkpoint(path) as checkpoint:
        assert dict(checkpoint.spec.record.metrics) == {}


@pytest.mark.usefixtures("in_time")
def test_many_bytes_of_one_text_are_limited(tmp_path: Path) -> None:
    """The pickle has the text once and refers to it with two bytes: each call would make a copy of its own."""
    text = "x" * 2**20
    path = save([Forged(codecs.encode, (text, "latin1")) for _ in range(5_000)], tmp_path / "a.pt", protocol=4)
    assert path.stat().st_size < 2 * 2**20
    with pytest.raises(CheckpointFormatError, match="operations in the pickle"):
        open_checkpoint(path)


def test_numpy_is_not_needed_to_look_at_a_checkpoint(tmp_path: Path) -> None:
    """``inspect`` and ``check`` answer at once, and without numpy."""
    path = save(
        {"model": {"w": torch.ones(3)}, "epoch": np.int64(3), "x": np.arange(3.0)}, tmp_path / "a.pt", protocol=4
    )
    script = (
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "from ckpt_avg import open_checkpoint\n"
        f"spec = open_checkpoint({str(path)!r}).spec\n"
        "assert 'torch' not in sys.modules\n"
        "print(spec.tensors['w'].shape, spec.record.epoch)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("(3,) 3\n", "")


class OnDevice:
    """Pickled as torch pickles a tensor of XLA and similar devices, by way of the CPU or of numpy."""

    def __init__(self, tensor: torch.Tensor, *, by_numpy: bool = False) -> None:
        self.tensor, self.by_numpy = tensor, by_numpy

    def __reduce__(self) -> tuple[object, ...]:
        if self.by_numpy:
            rebuild, value = torch._utils._rebuild_device_tensor_from_numpy, self.tensor.numpy()
        else:
            rebuild, value = torch._utils._rebuild_device_tensor_from_cpu_tensor, self.tensor
        return rebuild, (value, self.tensor.dtype, "xla:0", False)


@pytest.mark.parametrize("stream", [False, True])
def test_tensors_of_other_devices_have_the_values_of_their_copies(tmp_path: Path, stream: bool) -> None:
    weights = {"w": torch.arange(6.0).view(2, 3), "half": torch.ones(2).bfloat16(), "n": torch.tensor(3)}
    path = save({"model": {name: OnDevice(value) for name, value in weights.items()}}, tmp_path / "a.pt", stream=stream)
    assert_same(read(path), weights)
    save({"w": OnDevice(torch.ones(2), by_numpy=True)}, path, stream=stream)
    assert "got a tensor of another device, saved as a numpy array. Save tensor.cpu()." in refusal(path)


def forms_of_weights() -> list[object]:
    return [{"w": np.ones(2)}, nn.Linear(2, 2).state_dict(), {"w": [1.0] * 9}, {"G_ema": nn.Linear(2, 2)}]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("form", range(4), ids=["arrays", "tensors", "numbers", "modules"])
def test_a_bare_pickle_is_refused_with_how_to_convert_it(tmp_path: Path, form: int, protocol: int) -> None:
    """It is not read at all. What a run folder contains of the kind is skipped."""
    path = tmp_path / "model it's.pkl"
    path.write_bytes(pickle.dumps(forms_of_weights()[form], protocol))
    message = refusal(path, NoWeightsError)
    assert "got a Python pickle (pickle.dump, as in detectron2's model zoo and StyleGAN)" in message
    assert message.endswith(""" 'model it'"'"'s.pkl' model.pth`.""")


@pytest.mark.slow
def test_the_command_that_converts_works(tmp_path: Path) -> None:
    """Pasted as it is; Caffe2's pickles of Python 2 included."""
    weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int64(3) * np.ones((), np.int64)}
    model = nn.Linear(2, 2)
    contents = [
        ({"model": weights, "__author__": "Detectron2 Model Zoo"}, {"w": (2, 3), "n": ()}),
        (model.state_dict(), {"weight": (2, 2), "bias": (2,)}),
        ({"G_ema": model, "training_set_kwargs": {"path": "x"}}, {"weight": (2, 2), "bias": (2,)}),
    ]
    path = tmp_path / "model it's.pkl"
    for value, shapes in contents:
        path.write_bytes(pickle.dumps(value, 2))
        command = refusal(path).partition("`python ")[2].removesuffix("`.")
        subprocess.run(f"{sys.executable} {command}", shell=True, cwd=tmp_path, check=True)
        with open_checkpoint(tmp_path / "model.pth") as checkpoint:
            assert {name: tensor.shape for name, tensor in checkpoint.spec.tensors.items()} == shapes
