"""A model in several files, listed by a shard index: ``{"metadata": …, "weight_map": {tensor: file}}``.

transformers, diffusers and accelerate write ``model.safetensors.index.json`` (or ``pytorch_model.bin.index.json``)
beside the shards. File names in an index are untrusted (`members`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakValueDictionary

from ckpt_avg.checkpoint.spec import Checkpoint, CheckpointSpec, TensorSpec
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.in_memory import MemoryFile
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.status import is_file
from ckpt_avg.formats.members import member_of
from ckpt_avg.formats.one_file import open_file
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.torch_file import Names, rename, settle_names
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import listing, plural, quote

SUFFIX = ".index.json"


def is_index(path: Path) -> bool:
    """Whether the file is a shard index, by its name and its start."""
    return path.name.endswith(SUFFIX) and is_file(path)


def open_sharded(index: Path, path: Path, reading: Reading) -> Checkpoint:
    """Opens every shard that an index names.

    Args:
        index: the index file.
        path: what the checkpoint is called: the index, or its folder.
        reading: how to read each shard.

    Raises:
        CheckpointFormatError: the index is damaged or unsafe, shards are missing, or index and shards disagree.
    """
    weight_map, digest = _weight_map(index)
    shards = {name: member_of(index.parent, name, str(index)) for name in dict.fromkeys(weight_map.values())}
    for name in shards:
        if ".safetensors." in index.name and not name.endswith(".safetensors"):
            _fail(index, f"expected safetensors shards, as its own name says, got {quote(name)}")
    missing = [name for name, shard in shards.items() if not shard.exists()]
    if missing:
        raise CheckpointFormatError(
            f"{index}: {plural(len(missing), 'shard')} of {len(shards)} missing: {listing(map(quote, missing))}. Copy "
            "them beside the index."
        )
    files: list[InputFile | MemoryFile] = []
    opened: dict[str, CheckpointSpec] = {}
    begins: list[int] = []
    bare = replace(reading, strip_prefix=None)
    with ExitStack() as on_error:
        for name, shard in shards.items():
            checkpoint = on_error.enter_context(open_file(shard, bare, strip=False))
            opened[name] = checkpoint.spec
            begins.append(len(files))
            files += checkpoint.files
        whole = _whole(index, path, weight_map, opened, begins, reading)
        names = whole.names
        forms = sorted({spec.format for spec in opened.values()})
        spec = CheckpointSpec(
            path,
            f"sharded {' and '.join(forms)}",
            whole,
            kind=names.kind or list(opened.values())[-1].kind,
            prefix=names.stripped.prefix,
            lacks_prefix=names.stripped.lacking,
            averaged=names.averaged,
            metadata={"shards": len(shards)},
            digest=_joined(digest, *(spec.digest for spec in opened.values())),
            notes=(*dict.fromkeys(note for spec in opened.values() for note in spec.notes), *names.notes),
        )
        on_error.pop_all()
        return Checkpoint(spec, files)


def _joined(*digests: str) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


class _Whole(dict[str, TensorSpec]):
    """The tensors of all shards together. It is shared, so nothing changes it.

    Attributes:
        shards: the tables that it was made of, kept for the next checkpoint.
        names: what the names tell.
    """

    def __init__(self, tensors: Mapping[str, TensorSpec], shards: list[Mapping[str, TensorSpec]], names: Names) -> None:
        super().__init__(tensors)
        self.shards, self.names = shards, names


# The shards of one run's checkpoints mostly share their tables, and then the whole is put together once.
_WHOLES: WeakValueDictionary[tuple[object, ...], _Whole] = WeakValueDictionary()


def _whole(
    index: Path,
    path: Path,
    weight_map: Mapping[str, str],
    opened: Mapping[str, CheckpointSpec],
    begins: Sequence[int],
    reading: Reading,
) -> _Whole:
    """Returns the tensors that the index names, with the shards that it places them in.

    Args:
        index, path, reading: as for `open_sharded`.
        weight_map: tensor name → name of its shard.
        opened: name of the shard → what it holds.
        begins: the index of each shard's first file among all.
    """
    shards = [spec.tensors for spec in opened.values()]
    key = (tuple(weight_map.items()), tuple(map(id, shards)), tuple(begins), reading.strip_prefix)
    whole = _WHOLES.get(key)
    if whole is None:
        promised: dict[str, set[str]] = {name: set() for name in opened}
        for tensor_name, name in weight_map.items():
            promised[name].add(tensor_name)
        tensors: dict[str, TensorSpec] = {}
        for (name, spec), begin in zip(opened.items(), begins, strict=True):
            _check_agreement(index, name, promised[name], weight_map, spec.tensors)
            tensors |= {each.name: replace(each, file=each.file + begin) for each in spec.tensors.values()}
        ordered = {name: tensors[name] for name in weight_map}
        names = settle_names({name: tensor.shape == () for name, tensor in ordered.items()}, reading, path)
        whole = _WHOLES[key] = _Whole(rename(ordered.values(), names.stripped.names), shards, names)
    return whole


def _fail(index: Path, what: str) -> NoReturn:
    raise CheckpointFormatError(f"{index}: {what}. Save or copy the checkpoint again.")


def _weight_map(index: Path) -> tuple[Mapping[str, str], str]:
    with InputFile(index) as file:
        if file.size > LIMITS.index:
            _fail(index, f"expected a shard index of at most {LIMITS.index:,} bytes, got {file.size:,}")
        text = file.read(0, file.size)
    # What json builds of an empty list or of a name takes up to 80 and 160 bytes: bounded before it is built.
    built = 80 * (text.count(b"[") + text.count(b"{")) + 160 * text.count(b":")
    if built > 64 * 2**20 + 3 * len(text):
        _fail(index, "expected names of tensors and files in the shard index, got a great many other values")
    try:
        parsed: Any = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        _fail(index, f"expected a shard index in JSON, got other text: {str(error)[:200]}")
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        _fail(index, 'expected a shard index {"weight_map": {tensor: file}}, got other JSON')
    if not all(isinstance(name, str) for name in weight_map.values()):
        _fail(index, "expected file names in weight_map, got other values")
    return weight_map, hashlib.sha256(text).hexdigest()


def _check_agreement(
    index: Path, name: str, promised: set[str], weight_map: Mapping[str, str], held: Mapping[str, TensorSpec]
) -> None:
    lacking = sorted(promised - set(held))
    if lacking:
        _fail(index, f"the shard {quote(name)} lacks {listing(map(quote, lacking))}, which the index places there")
    extra = sorted(set(held) - promised)
    if twice := [tensor for tensor in extra if tensor in weight_map]:
        _fail(index, f"in two shards, {quote(name)} and another: {listing(map(quote, twice))}")
    if extra:
        _fail(index, f"the shard {quote(name)} holds {listing(map(quote, extra))}, which the index does not name")
