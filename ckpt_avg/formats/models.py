"""A folder of several models, such as a diffusers pipeline, as one checkpoint with the tensors of all."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ckpt_avg.checkpoint.spec import Checkpoint, CheckpointSpec, TensorSpec
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import fail
from ckpt_avg.files.status import is_file
from ckpt_avg.formats.folder import find_weights, has_models_file, models_in, open_weights
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.trainers.sidecars import settings_of
from ckpt_avg.formats.trainers.trainer import Folder, WeightFiles
from ckpt_avg.text import listing, quote

_CONFIGS = ("config.json", "adapter_config.json")


def models_of(path: Path) -> dict[str, WeightFiles]:
    """Returns the models in a folder, by name: that of a folder inside, or an empty one for its own weights.

    Empty if the folder is no such folder: it needs a file that says so, or configurations next to the weights inside.

    Raises:
        CheckpointFormatError: it cannot be listed.
    """
    own = find_weights(path)
    folder = Folder.of(path)
    is_marked = has_models_file(folder)
    found = models_in(folder)
    if own is not None and not own.models and not own.is_inside(path):
        if not is_marked:
            found = {name: each for name, each in found.items() if any(is_file(path / name / c) for c in _CONFIGS)}
        found = {"": own, **found}
    elif own is None or not (is_marked or own.models):
        return {}
    return found if is_marked or len(found) > 1 else {}


def prefix_of(model: str) -> str:
    """Returns what the names of a model's tensors begin with where several models are one checkpoint: ``unet.``."""
    return f"{model}." if model else ""


def open_models(path: Path, models: Mapping[str, WeightFiles], reading: Reading) -> Checkpoint:
    """Opens all models of a folder. The names of a model's tensors begin with `prefix_of` it.

    Raises:
        CheckpointFormatError: one cannot be opened, or two tensors would have the same name.
    """
    with ExitStack() as on_error:
        opened: dict[str, Checkpoint] = {}
        for name, weights in models.items():
            inner = path / name
            checkpoint = on_error.enter_context(open_weights(inner, weights, reading, read=models))
            spec = replace(checkpoint.spec, path=inner, model=name, settings=settings_of(inner))
            opened[name] = replace(checkpoint, spec=spec)
        tensors: dict[str, TensorSpec] = {}
        notes = [f"read as one checkpoint, with the models in its folders: {listing(map(quote, filter(None, opened)))}"]
        begin = 0
        for name, checkpoint in opened.items():
            prefix = prefix_of(name)
            for tensor in checkpoint.spec.tensors.values():
                if prefix + tensor.name in tensors:
                    fail(path, f"the models {quote(name)} and '' both have a tensor of this name", tensor=tensor.name)
                tensors[prefix + tensor.name] = _moved(tensor, begin, prefix + tensor.name)
            notes += [f"{name}: {note}" if name else note for note in checkpoint.spec.notes]
            begin += len(checkpoint.files)
        specs = [checkpoint.spec for checkpoint in opened.values()]
        spec = CheckpointSpec(
            path,
            specs[-1].format,
            tensors,
            kind=specs[0].kind,
            lacks_prefix=all(each.lacks_prefix for each in specs),
            record=functools.reduce(Record.or_else, (each.record for each in specs)),
            averaged=next((each.averaged for each in specs if each.averaged), ""),
            metadata=dict(set.intersection(*(set(each.metadata.items()) for each in specs))),
            notes=tuple(notes),
            digest=hashlib.sha256("".join(each.digest for each in specs).encode()).hexdigest(),
        )
        on_error.pop_all()
        files = [file for checkpoint in opened.values() for file in checkpoint.files]
        return Checkpoint(spec, files, models=opened)


def _moved(tensor: TensorSpec, begin: int, name: str) -> TensorSpec:
    parts = tuple(replace(part, tensor=_moved(part.tensor, begin, part.tensor.name)) for part in tensor.parts)
    return replace(tensor, name=name, file=tensor.file + begin, parts=parts)
