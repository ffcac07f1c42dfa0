"""What the output says of itself in ``__metadata__``: reproducible, so no time, no host, no absolute path.

Two of its values are digests of a fixed width, so that they can be put in once the data is known: `DATA_DIGEST`, of the
data section (`digests`), and `HEADER_DIGEST`, plain SHA-256 of all that stands before the data, with zeros in its own
place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckpt_avg.checkpoint.spec import METHOD_KEY, ORIGIN_KEY, Checkpoint, CheckpointSpec, name_of
from ckpt_avg.errors import CheckpointFormatError, UsageError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.open import make_reading
from ckpt_avg.formats.state_dict import Reading
from ckpt_avg.mean.plan import check_rules
from ckpt_avg.version import __version__

SOURCES = "ckpt_avg.sources"
OPTIONS = "ckpt_avg.options"
DTYPE = "ckpt_avg.dtype"
BATCH_NORM = "ckpt_avg.batch_norm"
DATA_DIGEST = "ckpt_avg.data_digest"
HEADER_DIGEST = "ckpt_avg.header_digest"

_TREE = "sha256-tree-1MiB:"
_PLAIN = "sha256:"
_UNKNOWN = "0" * 64
_HEX = "[0-9a-f]{64}"
_METRICS = 32  # of one checkpoint, in the order of their names: some trainers log hundreds


@dataclass(frozen=True, slots=True)
class Options:
    """The options on which the output's bytes depend, those of the BatchNorm refresh aside; each as for `average`."""

    dtype: str = "keep"
    non_float: str = "equal"
    allow_nonfinite: bool = False
    state_key: str | None = None
    ema: bool = False
    strip_prefix: str | None = None

    @property
    def reading(self) -> Reading:
        """How the checkpoints are read."""
        return make_reading(self.state_key, self.ema, self.strip_prefix)


@dataclass(frozen=True, slots=True)
class Digests:
    """What a file records of itself, in hex: the digest of its data section, and that of all before it."""

    data: str
    header: str


def make_metadata(
    checkpoints: Sequence[Checkpoint],
    options: Options,
    *,
    batch_norm: dict[str, object] | None,
    digests: Sequence[Mapping[str, str]] | None = None,
    data_digest: str | None = None,
) -> dict[str, str]:
    """Returns the metadata of an average. That of a copy, of a single checkpoint, keeps what its source says of itself.

    Args:
        checkpoints: what was averaged, in order.
        options: what was asked for.
        batch_norm: how the running statistics came about; None without BatchNorm layers.
        digests: for each checkpoint SHA-256 of its files, by name; None where they were not asked for.
        data_digest: of the output's data section, in hex; None while it is not known.
    """
    specs = [checkpoint.spec for checkpoint in checkpoints]
    own = _own_words(specs[0], options) if len(specs) == 1 else {}
    sources = [
        _source(checkpoint, None if digests is None else digests[index]) for index, checkpoint in enumerate(checkpoints)
    ]
    others = asdict(options)
    dtype = others.pop("dtype")
    metadata = {
        METHOD_KEY: "mean" if len(specs) > 1 else "copy",
        SOURCES: _as_json(sources),
        OPTIONS: _as_json(others),
        DTYPE: dtype,
        **own,
        "format": "pt",  # transformers refuses a file without it
        "ckpt_avg.version": __version__,
        DATA_DIGEST: _TREE + (data_digest or _UNKNOWN),
        HEADER_DIGEST: _PLAIN + _UNKNOWN,
    }
    if dtype != "keep":
        metadata[DTYPE] = dtype
    if batch_norm is not None and not (batch_norm["statistics"] == "copied" and BATCH_NORM in own):
        metadata[BATCH_NORM] = _as_json(batch_norm)
    return metadata


def seal(header: bytes) -> bytes:
    """Returns an output's header with its own digest put in."""
    begin = _place_of_own_digest(header)
    return header[:begin] + header_digest(header).encode() + header[begin + 64 :]


def header_digest(header: bytes) -> str:
    """Returns SHA-256, in hex, of a header with zeros where it holds its own digest.

    Args:
        header: all bytes before the data, the first eight included.

    Raises:
        CheckpointFormatError: it does not hold its own digest where this package writes it.
    """
    begin = _place_of_own_digest(header)
    return hashlib.sha256(header[:begin] + _UNKNOWN.encode() + header[begin + 64 :]).hexdigest()


def recorded_digests(metadata: Mapping[str, Any]) -> Digests | None:
    """Returns the digests that a file records of itself; None without them."""
    data, header = metadata.get(DATA_DIGEST), metadata.get(HEADER_DIGEST)
    if not isinstance(data, str) or not isinstance(header, str):
        return None
    if not re.fullmatch(f"{_TREE}{_HEX}", data) or not re.fullmatch(f"{_PLAIN}{_HEX}", header):
        return None
    return Digests(data.removeprefix(_TREE), header.removeprefix(_PLAIN))


def recorded_sources(metadata: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns what a file records of the checkpoints that it is the mean of; None where that makes no sense."""
    try:
        sources = json.loads(metadata[SOURCES])
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(sources, list) or not sources:
        return None
    return sources if all(map(_is_source, sources)) else None


def recorded_options(metadata: Mapping[str, Any]) -> Options | None:
    """Returns the options that a file records; None where they make no sense."""
    try:
        options = Options(dtype=metadata[DTYPE], **json.loads(metadata[OPTIONS]))
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    texts = (options.state_key or "", options.strip_prefix or "", options.non_float)
    well_formed = all(isinstance(text, str) for text in texts)
    well_formed &= all(isinstance(each, bool) for each in (options.allow_nonfinite, options.ema))
    if not well_formed:
        return None
    try:
        check_rules(options.dtype, options.non_float)
        make_reading(options.state_key, options.ema, options.strip_prefix)
    except UsageError:
        return None
    return options


def recorded_statistics(metadata: Mapping[str, Any]) -> str:
    """Returns where the running statistics of a file come from, as it records; ``none`` where it does not."""
    try:
        return str(json.loads(metadata[BATCH_NORM])["statistics"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return "none"


def text_of(path: Path) -> str:
    """Returns the last part of a checkpoint's path as text, bytes that are no UTF-8 escaped: metadata is UTF-8."""
    return os.fsencode(name_of(path)).decode(errors="backslashreplace")


def size_of(checkpoint: Checkpoint) -> int:
    """Returns the bytes of all files that hold a checkpoint's tensors."""
    return sum(file.size for file in checkpoint.files if isinstance(file, InputFile))


def _is_source(source: object) -> bool:
    if not isinstance(source, dict) or not isinstance(source.get("name"), str):
        return False
    nbytes, digest = source.get("bytes"), source.get("header_sha256")
    return type(nbytes) is int and 0 <= nbytes < 2**63 and isinstance(digest, str) and bool(re.fullmatch(_HEX, digest))


def _source(checkpoint: Checkpoint, digests: Mapping[str, str] | None) -> dict[str, object]:
    spec = checkpoint.spec
    source: dict[str, object] = {
        "name": text_of(spec.path),
        "bytes": size_of(checkpoint),
        "header_sha256": spec.digest,
    }
    moment = {"step": spec.record.step, "epoch": spec.record.epoch}
    source |= {key: value for key, value in moment.items() if value is not None}
    if spec.record.metrics:
        source["metrics"] = dict(sorted(spec.record.metrics.items())[:_METRICS])
    if digests is not None:
        source["sha256"] = dict(digests)
    return source


def _own_words(spec: CheckpointSpec, options: Options) -> dict[str, str]:
    """Returns what a copy keeps of a safetensors file's metadata; what a torch file holds beside its weights is none.

    Where the copy changes dtypes or names, it no longer is what its source says that it is the mean of: then its
    source is that file, whose own sources are kept as its origin.
    """
    if spec.format != "safetensors":
        return {}
    own = {key: value for key, value in spec.metadata.items() if isinstance(value, str)}
    if options.dtype in ("keep", own.get(DTYPE)) and not spec.prefix and options.strip_prefix is None:
        return own
    origin = own.get(ORIGIN_KEY, own.get(SOURCES))
    kept = {key: value for key, value in own.items() if not key.startswith("ckpt_avg.")}
    return kept if origin is None else {**kept, ORIGIN_KEY: origin}


def _as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True)  # in ASCII: what is not text, in a metric's name, stays escaped


def _place_of_own_digest(header: bytes) -> int:
    # Quotes inside of names and values are escaped, so this stands nowhere else.
    key = f'"{HEADER_DIGEST}":"{_PLAIN}'.encode()
    begin = header.find(key)
    if begin < 0:
        raise CheckpointFormatError(f"the header was written anew: expected {key.decode()}…, got none.")
    return begin + len(key)
