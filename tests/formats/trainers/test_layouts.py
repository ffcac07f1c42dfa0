"""numpy arrays in place of tensors, as in detectron2's model zoo."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import torch
from formats.reading import Command, assert_same, averaged, check_saved, mean, read, refusal
from layouts import throwaway

from ckpt_avg import open_checkpoint

# --- arrays ------------------------------------------------------------------------------------------------

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "f32": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
    "f64": np.linspace(0, 1, 6, dtype=np.float64),
    "f16": np.linspace(0, 1, 6, dtype=np.float16),
    "i64": np.arange(-3, 3, dtype=np.int64),
    "u8": np.arange(250, 256, dtype=np.uint8),
    "bool": np.array([True, False]),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "fortran 3": np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
    "strided": np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
    "reversed": np.arange(6, dtype=np.float32)[::-1],
    "scalar": np.array(2.5, dtype=np.float32),
    "empty": np.zeros((0, 3), dtype=np.float32),
}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("container", ["zip", "stream", "pickle"])
def test_numpy_arrays_are_read_at_every_protocol(tmp_path: Path, protocol: int, container: str) -> None:
    """An array's bytes read in the wrong order, or by importing numpy's functions."""
    contents = {"model": ARRAYS, "optimizer": {}, "iteration": 9}
    path = tmp_path / "model_0000009.pth"
    if container == "pickle":
        path = path.with_suffix(".pkl")
        path.write_bytes(pickle.dumps({"model": ARRAYS, "__author__": "Detectron2 Model Zoo"}, protocol))
    else:
        zipped = container == "zip"
        torch.save(contents, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_same(read(path), {name: torch.from_numpy(np.array(array, order="C")) for name, array in ARRAYS.items()})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.kind == "detectron2"
        assert checkpoint.spec.state_key == "model"


def test_detectron2_with_arrays(tmp_path: Path, in_process: Command) -> None:
    (tmp_path / "run").mkdir()
    run = layouts.detectron2(tmp_path / "run", arrays=True)
    for saved in run.checkpoints:
        check_saved(saved, "detectron2")
    assert_same(averaged(in_process, run.folder), mean([each.raw for each in run.checkpoints]))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(4, dtype=">f4"),
        np.array(["a", "bc"]),
        np.array([{}, None], dtype=object),
        np.zeros(2, dtype=[("a", "<f4"), ("b", "<i4")]),
        np.array([1 + 2j], dtype=np.complex128),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.zeros(2, dtype=np.longdouble),
    ],
    ids=["big-endian", "text", "objects", "records", "complex128", "dates", "long double"],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_that_safetensors_cannot_hold_are_refused(tmp_path: Path, array: Any, protocol: int) -> None:
    """Their bytes taken for something else, or the array left out of the average."""
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": {"w": np.zeros(3), "odd": array}, "__author__": "x"}, protocol))
    assert "odd" in refusal(path)


def test_arrays_whose_bytes_do_not_fit_their_shape_are_refused(tmp_path: Path) -> None:
    """A shape that claims more than the pickle holds."""
    whole = pickle.dumps({"model": {"w": np.arange(6, dtype=np.float32)}, "__author__": "x"}, 3)
    assert whole.count(b"K\x06\x85") == 1
    path = tmp_path / "model_final.pkl"
    path.write_bytes(whole.replace(b"K\x06\x85", b"K\x07\x85"))
    refusal(path)


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """The model zoo of Caffe2: text and array bytes in the same kind of string."""
    raw = np.array([1.5, -2.0, 1e30], dtype=np.float32)

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"f4")
        + b"K\0K\1\x87R(K\3"
        + text(b"<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85" + text(b"b") + b"tR"
    array += b"(K\1K\3\x85" + dtype + b"\x89" + text(raw.tobytes()) + b"tb"
    body = text(b"model") + b"}" + text(b"w") + array + b"s" + text(b"__author__") + text(b"Caffe2")
    path = tmp_path / "R-50.pkl"
    path.write_bytes(b"\x80\x02}(" + body + b"u.")
    loaded = pickle.loads(path.read_bytes(), encoding="latin1")
    assert loaded["model"]["w"].tolist() == raw.tolist()
    assert_same(read(path), {"w": torch.from_numpy(raw)})


def test_a_bare_pickle_of_an_object_is_refused(tmp_path: Path) -> None:
    with throwaway("sklearn.svm", SVC=type("SVC", (), {})) as module:
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(module.SVC()))
    refusal(tmp_path / "model.pkl")
