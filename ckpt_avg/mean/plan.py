"""The plan: the rule, the output dtype and the offset of every tensor.

It is made from headers alone and fixes the offset of every output byte. Workers can therefore compute blocks in any
order, and peak memory is a few blocks whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt_avg.checkpoint.spec import BY_TORCH_NAME, DTYPES, CheckpointSpec, DType, batch_norm_buffer, batch_norm_layers
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.text import listing, quote

Rule = Literal["mean", "equal", "last"]

# The shares of ranks begin at multiples of this. Some network file systems lose writes of two ranks to one page.
_PAGE = 64 * 1024
_DTYPE_ORDER = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name, shape, numel: as in the checkpoints.
        source_dtype, dtype: in the checkpoints, and in the output.
        rule: ``mean``; ``equal``: copied, the bytes are the same in every checkpoint; ``last``: copied from the last.
        offset: of its first byte in the data section.
    """

    name: str
    shape: tuple[int, ...]
    source_dtype: DType
    dtype: DType
    rule: Rule
    offset: int
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Plan:
    """What is computed.

    Attributes:
        tensors: in the order of the output's data section.
        batch_norm: the BatchNorm layers with running statistics.
        checkpoints: how many are averaged.
    """

    tensors: tuple[OutputTensor, ...]
    batch_norm: tuple[str, ...]
    checkpoints: int

    @property
    def nbytes(self) -> int:
        """Bytes of the output's data section."""
        return self.tensors[-1].offset + self.tensors[-1].nbytes if self.tensors else 0

    def by_name(self) -> Mapping[str, OutputTensor]:
        """Returns the tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}

    def share(self, rank: int, size: int, *, begin: int) -> range:
        """Returns the bytes of the data section that one of ``size`` ranks computes: an equal share, in whole pages.

        Args:
            rank, size: the rank and the world size.
            begin: the offset of the data section in the file, in bytes: a multiple of 8.
        """

        def bound(part: int) -> int:
            if part in (0, size):
                return self.nbytes * (part > 0)
            end = begin + self.nbytes * part // size
            return max(0, end - end % _PAGE - begin)

        return range(bound(rank), bound(rank + 1))


def make_plan(specs: Sequence[CheckpointSpec], *, dtype: str = "keep", non_float: str = "equal") -> Plan:
    """Chooses the rule, the output dtype and the offset of every tensor.

    Args:
        specs: checkpoints with the same names, shapes and dtypes.
        dtype: ``keep``, or the dtype of every floating-point tensor of the output.
        non_float: ``equal`` or ``last``: the rule for integer and bool tensors. ``num_batches_tracked`` of a BatchNorm
            layer differs between any two checkpoints of a run and is always copied from the last.

    Raises:
        IncompatibleError: there are no tensors, or some cannot be averaged.
    """
    tensors = specs[0].tensors
    if not tensors:
        where = "" if specs[0].state_key is None else f" under the key {quote(specs[0].state_key)}"
        raise IncompatibleError(
            f"{specs[0].path}: nothing to average: there are no named tensors{where}. "
            "Choose the weights with --state-key, or skip the file with --exclude."
        )
    _refuse_scaled_codes(specs[0])
    layers = batch_norm_layers(tensors)
    counters = {batch_norm_buffer(layer, "num_batches_tracked") for layer in layers}

    def output_dtype(source: DType) -> DType:
        return BY_TORCH_NAME[dtype] if dtype != "keep" and source.kind in ("float", "float8") else source

    in_order = sorted(tensors.items(), key=lambda item: (_DTYPE_ORDER[output_dtype(item[1].dtype)], item[0].encode()))
    placed: list[OutputTensor] = []
    offset = 0
    for name, tensor in in_order:
        rule: Rule = "mean"
        if tensor.dtype.kind == "exact":
            rule = "last" if name in counters or non_float == "last" else "equal"
        target = output_dtype(tensor.dtype)
        placed.append(OutputTensor(name, tensor.shape, tensor.dtype, target, rule, offset, tensor.numel))
        offset += placed[-1].nbytes
    return Plan(tuple(placed), tuple(layers), len(specs))


def _refuse_scaled_codes(spec: CheckpointSpec) -> None:
    """Refuses float8 tensors with scales in other tensors: the mean of codes is not the code of the mean."""
    modules = {
        name.rpartition(".")[0]
        for name, tensor in spec.tensors.items()
        if "scale" in name.rpartition(".")[2] and tensor.dtype.kind != "float8"
    }
    scaled = [
        name
        for name, tensor in spec.tensors.items()
        if tensor.dtype.kind == "float8" and name.rpartition(".")[0] in modules
    ]
    if scaled:
        raise IncompatibleError(
            f"{spec.path}: float8 tensors with separate scales cannot be averaged: {listing(map(quote, scaled))}. "
            "Average the checkpoints before quantisation."
        )
