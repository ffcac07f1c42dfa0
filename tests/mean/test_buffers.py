"""Tensors that are no plain weights: each kind as real libraries store it, and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mean.inputs import save
from mean.plans import plan_of, spec_of
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune

from ckpt_avg import AverageResult, IncompatibleError, average, check, verify
from ckpt_avg.mean.arithmetic import round_to
from ckpt_avg.mean.buffers import KINDS, kinds_of, markdown
from ckpt_avg.mean.plan import make_plan

State = dict[str, Tensor]


def mean_of(folder: Path, states: list[State], **options: Any) -> tuple[State, AverageResult]:
    paths = save(folder, states, ".pt")
    result = average(paths, folder / "mean", **options)
    assert verify(folder / "mean", sources=paths).measured == ()
    return load_file(folder / "mean"), result


def refusal_of(folder: Path, states: list[State], **options: Any) -> str:
    with pytest.raises(IncompatibleError) as error:
        average(save(folder, states, ".pt"), folder / "mean", **options)
    assert error.value.exit_code == 4
    assert not (folder / "mean").exists()
    return str(error.value)


def kinds(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, str]:
    spec = spec_of({name.replace("__", "."): what for name, what in tensors.items()})
    return {name: kind.name for name, kind in kinds_of(spec.tensors).items()}


def test_the_table_is_in_the_docs() -> None:
    """The page shows what the code does, and no kind is left without a word."""
    docs = Path(__file__).parents[2] / "docs" / "how-it-works.md"
    assert markdown() in docs.read_text()


# -- Quantised weights ------------------------------------------------------------------------------------------------

FLOAT, INT = torch.float32, torch.int32
QUANTIZED: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
    "GPTQ": {
        "qweight": (INT, (4, 8)),
        "qzeros": (INT, (1, 1)),
        "scales": (torch.float16, (1, 8)),
        "g_idx": (INT, (32,)),
    },
    "bitsandbytes int8": {"weight": (torch.int8, (8, 4)), "SCB": (FLOAT, (8,))},
    "bitsandbytes NF4": {"weight": (torch.uint8, (16, 1)), "weight.absmax": (FLOAT, (2,))},
    "nested absmax": {
        "weight": (torch.uint8, (16, 1)),
        "weight.absmax": (torch.uint8, (2,)),
        "weight.nested_absmax": (FLOAT, (1,)),
    },
    "compressed-tensors": {"weight_packed": (INT, (4, 1)), "weight_scale": (torch.bfloat16, (4, 1))},
    "zero points": {
        "weight": (torch.int8, (4, 4)),
        "weight_scale": (FLOAT, (4, 1)),
        "weight_zero_point": (torch.int8, (4, 1)),
    },
    "MXFP4": {"gate_up_proj_blocks": (torch.uint8, (2, 4, 16)), "gate_up_proj_scales": (torch.uint8, (2, 4))},
    "torchao": {"_weight_qdata": (torch.int8, (4, 4)), "_weight_scale": (FLOAT, (4,))},
    "quanto": {"weight._data": (torch.int8, (4, 4)), "weight._scale": (FLOAT, (4, 1))},
    "HQQ": {"W_q": (torch.uint8, (4, 4)), "scale": (FLOAT, (4, 1)), "zero": (FLOAT, (4, 1))},
    "AQLM": {"codes": (torch.int16, (4, 4, 1)), "codebooks": (FLOAT, (1, 16, 1, 8)), "scales": (FLOAT, (4, 1))},
    "float8, w_scale": {"w": (torch.float8_e4m3fn, (2,)), "w_scale": (FLOAT, ())},
    "float8, scale": {"w": (torch.float8_e4m3fn, (2,)), "scale": (FLOAT, ())},
    "float8, inverse": {"weight": (torch.float8_e4m3fn, (4, 4)), "weight_scale_inv": (FLOAT, (1, 1))},
    "float8, of the input": {"weight": (torch.float8_e4m3fn, (4, 4)), "input_scale": (FLOAT, ())},
    "float8, inside": {"weight": (torch.float8_e5m2, (4, 4)), "weight.scale": (FLOAT, ())},
    "float8, inside, private": {"weight": (torch.float8_e4m3fn, (4, 4)), "weight._scale": (FLOAT, ())},
    "float8, amax": {"weight": (torch.float8_e4m3fn, (4, 4)), "weight_amax": (FLOAT, ())},
}


def quantized(name: str, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)

    def values(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if dtype.is_floating_point:
            return (torch.rand(shape, generator=generator) + 0.5).to(dtype)
        return torch.randint(0, 100, shape, generator=generator).to(dtype)

    state = {f"layer.{each}": values(*what) for each, what in QUANTIZED[name].items()}
    return state | {"norm.weight": torch.rand(4, generator=generator)}


@pytest.mark.guarantee("float8")
@pytest.mark.parametrize("non_float", ["equal", "last"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_weights_that_differ_are_refused_whatever_the_option(
    tmp_path: Path, name: str, non_float: str
) -> None:
    """The last one's codes with the mean of the scales are a quarter off."""
    message = refusal_of(tmp_path, [quantized(name, seed) for seed in (0, 1)], non_float=non_float)
    first = next(iter(QUANTIZED[name]))
    assert f"tensor 'layer.{first}': first at index " in message
    assert "Average the checkpoints before quantisation." in message
    assert "--non-float" not in message


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantised_weights_that_are_equal_are_copied(tmp_path: Path, name: str) -> None:
    """As those below an adapter that is trained: only what differs is averaged, and no code changes its dtype."""
    states = [quantized(name, 0) | {"norm.weight": torch.full((4,), value)} for value in (0.25, 0.75)]
    found, result = mean_of(tmp_path, states, dtype="float32")
    for each, (dtype, _) in QUANTIZED[name].items():
        wanted = states[0][f"layer.{each}"]
        assert found[f"layer.{each}"].float().equal(wanted.float()), each
        assert found[f"layer.{each}"].dtype == (FLOAT if dtype in (torch.float16, torch.bfloat16) else dtype)
    assert found["norm.weight"].tolist() == [0.5] * 4
    assert any("must be the same in every checkpoint: " in notice for notice in result.notices)


def test_an_integer_table_next_to_a_scale_of_something_else_is_no_quantised_weight() -> None:
    """As the relative positions and the logit scale of one attention layer."""
    found = kinds(
        attn__relative_position_index=("I64", (49, 49)),
        attn__logit_scale=("F32", (4, 1, 1)),
        norm__scale=("F32", (4,)),
        other__weight=("F8_E4M3", (4,)),
        bn__num_batches_tracked=("I64", ()),
        bn__scale=("F32", (4,)),
    )
    assert found == {
        "attn.relative_position_index": "integers and bools",
        "bn.num_batches_tracked": "integers and bools",
    }


def test_the_weight_next_to_a_scale_and_its_zero_point_is_averaged() -> None:
    """As layers that quantise their activations store it; and at the root, where every tensor is below."""
    tensors = {"scale": ("F32", (1,)), "zero_point": ("I32", (1,)), "weight": ("F32", (3, 3)), "a.w": ("F32", (3,))}
    for prefix in ("", "layer."):
        found = kinds_of(spec_of({prefix + name: what for name, what in tensors.items()}).tensors)
        assert {name for name, kind in found.items() if kind.name == "fake quantisation"} == {
            f"{prefix}scale",
            f"{prefix}zero_point",
        }


def test_fake_quantisation_is_the_lasts(tmp_path: Path) -> None:
    """A scale belongs to its zero point: both come from one checkpoint, as torch stores them while it trains."""
    layer = torch.ao.quantization.FakeQuantize()
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        layer(torch.rand(50) + seed)
        states.append({f"act.{name}": value.clone() for name, value in layer.state_dict().items()})
    found, result = mean_of(tmp_path, states)
    for name, value in states[2].items():
        assert torch.equal(found[name], value), name
    assert any("of fake quantisation copied from the last checkpoint" in notice for notice in result.notices)


# -- Masks ------------------------------------------------------------------------------------------------------------


def test_a_flag_that_was_set_is_refused(tmp_path: Path) -> None:
    """A third of a flag is no flag."""
    assert "1 mask differs" in refusal_of(tmp_path, [{"q.inited": torch.tensor([value])} for value in (0.0, 1.0, 1.0)])


@pytest.mark.parametrize("name", ["weight_mask", "gates"])
def test_a_mask_that_is_all_ones_at_first_is_one(tmp_path: Path, name: str) -> None:
    """As before gradual pruning begins."""
    later = torch.ones(10_000)
    later[::7] = 0
    message = refusal_of(tmp_path, [{name: torch.ones(10_000)}, {name: later}])
    assert f"tensor '{name}': first at index 0" in message


def pruned(amount: float, seed: int = 0) -> State:
    torch.manual_seed(seed)
    layer = nn.Linear(30, 30)
    prune.l1_unstructured(layer, "weight", amount)
    return {name: value.clone() for name, value in layer.state_dict().items()}


@pytest.mark.guarantee("integers")
def test_masks_that_differ_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    message = refusal_of(tmp_path, [pruned(0.3), pruned(0.5)])
    assert "1 mask differs in other checkpoints" in message
    assert "tensor 'weight_mask': first at index " in message
    assert "Use --non-float last to copy the last checkpoint's." in message


@pytest.mark.guarantee("integers")
@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_masks_may_be_the_lasts(tmp_path: Path, dtype: str) -> None:
    states = [pruned(0.3, 1), pruned(0.5, 2)]
    found, _ = mean_of(tmp_path, states, non_float="last", dtype=dtype)
    assert found["weight_mask"].float().equal(states[1]["weight_mask"])
    wanted = (states[0]["weight_orig"].double() + states[1]["weight_orig"].double()) / 2
    assert found["weight_orig"].equal(round_to(wanted, found["weight_orig"].dtype))


def test_zeros_and_ones_that_are_no_mask_are_averaged(tmp_path: Path) -> None:
    """A gate that was 0 in one checkpoint and 1 in the other, and a tensor that only begins with zeros."""
    late = torch.zeros(2_000_000)
    late[-1] = 0.5
    states = [
        {"gate": torch.zeros(3), "late": late, "same": torch.tensor([0.0, 1.0])},
        {"gate": torch.ones(3), "late": late.sign(), "same": torch.tensor([0.0, 1.0])},
    ]
    found, _ = mean_of(tmp_path, states)
    assert found["gate"].tolist() == [0.5] * 3
    assert found["late"][-1] == 0.75
    assert found["same"].tolist() == [0.0, 1.0]


# -- Other kinds ------------------------------------------------------------------------------------------------------


class RunningMeanStd(nn.Module):
    """As reinforcement learning normalises its observations."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.rand(3, dtype=torch.float64))
        self.register_buffer("count", torch.rand((), dtype=torch.float64))


def test_statistics_of_the_inputs_are_the_lasts_and_no_batch_norm(tmp_path: Path) -> None:
    """They would ask for a model and data of a refresh that cannot compute them."""
    states = [nn.ModuleDict({"obs": RunningMeanStd()}).state_dict() for _ in range(3)]
    found, result = mean_of(tmp_path, states)
    assert result.statistics == "none"
    for name, value in states[2].items():
        assert torch.equal(found[name], value), name
    assert any("3 tensors with statistics of the inputs copied from the last" in notice for notice in result.notices)


CASES: dict[str, tuple[dict[str, tuple[str, tuple[int, ...]]], str, set[str]]] = {
    "empirical normalisation": (
        {"n._mean": ("F32", (1, 3)), "n._var": ("F32", (1, 3)), "n._std": ("F32", (1, 3)), "n.count": ("I64", ())},
        "input statistics",
        {"n._mean", "n._var", "n._std", "n.count"},
    ),
    "skrl's scaler": (
        {"s.running_mean": ("F64", (3,)), "s.running_variance": ("F64", (3,)), "s.current_count": ("F64", ())},
        "input statistics",
        {"s.running_mean", "s.running_variance", "s.current_count"},
    ),
    "a mean and a count of something else": (
        {"m.mean": ("F32", (3,)), "m.count": ("F32", ()), "m.var": ("F32", (2,)), "n.std": ("F32", (3,))},
        "input statistics",
        set(),
    ),
    "BatchNorm that counts": (
        {"b.running_mean": ("F32", (3,)), "b.running_var": ("F32", (3,)), "b.num_batches_tracked": ("I64", ())},
        "batch counters",
        {"b.num_batches_tracked"},
    ),
    "EvoNorm": ({"e.running_var": ("F32", (3,)), "e.v": ("F32", (3,))}, "other running statistics", {"e.running_var"}),
    "MoCo": (
        {"m.queue": ("F32", (8, 16)), "m.queue_ptr": ("I64", (1,)), "other_ptr": ("I64", (1,))},
        "queues",
        {"m.queue", "m.queue_ptr"},
    ),
    "memory bank": ({"memory_bank": ("F32", (8, 16)), "filter_bank": ("F32", (8,))}, "queues", {"memory_bank"}),
    "counters": (
        {
            "ema.num_updates": ("I32", ()),
            "global_step": ("F32", ()),
            "step": ("I64", (1,)),
            "q.step": ("F32", ()),
        },
        "counters",
        {"ema.num_updates", "global_step", "step"},
    ),
    "codebook": (
        {"q.embed": ("F32", (8, 4)), "q.embed_avg": ("F32", (8, 4)), "q.cluster_size": ("F32", (8,))},
        "codebooks",
        {"q.embed_avg"},
    ),
    "a scale inside": ({"q.W_q": ("U8", (4, 8)), "q.meta.scale": ("F16", (4, 1))}, "other integer tables", {"q.W_q"}),
    "marlin": ({"q.B": ("I32", (4, 8)), "q.s": ("F16", (1, 8))}, "other integer tables", {"q.B"}),
    "SmoothQuant": (
        {"l.weight": ("I8", (4, 8)), "l.bias": ("I8", (1, 8)), "l.a": ("F32", ()), "l.b": ("F32", ())},
        "other integer tables",
        {"l.weight", "l.bias"},
    ),
    "no codes": (
        {
            "table": ("I32", (3, 3)),
            "value": ("F32", ()),
            "a.ids": ("I64", (1, 9)),
            "a.m": ("BOOL", (3, 3)),
            "a.x": ("F32", ()),
            "n.weight": ("F32", (3,)),
        },
        "other integer tables",
        set(),
    ),
    "random states": (
        {"cuda_rng_state": ("U8", (16,)), "range": ("U8", (1,)), "rng_state.weight": ("F32", (2, 2))},
        "random states",
        {"cuda_rng_state"},
    ),
    "weight norm": (
        {"c.weight_g": ("F32", (4, 1, 1)), "c.weight_v": ("F32", (4, 3, 3)), "d.bias_g": ("F32", (4,))},
        "weight norm",
        {"c.weight_g"},
    ),
    "weight norm, parametrization": (
        {"p.weight.original0": ("F32", (4, 1)), "p.weight.original1": ("F32", (4, 3))},
        "weight norm",
        {"p.weight.original0"},
    ),
    "adapter scales": (
        {"u.alpha": ("F32", ()), "u.lora_down.weight": ("F32", (2, 4)), "snake.alpha": ("F32", (4,))},
        "adapter scales",
        {"u.alpha"},
    ),
    "adapter scales, embedding": (
        {"u.alpha": ("F32", ()), "u.lora_embedding_A": ("F32", (2, 4)), "snake.alpha": ("F32", (4,))},
        "adapter scales",
        {"u.alpha"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_kind_is_recognised_and_nothing_else_is(case: str) -> None:
    tensors, kind, names = CASES[case]
    found = kinds_of(spec_of(tensors).tensors)
    assert {name for name, each in found.items() if each.name == kind} == names
    rules = {tensor.name: tensor.rule for tensor in plan_of(tensors).tensors}
    assert {rules[name] for name in names} <= {each.rule for each in KINDS if each.name == kind}


def test_weight_norm_is_averaged_with_a_notice(tmp_path: Path) -> None:
    states = [nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).state_dict() for _ in range(2)]
    _, result = mean_of(tmp_path, states)
    assert any(notice.startswith("1 weight with weight norm: lengths and directions") for notice in result.notices)


def test_adapter_scales_that_differ_are_refused(tmp_path: Path) -> None:
    states = [{"u.alpha": torch.tensor(alpha), "u.lora_down.weight": torch.rand(2, 4)} for alpha in (4.0, 8.0)]
    message = refusal_of(tmp_path, states, non_float="last")
    assert "1 adapter scale differs in other checkpoints" in message
    assert "Merge each adapter into its model first" in message


def test_extra_state_of_another_length_is_the_lasts(tmp_path: Path) -> None:
    """As TransformerEngine's, which grows during a run."""
    states = [{"l._extra_state": torch.arange(size).to(torch.uint8), "w": torch.rand(3)} for size in (5, 9, 7)]
    found, result = mean_of(tmp_path, states)
    assert found["l._extra_state"].tolist() == list(range(7))
    assert any("1 tensor with extra state copied from the last checkpoint" in notice for notice in result.notices)
    assert check(save(tmp_path, states, ".pt")).compatible


def test_infinity_in_extra_state_of_another_length_is_refused(tmp_path: Path) -> None:
    """It is no constant, and to find that out is no crash."""
    states = [{"l._extra_state": torch.full((size,), float("inf"))} for size in (5, 7)]
    assert "tensor 'l._extra_state': NaN or Inf" in refusal_of(tmp_path, states)


def test_nan_in_a_tensor_that_is_copied_is_refused(tmp_path: Path) -> None:
    states = [{"queue": torch.rand(4), "queue_ptr": torch.tensor([n])} for n in range(2)]
    states[1]["queue"][3] = float("nan")
    assert "tensor 'queue': NaN or Inf" in refusal_of(tmp_path, states)


# -- dtypes that differ -----------------------------------------------------------------------------------------------


@pytest.mark.guarantee("differences")
def test_float_dtypes_that_differ_are_refused_without_a_dtype_for_the_output(tmp_path: Path) -> None:
    states = [{"w": torch.rand(3)}, {"w": torch.rand(3).bfloat16()}]
    assert "Add --dtype float32" in refusal_of(tmp_path, states)
    states[1]["w"] = torch.tensor([1, 2, 3])
    assert "Save all checkpoints in one dtype." in refusal_of(tmp_path, states, dtype="float32")


@pytest.mark.parametrize("target", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("widest", [torch.float64, torch.float32, torch.float16, torch.float8_e5m2])
def test_float_dtypes_that_differ_are_averaged_exactly(tmp_path: Path, widest: torch.dtype, target: str) -> None:
    """Each checkpoint is widened without loss; tensors of two dtypes that are next to each other are read apart."""
    torch.manual_seed(0)
    dtypes = [(torch.bfloat16, widest), (widest, widest), (widest, torch.bfloat16)]
    states = [{f"w.{n}": torch.rand(50).to(dtype) for n, dtype in enumerate(pair)} for pair in dtypes]
    average(save(tmp_path, states), tmp_path / "mean", dtype=target)
    found = load_file(tmp_path / "mean")
    for name in states[0]:
        total = sum(state[name].double() for state in states)
        assert torch.equal(found[name], round_to(total / 3, getattr(torch, target))), name


def test_the_source_dtype_contains_the_values_of_all() -> None:
    for others, expected in ((("BF16", "F16"), "F32"), (("BF16", "F64"), "F64"), (("F8_E4M3", "F8_E5M2"), "F32")):
        specs = [spec_of({"w": (dtype, (2,))}) for dtype in others]
        assert make_plan(specs, dtype="bfloat16").tensors[0].source_dtype.name == expected


@pytest.mark.parametrize(
    "forms",
    [
        ("m{}.count", "m{}.mean"),
        ("a.x{}_mean", "a.x{}_count"),
        ("q{}_a_b_c_d_e_f_g_h", "r{}_scale"),
        ("m{}.zero_point", "m{}.scale"),
        ("w{}_u", "w{}_orig"),
    ],
)
def test_names_chosen_against_it_take_linear_time(in_time: None, forms: tuple[str, str]) -> None:
    """Comparing each with each would take hours for a header that is read in a second."""
    tensors = {form.format(number): ("I8", (1, 1)) for form in forms for number in range(12_000)}
    kinds_of(spec_of(tensors).tensors)
