"""Recognises tensors that are no plain weights, by their names, shapes and dtypes: a function for each of `KINDS`.

Each takes the tensors of a checkpoint, and yields the names of those of its kind.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckpt_avg.checkpoint.spec import SAMPLE_COUNTS, TensorSpec, batch_norm_buffer, batch_norm_layers, is_extra_state
from ckpt_avg.formats.trainers import lora

Tensors = Mapping[str, TensorSpec]


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


def statistics(tensors: Tensors) -> Iterator[str]:
    """The running statistics of BatchNorm layers."""
    for layer in batch_norm_layers(tensors):
        yield from (batch_norm_buffer(layer, each) for each in ("running_mean", "running_var"))


def batch_counters(tensors: Tensors) -> Iterator[str]:
    """The batch counters of BatchNorm layers."""
    counters = (batch_norm_buffer(layer, "num_batches_tracked") for layer in batch_norm_layers(tensors))
    return (name for name in counters if name in tensors)


def input_statistics(tensors: Tensors) -> Iterator[str]:
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


def other_statistics(tensors: Tensors) -> Iterator[str]:
    """As EvoNorm's running_var, and running_std, without a running_mean and running_var of BatchNorm."""
    known = {*statistics(tensors), *input_statistics(tensors)}
    pattern = re.compile(r"(?:running|moving)_(?:mean|var|variance|std|avg)")
    return (name for name in tensors if name not in known and pattern.fullmatch(_last_word(name)))


def is_spread(name: str) -> bool:
    """Whether a tensor is a running variance or standard deviation by its name, which cannot be negative."""
    return re.fullmatch(r"(?:running|moving)_(?:var|variance|std)", _last_word(name)) is not None


# -- Functions of the weights -----------------------------------------------------------------------------------------

_ORIGINALS = ("_orig", "_bar", "_unspec")  # suffixes that implementations give the weight before the division


def spectral_norms(tensors: Tensors) -> Iterator[SpectralNorm]:
    """Yields the weights with spectral norm whose vectors can be computed from the weight alone."""
    for u in (name for name in tensors if name.endswith(("_u", "u0"))):
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
    for u in [name for name in tensors if name.endswith("u") and _last_word(name) == "u"]:
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


def spectral_vectors(tensors: Tensors) -> Iterator[str]:
    """The vectors of `spectral_norms`."""
    return (name for each in spectral_norms(tensors) for name in (each.u, each.v) if name)


def other_spectral_vectors(tensors: Tensors) -> Iterator[str]:
    """Vectors of power iterations that go through something else than a matrix, or a parametrization before them."""
    known = set(spectral_vectors(tensors))
    for name in tensors:
        match = re.fullmatch(r"(.*)_([uv])", name)
        if match and name not in known:
            base, partner = match[1], f"{match[1]}_{'v' if match[2] == 'u' else 'u'}"
            parametrized = re.search(r"parametrizations\.\w+\.\d+\.$", base) and partner in tensors
            if parametrized or any(base + suffix in tensors for suffix in _ORIGINALS):
                yield name


def weight_norms(tensors: Tensors) -> Iterator[str]:
    """The lengths of weight norm, next to its directions."""
    for name, tensor in tensors.items():
        base = name[: -len("_g")] if name.endswith("_g") else name[: -len("0")] if name.endswith(".original0") else ""
        other = tensors.get(f"{base}_v" if name.endswith("_g") else f"{base}1") if base else None
        if other and len(other.shape) == len(tensor.shape) > 1 and tensor.numel in (1, *other.shape):
            yield name


# -- Quantisation -----------------------------------------------------------------------------------------------------

SCALES = {"scale", "scales", "scaling", "scb", "absmax", "amax", "qzeros", "codebook", "codebooks", "centroids"}
_BESIDE = {"input", "output", "act", "inv", "group", "block", "global", "nested", "weight", "w", "2"}
_ZEROS = {"zero", "zeros", "zp"}
_OBSERVED = ("scale", "zero_point", "min_val", "max_val", "histogram", "fake_quant_enabled", "observer_enabled")


def quantized(tensors: Tensors) -> Iterator[str]:
    """Codes with a scale, in the same module (qweight, scales) or named after them (weight, weight.absmax)."""
    scales: dict[str, set[frozenset[str]]] = {}  # module → the other words in the name of each scale in it
    for name in tensors:
        if (words := _words(name)) & SCALES:
            scales.setdefault(_module(name), set()).add(frozenset(words - SCALES - _BESIDE))
    if not scales:
        return
    observed = set(observers(tensors))
    codes = set()
    for name, tensor in tensors.items():
        words, beside = _words(name), scales.get(_module(name), set())
        if tensor.dtype.kind not in ("exact", "float8") or words & SCALES:
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


def integer_tables(tensors: Tensors) -> Iterator[str]:
    """Integers that may be codes with a scale: next to floats other than the weight and the bias, or a scale inside."""
    tables = [
        name
        for name, each in tensors.items()
        if each.dtype.kind == "exact" and len(each.shape) > 1 and each.dtype.name not in ("BOOL", "I64")
    ]
    if not tables:
        return
    floats = {_module(name) for name, each in tensors.items() if each.dtype.kind == "float"
              and _last_word(name) not in ("weight", "bias")}  # fmt: skip
    floats |= {_module(_module(name)) for name in tensors if _words(name) & SCALES}
    for name in tables:
        if _module(name) and (_module(name) in floats or _last_word(name) == "weight"):
            yield name


def observers(tensors: Tensors) -> Iterator[str]:
    """A scale and its zero_point in modules without codes, and the ranges they come from, as torch stores them."""
    coded = {_module(name) for name, each in tensors.items() if each.dtype.kind != "float" and len(each.shape) > 1}
    points = (name for name, each in tensors.items() if _last_word(name) == "zero_point" and each.dtype.kind == "exact")
    for module in {_module(name) for name in points} - coded:
        if batch_norm_buffer(module, "scale") in tensors:
            inner = batch_norm_buffer(module, "activation_post_process")
            names = (batch_norm_buffer(each, word) for each in (module, inner) for word in _OBSERVED)
            yield from (name for name in names if name in tensors)


def adapter_scales(tensors: Tensors) -> Iterator[str]:
    """``alpha`` next to low-rank factors, as kohya's scripts and LyCORIS store it."""
    factor = re.compile(lora.TRAINER.tensor_names)
    modules = {".".join(name.split(".")[:end]) for name in tensors if factor.search(name) for end in (-1, -2)}
    return (name for name in tensors if _last_word(name) == "alpha" and _module(name) in modules)


# -- State that is no weight ------------------------------------------------------------------------------------------


def queues(tensors: Tensors) -> Iterator[str]:
    """As MoCo's: the keys of the last batches, and where the next ones go; as banks of the features of all samples."""
    queue = re.compile(r"(?:\w*_)?queue(?:_\w+)?|(?:\w*_)?(?:memory|feature)_bank(?:_\w+)?")
    found = [name for name in tensors if queue.fullmatch(_last_word(name))]
    modules = {_module(name) for name in found}
    yield from found
    yield from (name for name in tensors if _module(name) in modules and "ptr" in _words(name))


COUNTERS = {"num_updates", "global_step", "iteration", "iterations", "num_steps", "n_averaged", "steps", "counter"}
FLOAT_COUNTERS = {"count", "num_samples"}  # an integer of these names may be a size
INTEGER_COUNTERS = {"step", "epoch", "update_count"}  # a float of these names may be a parameter


def counters(tensors: Tensors) -> Iterator[str]:
    """Numbers that count steps, epochs or samples."""
    for name, tensor in tensors.items():
        names = COUNTERS | (INTEGER_COUNTERS if tensor.dtype.kind == "exact" else FLOAT_COUNTERS)
        if tensor.numel == 1 and _last_word(name).lower() in names:
            yield name


def codebooks(tensors: Tensors) -> Iterator[str]:
    """As in vector quantisation: each vector is a running sum divided by a running count."""
    for name in tensors:
        if _last_word(name) == "embed_avg" and batch_norm_buffer(_module(name), "cluster_size") in tensors:
            yield name


def extra_state(tensors: Tensors) -> Iterator[str]:
    """What modules save by `get_extra_state`."""
    return filter(is_extra_state, tensors)


def random_states(tensors: Tensors) -> Iterator[str]:
    """The states of random number generators."""
    pattern = re.compile(r"(?:\w+_)?(?:rng|random)_states?(?:_\w+)?")
    exact = (name for name, tensor in tensors.items() if tensor.dtype.kind == "exact")
    return (name for name in exact if pattern.fullmatch(_last_word(name)))
