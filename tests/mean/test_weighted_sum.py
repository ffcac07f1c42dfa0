"""Weighted means of both engines: the same bits, within the bound of a float64 sum, and no silent overflow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from mean.inputs import bits, save

from ckpt_avg import NonFiniteError
from ckpt_avg.formats.open import open_checkpoint
from ckpt_avg.mean.arithmetic import round_to
from ckpt_avg.mean.memory_output import MemoryOutput
from ckpt_avg.mean.plan import make_plan
from ckpt_avg.mean.stream import Mean, write_means

REAL = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float8_e4m3fn),
    *(torch.float8_e5m2fnuz, torch.float8_e4m3fnuz),
]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(params=["native", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native":
        pytest.importorskip("ckpt_avg._kernel", reason="the native engine was not built here")
    monkeypatch.setenv("CKPT_AVG_ENGINE", request.param)
    return str(request.param)


def weighted(
    paths: Sequence[Path],
    *weights: Sequence[float] | None,
    dtype: str = "keep",
    memory: int = 2**24,
    allow_nonfinite: bool = False,
) -> list[Tensors]:
    """The means of all checkpoints with each of these weights, computed in one pass."""
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(path)) for path in paths]
        plan = make_plan([checkpoint.spec for checkpoint in checkpoints], dtype=dtype)
        outputs = [MemoryOutput(plan) for _ in weights]
        means = [Mean(range(len(paths)), output.write, each) for output, each in zip(outputs, weights, strict=True)]
        write_means(checkpoints, plan, means, device="cpu", threads=2, memory=memory, allow_nonfinite=allow_nonfinite)
        return [{name: values.clone() for name, values in output.tensors().items()} for output in outputs]


def by_both_engines(monkeypatch: pytest.MonkeyPatch, paths: Sequence[Path], *weights: Any, **options: Any) -> None:
    pytest.importorskip("ckpt_avg._kernel", reason="the native engine was not built here")
    made = []
    for engine in ("native", "torch"):
        monkeypatch.setenv("CKPT_AVG_ENGINE", engine)
        made.append(weighted(paths, *weights, **options))
    for native, torchs in zip(*made, strict=True):
        for name, values in native.items():
            assert bits(values) == bits(torchs[name]), name


def any_bits(numel: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)


def finite(numel: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    values = any_bits(numel, dtype, generator)
    codes = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    return codes.masked_fill(values.double().isfinite().logical_not(), 0).view(dtype)


def random_weights(number: int, seed: int) -> list[float]:
    """Of both signs and many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randint(-12, 3, (number,), generator=generator, dtype=torch.float64)
    return (torch.randn(number, generator=generator, dtype=torch.float64) * 10**scale).tolist()


@pytest.mark.guarantee("same-bytes")
@pytest.mark.parametrize("number", [1, 2, 5, 9])
@pytest.mark.parametrize("dtype", ["keep", "float64", "float32", "bfloat16", "float16"])
def test_both_engines_give_the_same_bytes_for_any_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, dtype: str
) -> None:
    """NaN, infinities, sums out of range, zeros of both signs; weights that nobody would choose; two means at once."""
    generator = torch.Generator().manual_seed(number)
    kinds = [*REAL, torch.complex64]
    for make in (any_bits, finite):
        states = [
            {str(each): make(2_503, each, generator) for each in kinds if each.is_floating_point or make is any_bits}
            for _ in range(number)
        ]
        for state in states[1:]:  # elements that are equal in all inputs
            for name, values in state.items():
                values[:500] = states[0][name][:500]
        paths = save(tmp_path, states)
        extreme = [(-1) ** index * (1e-300, 1e300, 5e-324)[index % 3] for index in range(number)]
        options = {"dtype": dtype, "allow_nonfinite": True}
        by_both_engines(monkeypatch, paths, random_weights(number, number), extreme, None, **options)


def test_both_engines_give_the_same_bytes_wherever_the_elements_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transposed, in another order, of several dtypes, larger than a window; one mean, and two of one block."""
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        kind = (torch.float32, torch.bfloat16, torch.float64)[index]
        state = {
            "transposed": torch.randn(500, 700, generator=generator).t(),
            **{f"small {name}": torch.randn(37, generator=generator).to(kind) for name in range(20)},
            "plain": torch.randn(80_000, generator=generator).to(kind),
        }
        names = list(state) if index else list(reversed(state))
        torch.save({name: state[name] for name in names}, tmp_path / f"{index}.pt")
    paths = [tmp_path / f"{index}.pt" for index in range(3)]
    for weights in ([[0.2, -0.7, 1.5]], [[0.2, -0.7, 1.5], [0.1, 0.1, 0.8]]):
        by_both_engines(monkeypatch, paths, *weights, dtype="float32", memory=2**20)


@pytest.mark.parametrize("number", [1, 2, 9])
def test_the_error_is_within_the_bound(tmp_path: Path, engine: str, number: int) -> None:
    """Of the float64 sum; the output is that sum, rounded once."""
    generator = torch.Generator().manual_seed(number)
    states = []
    for _ in range(number):
        state = {str(each): finite(300, each, generator) for each in REAL}
        for name in ("torch.float64", "torch.float32"):  # of which the products would overflow or underflow
            state[name] = torch.randn(300, generator=generator).to(state[name].dtype)
        states.append(state)
    paths = save(tmp_path, states)
    weights = random_weights(number, number + 1)
    [sums] = weighted(paths, weights, dtype="float64")
    unit = Fraction(1, 2**53)
    relative = number * unit / (1 - number * unit)
    for name, found in sums.items():
        columns = zip(*(state[name].double().tolist() for state in states), strict=True)
        for value, column in zip(found.tolist(), columns, strict=True):
            products = [Fraction(weight) * Fraction(each) for weight, each in zip(weights, column, strict=True)]
            error = abs(Fraction(value) - sum(products))
            assert error <= relative * sum(map(abs, products)) + number * Fraction(1, 2**1075), (name, column)
    [kept] = weighted(paths, weights, allow_nonfinite=True)
    for name, values in kept.items():
        expected = round_to(sums[name], values.dtype)
        assert bits(values) == bits(expected) or values.double().equal(expected.double()), name


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.5, -0.5], [-0.5, 1.5]])
def test_zeros_have_the_sign_of_a_sum_in_ieee_754(tmp_path: Path, engine: str, weights: list[float]) -> None:
    zeros = [0.0, -0.0]
    paths = save(tmp_path, [{"w": torch.tensor([0.0, 0.0, -0.0, -0.0])}, {"w": torch.tensor([0.0, -0.0] * 2)}])
    [found] = weighted(paths, weights)
    expected = [weights[0] * a + weights[1] * b for a in zeros for b in zeros]
    assert [math.copysign(1, each) for each in found["w"].tolist()] == [math.copysign(1, each) for each in expected]


@pytest.mark.parametrize(
    ("dtype", "values", "weights"),
    [
        (torch.float32, (3e38, -3e38), (1.5, -0.5)),
        (torch.bfloat16, (3e38, -3e38), (1.5, -0.5)),
        (torch.float16, (6e4, -6e4), (1.5, -0.5)),
        (torch.float8_e5m2, (5e4, -5e4), (1.5, -0.5)),
        (torch.float8_e4m3fn, (448, -448), (1.5, -0.5)),
        (torch.float8_e4m3fnuz, (240, -240), (-0.5, 1.5)),
    ],
    ids=str,
)
def test_a_mean_out_of_range_is_refused(
    tmp_path: Path, engine: str, dtype: torch.dtype, values: tuple[float, float], weights: tuple[float, float]
) -> None:
    """Weights of both signs leave the range of the inputs, also if the output has their dtype."""
    states = [{"w": torch.zeros(3_000).index_fill(0, torch.tensor([2_000]), value).to(dtype)} for value in values]
    paths = save(tmp_path, states)
    with pytest.raises(NonFiniteError, match=r"tensor 'w': the mean -?[\d.e+]+ at index 2,000 is out of the range of"):
        weighted(paths, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64])
def test_a_sum_that_overflows_is_not_called_nan_in_the_inputs(tmp_path: Path, engine: str, dtype: torch.dtype) -> None:
    for weights in ((1e300, 1.0), (1e300, -1e300)):
        paths = save(
            tmp_path, [{"w": torch.full((50,), 1e30, dtype=dtype)}, {"w": torch.full((50,), 1e31, dtype=dtype)}]
        )
        with pytest.raises(NonFiniteError, match=r"tensor 'w': all values are finite, but their sum with"):
            weighted(paths, weights)


def test_an_infinity_in_all_inputs_is_kept(tmp_path: Path, engine: str) -> None:
    """A mask: minus infinity, times weights of both signs, would be NaN."""
    mask = torch.full((40, 40), -math.inf).triu(1)
    paths = save(tmp_path, [{"mask": mask, "w": torch.ones(5)} for _ in range(3)])
    [found] = weighted(paths, [-0.5, 0.25, 1.25])
    assert found["mask"].equal(mask)


def test_an_infinity_in_one_input_is_named(tmp_path: Path, engine: str) -> None:
    states = [{"w": torch.ones(5)} for _ in range(3)]
    states[1]["w"][3] = math.inf
    with pytest.raises(NonFiniteError, match=r"1\.safetensors: 1 of 5 elements, the first at index 3"):
        weighted(save(tmp_path, states), [-0.5, 0.25, 1.25])


@pytest.mark.parametrize(
    "weights", [[1.0], [0.5, 0.25, 0.25], [1.0, 0.0], [1.0, -0.0], [math.nan, 1.0], [math.inf, 1.0]]
)
def test_weights_that_no_sum_has_are_refused(weights: list[float]) -> None:
    """What counts zero is not read; it is no input."""
    with pytest.raises(ValueError, match="weights that are not finite, or zero, or not one for each checkpoint"):
        Mean([0, 1], lambda contents, offset: None, weights)
