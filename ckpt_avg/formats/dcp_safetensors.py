"""The safetensors layout of ``torch.distributed.checkpoint`` (HuggingFaceStorageWriter), not consolidated.

Each rank writes ``shard-<rank>-model-<n>-of-<m>.safetensors``. ``DCP_SHARDING_INFO`` in its metadata gives, for each
tensor, where the box in this file begins. The whole shape is the furthest corner of all boxes
(torch/distributed/checkpoint/hf_storage.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_avg.checkpoint.spec import Checkpoint, Part, TensorSpec
from ckpt_avg.errors import fail
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.dcp_parts import combine_parts
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.safetensors_header import parse_header, read_header
from ckpt_avg.formats.single_file import DCP_SHARDING, refuse_options
from ckpt_avg.formats.tensor_names import settle_names
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import quote


def open_dcp_safetensors(shards: Sequence[Path], path: Path, reading: Reading) -> Checkpoint:
    """Opens the shards of all ranks as one checkpoint; ``path`` is what it is called.

    Raises:
        CheckpointFormatError: a shard is damaged or missing, or is not such a shard.
    """
    refuse_options(reading, path)
    parts: dict[str, list[Part]] = {}
    first: dict[str, TensorSpec] = {}
    files: list[InputFile] = []
    digest = hashlib.sha256()
    with ExitStack() as on_error:
        for number, shard in enumerate(shards):
            files.append(on_error.enter_context(InputFile(shard)))
            header = read_header(files[-1])
            digest.update(hashlib.sha256(header).digest())
            tensors, metadata = parse_header(files[-1], header)
            offsets = saved_offsets(shard, metadata)
            for name, tensor in tensors.items():
                dtype = first.setdefault(name, tensor).dtype
                starts = offsets.get(name, (0,) * len(tensor.shape))
                if len(starts) != len(tensor.shape) or tensor.dtype != dtype:
                    expected = f"expected {dtype.name} and {len(tensor.shape)} offsets"
                    fail(shard, f"{expected}, got {tensor.dtype.name} and {quote(starts)}", tensor=name)
                parts.setdefault(name, []).append(Part(starts, replace(tensor, name="", file=number)))
        names = settle_names(first, reading.strip_prefix, path)
        combined = {}
        for old, new in names.renamed.items():
            corners = [
                [start + extent for start, extent in zip(part.starts, part.tensor.shape, strict=True)]
                for part in parts[old]
            ]
            shape = tuple(map(max, zip(*corners, strict=True)))
            combined[new] = combine_parts(new, first[old].dtype, shape, parts[old], f"{path}: tensor {quote(new)}")
        spec = names.make_spec(
            path,
            "DCP safetensors",
            combined,
            kind="torch DCP",
            metadata={"files": len(files)},
            digest=digest.hexdigest(),
        )
        on_error.pop_all()
        return Checkpoint(spec, files)


def saved_offsets(shard: Path, metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Returns where the parts in a shard begin, by tensor name."""
    where = f"{shard}: {DCP_SHARDING}"
    try:
        parsed: Any = json.loads(metadata.get(DCP_SHARDING, "{}"))
        offsets = {name: tuple(entry["saved_offsets"]) for name, entry in parsed.items()}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        fail(where, "expected saved_offsets for each tensor, got something else", "Save it again")
    if not all(type(start) is int and 0 <= start <= LIMITS.elements for starts in offsets.values() for start in starts):
        fail(where, "expected offsets from 0, got others", "Save it again")
    return offsets
