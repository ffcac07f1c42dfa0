"""The plan: the rule, the output dtype and the offset of every tensor.

It is made from headers alone and fixes the offset of every output byte. Workers can therefore compute blocks in any
order, and peak memory is a few blocks whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from ckpt_avg.checkpoint.spec import (
    BY_TORCH_NAME,
    DTYPES,
    CheckpointSpec,
    DType,
    TensorSpec,
    batch_norm_layers,
    is_extra_state,
)
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.mean.buffers import (
    INTEGERS,
    MASKS,
    QUANTIZED,
    SPECTRAL,
    BufferKind,
    Rule,
    kinds_of,
)
from ckpt_avg.mean.recognisers import SpectralNorm, spectral_norms
from ckpt_avg.text import quote


@dataclass(slots=True, unsafe_hash=True)  # not frozen, as `TensorSpec`
class OutputTensor:
    """One tensor of the output.

    Attributes:
        name, shape, numel: as in the checkpoints.
        source_dtype: in the checkpoints; if theirs differ, one that contains the values of all.
        dtype: in the output.
        rule: as `BufferKind.rule`.
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
        kinds: what each tensor is that is no plain weight.
        spectral_norms: those whose vectors are computed from the averaged weight; none of a single checkpoint.
    """

    tensors: tuple[OutputTensor, ...]
    batch_norm: tuple[str, ...]
    checkpoints: int
    kinds: Mapping[str, BufferKind]
    spectral_norms: tuple[SpectralNorm, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the output's data section."""
        return self.tensors[-1].offset + self.tensors[-1].nbytes if self.tensors else 0

    @property
    def source_nbytes(self) -> int:
        """Bytes of the tensors of one checkpoint, in the source dtypes."""
        return sum([tensor.numel * tensor.source_dtype.itemsize for tensor in self.tensors])

    def by_name(self) -> Mapping[str, OutputTensor]:
        """Returns the tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}


def make_plan(
    specs: Sequence[CheckpointSpec],
    *,
    dtype: str = "keep",
    non_float: str = "equal",
    masks: Collection[str] = (),
    spectral: Sequence[SpectralNorm] = (),
) -> Plan:
    """Chooses the rule, the output dtype and the offset of every tensor.

    Args:
        specs: checkpoints that fit together.
        dtype: ``keep``, or the dtype of every floating-point tensor of the output.
        non_float: ``equal`` or ``last``: the rule for integers, bools and masks.
        masks: floating-point tensors that contain only zeros and ones.
        spectral: weights with spectral norm that the names alone do not show.

    Raises:
        IncompatibleError: there are no tensors.
    """
    tensors = specs[0].tensors
    if not tensors:
        where = "" if specs[0].state_key is None else f" under the key {quote(specs[0].state_key)}"
        raise IncompatibleError(
            f"{specs[0].path}: nothing to average: there are no named tensors{where}. "
            "Choose the weights with --state-key, or skip the file with --exclude."
        )
    spectral = (*spectral_norms(tensors), *spectral)
    vectors = (name for layer in spectral for name in (layer.u, layer.v))
    kinds = dict.fromkeys(masks, MASKS) | dict.fromkeys(vectors, SPECTRAL) | kinds_of(tensors)
    different = [] if dtype == "keep" else [spec.tensors for spec in specs if spec.tensors is not tensors]

    by_dtype: dict[DType, list[tuple[str, TensorSpec, DType, Rule]]] = {target: [] for target in DTYPES.values()}
    for name, first in tensors.items():
        kind = kinds.get(name)
        stored = specs[-1].tensors[name] if kind and is_extra_state(name) else first
        source = _common_dtype(stored, [others[name] for others in different]) if different else stored.dtype
        convert = dtype != "keep" and source.kind in ("float", "float8") and kind is not QUANTIZED
        rule: Rule = kind.rule if kind else "mean"
        if non_float == "last" and kind in (INTEGERS, MASKS):
            rule = "last"
        target = BY_TORCH_NAME[dtype] if convert else source
        by_dtype[target].append((name, stored, source, rule))
    placed: list[OutputTensor] = []
    offset = 0
    for target, group in by_dtype.items():
        # Python orders text by code points, which is also the order of its bytes in UTF-8.
        for name, stored, source, rule in sorted(group, key=itemgetter(0)):
            numel = stored.numel
            placed.append(OutputTensor(name, stored.shape, source, target, rule, offset, numel))
            offset += numel * target.itemsize
    recomputed = spectral if len(specs) > 1 else ()
    return Plan(tuple(placed), tuple(batch_norm_layers(tensors)), len(specs), kinds, recomputed)


def _common_dtype(first: TensorSpec, others: Sequence[TensorSpec]) -> DType:
    """Returns the dtype of stored tensors; of different ones, float32, or float64 if one has it."""
    dtypes = {first.dtype, *(other.dtype for other in others)}
    if len(dtypes) == 1:
        return first.dtype
    return BY_TORCH_NAME["float64" if BY_TORCH_NAME["float64"] in dtypes else "float32"]
