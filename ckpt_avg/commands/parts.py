"""The models of an output: mostly one, of a folder of several models each of them, and their files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.commands.prepare import Prepared
from ckpt_avg.formats.models import prefix_of
from ckpt_avg.mean.plan import Plan
from ckpt_avg.output.shards import Shard, split, whole
from ckpt_avg.output.weights_name import without_variant


@dataclass(frozen=True, slots=True)
class Part:
    """One model of an output.

    Attributes:
        model: its name; empty if it is the only one, or in the folder itself.
        checkpoints: what it is the mean of, in order.
        shards: its files; a single one if that is one file.
        tied: tensors that are not stored, because they are tied to others: name → the name under which it is stored.
    """

    model: str
    checkpoints: tuple[Checkpoint, ...]
    shards: tuple[Shard, ...]
    tied: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """The names of its tensors in the plan."""
        return {tensor.name for shard in self.shards for tensor in shard.tensors}


def only_part(prepared: Prepared, name: str) -> Part:
    """Returns the only model of an output, in one file of this name."""
    return Part("", prepared.checkpoints, whole(prepared.plan, name))


def parts_of(
    prepared: Prepared, names: Mapping[str, str], tied: Mapping[str, Mapping[str, str]], largest: int | None = None
) -> tuple[Part, ...]:
    """Returns the models.

    Args:
        prepared: what is averaged.
        names: for each model, the name of its file.
        tied: for each model, as `Part.tied`.
        largest: bytes of tensors in a file, unless it has only one; None for one file for each model.
    """
    parts: list[Part] = []
    begin = 0
    plans = {model: _only(prepared, model, tied[model]) for model in names}
    sharded = {model for model, plan in plans.items() if largest is not None and plan.nbytes > largest}
    if sharded or any(name == without_variant(name) for name in names.values()):
        # A loader looks for one variant in all folders.
        names = {model: without_variant(name) for model, name in names.items()}
    for model, name in names.items():
        checkpoints = prepared.checkpoints
        if prepared.last.models:
            checkpoints = tuple(_model_of(each, model) for each in checkpoints)
        plan = plans[model]
        shards = split(plan, name, largest) if largest is not None and model in sharded else whole(plan, name)
        moved = tuple(_moved(each, begin, prefix_of(model)) for each in shards)
        parts.append(Part(model, checkpoints, moved, tied[model]))
        begin += plan.nbytes
    return tuple(parts)


def dtypes_of(prepared: Prepared, model: str) -> Counter[str]:
    """Returns the floating-point dtypes of one model of the output, as torch calls them, with their bytes."""
    plan = _only(prepared, model)
    sizes: Counter[str] = Counter()
    for tensor in plan.tensors:
        if tensor.dtype.kind == "float":
            sizes[tensor.dtype.torch_name] += tensor.nbytes
    return sizes


def _model_of(checkpoint: Checkpoint, model: str) -> Checkpoint:
    """Returns one model of a checkpoint, with what the checkpoint records."""
    found = checkpoint.models[model]
    return replace(found, spec=replace(found.spec, record=checkpoint.spec.record))


def _only(prepared: Prepared, model: str, tied: Collection[str] = ()) -> Plan:
    """Returns the plan of one model's tensors, in the same order, without those that are ``tied``."""
    plan, last = prepared.plan, prepared.last
    if not last.models and not tied:
        return plan
    tensors, offset = [], 0
    own = last.models[model].spec.tensors if last.models else last.spec.tensors
    names = {prefix_of(model) + name for name in own if name not in tied}
    for tensor in plan.tensors:
        if tensor.name in names:
            tensors.append(replace(tensor, offset=offset))
            offset += tensor.nbytes
    return replace(plan, tensors=tuple(tensors))


def _moved(shard: Shard, begin: int, prefix: str) -> Shard:
    tensors = (
        tuple(replace(tensor, offset=tensor.offset + begin) for tensor in shard.tensors) if begin else shard.tensors
    )
    return replace(shard, tensors=tensors, begin=shard.begin + begin, prefix=prefix)
