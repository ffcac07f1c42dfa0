"""The vectors of spectral norm, computed again: they are functions of the weight, so their mean is of no use.

In evaluation mode a layer divides its weight W by σ = uᵀWv, with u and v as stored (Miyato et al. 2018, "Spectral
Normalization for Generative Adversarial Networks", arXiv 1802.05957). The result is the same to about 1e-6 on any
machine, not bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import read_ranges
from ckpt_avg.mean.arithmetic import round_to
from ckpt_avg.mean.plan import Plan
from ckpt_avg.mean.recognisers import SpectralNorm
from ckpt_avg.text import listing, plural, quote

_TOLERANCE = 1e-7  # by which σ may still change in `_AT_ONCE` iterations
_AT_ONCE = 10
_MOST_ITERATIONS = 1000


def leading_vectors(
    plan: Plan,
    last: Checkpoint,
    weights: Mapping[str, torch.Tensor],
    notice: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Returns u and v of each averaged weight, as the output's tensors contain them.

    Args:
        plan: the output's tensors.
        last: the last checkpoint, with whose u each power iteration begins.
        weights: the output's tensors.
        notice: called if σ of some weights was still changing after the last iteration.
        check: called after each weight.
    """
    vectors: dict[str, torch.Tensor] = {}
    unfinished = []
    for layer in plan.spectral_norms:
        u, v, is_settled = _leading_vectors(layer, last, weights[layer.weight])
        if not is_settled:
            unfinished.append(layer.weight)
        for name, vector in ((layer.u, u), (layer.v, v)):
            if name and vector is not None:
                vectors[name] = round_to(vector, weights[name].dtype).view(weights[name].shape)
        check()
    if unfinished:
        notice(
            f"spectral norm of {plural(len(unfinished), 'weight')}: still changing after {_MOST_ITERATIONS:,} power "
            f"iterations, by more than {_TOLERANCE:g}: {listing(map(quote, unfinished))}. Run a batch through the "
            "averaged model in train mode to continue"
        )
    return vectors


def differing_vectors(plan: Plan, last: Checkpoint, weights: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yields the weights with vectors that give another σ than `leading_vectors` computes, in the precision stored."""
    for layer in plan.spectral_norms:
        u, v, _ = _leading_vectors(layer, last, weights[layer.weight])
        if u is not None and v is not None:
            matrix = _matrix(layer, last, weights[layer.weight])
            stored = weights[layer.u].double().flatten()
            columns = weights[layer.v].double() if layer.v else matrix.t().mv(stored)
            expected = float(u.dot(matrix.mv(v)))
            found = float(stored.dot(matrix.mv(columns))) / (1.0 if layer.v else float(columns.norm()))
            if not abs(found - expected) <= max(1e-6, 8 * torch.finfo(weights[layer.u].dtype).eps) * expected:
                yield layer.weight


def _leading_vectors(
    layer: SpectralNorm, last: Checkpoint, weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
    """Returns the leading singular vectors, float64, and whether σ has settled; no vectors for a weight of zeros."""
    matrix, u = _matrix(layer, last, weight), _stored(last, layer.u).flatten()
    sigma = 0.0
    for _ in range(_MOST_ITERATIONS // _AT_ONCE):
        before = sigma
        for _ in range(_AT_ONCE):
            v = torch.nn.functional.normalize(matrix.t().mv(u), dim=0)
            u = matrix.mv(v)
            sigma = float(u.norm())
            u = u / sigma
        if not 0 < sigma < float("inf"):
            return None, None, True
        if abs(sigma - before) <= _TOLERANCE * sigma:
            return u, v, True
    return u, v, False


def _matrix(layer: SpectralNorm, last: Checkpoint, weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight as a float64 matrix, whose rows are the dimension that u belongs to.

    Of several dimensions of that length, it is the one for which u fits the last checkpoint's weight best.
    """
    tensors = last.spec.tensors
    dims = [dim for dim, extent in enumerate(weight.shape) if extent == tensors[layer.u].numel]
    if len(dims) > 1:
        stored, u = _stored(last, layer.weight), _stored(last, layer.u).flatten()
        matrices = [_with_rows(stored, dim) for dim in dims]
        rights = [_stored(last, layer.v) if layer.v else matrix.t().mv(u) for matrix in matrices]
        images = [matrix.mv(right) for matrix, right in zip(matrices, rights, strict=True)]
        fits = [float(u.dot(image) / image.norm().clamp_min(1e-300)) for image in images]
        dims = [dims[fits.index(max(fits))]]
    return _with_rows(weight.double(), dims[0])


def _with_rows(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return weight.movedim(dim, 0).flatten(1)


def _stored(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    tensor = checkpoint.spec.tensors[name]
    return read_ranges(checkpoint, [(tensor, 0, tensor.numel)])[0].view(tensor.shape).double()
