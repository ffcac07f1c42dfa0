"""The kinds of tensors that are no plain weights, and what becomes of each: `KINDS`, which docs/how-it-works.md shows.

`recognisers` finds them. Of masks and a few others `value_kinds` must read the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ckpt_avg.checkpoint.spec import SAMPLE_COUNTS
from ckpt_avg.formats.tensor_names import forms_of
from ckpt_avg.mean import recognisers
from ckpt_avg.mean.recognisers import Tensors
from ckpt_avg.text import listing, plural, quote

Rule = Literal["mean", "equal", "last", "newest"]


@dataclass(frozen=True, slots=True)
class BufferKind:
    """One kind of tensor.

    Attributes:
        name: in the plural.
        rule: ``mean``; ``equal``: copied, and refused if checkpoints differ; ``last``: copied from the last checkpoint;
            ``newest``: the same, but in a sweep from the last of all, since the size differs between checkpoints.
        found: how it is recognised, in Markdown.
        becomes: what the output contains, in Markdown.
        noun: what to call one of its tensors in a notice or an error.
        notice: what the user should know, after the number and noun; empty if there is nothing to say.
        refusal: why tensors that differ are not averaged, and what to do.
        where: yields the names of its tensors.
        hints: it is asked only if one of them is part of a name; every digit counts as 0.
    """

    name: str
    rule: Rule
    found: str
    becomes: str
    noun: str = "tensor"
    notice: str = ""
    refusal: str = ""
    where: Callable[[Tensors], Iterator[str]] = lambda tensors: iter(())
    hints: tuple[str, ...] = ()


_AVERAGE_BEFORE = "the mean of codes is not the code of the mean. Average the checkpoints before quantisation."
_USE_LAST = "these are never averaged. Use --non-float last to copy the last checkpoint's."

STATISTICS = BufferKind(
    "BatchNorm statistics",
    "mean",
    "`running_mean` and `running_var` of one layer",
    "measured again over data; the mean with `--bn keep`",
    where=recognisers.statistics,
    hints=("running_mean",),
)
SPECTRAL = BufferKind(
    "spectral norm vectors",
    "last",
    "`weight_u`, `weight_v` next to `weight_orig`; `parametrizations.weight.0._u`, `._v`; `u0` next to `sv0`; `u`, `v` "
    "of length 1",
    "computed from the averaged weight",
    where=recognisers.spectral_vectors,
    hints=("_u", "u0"),
)
INTEGERS = BufferKind(
    "integers and bools",
    "equal",
    "the dtype",
    "copied if they are equal; `--non-float last` copies the last one's",
    "integer or bool tensor",
    refusal=_USE_LAST,
)
MASKS = BufferKind(
    "masks",
    "equal",
    "only zeros and ones in every checkpoint, and both in one; or such a flag, as `inited`",
    "copied if they are equal; `--non-float last` copies the last one's",
    "mask",
    refusal=_USE_LAST,
)
QUANTIZED = BufferKind(
    "quantised weights",
    "equal",
    "integers or float8 with a scale: `qweight`, `scales`; `weight`, `SCB`; `weight`, `weight.absmax`; …",
    "copied if they are equal; never averaged, and never the last one's",
    "quantised tensor",
    notice="must be the same in every checkpoint",
    refusal=_AVERAGE_BEFORE,
    where=recognisers.quantized,
    hints=tuple(recognisers.SCALES),
)
KINDS = (
    STATISTICS,
    BufferKind(
        "batch counters",
        "last",
        "`num_batches_tracked` of such a layer",
        "the last one's",
        where=recognisers.batch_counters,
        hints=("num_batches_tracked",),
    ),
    BufferKind(
        "input statistics",
        "last",
        "a mean, a spread and `count`: `running_mean`, `running_var`, `count`; `_mean`, `_std`, `count`",
        "the last one's",
        notice="with statistics of the inputs copied from the last checkpoint",
        where=recognisers.input_statistics,
        hints=SAMPLE_COUNTS,
    ),
    BufferKind(
        "other running statistics",
        "mean",
        "`running_var` alone, `running_std`, `moving_mean`, …",
        "the mean",
        notice="with running statistics averaged, since they belong to no BatchNorm layer",
        where=recognisers.other_statistics,
        hints=("running_", "moving_"),
    ),
    SPECTRAL,
    BufferKind(
        "other spectral norm vectors",
        "last",
        "`weight_u` and the like that do not fit the weight's shape, or after another parametrization",
        "the last one's: run a batch in train mode to compute them",
        notice="of spectral norm copied from the last checkpoint, since the weight alone does not determine them. Run "
        "a batch through the averaged model in train mode",
        where=recognisers.other_spectral_vectors,
        hints=("_u",),
    ),
    BufferKind(
        "weight norm",
        "mean",
        "`weight_g`, `weight_v`; `original0`, `original1`",
        "the mean of lengths, and the mean of directions",
        "weight",
        notice="with weight norm: lengths and directions are averaged separately, which is close to the mean of the "
        "weights within one run only. Otherwise remove it before saving (remove_weight_norm, or "
        "parametrize.remove_parametrizations)",
        where=recognisers.weight_norms,
        hints=("_g", "original0"),
    ),
    INTEGERS,
    MASKS,
    QUANTIZED,
    BufferKind(
        "fake quantisation",
        "last",
        "`scale` and an integer `zero_point`, without quantised weights",
        "the last one's: calibrate again",
        notice="of fake quantisation copied from the last checkpoint (calibrate the averaged model again)",
        where=recognisers.observers,
        hints=("zero_point",),
    ),
    BufferKind(
        "low-rank factors",
        "mean",
        "`lora_A`, `lora_down`, `hada_w1_a` and the like, which `formats/trainers/lora` recognises",
        "the mean of each factor",
    ),
    BufferKind(
        "adapter scales",
        "equal",
        "`alpha` next to low-rank factors",
        "copied if they are equal",
        "adapter scale",
        refusal="they scale what is averaged. Merge each adapter into its model first, then average the models.",
        where=recognisers.adapter_scales,
        hints=("alpha",),
    ),
    BufferKind(
        "counters",
        "last",
        "one number called `num_updates`, `global_step`, …; one integer called `step`; one float called `count`",
        "the last one's",
        where=recognisers.counters,
        hints=tuple(recognisers.COUNTERS | recognisers.FLOAT_COUNTERS | recognisers.INTEGER_COUNTERS),
    ),
    BufferKind(
        "codebooks",
        "mean",
        "`embed_avg` and `cluster_size`, the running sums and counts of vector quantisation",
        "the mean of vectors, sums and counts",
        "codebook",
        notice="with running sums and counts: the vectors are averaged, and are not the averaged sums divided by the "
        "averaged counts",
        where=recognisers.codebooks,
        hints=("embed_avg",),
    ),
    BufferKind(
        "queues",
        "last",
        "`queue`, `queue_ptr`, `memory_bank` and the like",
        "the last one's",
        notice="of queues or banks of features copied from the last checkpoint",
        where=recognisers.queues,
        hints=("queue", "_bank"),
    ),
    BufferKind(
        "extra state",
        "newest",
        "`_extra_state`, of any length",
        "the last one's",
        notice="with extra state copied from the last checkpoint",
        where=recognisers.extra_state,
        hints=("_extra_state",),
    ),
    BufferKind(
        "random states",
        "last",
        "integers called `rng_state` and the like",
        "the last one's",
        notice="with random states copied from the last checkpoint",
        where=recognisers.random_states,
        hints=("rng_state", "random_state"),
    ),
    BufferKind(
        "other integer tables",
        "equal",
        "int8, uint8, int16 or int32 in two dimensions or more, next to floats other than `weight` and `bias`, or to a "
        "module with a scale",
        "copied if they are equal",
        "integer table",
        refusal="they may be codes with a scale, whose mean is of no use. Average the checkpoints before quantisation.",
        where=recognisers.integer_tables,
        hints=("",),
    ),
)


def kinds_of(tensors: Tensors) -> dict[str, BufferKind]:
    """Returns the kind of each tensor that is no plain weight; of several kinds the first in the table."""
    found = {name: INTEGERS for name, tensor in tensors.items() if tensor.dtype.kind == "exact"}
    text = "\n".join(forms_of(tensors)).lower()
    for kind in reversed(KINDS):
        if any(hint in text for hint in kind.hints):
            found |= dict.fromkeys(kind.where(tensors), kind)
    return found


def notices(kinds: Mapping[str, BufferKind]) -> Iterator[str]:
    """Yields what the user should know of tensors that are not averaged like weights."""
    for kind in KINDS:
        if kind.notice and (names := [name for name, each in kinds.items() if each is kind]):
            yield f"{plural(len(names), kind.noun)} {kind.notice}: {listing(map(quote, names))}"


def markdown() -> str:
    """Returns the table as docs/how-it-works.md shows it."""
    rows = [f"| {kind.name} | {kind.found} | {kind.becomes} |" for kind in KINDS]
    return "\n".join(("| kind | recognised by | in the output |", "|---|---|---|", *rows))
