"""Plans of arbitrary tensors, without files."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from ckpt_avg.checkpoint.spec import DTYPES, CheckpointSpec, TensorSpec, contiguous_stride
from ckpt_avg.mean.plan import Plan, make_plan

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # name → dtype and shape
_shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
_kinds = st.tuples(st.sampled_from(sorted(DTYPES)), _shapes)
# No surrogates, which UTF-8 does not have, and no scales, with which float8 tensors are refused.
_names = st.text(st.characters(codec="utf-8"), max_size=6).filter(lambda name: "scale" not in name)
tensors = st.dictionaries(_names, _kinds, min_size=1, max_size=12)


def spec_of(tensors: Tensors) -> CheckpointSpec:
    """A checkpoint of these tensors; where their bytes are stored does not matter here."""
    specs = {
        name: TensorSpec(name, DTYPES[dtype], shape, contiguous_stride(shape), 0, 0, (0, 0))
        for name, (dtype, shape) in tensors.items()
    }
    return CheckpointSpec(Path("run/epoch_1.pt"), "torch zip", specs)


def plan_of(tensors: Tensors, **options: str) -> Plan:
    return make_plan([spec_of(tensors)], **options)
