"""The folders of ``torch.distributed.checkpoint`` (DCP): FSDP through Accelerate, Lightning, or by hand.

``.metadata`` is a pickle (of ``torch.distributed.checkpoint.metadata.Metadata``) that says for each tensor which parts
of it were saved, and where: in a range of a file ``__<rank>_<n>.distcp``, which is a ``torch.save`` archive. So every
element has a file and an offset, and one process without a process group reads them all. The pickles are read by
`pickles.unpickler`; torch reads ``.metadata`` with a plain ``pickle.load``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt_avg.checkpoint.spec import Checkpoint, DType, Part, TensorSpec
from ckpt_avg.errors import fail
from ckpt_avg.files.input_file import FileRange, InputFile
from ckpt_avg.files.status import input_status
from ckpt_avg.formats import safetensors_header, torch_zip
from ckpt_avg.formats.dcp_parts import combine_parts
from ckpt_avg.formats.dcp_safetensors import saved_offsets
from ckpt_avg.formats.pickles.stand_ins import Foreign, Opaque, PickledTensor, StoredTensor, safe_key
from ckpt_avg.formats.pickles.unpickler import read_pickle
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.sharded import safe_sibling
from ckpt_avg.formats.state_dict import find_state_dict
from ckpt_avg.formats.tensor_names import settle_names
from ckpt_avg.formats.torch_file import describe_ema, locate, note_without_weights, top_keys
from ckpt_avg.formats.trainers.torch_dcp import METADATA
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import listing, plural, quote

# Names of optimizers in flat names: optimizer.state.exp_avg.…, chained_0.optimizer.… (Megatron-Core).
_OPTIMIZER = re.compile(r"((?:chained_\d+\.)?optim(?:izers?)?[\d_]*)\.(.+)", re.DOTALL)
_AGAIN = "Save or copy the checkpoint again"


@dataclass(frozen=True, slots=True)
class _Distributed(PickledTensor):
    """A tensor of the metadata; its boxes are (starts, sizes)."""

    name: str
    dtype: DType | None
    shape: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a part is stored: the name of its file and the range of its archive."""

    file: str
    offset: int
    length: int


_Storage = Mapping[tuple[str, tuple[int, ...] | None], _Stored]  # (tensor, starts of the part) → where it is stored


def open_dcp(folder: Path, path: Path, reading: Reading) -> Checkpoint:
    """Opens a folder with ``.metadata``; ``path`` is what the checkpoint is called.

    Raises:
        CheckpointFormatError: the metadata is damaged, or a file or a part of a tensor is missing.
    """
    where = folder / METADATA
    metadata, digest = _read_metadata(where)
    tensors = _tensors(metadata, where)
    storage = _storage(metadata, where)
    contents = _nested(metadata, tensors, where)
    found = find_state_dict(contents, path, reading)
    chosen = {name: tensor for name, tensor in found.tensors.items() if isinstance(tensor, _Distributed)}
    names = settle_names(chosen, reading.strip_prefix, path, found.trainer)
    with ExitStack() as on_error:
        parts = _Parts(folder, on_error)
        _check_present(folder, chosen, storage)
        combined = {new: _combine(new, chosen[old], storage, parts, folder) for old, new in names.renamed.items()}
        spec = names.make_spec(
            path,
            "torch DCP",
            combined,
            kind="torch DCP",
            averaged=names.averaged or describe_ema(found),
            notes=(*found.notes, *note_without_weights(found.others)),
            keys=top_keys(contents, found.key),
            state_key=found.key,
            metadata={"files": len(parts.files)},
            digest=digest,
        )
        on_error.pop_all()
        return Checkpoint(spec, parts.files)


class _Parts:
    """Where the stored parts of tensors are. Each archive is read once, however often the metadata names it."""

    def __init__(self, folder: Path, on_error: ExitStack) -> None:
        self._folder, self._on_error = folder, on_error
        self._files: dict[str, tuple[int, InputFile]] = {}
        self._archives: dict[tuple[str, int, int], TensorSpec] = {}
        self._tables: dict[tuple[str, int], Mapping[str, Part]] = {}

    @property
    def files(self) -> list[InputFile]:
        """The files, in the order of their numbers."""
        return [file for _, file in self._files.values()]

    def locate(self, stored: _Stored, tensor: str, starts: tuple[int, ...]) -> TensorSpec:
        """Returns where the part of a tensor that begins at ``starts`` is."""
        if stored.file not in self._files:
            path = safe_sibling(self._folder, stored.file, str(self._folder / METADATA))
            self._files[stored.file] = (len(self._files), self._on_error.enter_context(InputFile(path)))
        number, file = self._files[stored.file]
        where, archive = (stored.file, stored.offset), (stored.file, stored.offset, stored.length)
        if where not in self._tables and archive not in self._archives:
            rest = FileRange(file, stored.offset, max(file.size - stored.offset, 0))
            if safetensors_header.matches(rest.read(0, min(rest.size, 16))):
                self._tables[where] = _read_safetensors(rest, number)
            else:
                self._archives[archive] = _read_archive(FileRange(file, stored.offset, stored.length), number, tensor)
        if where not in self._tables:
            return self._archives[archive]
        part = self._tables[where].get(tensor)
        if part is None or part.starts != starts:
            fail(file.path, f"its safetensors data lacks the part at {quote(starts)}", _AGAIN, tensor=tensor)
        return part.tensor


def _read_metadata(path: Path) -> tuple[Mapping[str, Any], str]:
    with InputFile(path) as file:
        if file.size > LIMITS.pickle:
            fail(path, f"expected metadata of at most {LIMITS.pickle:,} bytes, got {file.size:,}", _AGAIN)
        pickle = file.read(0, file.size)
    state = _state(read_pickle(pickle, str(path)))
    if not isinstance(state.get("state_dict_metadata"), dict) or not isinstance(state.get("storage_data"), dict):
        fail(path, "expected the metadata of torch.distributed.checkpoint, got another pickle", _AGAIN)
    return state, hashlib.sha256(pickle).hexdigest()


def _state(value: object) -> Mapping[str, Any]:
    return value.state if isinstance(value, Foreign) and isinstance(value.state, dict) else {}


def _integers(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, (tuple, list)) or len(value) > LIMITS.rank:
        return None
    return tuple(value) if all(type(each) is int and 0 <= each <= LIMITS.elements for each in value) else None


def _tensors(metadata: Mapping[str, Any], where: Path) -> dict[str, _Distributed | None]:
    """Returns each entry of the metadata; None if it is not a tensor."""
    entries = metadata["state_dict_metadata"]
    found: dict[str, _Distributed | None] = {}
    listed = [_state(entry).get("chunks") for entry in entries.values()]
    count = sum(len(chunks) for chunks in listed if isinstance(chunks, list))
    if count > LIMITS.parts:  # a list that several tensors share is short in the pickle
        fail(where, f"expected at most {LIMITS.parts:,} parts of tensors, got {count:,}", _AGAIN)
    for name, entry in entries.items():
        if not isinstance(name, str):
            fail(where, f"expected names, got {quote(name)}", _AGAIN)
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
        complete = tuple((starts, sizes) for starts, sizes in boxes if starts is not None and sizes is not None)
        if shape is None or len(complete) < len(boxes):
            fail(where, "expected a shape and chunks with offsets and sizes", _AGAIN, tensor=name)
        found[name] = _Distributed(name, dtype if isinstance(dtype, DType) else None, shape, complete)
    return found


def _storage(metadata: Mapping[str, Any], where: Path) -> _Storage:
    found: dict[tuple[str, tuple[int, ...] | None], _Stored] = {}
    for key, entry in metadata["storage_data"].items():
        index, info = _state(key.value if isinstance(key, Opaque) else key), _state(entry)
        name, file = index.get("fqn"), info.get("relative_path")
        byte_range = _integers((info.get("offset"), info.get("length")))
        if not isinstance(name, str) or not isinstance(file, str) or byte_range is None:
            fail(where, f"expected where {quote(name)} is stored, got something else", _AGAIN)
        if info.get("transform_descriptors"):
            advice = "Save it without transforms"
            fail(where, "it was transformed when it was saved (compressed or encrypted)", advice, tensor=name)
        found[name, _integers(index.get("offset"))] = _Stored(file, *byte_range)
    return found


def _nested(metadata: Mapping[str, Any], tensors: Mapping[str, _Distributed | None], where: Path) -> dict[object, Any]:
    """Returns the state dict as it was before DCP flattened it.

    ``planner_data`` has the path of each name. Without it, names that begin with an optimizer's name are its state. If
    all others begin with ``model.``, that is the key of the weights.
    """
    planner = metadata.get("planner_data")
    paths: dict[str, tuple[object, ...]] = {}
    for name in tensors:
        path = planner.get(name) if isinstance(planner, dict) else None
        paths[name] = path if isinstance(path, tuple) and 0 < len(path) <= LIMITS.rank else (name,)
    if all(path == (name,) for name, path in paths.items()):
        optimizers = {name: match.groups() for name in tensors if (match := _OPTIMIZER.fullmatch(name))}
        weights = [name for name in tensors if name not in optimizers]
        inside = all(name.startswith("model.") for name in weights)
        paths = {name: ("model", name.removeprefix("model.")) if inside else (name,) for name in weights}
        paths |= optimizers
    root: dict[object, Any] = {}
    for name, path in paths.items():
        target = root
        for key in path[:-1]:
            inner = target.setdefault(safe_key(key), {})
            if not isinstance(inner, dict):
                fail(where, f"{quote(name)}: expected a name of its own, got one inside another tensor", _AGAIN)
            target = inner
        last = safe_key(path[-1])
        if last in target:
            fail(where, f"{quote(name)}: expected a name of its own, got that of another tensor", _AGAIN)
        target[last] = tensors[name]
    return root


def _check_present(folder: Path, chosen: Mapping[str, _Distributed], storage: _Storage) -> None:
    needed = dict.fromkeys(
        storage[tensor.name, starts].file
        for tensor in chosen.values()
        for starts, _ in tensor.boxes
        if (tensor.name, starts) in storage
    )
    files = {name: safe_sibling(folder, name, str(folder / METADATA)) for name in needed}
    if missing := [name for name, file in files.items() if not input_status(file)]:
        problem = f"{plural(len(missing), 'file')} of {len(needed)} missing: {listing(map(quote, missing))}"
        fail(folder, problem, "Copy those of every rank")


def _read_archive(archive: FileRange, file: int, name: str) -> TensorSpec:
    """Returns where the one tensor of an archive inside a file is: a part of the tensor of that name."""
    contents = torch_zip.read_contents(archive, is_part=True)
    if not isinstance(contents.objects, StoredTensor):
        path = archive.path
        problem = f"expected a plain tensor in {quote(path.name)}, got another object at byte {archive.begin:,}"
        fail(path, problem, "Save it as a plain tensor")
    return _shifted(locate(archive.path, name, contents.objects, contents), archive.begin, file)


def _read_safetensors(data: FileRange, file: int) -> Mapping[str, Part]:
    """Returns the parts of tensors that SerializationFormat.SAFETENSORS puts at the end of a file."""
    tensors, metadata = safetensors_header.parse_header(data, safetensors_header.read_header(data))
    starts = saved_offsets(data.path, metadata)
    return {
        name: Part(starts.get(name, (0,) * len(tensor.shape)), _shifted(tensor, data.begin, file))
        for name, tensor in tensors.items()
    }


def _shifted(part: TensorSpec, begin: int, file: int) -> TensorSpec:
    storage = (part.storage[0] + begin, part.storage[1])
    return replace(part, name="", file=file, offset=part.offset + begin, storage=storage)


def _combine(name: str, tensor: _Distributed, storage: _Storage, stored_parts: _Parts, folder: Path) -> TensorSpec:
    if tensor.dtype is None:
        fail(folder, "expected a dtype of safetensors, got another", "Save it in a common dtype", tensor=name)
    parts = []
    for starts, sizes in tensor.boxes:
        if 0 in sizes:
            continue
        stored = storage.get((tensor.name, starts))
        if stored is None and len(tensor.boxes) == 1:
            stored = storage.get((tensor.name, None))
        if stored is None:
            fail(folder, f"the part at {quote(starts)} is not stored anywhere", "Save it again", tensor=name)
        part = stored_parts.locate(stored, tensor.name, starts)
        if part.shape != sizes or part.dtype != tensor.dtype:
            expected = f"expected {tensor.dtype.name} {quote(sizes)} in {quote(stored.file)}"
            fail(folder, f"{expected}, got {part.dtype.name} {quote(part.shape)}", _AGAIN, tensor=name)
        parts.append(Part(starts, part))
    return combine_parts(name, tensor.dtype, tensor.shape, parts, f"{folder}: tensor {quote(name)}")
