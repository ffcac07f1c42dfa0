"""The plan: rules, dtypes, offsets and tasks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_avg.checkpoint.spec import DTYPES, CheckpointSpec, TensorSpec, contiguous_stride
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.mean.plan import OUTPUT_DTYPES, Plan, make_plan

# As the reference implementation declares its dtypes; data sections are sorted by falling rank.
REFERENCE = [
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
]


def spec_of(*tensors: tuple[str, str, tuple[int, ...]]) -> CheckpointSpec:
    """A checkpoint of (name, dtype, shape); where its bytes lie does not matter here."""
    return CheckpointSpec(
        Path("run/epoch_1.pt"),
        "torch zip",
        {
            name: TensorSpec(name, DTYPES[dtype], shape, contiguous_stride(shape), 0, 0, (0, 0))
            for name, dtype, shape in tensors
        },
    )


Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name → dtype and shape
shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
kinds = st.tuples(st.sampled_from(sorted(DTYPES)), shapes)
# No surrogates, which UTF-8 has not, and no scales, beside which float8 tensors are refused.
names = st.text(st.characters(codec="utf-8"), max_size=6).filter(lambda name: "scale" not in name)
specs = st.dictionaries(names, kinds, min_size=1, max_size=12)


def plan_of(tensors: Tensors, **options: str) -> Plan:
    return make_plan([spec_of(*((name, *what) for name, what in tensors.items()))], **options)


@given(tensors=specs, dtype=st.sampled_from(OUTPUT_DTYPES))
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


@given(tensors=specs)
@settings(max_examples=50, deadline=None)
def test_the_order_of_the_checkpoint_does_not_matter(tensors: Tensors) -> None:
    shuffled = list(tensors.items())
    random.Random(0).shuffle(shuffled)
    assert plan_of(tensors).tensors == plan_of(dict(shuffled)).tensors


@given(tensors=specs, elements=st.integers(1, 500))
@settings(max_examples=200, deadline=None)
def test_tasks_cover_every_element_once_and_lie_side_by_side(tensors: Tensors, elements: int) -> None:
    plan = plan_of(tensors)
    tasks = list(plan.tasks(elements))
    covered = [
        (piece.tensor.name, index) for task in tasks for piece in task for index in range(piece.start, piece.stop)
    ]
    assert covered == [(tensor.name, index) for tensor in plan.tensors for index in range(tensor.numel)]
    end = 0
    for task in tasks:
        assert 0 < sum(piece.stop - piece.start for piece in task) <= elements
        for piece in task:
            assert piece.tensor.offset + piece.start * piece.tensor.dtype.itemsize == end
            end = piece.tensor.offset + piece.stop * piece.tensor.dtype.itemsize
    assert end == plan.nbytes
    assert all(sum(piece.stop - piece.start for piece in task) == elements for task in tasks[:-1])


@pytest.mark.parametrize("dtype", [dtype for dtype in OUTPUT_DTYPES if dtype != "keep"])
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
    plan = make_plan([spec_of(*((name, "F32", (3,)) for name in names), (counter, "I64", ()), ("other", "I64", ()))])
    assert plan.batch_norm == (prefix.removesuffix("."),)
    assert {tensor.name: tensor.rule for tensor in plan.tensors} == {
        names[0]: "mean",
        names[1]: "mean",
        counter: "last",
        "other": "equal",
    }
    alone = make_plan([spec_of((names[0], "F32", (3,)), (counter, "I64", ()))])
    assert alone.batch_norm == ()
    assert alone.by_name()[counter].rule == "equal"


def test_a_checkpoint_without_tensors_is_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"epoch_1\.pt: nothing to average: expected .*, got none") as error:
        make_plan([spec_of()])
    assert error.value.exit_code == 4


def test_float8_with_scales_is_refused_with_each_name() -> None:
    tensors = [
        (f"layer{i}.{name}", dtype, (2,)) for i in range(3) for name, dtype in (("w", "F8_E4M3"), ("w_scale", "F32"))
    ]
    with pytest.raises(IncompatibleError, match=r"'layer0\.w', 'layer1\.w', 'layer2\.w'\. Average .* before"):
        make_plan([spec_of(*tensors)])


def test_a_plan_of_empty_tensors_has_no_tasks() -> None:
    plan = plan_of({"a": ("F32", (0,)), "b": ("I64", (3, 0))})
    assert plan.nbytes == 0
    assert list(plan.tasks(10)) == []
