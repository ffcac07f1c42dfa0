"""A model in several files, listed by a shard index: ``{"metadata": …, "weight_map": {tensor: file}}``.

transformers, diffusers and accelerate write ``model.safetensors.index.json`` (or ``pytorch_model.bin.index.json``)
next to the shards. File names in an index are untrusted (`safe_sibling`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt_avg.checkpoint.spec import Checkpoint, CheckpointSpec, TensorSpec
from ckpt_avg.errors import CheckpointFormatError, fail
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.status import input_status, is_file
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.single_file import open_file
from ckpt_avg.formats.tensor_names import TensorTable, is_text, settle_names, shared_table
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import listing, plural, quote

SUFFIX = ".index.json"
_AGAIN = "Save or copy the checkpoint again"


def is_index(path: Path) -> bool:
    """Whether a file is a shard index, by its name."""
    return path.name.endswith(SUFFIX) and is_file(path)


def open_sharded(index: Path, path: Path, reading: Reading) -> Checkpoint:
    """Opens every shard that an index names; ``path`` is what the checkpoint is called: the index, or its folder.

    Raises:
        CheckpointFormatError: the index is damaged or unsafe, shards are missing, or index and shards disagree.
    """
    weight_map, digest = _read_index(index)
    paths = {name: safe_sibling(index.parent, name, str(index)) for name in dict.fromkeys(weight_map.values())}
    if missing := [name for name, shard in paths.items() if not input_status(shard)]:
        problem = f"{plural(len(missing), 'shard')} of {len(paths)} missing: {listing(map(quote, missing))}"
        fail(index, problem, "Copy them next to the index")
    bare = replace(reading, strip_prefix=None)
    with ExitStack() as on_error:
        opened = [on_error.enter_context(open_file(shard, bare, strip=False)) for shard in paths.values()]
        shards = {name: checkpoint.spec for name, checkpoint in zip(paths, opened, strict=True)}
        for name, spec in shards.items():
            if ".safetensors." in index.name and spec.format != "safetensors":
                fail(index, f"expected safetensors shards, as its own name says, got {quote(name)}", _AGAIN)

        def make() -> TensorTable:
            tensors = _combine(index, weight_map, shards)
            names = settle_names(tensors, reading.strip_prefix, path)
            return TensorTable(tensors, names, parts=[spec.tensors for spec in shards.values()])

        # Checkpoints of one run mostly share the tables of their shards, which live as long as the table made of them.
        tables = tuple(id(spec.tensors) for spec in shards.values())
        table = shared_table((tuple(weight_map.items()), tables, reading.strip_prefix), make)
        digests = "".join([digest, *(spec.digest for spec in shards.values())])
        spec = table.names.make_spec(
            path,
            f"sharded {' and '.join(sorted({spec.format for spec in shards.values()}))}",
            table,
            kind=opened[-1].spec.kind,
            averaged=opened[-1].spec.averaged,
            notes=tuple(dict.fromkeys(note for spec in shards.values() for note in spec.notes)),
            metadata={**_common([spec.metadata for spec in shards.values()]), "shards": len(shards)},
            digest=hashlib.sha256(digests.encode()).hexdigest(),
        )
        on_error.pop_all()
        return Checkpoint(spec, [file for checkpoint in opened for file in checkpoint.files])


def _common(metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what all shards have in their metadata."""
    first, *others = metadata
    return {key: value for key, value in first.items() if all(each.get(key) == value for each in others)}


def shards_of(index: Path) -> set[str]:
    """Returns the names of the files that an index names; none if it cannot be read."""
    try:
        return set(_read_index(index)[0].values())
    except CheckpointFormatError:
        return set()


def _read_index(index: Path) -> tuple[Mapping[str, str], str]:
    """Returns tensor name → name of its shard, and the SHA-256 of the index."""
    with InputFile(index) as file:
        if file.size > LIMITS.index:
            fail(index, f"expected a shard index of at most {LIMITS.index:,} bytes, got {file.size:,}", _AGAIN)
        text = file.read(0, file.size)
    # What json builds of an empty list or of a name takes up to 80 and 160 bytes: limited before it is built.
    built = 80 * (text.count(b"[") + text.count(b"{")) + 160 * text.count(b":")
    if built > 64 * 2**20 + 3 * len(text):
        fail(index, "expected names of tensors and files in the shard index, got too many other values", _AGAIN)
    try:
        parsed: Any = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        fail(index, f"expected a shard index in JSON, got other text: {str(error)[:200]}", _AGAIN)
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        fail(index, 'expected a shard index {"weight_map": {tensor: file}}, got other JSON', _AGAIN)
    if not all(isinstance(name, str) for name in weight_map.values()):
        fail(index, "expected file names in weight_map, got other values", _AGAIN)
    return weight_map, hashlib.sha256(text).hexdigest()


def _combine(
    index: Path, weight_map: Mapping[str, str], shards: Mapping[str, CheckpointSpec]
) -> Mapping[str, TensorSpec]:
    """Returns the tensors of all shards in the order of the index, which must agree with the shards."""
    promised: dict[str, set[str]] = {name: set() for name in shards}
    for tensor_name, shard in weight_map.items():
        promised[shard].add(tensor_name)
    tensors: dict[str, TensorSpec] = {}
    for number, (name, spec) in enumerate(shards.items()):
        shard = f"the shard {quote(name)}"
        if lacking := sorted(promised[name] - set(spec.tensors)):
            fail(index, f"{shard} lacks {listing(map(quote, lacking))}, which the index says it contains", _AGAIN)
        extra = sorted(set(spec.tensors) - promised[name])
        if twice := [tensor for tensor in extra if tensor in weight_map]:
            fail(index, f"{shard} and another one both contain {listing(map(quote, twice))}", _AGAIN)
        if extra:
            fail(index, f"{shard} contains {listing(map(quote, extra))}, which the index does not list", _AGAIN)
        tensors |= {each.name: replace(each, file=number) for each in spec.tensors.values()}
    return {name: tensors[name] for name in weight_map}


def safe_sibling(folder: Path, name: object, where: str) -> Path:
    """Returns the path of a file in the same folder that an index or metadata file names.

    A symbolic link may lead out of the folder only as in the Hugging Face cache, where ``snapshots/<revision>/<file>``
    points into ``blobs``.

    Raises:
        CheckpointFormatError: the name, or the link of that name, leads out of the folder.
    """
    distrust = "Don't trust it"
    is_name = isinstance(name, str) and name not in ("", ".", "..") and is_text(name)
    if not isinstance(name, str) or not is_name or any(sign in name for sign in "/\\\0:"):
        fail(where, f"expected the name of a file next to it, got {quote(name)}", distrust)
    path = folder / name
    try:
        is_link = path.is_symlink()
    except (OSError, ValueError):  # a name that is too long, or not text
        fail(where, f"{quote(name)} cannot be the name of a file", distrust)
    if is_link:
        try:
            target = Path(os.path.realpath(path, strict=True))
        except OSError as error:
            fail(where, f"{quote(name)} is a symbolic link that cannot be followed: {error.strerror}", "Copy the file")
        real = Path(os.path.realpath(folder))
        cached = real.parent.name == "snapshots" and target.parent == real.parent.parent / "blobs"
        if real not in target.parents and not cached:
            problem = f"{quote(name)} is a symbolic link out of the folder, to {quote(target)}"
            fail(where, problem, "Copy the file")
    return path
