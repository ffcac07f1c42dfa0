"""numpy's arrays, dtypes and scalars in a pickle: their values without numpy, and nothing of them trusted."""

from __future__ import annotations

import codecs
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_avg.checkpoint.tensor_reads import stream
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.open import open_checkpoint

DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8")


def write(path: Path, contents: object, protocol: int, container: str = "zip") -> Path:
    """By torch.save in either of its forms, or as a bare pickle, as detectron2's model zoo has them."""
    if container == "pickle":
        path.write_bytes(pickle.dumps(contents, protocol))
    else:
        torch.save(contents, path, pickle_protocol=protocol, _use_new_zipfile_serialization=container == "zip")
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        found = {}
        for name, tensor in checkpoint.spec.tensors.items():
            dtype = getattr(torch, tensor.dtype.torch_name)
            parts = [part.clone() for _, part in stream(checkpoint, tensor, 5)]
            found[name] = (torch.cat(parts) if parts else torch.empty(0, dtype=dtype)).view(tensor.shape)
        return found


def assert_same(found: torch.Tensor, expected: Any) -> None:
    wanted = torch.from_numpy(np.ascontiguousarray(expected).copy()).view(np.shape(expected))
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert found.numpy().tobytes() == wanted.numpy().tobytes()


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 3000
    return str(caught.value)


@pytest.mark.parametrize("container", ["zip", "stream", "pickle"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_each_dtype_at_each_protocol(tmp_path: Path, protocol: int, container: str) -> None:
    """Protocol 2 has no bytes, 5 has a form of its own: the values are the same, to the bit."""
    state = {code: np.frombuffer(bytes(range(1, 49)), dtype=code).reshape(2, -1) for code in DTYPES if code != "?"}
    state["?"] = np.array([[True, False, True]])
    found = read(write(tmp_path / "a.pkl", {"model": state, "epoch": 3}, protocol, container))
    assert list(found) == list(state)
    for name, value in state.items():
        assert_same(found[name], value)


@given(
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    order=st.sampled_from("CF"),
    protocol=st.sampled_from([2, 4, 5]),
    turned=st.booleans(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_in_either_order(
    tmp_path: Path, shape: tuple[int, ...], order: Any, protocol: int, turned: bool
) -> None:
    """Columns first as well as rows first, without elements, without dimensions."""
    value = np.asarray(np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape), order=order)
    value = value.T if turned else value
    found = read(write(tmp_path / "a.pkl", {"w": value, "b": np.ones(1, np.float32)}, protocol, "pickle"))
    assert_same(found["w"], value)


@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_and_tensors_in_one_state_dict(tmp_path: Path, protocol: int) -> None:
    path = write(tmp_path / "a.pt", {"t": torch.arange(3.0), "n": np.arange(3.0) + 10}, protocol)
    found = read(path)
    assert found["t"].tolist() == [0, 1, 2]
    assert found["n"].tolist() == [10, 11, 12]
    with open_checkpoint(path) as checkpoint:
        assert any(
            "numpy arrays, which the pickle holds itself, are in memory" in note for note in checkpoint.spec.notes
        )


def test_one_array_under_two_names_is_there_twice(tmp_path: Path) -> None:
    shared = np.arange(3.0)
    found = read(write(tmp_path / "a.pkl", {"a": shared, "b": shared}, 2, "pickle"))
    assert found["a"].tolist() == found["b"].tolist() == [0, 1, 2]


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
        "optimizer": {"param_groups": [{"lr": np.float64(0.125)}]},
        "broken": np.float64("nan"),
        "good": np.bool_(True),
    }
    for container in ("zip", "stream"):
        with open_checkpoint(write(tmp_path / "a.pt", contents, protocol, container)) as checkpoint:
            record = checkpoint.spec.record
            assert (record.epoch, record.step, record.learning_rate) == (3, 70, 0.125)
            assert dict(record.metrics) == {"val_loss": 0.5, "accuracy": 0.75, "half": 0.25, "wide": 1.5}


@pytest.mark.parametrize(
    "value",
    [
        np.array([1, "a", None], dtype=object),
        np.array([torch.ones(1)], dtype=object),
        np.arange(3.0).astype(">f4"),
        np.arange(3).astype(">i8"),
        np.array(["a", "b"]),
        np.array([b"a"]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.zeros(2, dtype=[("x", "f4"), ("y", "i4")]),
        np.zeros(2, dtype=np.complex128),
        np.zeros(2, dtype=np.longdouble),
        np.array([], dtype=object),
    ],
    ids=["object", "tensors", "big-endian float", "big-endian integer", "text", "bytes", "dates", "fields",
         "complex128", "longdouble", "empty object"],
)  # fmt: skip
@pytest.mark.parametrize("protocol", [2, 5])
def test_what_safetensors_cannot_hold_is_refused_as_a_weight_only(tmp_path: Path, value: Any, protocol: int) -> None:
    """Beside the weights it does no harm; among them it is named."""
    message = refusal(write(tmp_path / "a.pt", {"model": {"w": torch.ones(1), "odd": value}}, protocol))
    assert "tensor 'odd': expected a plain tensor, got a numpy array of dtype" in message
    found = read(write(tmp_path / "a.pt", {"model": {"w": torch.ones(1)}, "odd": value}, protocol))
    assert list(found) == ["w"]


def test_one_byte_dtypes_have_no_order(tmp_path: Path) -> None:
    for code in ("|i1", "|u1", "|b1", ">i1"):
        value = np.array([0, 1, 1], dtype=code)
        assert_same(read(write(tmp_path / "a.pkl", {"w": value}, 2, "pickle"))["w"], value.astype(code[1:]))


class Forged:
    """An array whose state its author chose."""

    def __init__(self, state: object) -> None:
        self.state = state

    def __reduce__(self) -> tuple[object, ...]:
        return np.arange(0).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


def deep() -> object:
    value: object = ()
    for _ in range(40):
        value = (value, value)
    return value


FLOAT = np.dtype("f4")
FORGED: dict[str, object] = {
    "too few bytes": (1, (3,), FLOAT, False, b"\1" * 8),
    "too many bytes": (1, (1,), FLOAT, False, b"\1" * 8),
    "a negative extent": (1, (-2,), FLOAT, False, b"\1" * 8),
    "an endless extent": (1, (2**70,), FLOAT, False, b"\1" * 8),
    "a product beyond counting": (1, (2**40, 2**40), FLOAT, False, b"\1" * 8),
    "a shape of floats": (1, (2.0,), FLOAT, False, b"\1" * 8),
    "a shape of truths": (1, (True, 2), FLOAT, False, b"\1" * 8),
    "a shape that is no tuple": (1, [2], FLOAT, False, b"\1" * 8),
    "too many dimensions": (1, (1,) * 100, FLOAT, False, b"\1" * 4),
    "an endless shape": (1, (deep(),), FLOAT, False, b"\1" * 8),
    "no state": None,
    "a short state": (1, (2,), FLOAT),
    "text that is no bytes": (1, (2,), FLOAT, False, "1234567\u2028"),
    "too much text": (1, (2,), FLOAT, False, "123456789"),
    "no dtype": (1, (2,), None, False, b"\1" * 8),
    "a list of objects": (1, (2,), np.dtype("O"), False, [1, 2]),
}


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("forged", FORGED)
def test_arrays_that_lie_are_refused(tmp_path: Path, forged: str, protocol: int) -> None:
    """Bytes, dtype and shape must fit each other before one element is looked at."""
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"w": Forged(FORGED[forged])}, protocol))
    refusal(path)


def test_numpy_is_not_needed_to_look_at_a_checkpoint(tmp_path: Path) -> None:
    """``inspect`` and ``check`` answer at once, and where numpy is missing."""
    path = write(tmp_path / "a.pkl", {"model": {"w": np.arange(3.0)}, "epoch": np.int64(3)}, 4, "pickle")
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


class Encoded:
    """Bytes as protocol 2 writes them: a call with a text."""

    def __init__(self, text: str) -> None:
        self.arguments = (text, "latin1")

    def __reduce__(self) -> tuple[object, ...]:
        return codecs.encode, self.arguments


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("form", ["state", "encoded", "buffer"])
def test_many_arrays_of_one_text_are_bounded(tmp_path: Path, form: str) -> None:
    """The pickle holds the text once, and refers to it with two bytes: each array would be a copy of its own."""
    text = "x" * 2**20
    state = (1, (2**18,), FLOAT, False, text)
    arguments = (text, FLOAT, (2**18,), "C")
    made: dict[str, Any] = {
        "state": lambda: Forged(state),
        "encoded": lambda: Encoded(text),
        "buffer": lambda: Buffer(arguments),
    }
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({str(number): made[form]() for number in range(5_000)}, 4))
    assert path.stat().st_size < 2 * 2**20
    assert "operations in the pickle" in refusal(path)


class Buffer:
    """An array as protocol 5 writes it: a call with its bytes."""

    def __init__(self, arguments: tuple[object, ...]) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[object, ...]:
        return np.arange(2.0).__reduce_ex__(5)[0], self.arguments
