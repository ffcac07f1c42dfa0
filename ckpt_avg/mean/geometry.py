"""Norms, distances, cosines and the plane of the two main directions, from the products that `gram` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where N checkpoints are.

    Attributes:
        norm: of their mean.
        norms: of each.
        to_mean: the distance of each from the mean.
        distances: (N, N), between each two.
        cosines: (N, N), of the angles between each two, seen from zero.
        centred_cosines: (N, N), of the angles seen from the mean; 0 for a checkpoint that is at the mean.
        plane: the coordinates of each along the two main directions (principal components); the mean is at (0, 0).
        shares: of the sum of squared distances from the mean, the parts along these two directions.
    """

    norm: float
    norms: tuple[float, ...]
    to_mean: tuple[float, ...]
    distances: Matrix
    cosines: Matrix
    centred_cosines: Matrix
    plane: tuple[tuple[float, float], ...]
    shares: tuple[float, float]


def geometry_of(products: torch.Tensor, chosen: Sequence[int] | None = None) -> Geometry:
    """Returns the geometry of checkpoints, from the (N + 1, N + 1) products of their differences and their mean.

    Args:
        products: as `gram.Sums.products`.
        chosen: the indices of those to look at, with a mean of their own; all by default.
    """
    number = products.shape[0] - 1
    rows = range(number) if chosen is None else chosen
    # d_i − mean of the chosen d_j; m + mean of the chosen d_j
    change = torch.zeros(len(rows) + 1, number + 1, dtype=torch.float64)
    for place, index in enumerate(rows):
        change[place, index] = 1.0
    if chosen is not None:
        change[:-1] -= change[:-1].mean(0)
        change[-1, list(rows)] = 1.0 / len(rows)
    change[-1, -1] = 1.0
    products = change @ products @ change.T
    among = products[:-1, :-1]
    squares = among.diagonal().clamp(min=0.0)
    with_mean, mean_square = products[:-1, -1], products[-1, -1].clamp(min=0.0)
    from_zero = among + with_mean[:, None] + with_mean[None, :] + mean_square
    distances = (squares[:, None] + squares[None, :] - 2 * among).clamp(min=0.0).sqrt()
    distances.fill_diagonal_(0.0)
    plane, shares = _plane(among)
    return Geometry(
        norm=mean_square.sqrt().item(),
        norms=tuple(from_zero.diagonal().clamp(min=0.0).sqrt().tolist()),
        to_mean=tuple(squares.sqrt().tolist()),
        distances=_tuples(distances),
        cosines=_tuples(_cosines(from_zero)),
        centred_cosines=_tuples(_cosines(among)),
        plane=plane,
        shares=shares,
    )


def _cosines(products: torch.Tensor) -> torch.Tensor:
    """Returns the cosines; of zero to anything else it is 0, and to itself 1."""
    lengths = products.diagonal().clamp(min=0.0).sqrt()
    both = lengths[:, None] * lengths[None, :]
    # What rounding leaves of the products of a zero is not 0.
    cosines = torch.where(both.eq(0), lengths[:, None].eq(lengths[None, :]).double(), products / both)
    return cosines.clamp(-1.0, 1.0)


def _plane(products: torch.Tensor) -> tuple[tuple[tuple[float, float], ...], tuple[float, float]]:
    """Returns the coordinates along the two leading eigenvectors, and the share of each in the trace."""
    values, vectors = torch.linalg.eigh(products)
    total = values.clamp(min=0.0).sum().item()
    axes, shares = [], []
    for place in (-1, -2):
        value = values[place].item() if -place <= len(values) else 0.0
        if not value > 1e-12 * total:  # what rounding leaves
            axes.append([0.0] * len(values))
            shares.append(0.0)
            continue
        axis = vectors[:, place] * value**0.5
        if axis[-1] < 0:  # an eigenvector has no sign: the last checkpoint is to the right, and above
            axis = -axis
        axes.append(axis.tolist())
        shares.append(value / total)
    return tuple(zip(*axes, strict=True)), (shares[0], shares[1])


def _tuples(matrix: torch.Tensor) -> Matrix:
    return tuple(map(tuple, matrix.tolist()))
