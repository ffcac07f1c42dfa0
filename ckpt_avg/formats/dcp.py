"""The folders of ``torch.distributed.checkpoint`` (DCP): FSDP through Accelerate, Lightning, or by hand.

``.metadata`` is a pickle (of ``torch.distributed.checkpoint.metadata.Metadata``) that says, for each tensor, which
boxes of it were saved, and where: a range of a file ``__<rank>_<n>.distcp``, which is a ``torch.save`` archive of its
own. So every element has a file and an offset, and one process without a process group reads them all. The pickles go
through `pickle_specs`; torch reads ``.metadata`` with a plain ``pickle.load``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from ckpt_avg.checkpoint.spec import Checkpoint, CheckpointSpec, DType, Part, TensorSpec
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.input_file import FileRange, InputFile
from ckpt_avg.formats import torch_zip
from ckpt_avg.formats.dcp_parts import join_parts
from ckpt_avg.formats.members import member_of
from ckpt_avg.formats.pickles.leaves import Leaf, StoredTensor
from ckpt_avg.formats.pickles.stand_ins import Foreign, Opaque, safe_key
from ckpt_avg.formats.pickles.unpickler import read_pickle
from ckpt_avg.formats.place import place
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.state_dict import find_state_dict
from ckpt_avg.formats.torch_file import average_mark, keys_of, settle_names, without_tensor
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import listing, plural, quote

METADATA = ".metadata"
_OPTIMIZER = ("optim", "optimizer", "optimizers")


@dataclass(frozen=True, slots=True)
class _Distributed(Leaf):
    """A tensor of the metadata: its boxes as (starts, sizes)."""

    name: str
    dtype: DType | None
    shape: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a box lies: the name of its file and the range of its archive."""

    file: str
    offset: int
    length: int


def open_dcp(folder: Path, path: Path, reading: Reading) -> Checkpoint:
    """Opens a folder that ``torch.distributed.checkpoint.save`` wrote.

    Args:
        folder: the folder with ``.metadata``.
        path: what the checkpoint is called.
        reading: how to read it.

    Raises:
        CheckpointFormatError: the metadata is damaged, a file is missing, or parts of a tensor are.
    """
    metadata, digest = _read_metadata(folder / METADATA)
    tensors = _tensors(metadata, folder)
    stored = _storage(metadata, folder)
    contents = _nested(metadata, tensors, folder)
    found = find_state_dict(contents, path, reading)
    chosen = {name: leaf for name, leaf in found.tensors.items() if isinstance(leaf, _Distributed)}
    names = settle_names({name: leaf.shape == () for name, leaf in chosen.items()}, reading, path, found.trainer)
    files: dict[str, tuple[int, InputFile]] = {}
    archives: dict[_Stored, TensorSpec] = {}  # each is read once, however often the metadata names it
    with ExitStack() as on_error:

        def archive_of(stored: _Stored, name: str) -> TensorSpec:
            if stored.file not in files:
                member = member_of(folder, stored.file, str(folder / METADATA))
                files[stored.file] = (len(files), on_error.enter_context(InputFile(member)))
            if stored not in archives:
                archives[stored] = _read_archive(*files[stored.file], stored, name)
            return archives[stored]

        _check_present(folder, chosen, stored)
        placed = {
            new: _place(new, chosen[old], stored, archive_of, folder) for old, new in names.stripped.names.items()
        }
        spec = CheckpointSpec(
            path,
            "torch DCP",
            placed,
            kind=names.kind or "torch DCP",
            keys=keys_of(contents, found.key),
            state_key=found.key,
            prefix=names.stripped.prefix,
            lacks_prefix=names.stripped.lacking,
            averaged=names.averaged or average_mark(found.ema, found.key),
            metadata={"files": len(files)},
            notes=(*found.notes, *names.notes, *without_tensor(found.others)),
            digest=digest,
        )
        on_error.pop_all()
        return Checkpoint(spec, [file for _, file in files.values()])


def _fail(folder: Path, what: str) -> NoReturn:
    raise CheckpointFormatError(f"{folder / METADATA}: {what}. Save or copy the checkpoint again.")


def _read_metadata(path: Path) -> tuple[Mapping[str, Any], str]:
    with InputFile(path) as file:
        if file.size > LIMITS.pickle:
            _fail(path.parent, f"expected metadata of at most {LIMITS.pickle:,} bytes, got {file.size:,}")
        pickle = file.read(0, file.size)
    root = read_pickle(pickle, str(path))
    state = _state(root)
    if not isinstance(state.get("state_dict_metadata"), dict) or not isinstance(state.get("storage_data"), dict):
        _fail(path.parent, "expected the metadata of torch.distributed.checkpoint, got another pickle")
    return state, hashlib.sha256(pickle).hexdigest()


def _state(value: object) -> Mapping[str, Any]:
    return value.state if isinstance(value, Foreign) and isinstance(value.state, dict) else {}


def _integers(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, (tuple, list)) or len(value) > LIMITS.rank:
        return None
    return tuple(value) if all(type(each) is int and 0 <= each <= LIMITS.elements for each in value) else None


def _tensors(metadata: Mapping[str, Any], folder: Path) -> dict[str, _Distributed | None]:
    """Returns each entry of the metadata; None where it is no tensor."""
    found: dict[str, _Distributed | None] = {}
    listed = [_state(entry).get("chunks") for entry in metadata["state_dict_metadata"].values()]
    count = sum(len(chunks) for chunks in listed if isinstance(chunks, list))
    if count > LIMITS.parts:  # a list that several tensors share is short in the pickle
        _fail(folder, f"expected at most {LIMITS.parts:,} parts of tensors, got {count:,}")
    for name, entry in metadata["state_dict_metadata"].items():
        if not isinstance(name, str):
            _fail(folder, f"expected names, got {quote(name)}")
        state = _state(entry)
        if "chunks" not in state:
            found[name] = None
            continue
        properties = state.get("properties")
        described = properties.state if isinstance(properties, Foreign) else None
        dtype = described[0] if isinstance(described, tuple) and described else _state(properties).get("dtype")
        shape = _integers(state.get("size"))
        chunks = state["chunks"] if isinstance(state["chunks"], list) else []
        boxes = [(_integers(_state(each).get("offsets")), _integers(_state(each).get("sizes"))) for each in chunks]
        if shape is None or any(starts is None or sizes is None for starts, sizes in boxes):
            _fail(folder, f"tensor {quote(name)}: expected a shape and chunks with offsets and sizes")
        complete = tuple((starts, sizes) for starts, sizes in boxes if starts is not None and sizes is not None)
        found[name] = _Distributed(name, dtype if isinstance(dtype, DType) else None, shape, complete)
    return found


def _storage(metadata: Mapping[str, Any], folder: Path) -> dict[tuple[str, tuple[int, ...] | None], _Stored]:
    found: dict[tuple[str, tuple[int, ...] | None], _Stored] = {}
    for key, entry in metadata["storage_data"].items():
        index, info = _state(key.value if isinstance(key, Opaque) else key), _state(entry)
        name, file = index.get("fqn"), info.get("relative_path")
        place = _integers((info.get("offset"), info.get("length")))
        if not isinstance(name, str) or not isinstance(file, str) or place is None:
            _fail(folder, f"expected where {quote(name)} is stored, got something else")
        if info.get("transform_descriptors"):
            _fail(folder, f"tensor {quote(name)} was transformed when it was saved (compressed or encrypted)")
        found[name, _integers(index.get("offset"))] = _Stored(file, *place)
    return found


def _nested(metadata: Mapping[str, Any], tensors: Mapping[str, _Distributed | None], folder: Path) -> dict[object, Any]:
    """Returns the state dict as it was before DCP flattened it.

    ``planner_data`` keeps the path of each name. Where it does not, names that all begin with ``model.``, but for those
    of an optimizer, are taken for nested.
    """
    planner = metadata.get("planner_data")
    paths: dict[str, tuple[object, ...]] = {}
    for name in tensors:
        path = planner.get(name) if isinstance(planner, dict) else None
        paths[name] = path if isinstance(path, tuple) and 0 < len(path) <= LIMITS.rank else (name,)
    if all(len(path) == 1 for path in paths.values()):
        first = {name: name.partition(".")[0] for name in tensors}
        outer = {word for word in first.values() if word.rstrip("_0123456789") not in _OPTIMIZER}
        if outer == {"model"} and all("." in name for name in tensors):
            paths = {name: (word, name[len(word) + 1 :]) for name, word in first.items()}
    root: dict[object, Any] = {}
    for name, path in paths.items():
        target = root
        for key in path[:-1]:
            inner = target.setdefault(safe_key(key), {})
            if not isinstance(inner, dict):
                _fail(folder, f"{quote(name)}: expected a name of its own, got one inside another tensor")
            target = inner
        last = safe_key(path[-1])
        if last in target:
            _fail(folder, f"{quote(name)}: expected a name of its own, got that of another tensor")
        target[last] = tensors[name]
    return root


def _check_present(
    folder: Path, chosen: Mapping[str, _Distributed], stored: Mapping[tuple[str, tuple[int, ...] | None], _Stored]
) -> None:
    needed = dict.fromkeys(
        stored[leaf.name, starts].file
        for leaf in chosen.values()
        for starts, _ in leaf.boxes
        if (leaf.name, starts) in stored
    )
    missing = [name for name in needed if not member_of(folder, name, str(folder / METADATA)).exists()]
    if missing:
        raise CheckpointFormatError(
            f"{folder}: {plural(len(missing), 'file')} of {len(needed)} missing: {listing(map(quote, missing))}. Copy "
            "those of every rank."
        )


def _read_archive(index: int, file: InputFile, stored: _Stored, name: str) -> TensorSpec:
    """Returns where the one tensor of an archive inside a file lies: a part of the tensor of that name."""
    region = FileRange(file, stored.offset, stored.length)
    held = torch_zip.read_contents(region, is_part=True)
    contents = held.objects
    if not isinstance(contents, StoredTensor):
        raise CheckpointFormatError(
            f"{file.path}: expected a plain tensor in {quote(stored.file)}, got another object at byte "
            f"{stored.offset:,}. Save it as a plain tensor."
        )
    box = place(file.path, name, contents, held.place_of(contents.storage.key))
    begin, nbytes = box.storage
    return replace(box, name="", file=index, offset=box.offset + region.begin, storage=(begin + region.begin, nbytes))


def _place(
    name: str,
    leaf: _Distributed,
    stored: Mapping[tuple[str, tuple[int, ...] | None], _Stored],
    archive_of: Callable[[_Stored, str], TensorSpec],
    folder: Path,
) -> TensorSpec:
    where = f"{folder}: tensor {quote(name)}"
    if leaf.dtype is None:
        raise CheckpointFormatError(
            f"{where}: expected a dtype of safetensors, got another. Save it in a common dtype."
        )
    parts = []
    for starts, sizes in leaf.boxes:
        if 0 in sizes:
            continue
        info = stored.get((leaf.name, starts)) or (stored.get((leaf.name, None)) if len(leaf.boxes) == 1 else None)
        if info is None:
            raise CheckpointFormatError(f"{where}: the part at {quote(starts)} is stored nowhere. Save it again.")
        box = archive_of(info, name)
        if box.shape != sizes or box.dtype != leaf.dtype:
            raise CheckpointFormatError(
                f"{where}: expected {leaf.dtype.name} {quote(sizes)} in {quote(info.file)}, got {box.dtype.name} "
                f"{quote(box.shape)}. Save or copy the checkpoint again."
            )
        parts.append(Part(starts, box))
    return join_parts(name, leaf.dtype, leaf.shape, parts, where)
