"""The kinds of tensors that are no plain weights, and what becomes of each: `KINDS`, which docs/how-it-works.md shows.

They are recognised by names, shapes and dtypes. Of masks and a few others `value_kinds` must read the values.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ckpt_avg.checkpoint.spec import SAMPLE_COUNTS, TensorSpec, batch_norm_buffer, batch_norm_layers, is_extra_state
from ckpt_avg.text import listing, plural, quote

Rule = Literal["mean", "equal", "last", "newest"]
Tensors = Mapping[str, TensorSpec]


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
        hints: it is asked only if one of them is part of a name.
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


@dataclass(frozen=True, slots=True)
class SpectralNorm:
    """The tensors of one weight with spectral norm: σ = uᵀWv, where u and v are its leading singular vectors.

    Attributes:
        weight: the name of W, of any shape; one dimension is its rows, the others its columns.
        u, v: the names of the vectors; v is empty if it is not stored.
    """

    weight: str
    u: str
    v: str


def _last_word(name: str) -> str:
    return name.rpartition(".")[2]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _words(name: str) -> set[str]:
    """Returns the words of the last part of a name: ``layer.weight_scale_inv`` → weight, scale, inv."""
    return set(filter(None, _last_word(name).lower().split("_")))


# -- Running statistics and counters ----------------------------------------------------------------------------------


def _statistics(tensors: Tensors) -> Iterator[str]:
    for layer in batch_norm_layers(tensors):
        yield from (batch_norm_buffer(layer, each) for each in ("running_mean", "running_var"))


def _batch_counters(tensors: Tensors) -> Iterator[str]:
    counters = (batch_norm_buffer(layer, "num_batches_tracked") for layer in batch_norm_layers(tensors))
    return (name for name in counters if name in tensors)


def _input_statistics(tensors: Tensors) -> Iterator[str]:
    """As reinforcement learning normalises observations and returns: a mean, a spread, and a count of samples."""
    counts = {_module(name): name for name in tensors if _last_word(name) in SAMPLE_COUNTS and tensors[name].numel == 1}
    inside: dict[str, list[str]] = {module: [] for module in counts}
    layers = {batch_norm_buffer(layer, "running_mean") for layer in batch_norm_layers(tensors)}
    for name in tensors:
        if _module(name) in inside and name not in layers:
            inside[_module(name)].append(name)
    for module, names in inside.items():
        means = [name for name in names if "mean" in _words(name)]
        spreads = [name for name in names if _words(name) & {"var", "variance", "std"}]
        if means and any(tensors[name].shape == tensors[means[0]].shape for name in spreads):
            yield from (*means, *spreads, counts[module])


def _other_statistics(tensors: Tensors) -> Iterator[str]:
    """As EvoNorm's running_var, and running_std, without a running_mean and running_var of BatchNorm."""
    known = {*_statistics(tensors), *_input_statistics(tensors)}
    pattern = re.compile(r"(?:running|moving)_(?:mean|var|variance|std|avg)")
    return (name for name in tensors if name not in known and pattern.fullmatch(_last_word(name)))


# -- Functions of the weights -----------------------------------------------------------------------------------------

_ORIGINALS = ("_orig", "_bar", "_unspec")  # suffixes that implementations give the weight before the division


def spectral_norms(tensors: Tensors) -> Iterator[SpectralNorm]:
    """Yields the weights with spectral norm whose vectors can be computed from the weight alone."""
    for u in tensors:
        v = f"{u[:-1]}v" if f"{u[:-1]}v" in tensors else ""
        if u.endswith(".0._u"):  # a parametrization; a later one gets what the one before returns, not the weight
            weights = [u.removesuffix("0._u") + "original"]
        elif u.endswith("_u"):
            weights = [u[:-2] + suffix for suffix in _ORIGINALS]
        elif _last_word(u) == "u0" and f"{u[:-2]}sv0" in tensors:  # as BigGAN's layers, which store no v
            weights, v = [f"{u[:-2]}weight"], ""
        else:
            continue
        weight = next((name for name in weights if name in tensors), None)
        if weight and _fits(tensors, weight, u, v):
            yield SpectralNorm(weight, u, v)


def possible_spectral_norms(tensors: Tensors) -> Iterator[SpectralNorm]:
    """Yields those whose vectors are called u and v, as other parameters may be: these two have a length of 1."""
    for u in (name for name in tensors if _last_word(name) == "u"):
        v, weight = f"{u[:-1]}v", f"{u[:-1]}weight"
        if v in tensors and weight in tensors and _fits(tensors, weight, u, v):
            yield SpectralNorm(weight, u, v)


def _fits(tensors: Tensors, weight: str, u: str, v: str) -> bool:
    """Whether u and v have the lengths of one dimension of the weight and of all others together."""
    shape, rows = tensors[weight].shape, tensors[u].numel
    is_vector = sum(extent > 1 for extent in tensors[u].shape) <= 1 and tensors[u].dtype.kind == "float"
    fits = len(shape) > 1 and rows in shape and tensors[weight].numel > 0 and tensors[weight].dtype.kind == "float"
    columns = tensors[weight].numel // max(1, rows)
    return is_vector and fits and (not v or tensors[v].shape == (columns,))


def _spectral_vectors(tensors: Tensors) -> Iterator[str]:
    return (name for each in spectral_norms(tensors) for name in (each.u, each.v) if name)


def _other_spectral_vectors(tensors: Tensors) -> Iterator[str]:
    """Vectors of power iterations that go through something else than a matrix, or a parametrization before them."""
    known = set(_spectral_vectors(tensors))
    for name in tensors:
        match = re.fullmatch(r"(.*)_([uv])", name)
        if match and name not in known:
            base, partner = match[1], f"{match[1]}_{'v' if match[2] == 'u' else 'u'}"
            parametrized = re.search(r"parametrizations\.\w+\.\d+\.$", base) and partner in tensors
            if parametrized or any(base + suffix in tensors for suffix in _ORIGINALS):
                yield name


def _weight_norms(tensors: Tensors) -> Iterator[str]:
    for name, tensor in tensors.items():
        base = name[: -len("_g")] if name.endswith("_g") else name[: -len("0")] if name.endswith(".original0") else ""
        other = tensors.get(f"{base}_v" if name.endswith("_g") else f"{base}1") if base else None
        if other and len(other.shape) == len(tensor.shape) > 1 and tensor.numel in (1, *other.shape):
            yield name


# -- Quantisation -----------------------------------------------------------------------------------------------------

_SCALES = {"scale", "scales", "scaling", "scb", "absmax", "amax", "qzeros", "codebook", "codebooks", "centroids"}
_BESIDE = {"input", "output", "act", "inv", "group", "block", "global", "nested", "weight", "w", "2"}
_ZEROS = {"zero", "zeros", "zp"}
_OBSERVED = ("scale", "zero_point", "min_val", "max_val", "histogram", "fake_quant_enabled", "observer_enabled")


def _quantized(tensors: Tensors) -> Iterator[str]:
    """Codes with a scale, in the same module (qweight, scales) or named after them (weight, weight.absmax)."""
    scales: dict[str, set[frozenset[str]]] = {}  # module → the other words in the name of each scale in it
    for name in tensors:
        if (words := _words(name)) & _SCALES:
            scales.setdefault(_module(name), set()).add(frozenset(words - _SCALES - _BESIDE))
    if not scales:
        return
    observed = set(_observers(tensors))
    codes = set()
    for name, tensor in tensors.items():
        words, beside = _words(name), scales.get(_module(name), set())
        if tensor.dtype.kind not in ("exact", "float8") or words & _SCALES:
            continue
        # A parameter such as logit_scale is no scale of an integer table in its module.
        is_float8, is_table = tensor.dtype.kind == "float8", len(tensor.shape) > 1
        if name in scales or (is_float8 and beside) or (is_table and not beside.isdisjoint(_subsets(words - _BESIDE))):
            codes.add(name)
    coded = {_module(name) for name in codes} | codes
    for name, tensor in tensors.items():
        belongs = _module(name) in coded and (tensor.dtype.kind == "exact" or _words(name) & _ZEROS)
        if name in codes or (belongs and name not in observed):
            yield name


def _subsets(words: set[str]) -> Iterator[frozenset[str]]:
    few = sorted(words)[:8]  # names may have any number of words
    return (frozenset(each) for size in range(len(few) + 1) for each in itertools.combinations(few, size))


def _integer_tables(tensors: Tensors) -> Iterator[str]:
    """Integers that may be codes with a scale: next to floats other than the weight and the bias, or a scale inside."""
    floats = {_module(name) for name, each in tensors.items() if each.dtype.kind == "float"
              and _last_word(name) not in ("weight", "bias")}  # fmt: skip
    floats |= {_module(_module(name)) for name in tensors if _words(name) & _SCALES}
    for name, tensor in tensors.items():
        is_table = tensor.dtype.kind == "exact" and len(tensor.shape) > 1 and tensor.dtype.name not in ("BOOL", "I64")
        if is_table and _module(name) and (_module(name) in floats or _last_word(name) == "weight"):
            yield name


def _observers(tensors: Tensors) -> Iterator[str]:
    """A scale and its zero_point in modules without codes, and the ranges they come from, as torch stores them."""
    coded = {_module(name) for name, each in tensors.items() if each.dtype.kind != "float" and len(each.shape) > 1}
    points = (name for name, each in tensors.items() if _last_word(name) == "zero_point" and each.dtype.kind == "exact")
    for module in {_module(name) for name in points} - coded:
        if batch_norm_buffer(module, "scale") in tensors:
            inner = batch_norm_buffer(module, "activation_post_process")
            names = (batch_norm_buffer(each, word) for each in (module, inner) for word in _OBSERVED)
            yield from (name for name in names if name in tensors)


def _adapter_scales(tensors: Tensors) -> Iterator[str]:
    """``alpha`` next to low-rank factors, as kohya's scripts and LyCORIS store it."""
    modules = {".".join(name.split(".")[:end]) for name in tensors if _FACTORS.search(name) for end in (-1, -2)}
    return (name for name in tensors if _last_word(name) == "alpha" and _module(name) in modules)


_FACTORS = re.compile(r"(?:^|[._])(?:lora_(?:down|up|mid)|lora_[AB]|hada_w\d|lokr_w\d)")


# -- State that is no weight ------------------------------------------------------------------------------------------


def _queues(tensors: Tensors) -> Iterator[str]:
    """As MoCo's: the keys of the last batches, and where the next ones go; as banks of the features of all samples."""
    queue = re.compile(r"(?:\w*_)?queue(?:_\w+)?|(?:\w*_)?(?:memory|feature)_bank(?:_\w+)?")
    found = [name for name in tensors if queue.fullmatch(_last_word(name))]
    modules = {_module(name) for name in found}
    yield from found
    yield from (name for name in tensors if _module(name) in modules and "ptr" in _words(name))


_COUNTERS = {"num_updates", "global_step", "iteration", "iterations", "num_steps", "n_averaged", "steps", "counter"}
_FLOAT_COUNTERS = {"count", "num_samples"}  # an integer of these names may be a size
_INTEGER_COUNTERS = {"step", "epoch", "update_count"}  # a float of these names may be a parameter


def _counters(tensors: Tensors) -> Iterator[str]:
    for name, tensor in tensors.items():
        names = _COUNTERS | (_INTEGER_COUNTERS if tensor.dtype.kind == "exact" else _FLOAT_COUNTERS)
        if tensor.numel == 1 and _last_word(name).lower() in names:
            yield name


def _codebooks(tensors: Tensors) -> Iterator[str]:
    """As in vector quantisation: each vector is a running sum divided by a running count."""
    for name in tensors:
        if _last_word(name) == "embed_avg" and batch_norm_buffer(_module(name), "cluster_size") in tensors:
            yield name


def _extra_state(tensors: Tensors) -> Iterator[str]:
    return filter(is_extra_state, tensors)


def _random_states(tensors: Tensors) -> Iterator[str]:
    pattern = re.compile(r"(?:\w+_)?(?:rng|random)_states?(?:_\w+)?")
    exact = (name for name, tensor in tensors.items() if tensor.dtype.kind == "exact")
    return (name for name in exact if pattern.fullmatch(_last_word(name)))


# -- The table --------------------------------------------------------------------------------------------------------

_AVERAGE_BEFORE = "the mean of codes is not the code of the mean. Average the checkpoints before quantisation."
_USE_LAST = "these are never averaged. Use --non-float last to copy the last checkpoint's."

STATISTICS = BufferKind(
    "BatchNorm statistics",
    "mean",
    "`running_mean` and `running_var` of one layer",
    "measured again over data; the mean with `--bn keep`",
    where=_statistics,
    hints=("running_mean",),
)
SPECTRAL = BufferKind(
    "spectral norm vectors",
    "last",
    "`weight_u`, `weight_v` next to `weight_orig`; `parametrizations.weight.0._u`, `._v`; `u0` next to `sv0`; `u`, `v` "
    "of length 1",
    "computed from the averaged weight",
    where=_spectral_vectors,
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
    where=_quantized,
    hints=tuple(_SCALES),
)
KINDS = (
    STATISTICS,
    BufferKind(
        "batch counters",
        "last",
        "`num_batches_tracked` of such a layer",
        "the last one's",
        where=_batch_counters,
        hints=("num_batches_tracked",),
    ),
    BufferKind(
        "input statistics",
        "last",
        "a mean, a spread and `count`: `running_mean`, `running_var`, `count`; `_mean`, `_std`, `count`",
        "the last one's",
        notice="with statistics of the inputs copied from the last checkpoint",
        where=_input_statistics,
        hints=SAMPLE_COUNTS,
    ),
    BufferKind(
        "other running statistics",
        "mean",
        "`running_var` alone, `running_std`, `moving_mean`, …",
        "the mean",
        notice="with running statistics averaged, since they belong to no BatchNorm layer",
        where=_other_statistics,
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
        where=_other_spectral_vectors,
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
        where=_weight_norms,
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
        where=_observers,
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
        where=_adapter_scales,
        hints=("alpha",),
    ),
    BufferKind(
        "counters",
        "last",
        "one number called `num_updates`, `global_step`, …; one integer called `step`; one float called `count`",
        "the last one's",
        where=_counters,
        hints=(*_COUNTERS, *_FLOAT_COUNTERS, *_INTEGER_COUNTERS),
    ),
    BufferKind(
        "codebooks",
        "mean",
        "`embed_avg` and `cluster_size`, the running sums and counts of vector quantisation",
        "the mean of vectors, sums and counts",
        "codebook",
        notice="with running sums and counts: the vectors are averaged, and are not the averaged sums divided by the "
        "averaged counts",
        where=_codebooks,
        hints=("embed_avg",),
    ),
    BufferKind(
        "queues",
        "last",
        "`queue`, `queue_ptr`, `memory_bank` and the like",
        "the last one's",
        notice="of queues or banks of features copied from the last checkpoint",
        where=_queues,
        hints=("queue", "_bank"),
    ),
    BufferKind(
        "extra state",
        "newest",
        "`_extra_state`, of any length",
        "the last one's",
        notice="with extra state copied from the last checkpoint",
        where=_extra_state,
        hints=("_extra_state",),
    ),
    BufferKind(
        "random states",
        "last",
        "integers called `rng_state` and the like",
        "the last one's",
        notice="with random states copied from the last checkpoint",
        where=_random_states,
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
        where=_integer_tables,
        hints=("",),
    ),
)


def kinds_of(tensors: Tensors) -> dict[str, BufferKind]:
    """Returns the kind of each tensor that is no plain weight; of several kinds the first in the table."""
    found = {name: INTEGERS for name, tensor in tensors.items() if tensor.dtype.kind == "exact"}
    text = "\n".join(tensors).lower()
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
