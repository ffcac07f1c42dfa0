"""`moments_of` and `Moments.pooled_with` against exact rational arithmetic, for every layout, dtype and piece size."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from batchnorm.oracles import all_at_once, assert_close, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckpt_avg.batchnorm import moments
from ckpt_avg.batchnorm.moments import Moments, moments_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def channels_of(values: Tensor) -> list[list[float]]:
    return [values.select(1, channel).double().flatten().tolist() for channel in range(values.shape[1])]


def exact(numbers: list[float]) -> tuple[Fraction, Fraction]:
    """Returns the mean and the centred sum of squares, without any rounding."""
    values = list(map(Fraction, numbers))
    mean = sum(values, Fraction()) / len(values)
    return mean, sum(((value - mean) ** 2 for value in values), Fraction())


def assert_exact(found: Moments, values: Tensor, tolerance: float = 1e-14) -> None:
    """The errors are no larger than if each value had been moved by a few roundings of the largest one."""
    channels = channels_of(values)
    assert found.mean.dtype == found.squares.dtype == torch.float64
    assert found.mean.shape == found.squares.shape == (values.shape[1],)
    assert found.count == len(channels[0])
    for channel, numbers in enumerate(channels):
        mean, squares = exact(numbers)
        magnitude = Fraction(max(map(abs, numbers)))
        assert abs(Fraction(found.mean[channel].item()) - mean) <= Fraction(tolerance) * magnitude
        away = math.sqrt(found.squares[channel].item()) - math.sqrt(squares)
        assert abs(away) <= tolerance * (math.sqrt(squares) + math.sqrt(len(numbers)) * float(magnitude))


@pytest.fixture(params=["as on the CPU", "as on CUDA"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures on the CPU with the operations of either device."""
    if request.param == "as on CUDA":
        monkeypatch.setattr(moments, "_moments_of_piece", moments._moments_in_few_kernels)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: randn(9, 4),
    "rows transposed": lambda: randn(4, 9).t(),
    "rows, every other": lambda: randn(18, 8)[::2, ::2],
    "rows expanded": lambda: randn(1, 4).expand(9, 4),
    "one channel": lambda: randn(9, 1),
    "sequences": lambda: randn(5, 4, 7),
    "sequences transposed": lambda: randn(5, 7, 4).transpose(1, 2),
    "sequences, time first": lambda: randn(7, 5, 4).permute(1, 2, 0),
    "sequences of length 1": lambda: randn(5, 4, 1),
    "images": lambda: randn(3, 4, 5, 2),
    "images channels last": lambda: randn(3, 4, 5, 2).to(memory_format=torch.channels_last),
    "images channels last, cropped": lambda: randn(3, 4, 5, 4).to(memory_format=torch.channels_last)[:, :, 1:4, ::2],
    "images channels last, some channels": lambda: randn(3, 8, 5, 2).to(memory_format=torch.channels_last)[:, 2:6],
    "images, every other sample": lambda: randn(6, 4, 5, 2)[::2],
    "images, every other channel": lambda: randn(3, 8, 5, 2)[:, ::2],
    "images cropped": lambda: randn(3, 4, 7, 5)[:, :, 2:5, 1::2],
    "images turned": lambda: randn(3, 4, 5, 2).transpose(2, 3),
    "images mirrored by index": lambda: randn(3, 4, 5, 2)[:, :, [4, 3, 2, 1, 0]],
    "images of one pixel": lambda: randn(6, 4, 1, 1),
    "images of one sample": lambda: randn(1, 4, 5, 2),
    "images of one channel": lambda: randn(3, 1, 5, 2).to(memory_format=torch.channels_last),
    "images expanded over samples": lambda: randn(1, 4, 5, 2).expand(3, 4, 5, 2),
    "images expanded over channels": lambda: randn(3, 1, 5, 2).expand(3, 4, 5, 2),
    "images expanded over positions": lambda: randn(3, 4, 1, 1).expand(3, 4, 5, 2),
    "volumes": lambda: randn(2, 4, 3, 2, 3),
    "volumes channels last": lambda: randn(2, 4, 3, 2, 3).to(memory_format=torch.channels_last_3d),
}


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype_is_measured_exactly(layout: str, dtype: torch.dtype) -> None:
    values = LAYOUTS[layout]()
    narrow = torch.empty_strided(values.shape, values.stride(), dtype=dtype)
    if 0 in values.stride():  # what is expanded stays so
        narrow = values.to(dtype).as_strided(values.shape, values.to(dtype).stride())
    else:
        narrow.copy_(3 * values + 0.5)
    before = narrow.clone()
    assert_exact(moments_of(narrow), narrow)
    assert torch.equal(narrow, before)


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 8, 20, 39, 40, 41, 119, 120, 121, 10**6])
@pytest.mark.parametrize("layout", ["rows", "sequences", "images", "images channels last", "images cropped"])
def test_the_pieces_add_up_wherever_they_are_cut(monkeypatch: pytest.MonkeyPatch, layout: str, piece: int) -> None:
    monkeypatch.setattr(moments, "_PIECE", piece)
    values = LAYOUTS[layout]() + 2
    assert_exact(moments_of(values), values)


@settings(deadline=None, max_examples=80)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 4),
    dimensions=st.integers(2, 4),
    order=st.permutations([0, 1, 2, 3]),
    piece=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_any_order_of_strides_is_measured_exactly(
    shape: tuple[int, ...], dimensions: int, order: list[int], piece: int, seed: int
) -> None:
    shape, order = shape[:dimensions], [axis for axis in order if axis < dimensions]
    permuted = randn(*(shape[axis] for axis in order), seed=seed)
    values = permuted.permute([order.index(axis) for axis in range(dimensions)])
    assert values.shape == shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_PIECE", piece)
        assert_exact(moments_of(values), values)


def test_values_beyond_the_size_of_a_piece_are_measured_piece_by_piece() -> None:
    """Split along samples, and along positions within a sample."""
    values = randn(2, 3, 1100, 1100) * 3 + 5
    assert values[0].numel() > moments._PIECE
    found, (mean, variance) = moments_of(values), all_at_once(values)
    assert_close(found.mean, mean)
    assert_close(found.variance, variance)


# -- Cancellation -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("offset", [1e6, -1e7, 1e8])
@pytest.mark.parametrize("layout", ["rows", "sequences", "images", "images channels last"])
@pytest.mark.parametrize("piece", [7, 10**6])
def test_a_far_offset_costs_no_digit_of_the_variance(
    monkeypatch: pytest.MonkeyPatch, layout: str, offset: float, piece: int
) -> None:
    """E[x²] − E[x]² would lose all of it: the squares are up to 10¹⁶ times the variance."""
    monkeypatch.setattr(moments, "_PIECE", piece)
    values = LAYOUTS[layout]().double() + offset
    found = moments_of(values)
    assert_exact(found, values)
    for channel, numbers in enumerate(channels_of(values)):
        # A piece that is looked at twice loses nothing; pooling loses what the means are rounded by.
        squares = float(exact(numbers)[1])
        assert found.squares[channel].item() == pytest.approx(squares, rel=1e-12 if piece > 7 else 1e-6)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("value", [0.0, 0.1, -1e8 + 0.7, 3e38, 1e-40])
@pytest.mark.parametrize("shape", [(70, 3), (7, 3, 5), (7, 3, 2, 5)])
@pytest.mark.parametrize("piece", [4, 10**6])
def test_a_constant_channel_has_next_to_no_variance(
    monkeypatch: pytest.MonkeyPatch, value: float, shape: tuple[int, ...], piece: int
) -> None:
    """The mean of equal numbers may miss them by a unit in the last place, and nothing more comes of it."""
    monkeypatch.setattr(moments, "_PIECE", piece)
    values = torch.full(shape, value)
    found = moments_of(values)
    one = values.flatten()[0].double()
    assert (found.mean - one).abs().le(4e-16 * one.abs()).all()
    assert found.variance.ge(0).all()
    assert found.variance.le((8e-16 * one) ** 2).all()


@pytest.mark.usefixtures("each_way")
def test_values_of_very_different_magnitude_share_a_batch() -> None:
    values = torch.stack([10.0**exponent * randn(50, seed=exponent) for exponent in range(-18, 19)], dim=1)
    assert_exact(moments_of(values), values)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("shape", [(1, 1, 700, 700), (490_000, 1), (2, 1, 245_000)])
@pytest.mark.parametrize("kind", ["binary", "two signs", "noise"])
def test_a_million_values_keep_twelve_digits(shape: tuple[int, ...], kind: str) -> None:
    """Two-valued activations (masks, binary images) round to the same side in every addition of a running sum."""
    numbers = torch.rand(490_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = {
        "binary": (numbers < 0.13).float(),
        "two signs": torch.where(torch.arange(490_000) % 2 == 0, 0.1, -0.1),
        "noise": numbers.float(),
    }[kind].view(shape)
    flat = values.double().flatten().tolist()
    mean = math.fsum(flat) / len(flat)
    squares = math.fsum((value - mean) ** 2 for value in flat)
    found = moments_of(values)
    assert abs(found.mean.item() - mean) <= 1e-13
    assert abs(found.squares.item() / squares - 1) <= 1e-12


# -- Pooling ----------------------------------------------------------------------------------------------------------


def pooled(parts: list[Moments]) -> Moments:
    found = parts[0]
    for part in parts[1:]:
        found = found.pooled_with(part)
    return found


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=3, max_size=8),
    offset=st.sampled_from([0.0, 10.0, -1e6]),
    seed=st.integers(0, 2**31),
)
def test_pooling_gives_the_same_in_any_order_and_grouping(sizes: list[int], offset: float, seed: int) -> None:
    values = randn(sum(sizes), 2, seed=seed).double() + offset
    parts = [moments_of(part) for part in values.split(sizes)]
    half = len(parts) // 2
    for found in (
        pooled(parts),
        pooled(parts[::-1]),
        pooled(parts[:half]).pooled_with(pooled(parts[half:])),
        pooled([parts[-1], *parts[:-1]]),
    ):
        assert_exact(found, values)


def test_pooling_leaves_both_operands_as_they_were() -> None:
    first, second = moments_of(randn(5, 3)), moments_of(randn(4, 3, seed=1))
    before = [tensor.clone() for each in (first, second) for tensor in (each.mean, each.squares)]
    first.pooled_with(second)
    after = [tensor for each in (first, second) for tensor in (each.mean, each.squares)]
    assert all(map(torch.equal, before, after))


def test_single_samples_pool_to_all_of_them() -> None:
    """Each has no spread of its own: all of it is between them."""
    values = randn(40, 3) + 1e4
    assert_exact(pooled([moments_of(row) for row in values.split(1)]), values)


def test_many_equal_sets_drift_nowhere() -> None:
    """Pooling a set with itself: the mean stays, the squares double."""
    one, other = moments_of(torch.tensor([[0.1], [0.4]])), moments_of(torch.tensor([[0.2], [0.7]]))
    both = exact([*torch.tensor([0.1, 0.4, 0.2, 0.7]).double().tolist()])
    found = one.pooled_with(other)
    for _ in range(14):  # doubled each time
        found = found.pooled_with(found)
    assert found.count == 4 * 2**14
    assert found.mean.item() == pytest.approx(float(both[0]), rel=1e-15)
    assert found.squares.item() == pytest.approx(float(both[1]) * 2**14, rel=1e-14)


def test_variances_are_divided_as_they_say() -> None:
    found = moments_of(torch.tensor([[1.0], [2.0], [6.0]]))
    assert (found.count, found.mean.item(), found.squares.item()) == (3, 3.0, 14.0)
    assert found.variance.item() == 7.0
    assert found.biased_variance.item() == pytest.approx(14 / 3, rel=1e-15)


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["rows", "images", "images channels last"])
@pytest.mark.parametrize("piece", [5, 10**6])
def test_one_nonfinite_value_makes_the_mean_of_its_channel_nonfinite(
    monkeypatch: pytest.MonkeyPatch, layout: str, value: float, piece: int
) -> None:
    """The refusal of NaN and Inf looks at the mean alone."""
    monkeypatch.setattr(moments, "_PIECE", piece)
    values = LAYOUTS[layout]().clone()
    values.select(0, 1).select(0, 2).fill_(value)
    finite = moments_of(values).mean.isfinite().tolist()
    assert finite == [True, True, False, True]


@pytest.mark.usefixtures("each_way")
def test_opposite_infinities_do_not_cancel() -> None:
    values = torch.tensor([[math.inf], [-math.inf], [1.0]])
    assert not moments_of(values).mean.isfinite().any()


def test_the_input_is_not_written_to() -> None:
    """A float64 input needs no widening; it must be copied all the same."""
    for values in (randn(6, 3).double(), randn(6, 3, 2, 2).double(), randn(2, 3, 2, 2).double().transpose(2, 3)):
        before = values.clone()
        moments_of(values)
        assert torch.equal(values, before)
