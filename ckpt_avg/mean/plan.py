"""The plan: what happens to each tensor, and where each output byte lies.

The safetensors header is known before the data, so every offset is fixed here. Chunks may then be computed in any
order, and the peak memory is a few chunks whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt_avg.checkpoint.spec import BY_TORCH_NAME, DTYPES, CheckpointSpec, DType, batch_norm_buffer, batch_norm_layers
from ckpt_avg.errors import IncompatibleError, UsageError
from ckpt_avg.text import listing, quote

Rule = Literal["mean", "equal", "last"]
OUTPUT_DTYPES = ("keep", "float64", "float32", "bfloat16", "float16")

_PIECES = 4096  # of one task, however small
# Where ranks' shares meet: no two of them write to one page, which some network file systems could not merge.
_PAGE = 64 * 1024
_DTYPE_ORDER = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name, shape: as in the checkpoints.
        source_dtype: its dtype in the checkpoints.
        dtype: its dtype in the output.
        rule: ``mean``; ``equal``: the same bytes in every checkpoint, copied; ``last``: the last checkpoint's.
        offset: where it begins in the data section, in bytes.
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
class Piece:
    """The elements [start, stop) of one output tensor, in row-major order."""

    tensor: OutputTensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The tensors in the order of the output's data section, and the BatchNorm layers among them."""

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
        """Returns which bytes of the data section one of several ranks computes: an even part, in whole pages.

        Args:
            rank, size: which part of how many.
            begin: where in the file the data section begins, in bytes: a multiple of 8.
        """

        def bound(part: int) -> int:
            if part in (0, size):
                return self.nbytes * (part > 0)
            end = begin + self.nbytes * part // size
            return max(0, end - end % _PAGE - begin)

        return range(bound(rank), bound(rank + 1))

    def tasks(self, elements: int, within: range | None = None) -> Iterator[tuple[Piece, ...]]:
        """Yields runs of pieces that lie side by side in the output, at most ``elements`` elements each.

        A huge tensor is cut into many tasks; many small tensors share one.

        Args:
            elements: of one task.
            within: which bytes of the data section; all of them if not given. No element lies across its ends.
        """
        within = range(self.nbytes) if within is None else within
        pieces: list[Piece] = []
        room = elements
        for tensor in self.tensors:
            itemsize = tensor.dtype.itemsize
            start = max(0, within.start - tensor.offset) // itemsize
            end = min(tensor.numel, max(0, within.stop - tensor.offset) // itemsize)
            if len(pieces) == _PIECES:
                yield tuple(pieces)
                pieces, room = [], elements
            while start < end:
                stop = min(end, start + room)
                pieces.append(Piece(tensor, start, stop))
                room -= stop - start
                start = stop
                if room == 0:
                    yield tuple(pieces)
                    pieces, room = [], elements
        if pieces:
            yield tuple(pieces)


def check_rules(dtype: str, non_float: str) -> None:
    """Raises UsageError where there is no such output dtype or rule."""
    for option, value, choices in (("--dtype", dtype, OUTPUT_DTYPES), ("--non-float", non_float, ("equal", "last"))):
        if value not in choices:
            raise UsageError(f"{option}: expected one of {', '.join(choices)}, got {value!r}.")


def make_plan(specs: Sequence[CheckpointSpec], *, dtype: str = "keep", non_float: str = "equal") -> Plan:
    """Decides the rule, the output dtype and the place of every tensor.

    Args:
        specs: the checkpoints, which agree in names, shapes and dtypes.
        dtype: ``keep``, or the dtype of every floating-point tensor of the output.
        non_float: ``equal`` or ``last``: the rule for integer and bool tensors. A BatchNorm layer's
            ``num_batches_tracked``, which differs between any two checkpoints of a run, is always the last one's.

    Raises:
        IncompatibleError: there are no tensors, or some cannot be averaged.
    """
    tensors = specs[0].tensors
    if not tensors:
        where = "" if specs[0].state_key is None else f" under the key {quote(specs[0].state_key)}"
        raise IncompatibleError(
            f"{specs[0].path}: nothing to average: expected named tensors{where}, got none. "
            "Choose the weights with --state-key, or leave the file out."
        )
    _refuse_scaled_codes(specs[0])
    layers = batch_norm_layers(tensors)
    counters = {batch_norm_buffer(layer, "num_batches_tracked") for layer in layers}
    outputs: list[tuple[DType, bytes, Rule, str]] = []
    for name, tensor in tensors.items():
        kind = tensor.dtype.kind
        target = tensor.dtype
        if dtype != "keep" and kind in ("float", "float8"):
            target = BY_TORCH_NAME[dtype]
        rule: Rule = "mean"
        if kind == "exact":
            rule = "last" if name in counters or non_float == "last" else "equal"
        outputs.append((target, name.encode(), rule, name))
    outputs.sort(key=lambda output: (_DTYPE_ORDER[output[0]], output[1]))
    placed: list[OutputTensor] = []
    offset = 0
    for target, _, rule, name in outputs:
        source = tensors[name]
        placed.append(OutputTensor(name, source.shape, source.dtype, target, rule, offset, source.numel))
        offset += placed[-1].nbytes
    return Plan(tuple(placed), tuple(layers), len(specs))


def _refuse_scaled_codes(spec: CheckpointSpec) -> None:
    """Refuses float8 tensors whose scales lie in other tensors: the mean of codes is not the code of the mean."""
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
            f"{spec.path}: float8 tensors with scales beside them can't be averaged: {listing(map(quote, scaled))}. "
            "Average the checkpoints before quantisation."
        )
