"""The plan: rules, dtypes and offsets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mean.plans import Tensors, plan_of, tensors

from ckpt_avg.checkpoint.spec import DTYPES
from ckpt_avg.errors import IncompatibleError

# As the reference implementation declares its dtypes; data sections are sorted by falling rank.
REFERENCE = [
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
]
FLOATS = ["float64", "float32", "bfloat16", "float16"]


@given(tensors=tensors, dtype=st.sampled_from(["keep", *FLOATS]))
@settings(max_examples=100, deadline=None)
def test_tensors_lie_side_by_side_in_the_references_order(tensors: Tensors, dtype: str) -> None:
    plan = plan_of(tensors, dtype=dtype)
    assert {tensor.name: tensor.shape for tensor in plan.tensors} == {name: what[1] for name, what in tensors.items()}
    end = 0
    for tensor in plan.tensors:
        assert tensor.offset == end
        assert tensor.nbytes == tensor.numel * tensor.dtype.itemsize
        end += tensor.nbytes
    assert plan.nbytes == end
    keys = [(-REFERENCE.index(tensor.dtype.name), tensor.name.encode()) for tensor in plan.tensors]
    assert keys == sorted(keys)


@pytest.mark.guarantee("tensor-order")
@given(tensors=tensors)
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_checkpoint_does_not_matter(tensors: Tensors) -> None:
    shuffled = list(tensors.items())
    random.Random(0).shuffle(shuffled)
    assert plan_of(tensors).tensors == plan_of(dict(shuffled)).tensors


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_dtype_is_given_to_floating_point_tensors_alone(dtype: str) -> None:
    tensors = {name: (name, (2,)) for name in DTYPES}
    for tensor in plan_of(tensors, dtype=dtype).tensors:
        floating = tensor.name.startswith(("F", "BF")) and tensor.name != "F8_E8M0"
        assert tensor.dtype.torch_name == (dtype if floating else DTYPES[tensor.name].torch_name)
        assert tensor.source_dtype is DTYPES[tensor.name]


def test_floats_are_averaged_and_everything_else_is_not() -> None:
    tensors = {name: (name, (2,)) for name in DTYPES}
    for option, rule in (("equal", "equal"), ("last", "last")):
        for tensor in plan_of(tensors, non_float=option).tensors:
            averaged = tensor.name.startswith(("F", "BF", "C")) and tensor.name != "F8_E8M0"
            assert tensor.rule == ("mean" if averaged else rule), tensor.name


@pytest.mark.parametrize("prefix", ["", "layers.1.bn."])
def test_the_batch_counter_is_the_lasts_beside_running_statistics_alone(prefix: str) -> None:
    names = [prefix + name for name in ("running_mean", "running_var")]
    counter = prefix + "num_batches_tracked"
    plan = plan_of(dict.fromkeys(names, ("F32", (3,))) | {counter: ("I64", ()), "other": ("I64", ())})
    assert plan.batch_norm == (prefix.removesuffix("."),)
    assert {tensor.name: tensor.rule for tensor in plan.tensors} == {
        names[0]: "mean",
        names[1]: "mean",
        counter: "last",
        "other": "equal",
    }
    alone = plan_of({names[0]: ("F32", (3,)), counter: ("I64", ())})
    assert alone.batch_norm == ()
    assert alone.by_name()[counter].rule == "equal"


def test_a_checkpoint_without_tensors_is_refused() -> None:
    message = r"epoch_1\.pt: nothing to average: there are no named tensors"
    with pytest.raises(IncompatibleError, match=message) as error:
        plan_of({})
    assert error.value.exit_code == 4
