"""Step, epoch, metrics and learning rate in a torch file, and nothing that is none of these."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt_avg import inspect
from ckpt_avg.checkpoint.spec import BY_TORCH_NAME
from ckpt_avg.checkpoint.training_record import Record, count, measure
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.formats.torch_file import element
from ckpt_avg.formats.trainers.records import record_of
from ckpt_avg.formats.trainers.trainer import Contents

W = {"w": torch.ones(2)}


def recorded(tmp_path: Path, contents: object) -> Record:
    path = tmp_path / "checkpoint.bin"
    torch.save(contents, path)
    with open_checkpoint(path) as checkpoint:
        return checkpoint.spec.record


@pytest.mark.parametrize(
    "name",
    ["loss", "val_loss", "train_loss", "train_acc", "accuracy", "acc1", "f1", "criterion_loss", "precision_micro",
     "mean_iou", "bleu", "wer", "sentiment_accuracy", "perplexity", "validation_loss", "val_accuracy", "test_acc"],
)  # fmt: skip
def test_numbers_beside_the_weights_are_metrics(tmp_path: Path, name: str) -> None:
    """Whatever they are called: n_ in train_loss, time in sentiment and iter in criterion are parts of words."""
    for value in (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.bfloat16)):
        assert dict(recorded(tmp_path, {"model": W, "epoch": 1, name: value}).metrics) == {name: 0.5}


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.1), ("learning_rate", 0.1), ("time", 3.5), ("seed", 4.0), ("version", 2.0), ("best_acc", 0.9),
     ("num_classes", 10), ("batch_size", 32.0), ("loss", "low"), ("loss", True),
     ("loss", [0.5]), ("loss", torch.ones(2)), ("count", 7), (3, 0.5), ("loss", 10**400)],
)  # fmt: skip
def test_settings_and_counts_are_no_metrics(tmp_path: Path, name: Any, value: Any) -> None:
    """``best_acc`` is that of another checkpoint; a whole number is a count."""
    assert dict(recorded(tmp_path, {"model": W, "epoch": 1, name: value}).metrics) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_recorded(tmp_path: Path, value: float) -> None:
    """So that a selection by it can refuse it: the training has diverged."""
    for stored in (value, torch.tensor(value), torch.tensor(value, dtype=torch.float16)):
        found = recorded(tmp_path, {"model": W, "loss": stored, "lr": value, "step": value})
        assert str(dict(found.metrics)) == str({"loss": value})
        assert (found.learning_rate, found.step) == (None, None)


@pytest.mark.parametrize("key", ["metrics", "train_metrics", "val_metrics", "eval_metrics"])
def test_metrics_of_dicts(tmp_path: Path, key: str) -> None:
    metrics = {"loss": 0.5, "rank": 3, "names": ["a"], "deep": {"x": 1.0}, "wide": torch.tensor(2.0)}
    assert dict(recorded(tmp_path, {"model": W, key: metrics}).metrics) == {"loss": 0.5, "rank": 3.0, "wide": 2.0}


@pytest.mark.parametrize(
    ("beside", "step", "epoch"),
    [
        ({"global_step": 7, "epoch": 2}, 7, 2),
        ({"step": torch.tensor(7)}, 7, None),
        ({"iteration": 7}, 7, None),
        ({"meta": {"iter": 7, "epoch": 2}}, 7, 2),
        ({"step": 7.0}, 7, None),
        ({"step": 7.5}, None, None),
        ({"step": -1}, None, None),
        ({"step": True}, None, None),
        ({"step": "7"}, None, None),
        ({"step": 2**63}, None, None),
        ({"step": 0, "epoch": 0}, 0, 0),
        ({"optimizer_history": [{"num_updates": 3}, {"num_updates": 7}]}, 7, None),
        ({"optimizer_history": []}, None, None),
    ],
)
def test_steps_and_epochs(tmp_path: Path, beside: dict[str, Any], step: int | None, epoch: int | None) -> None:
    found = recorded(tmp_path, {"model": W, **beside})
    assert (found.step, found.epoch) == (step, epoch)


@pytest.mark.parametrize(
    "beside",
    [
        {"optimizer": {"param_groups": [{"lr": 0.125}, {"lr": 9.0}]}},
        {"optimizer_states": [{"param_groups": [{"lr": torch.tensor(0.125)}]}]},
        {"optimizer_state_dict": {"param_groups": ({"lr": 0.125},)}},
        {"optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.125).state_dict()},
    ],
)
def test_the_rate_of_the_first_group(tmp_path: Path, beside: dict[str, Any]) -> None:
    assert recorded(tmp_path, {"model": W, **beside}).learning_rate == 0.125


@pytest.mark.parametrize("rate", [None, "0.1", float("inf"), torch.ones(2), [0.1]])
def test_a_rate_that_is_no_number(tmp_path: Path, rate: Any) -> None:
    contents = {"model": W, "optimizer": {"param_groups": [{"lr": rate}]}}
    assert recorded(tmp_path, contents).learning_rate is None


def test_weights_are_no_records(tmp_path: Path) -> None:
    """A bare state dict has weights of one element, some of them with telling names."""
    state = {"w": torch.ones(2), "step": torch.tensor(9), "epoch": torch.tensor(3), "temperature": torch.tensor(0.5),
             "bias": torch.ones(1), "metrics": torch.ones(1)}  # fmt: skip
    assert recorded(tmp_path, state) == Record()


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("key", ["optimizer", "optimizer_states", "state", "meta", "extra_state", "optimizer_history",
                                 "callbacks", "metrics", "model_history"])  # fmt: skip
def test_lists_and_dicts_inside_themselves_end(tmp_path: Path, key: str) -> None:
    """A list whose first element is itself is a few bytes of pickle; following it must not go on for ever."""
    itself: list[Any] = []
    itself.append(itself)
    around: dict[str, Any] = {}
    around.update(param_groups=around, optimizers=around, timestamp=around, ModelCheckpoint=around, iter=around)
    for value in (itself, around, [around], {"param_groups": itself, "timestamp": itself}):
        assert recorded(tmp_path, {"model": W, key: value}).learning_rate is None


@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["optimizer", "param_groups", "lr", "step", "epoch", "metrics", "callbacks",
                                         "state", "timestamp", "Timestamp", "batch", "extra_state", "val_loss"])
                        | st.integers(), inner, max_size=4), max_leaves=12))  # fmt: skip
def test_any_contents_are_looked_at_without_an_error(contents: object) -> None:
    found = record_of(Contents(contents))
    assert found.step is None or (type(found.step) is int and 0 <= found.step < 2**63)
    assert all(type(value) is float for value in found.metrics.values())


def test_paths_through_dicts_and_first_elements() -> None:
    contents = Contents({"a": [{"b": ({"c": 3},)}, {"b": 4}], "empty": [], "n": 3})
    assert contents.get("a.b.c") == 3
    for path in ("a.x", "empty.x", "n.x", "x", "a.b.c.d"):
        assert contents.get(path) is None


@given(
    st.sampled_from([name for name in BY_TORCH_NAME if name.startswith(("int", "uint8", "float", "bfloat"))]), st.data()
)
def test_one_stored_element(name: str, data: st.DataObject) -> None:
    """By its dtype, as torch reads it; None for what has no plain number."""
    dtype = BY_TORCH_NAME[name]
    raw = data.draw(st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize))
    value = torch.frombuffer(bytearray(raw), dtype=getattr(torch, name))
    found = element(dtype, raw)
    if found is not None and math.isnan(found):
        assert torch.isnan(value).all()
    elif found is not None and math.isinf(found):
        assert (value.double().abs() >= 2.0**1000).all()
    elif found is not None:
        assert found == float(value.float() if name.startswith("float8") else value.double())
    else:
        assert name.startswith("float8")


@pytest.mark.parametrize("value", [None, "3", [], {}, b"3", object(), 1j, float("nan"), float("inf"), True])
def test_what_is_no_number(value: object) -> None:
    assert count(value) is None
    assert measure(value) is None


def test_what_is_left_open_is_taken_from_another_record() -> None:
    first = Record(step=0, metrics={"a": 1.0}, rates=((1, 0.1),))
    second = Record(step=5, epoch=2, metrics={"a": 9.0, "b": 2.0}, learning_rate=0.0, rates=((9, 0.9),))
    assert first.or_else(second) == Record(0, 2, {"a": 1.0, "b": 2.0}, 0.0, ((1, 0.1),))
    assert Record().or_else(second) == second


@pytest.mark.parametrize("moments", [[(1, 10), (1, 20), (2, 10), (2, 20)], [(0, 0), (0, 5), (1, 0), (3, 1)]])
def test_a_step_that_starts_anew_in_each_epoch_is_no_order(tmp_path: Path, moments: list[tuple[int, int]]) -> None:
    """What the files record is kept as it is; the order of the run is by epoch, then step."""
    for number, (epoch, step) in enumerate(reversed(moments)):
        contents = {"model": {"w": torch.full((2,), float(number))}, "epoch": epoch, "step": step}
        torch.save(contents, tmp_path / f"{number}.pt")
    found = inspect(tmp_path)
    assert [(each.record.epoch, each.record.step) for each in found.listed] == moments
