"""The ``__metadata__`` of the output: its sources, options and digests. Reproducible: no time, host or absolute path.

Some values are digests of a fixed width, filled in when the data is known: `DATA_DIGEST`, of the data section (see
`digests`), and `HEADER_DIGEST`, the SHA-256 of all bytes before the data, with zeros in place of this digest itself.
Each of several shards has its own two, and the same `SHARDS_DIGEST` (see `shards`) as the others and their index.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckpt_avg.checkpoint.spec import METHOD_KEY, ORIGIN_KEY, Checkpoint, CheckpointSpec, name_of
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.version import __version__

if TYPE_CHECKING:
    from ckpt_avg.mean.weighting import Weights
    from ckpt_avg.runs.metric_log import LogUse

WEIGHT = "weight"  # of a source: its weight, if the weights are not all equal
SUMMED = "summed"  # of a source: its position in the sum, if that is not in the order of the sources
SOURCES = "ckpt_avg.sources"
OPTIONS = "ckpt_avg.options"
WEIGHTING = "ckpt_avg.weighting"
DTYPE = "ckpt_avg.dtype"
LOG = "ckpt_avg.log"
BATCH_NORM = "ckpt_avg.batch_norm"
SPECTRAL_NORM = "ckpt_avg.spectral_norm"
SPLIT = "ckpt_avg.split"
DATA_DIGEST = "ckpt_avg.data_digest"
FILES = "ckpt_avg.files"
MODEL = "ckpt_avg.model"
TIED = "ckpt_avg.tied"
HEADER_DIGEST = "ckpt_avg.header_digest"
SHARD = "ckpt_avg.shard"
SHARDS_DIGEST = "ckpt_avg.shards_digest"
_OF_ONE_FILE = (DATA_DIGEST, HEADER_DIGEST, SHARD, SHARDS_DIGEST, FILES, MODEL, TIED)  # a copy has others, or none

_TREE = "sha256-tree-1MiB:"
_PLAIN = "sha256:"
_UNKNOWN = "0" * 64
_HEX = "[0-9a-f]{64}"
_MOST_METRICS = 32  # of one checkpoint, sorted by name: some trainers log hundreds


@dataclass(frozen=True, slots=True)
class Digests:
    """The digests that a file records, in hex: of its data section, and of the header before it."""

    data: str
    header: str


def make_metadata(
    checkpoints: Sequence[Checkpoint],
    options: Mapping[str, Any],
    *,
    sum_order: Sequence[int] = (),
    log: LogUse | None = None,
    weights: Weights | None = None,
    batch_norm: dict[str, object] | None,
    spectral_norms: int = 0,
    split: str | None = None,
    digests: Sequence[Mapping[str, str]] | None = None,
    files: Mapping[str, str | None] | None = None,
    tied: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Returns the metadata of an average; `with_digests` completes it for each file.

    The copy of a single checkpoint also keeps that checkpoint's metadata.

    Args:
        checkpoints: the checkpoints that were averaged, in order.
        options: the options to record.
        sum_order: the checkpoints' indices in the order of the sum, if it is another one.
        log: the log whose metric selected them.
        weights: of the checkpoints; None if all are equal.
        batch_norm: where the running statistics come from; None without BatchNorm layers.
        spectral_norms: how many weights have spectral norm whose vectors are computed from the averaged weight.
        split: the split of the data on which the checkpoints were chosen; None if that is not known.
        digests: for each checkpoint the SHA-256 of its files, by name; None if not requested.
        files: of an output folder: the name of each file in it, with SHA-256 in hex if it is copied; None of a file.
    """
    specs = [checkpoint.spec for checkpoint in checkpoints]
    own = _kept_metadata(specs[0], options) if len(specs) == 1 else {}
    sources = [
        _source(checkpoint, None if digests is None else digests[index]) for index, checkpoint in enumerate(checkpoints)
    ]
    if list(sum_order) != sorted(sum_order):
        for position, index in enumerate(sum_order):
            sources[index][SUMMED] = position
    for source, value in zip(sources, log.values, strict=True) if log is not None else ():
        source["logged"] = value
    if weights is not None:
        for source, weight in zip(sources, weights.values, strict=True):
            source[WEIGHT] = weight
    others = dict(options)
    dtype = others.pop("dtype")
    metadata = {
        METHOD_KEY: "copy" if len(specs) == 1 else "weighted mean" if weights else "mean",
        SOURCES: _as_json(sources),
        OPTIONS: _as_json(others),
        DTYPE: dtype,
        **own,
        "format": "pt",  # transformers refuses a file without it
        "ckpt_avg.version": __version__,
    }
    if dtype != "keep":
        metadata[DTYPE] = dtype
    if log is not None:
        metadata[LOG] = _as_json({"name": text_of(Path(log.name)), "step": log.step, "metric": log.metric})
    if batch_norm is not None and not (batch_norm["statistics"] == "copied" and BATCH_NORM in own):
        metadata[BATCH_NORM] = _as_json(batch_norm)
    if split is not None:
        metadata[SPLIT] = split.encode(errors="backslashreplace").decode()
    if weights is not None:
        metadata[WEIGHTING] = _as_json(dict(weights.method))
    metadata |= {MODEL: specs[0].model} if specs[0].model else {}
    metadata |= {TIED: _as_json(dict(tied))} if tied else {}
    metadata |= {FILES: _as_json(dict(files))} if files is not None else {}
    if spectral_norms:
        metadata[SPECTRAL_NORM] = _as_json({"vectors": "recomputed", "weights": spectral_norms})
    return metadata


def with_digests(
    metadata: Mapping[str, str], data_digests: Sequence[str] | None, files: int
) -> Iterator[dict[str, str]]:
    """Yields the metadata of each file of an output.

    Args:
        metadata: from `make_metadata`.
        data_digests: of their data sections, in hex; None while they are not known.
        files: how many there are.
    """
    digests = data_digests or [_UNKNOWN] * files
    together = _PLAIN + (shards_digest(digests) if data_digests else _UNKNOWN)
    for number, digest in enumerate(digests, start=1):
        own = {DATA_DIGEST: _TREE + digest, HEADER_DIGEST: _PLAIN + _UNKNOWN}
        if files > 1:
            own |= {SHARD: _as_json({"number": number, "of": files}), SHARDS_DIGEST: together}
        yield {**metadata, **own}


def digest_of(data_digests: Sequence[str]) -> str:
    """Returns the digest of the data of all files, in hex: of a single file its own."""
    return data_digests[0] if len(data_digests) == 1 else shards_digest(data_digests)


def shards_digest(data_digests: Iterable[str]) -> str:
    """Returns the SHA-256, in hex, of the digests of the shards' data sections, 32 bytes each, in order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, data_digests))).hexdigest()


def seal(header: bytes) -> bytes:
    """Returns an output's header with its own digest filled in."""
    digest = header_digest(header)
    if digest is None:
        raise ValueError("a header without a digest of itself")
    begin = _digest_offset(header)
    return b"".join((header[:begin], digest.encode(), memoryview(header)[begin + 64 :]))


def header_digest(header: bytes) -> str | None:
    """Returns the SHA-256, in hex, of a header with zeros in place of its own digest; None if it has none.

    ``header`` is all bytes before the data, the first eight included.
    """
    begin = _digest_offset(header)
    if begin < 0:
        return None
    digest = hashlib.sha256(header[:begin] + _UNKNOWN.encode())
    digest.update(memoryview(header)[begin + 64 :])
    return digest.hexdigest()


def recorded_digests(metadata: Mapping[str, Any]) -> Digests | None:
    """Returns the digests that a file records; None if it has none, or malformed ones."""
    data, header = metadata.get(DATA_DIGEST), metadata.get(HEADER_DIGEST)
    if not isinstance(data, str) or not isinstance(header, str):
        return None
    if not re.fullmatch(f"{_TREE}{_HEX}", data) or not re.fullmatch(f"{_PLAIN}{_HEX}", header):
        return None
    return Digests(data.removeprefix(_TREE), header.removeprefix(_PLAIN))


def recorded_tied(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tied tensors that a file does not store: name → the name under which it is stored."""
    tied = _parsed(metadata, TIED)
    return tied if isinstance(tied, dict) and all(isinstance(each, str) for each in tied.values()) else {}


def recorded_shard(metadata: Mapping[str, Any]) -> tuple[int, int, str] | None:
    """Returns of a shard its number, that of all shards, and the digest of all, in hex; None of a single file."""
    shard, digest = _parsed(metadata, SHARD), metadata.get(SHARDS_DIGEST)
    if not isinstance(shard, dict) or not isinstance(digest, str) or not re.fullmatch(f"{_PLAIN}{_HEX}", digest):
        return None
    number, count = shard.get("number"), shard.get("of")
    if not isinstance(number, int) or not isinstance(count, int):
        return None
    return number, count, digest.removeprefix(_PLAIN)


def recorded_sources(metadata: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns what a file records of the checkpoints that it is the mean of; None if it has none, or malformed ones."""
    sources = _parsed(metadata, SOURCES)
    return sources if isinstance(sources, list) and sources and all(map(_is_source, sources)) else None


def recorded_sum_order(sources: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the indices of recorded sources in the order in which they were summed."""
    positions = [source.get(SUMMED) for source in sources]
    if sorted(each for each in positions if type(each) is int) != list(range(len(sources))):
        return list(range(len(sources)))
    return sorted(range(len(sources)), key=lambda index: sources[index][SUMMED])


def recorded_weights(sources: Sequence[Mapping[str, Any]]) -> tuple[float, ...] | None:
    """Returns the weights of recorded sources; None if they record none, so that all are equal.

    Raises ValueError if only some record one, or what cannot be one.
    """
    weights = [source.get(WEIGHT) for source in sources]
    if all(weight is None for weight in weights):
        return None
    known = [float(weight) for weight in weights if isinstance(weight, float) and math.isfinite(weight)]
    if len(known) < len(weights) or not any(known):
        raise ValueError("a source without a weight")
    return tuple(known)


def recorded_weighting(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how a file says that its unequal weights were made; empty if it says nothing."""
    method = _parsed(metadata, WEIGHTING)
    return method if isinstance(method, dict) else {}


def recorded_options(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the options that a file records, unchecked; None if it has none."""
    options = _parsed(metadata, OPTIONS)
    return {**options, "dtype": metadata[DTYPE]} if isinstance(options, dict) and DTYPE in metadata else None


def recorded_files(metadata: Mapping[str, Any]) -> dict[str, str | None]:
    """Returns the files of the folder that weights belong to: name → SHA-256 in hex, None if that is not recorded.

    Empty if the weights record none, or malformed ones.
    """
    files = _parsed(metadata, FILES)
    if not isinstance(files, dict):
        return {}
    are_digests = all(each is None or (isinstance(each, str) and re.fullmatch(_HEX, each)) for each in files.values())
    return files if are_digests and all(map(_is_inside, files)) else {}


def _is_inside(name: str) -> bool:
    return bool(name) and not re.search(r"[\\\0:]", name) and not {"", ".", ".."} & set(name.split("/"))


def recorded_statistics(metadata: Mapping[str, Any]) -> str:
    """Returns where a file's running statistics come from, as it records; ``none`` if it records nothing."""
    batch_norm = _parsed(metadata, BATCH_NORM)
    return str(batch_norm.get("statistics", "none")) if isinstance(batch_norm, dict) else "none"


def _parsed(metadata: Mapping[str, Any], key: str) -> Any:
    """Returns a value of untrusted metadata that should be JSON; None if it is not."""
    try:
        return json.loads(metadata[key])
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def text_of(path: Path) -> str:
    """Returns the last part of a checkpoint's path as text. Metadata is UTF-8, so other bytes are escaped."""
    return os.fsencode(name_of(path)).decode(errors="backslashreplace")


def size_of(checkpoint: Checkpoint) -> int:
    """Returns the size in bytes of all files of a checkpoint."""
    return sum(file.size for file in checkpoint.files if isinstance(file, InputFile))


def _is_source(source: object) -> bool:
    if not isinstance(source, dict) or not isinstance(source.get("name"), str):
        return False
    nbytes, digest = source.get("bytes"), source.get("header_sha256")
    return type(nbytes) is int and 0 <= nbytes < 2**63 and isinstance(digest, str) and bool(re.fullmatch(_HEX, digest))


def _source(checkpoint: Checkpoint, digests: Mapping[str, str] | None) -> dict[str, object]:
    spec = checkpoint.spec
    source: dict[str, object] = {
        "name": text_of(spec.path.parent if spec.model else spec.path),
        "bytes": size_of(checkpoint),
        "header_sha256": spec.digest,
    }
    moment = {"step": spec.record.step, "epoch": spec.record.epoch}
    source |= {key: value for key, value in moment.items() if value is not None}
    metrics = sorted(each for each in spec.record.metrics.items() if math.isfinite(each[1]))
    if metrics:
        source["metrics"] = dict(metrics[:_MOST_METRICS])
    if digests is not None:
        source["sha256"] = dict(digests)
    return source


def _kept_metadata(spec: CheckpointSpec, options: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a copy keeps of the metadata of a safetensors file; other formats have none.

    If the copy changes dtypes or names, it is no longer the mean that the file records. It then records the file as its
    source, and the sources of that file as its origin.
    """
    if spec.format not in ("safetensors", "sharded safetensors"):
        return {}
    own = {key: value for key, value in spec.metadata.items() if isinstance(value, str) and key not in _OF_ONE_FILE}
    if options["dtype"] in ("keep", own.get(DTYPE)) and not spec.prefix and options["strip_prefix"] is None:
        return own
    origin = own.get(ORIGIN_KEY, own.get(SOURCES))
    kept = {key: value for key, value in own.items() if not key.startswith("ckpt_avg.")}
    return kept if origin is None else {**kept, ORIGIN_KEY: origin}


def _as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True)  # in ASCII: lone surrogates in a metric's name stay escaped


def _digest_offset(header: bytes) -> int:
    # Quotes inside names and values are escaped, so this occurs nowhere else.
    key = f'"{HEADER_DIGEST}":"{_PLAIN}'.encode()
    begin = header.find(key)
    return begin if begin < 0 else begin + len(key)
