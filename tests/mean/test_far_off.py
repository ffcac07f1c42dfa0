"""What counts as far off: never an ordinary run, always one that a spike or another run has got into."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch

from ckpt_avg.mean.far_off import DETOUR, detours, jump, related_groups
from ckpt_avg.mean.geometry import Matrix

WEIGHTS = 1000
Path = tuple[torch.Tensor, Sequence[int]]  # checkpoints, and their steps


def start(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(WEIGHTS, generator=generator, dtype=torch.float64)


def walk(
    steps: Sequence[int],
    rate: Callable[[float], float],
    generator: torch.Generator,
    drift: float = 0.0,
    pace: float = 0.01,
) -> Path:
    """A random walk, whose steps are as long as the learning rate, with a drift of so much of it in one direction."""
    points, direction = [start(generator)], start(generator)
    for before, after in itertools.pairwise(steps):
        time = after - before
        points.append(
            points[-1] + pace * rate(after / steps[-1]) * (time**0.5 * start(generator) + drift * time * direction)
        )
    return torch.stack(points), steps


def noise(steps: Sequence[int], rate: Callable[[float], float], generator: torch.Generator) -> Path:
    """Noise around one point, as after convergence; its squares grow with the learning rate."""
    centre = start(generator)
    points = [centre + 0.05 * rate(step / steps[-1]) ** 0.5 * start(generator) for step in steps]
    return torch.stack(points), steps


RATES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear to zero": lambda x: 1.01 - x,
    "exponential": lambda x: 0.001**x,
    "a tenth in the middle": lambda x: 1.0 if x < 0.5 else 0.1,
    "a hundredth in the middle": lambda x: 1.0 if x < 0.5 else 0.01,
    "a hundredth soon": lambda x: 1.0 if x < 0.2 else 0.01,
    "a warm-up": lambda x: min(1.0, 0.05 + 4 * x),
}
SPACINGS = {
    "even": range(100, 1300, 100),
    "few": range(100, 400, 100),
    "two": (100, 200),
    "a gap": (100, 200, 300, 1000, 1100, 1200),
    "doubling": [2**power for power in range(10)],
    "the last ones close": [1000 - 2**power for power in range(9, -1, -1)],
}
KINDS = {
    "a random walk": walk,
    "a drift": lambda *arguments: walk(*arguments, drift=0.1),
    "a straight path": lambda *arguments: walk(*arguments, drift=1.0, pace=0.001),
    "noise around one point": noise,
}


def distances(points: torch.Tensor) -> Matrix:
    return tuple(map(tuple, torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").tolist()))


def cosines(points: torch.Tensor) -> Matrix:
    lengths = points.norm(dim=1)
    return tuple(map(tuple, (points @ points.T / (lengths[:, None] * lengths)).tolist()))


def found(path: Path) -> tuple[list[int], list[int], list[int]]:
    """The checkpoints that are unrelated to the others, those on detours, and those after a jump."""
    points, steps = path
    groups = related_groups(cosines(points), range(len(points)))
    apart, norm = distances(points), points.mean(0).norm().item()
    off = list(detours(apart, norm, groups[0]))
    left = [index for index in groups[0] if not any(index in each.members for each in off)]
    step = jump(apart, norm, left, steps)
    members = sorted(index for each in off for index in each.members)
    return sorted(index for group in groups[1:] for index in group), members, [step.after] if step else []


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_far_off_in_an_ordinary_run(kind: str, spacing: str) -> None:
    """Whatever its learning rate does. If it were, users would learn to ignore it."""
    for seed, rate in itertools.product(range(5), RATES):
        generator = torch.Generator().manual_seed(seed)
        assert found(KINDS[kind](SPACINGS[spacing], RATES[rate], generator)) == ([], [], []), (seed, rate)


@pytest.mark.parametrize("kind", ["a random walk", "a drift", "noise around one point"])
@pytest.mark.parametrize("rate", RATES)
def test_a_checkpoint_of_another_run(kind: str, rate: str) -> None:
    """Wherever it is, the first and the last included: independent weights are orthogonal."""
    for place in range(12):
        generator = torch.Generator().manual_seed(place)
        points, steps = KINDS[kind](SPACINGS["even"], RATES[rate], generator)
        points[place] = start(generator)
        assert found((points, steps)) == ([place], [], [])


def test_permuted_weights() -> None:
    """Their norm and their values are those of the run, and yet they are another basin."""
    for place in range(12):
        generator = torch.Generator().manual_seed(place)
        points, steps = walk(SPACINGS["even"], RATES["constant"], generator)
        points[place] = points[place][torch.randperm(WEIGHTS, generator=generator)]
        assert found((points, steps)) == ([place], [], [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("members", [[1], [5], [10], [5, 6], [4, 5, 6, 7], [2, 8]])
def test_spikes(kind: str, members: list[int]) -> None:
    """One or several checkpoints that left the path by a third of the norm, and came back: each is named, no other."""
    generator = torch.Generator().manual_seed(len(members))
    points, steps = KINDS[kind](SPACINGS["even"], lambda x: 0.2, generator)
    away = start(generator)
    for place in members:
        points[place] += 0.3 * (away + 0.2 * start(generator)) * points[place].norm() / away.norm()
    assert found((points, steps)) == ([], members, [])


@pytest.mark.parametrize("place", [3, 6, 11])
def test_a_run_that_does_not_come_back(place: int) -> None:
    """From a spike on, the weights are elsewhere; the last checkpoint may be the only one after it."""
    generator = torch.Generator().manual_seed(place)
    points, steps = walk(SPACINGS["even"], lambda x: 0.1, generator)
    points[place:] += 0.3 * start(generator)
    assert found((points, steps)) == ([], [], [place])


def test_two_runs_in_one_folder() -> None:
    """The larger part is the run; of equals the one with the last checkpoint."""
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([walk(SPACINGS["few"], RATES["constant"], generator)[0] for _ in range(3)])
    assert found((points[:6], range(6)))[0] == [0, 1, 2]
    mixed = points[[0, 3, 1, 4, 5, 6]]
    assert found((mixed, range(6)))[0] == [0, 2, 5]
    assert found((points[[0, 3]], range(2)))[0] == [0]


def test_a_run_that_goes_far_is_one_run() -> None:
    """Its first and last checkpoint have nothing in common, but each step is small."""
    generator = torch.Generator().manual_seed(0)
    first, last = start(generator), start(generator)
    angles = torch.linspace(0, torch.pi / 2, 8, dtype=torch.float64)[:, None]
    points = angles.cos() * first + angles.sin() * last
    assert cosines(points)[0][-1] < 0.1
    assert found((points, range(8))) == ([], [], [])


def test_a_thousand_checkpoints_take_no_minutes(in_time: None) -> None:
    generator = torch.Generator().manual_seed(0)
    points, steps = walk(range(1000), RATES["constant"], generator)
    points[500] += start(generator)
    assert found((points, steps)) == ([], [500], [])


def test_frozen_weights_are_not_far_off() -> None:
    """Equal checkpoints have a direct way of zero, and differences below what float32 resolves are noise."""
    generator = torch.Generator().manual_seed(0)
    points = start(generator).repeat(5, 1)
    points[2] += 1e-6 * start(generator)
    assert found((points, range(5))) == ([], [], [])


def test_the_same_checkpoint_and_a_mean_of_zero_have_no_scale() -> None:
    points = torch.ones(8, WEIGHTS, dtype=torch.float64)
    points[:4] = -1
    assert found((points, range(8))) == ([0, 1, 2, 3], [], [])


def test_the_threshold_has_room_on_both_sides() -> None:
    """The bound that docs/comparing.md derives: noise that only grows or shrinks stays below 1 + √2."""
    highest = 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        sizes = torch.rand(3, generator=generator, dtype=torch.float64).sort(descending=True).values.tolist()
        before, middle, after = (size * start(generator) for size in sizes)
        way = (before - middle).norm() + (middle - after).norm()
        highest = max(highest, (way / (before - after).norm()).item())
    assert 2.2 < highest < 1 + 2**0.5 + 0.15 < DETOUR
