"""Checkpoints that are folders: which of the files in one have the weights.

`find_weights` reads names, and the first bytes of files whose names say nothing, so that a run folder with hundreds of
checkpoints is listed at once. docs/which-files.md has the rules. A folder may have the weights in several forms. It
uses the first of this order, as transformers does: one safetensors file, safetensors shards with an index, one torch
file, torch shards with an index; then those of distributed training.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ckpt_avg.checkpoint.spec import Checkpoint, name_of
from ckpt_avg.errors import CheckpointFormatError, NoWeightsError, PartError
from ckpt_avg.files.status import input_status
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.sharded import SUFFIX, open_sharded, shards_of
from ckpt_avg.formats.single_file import open_file, starts_as_checkpoint, starts_as_text
from ckpt_avg.formats.torch_file import RUNNING_AVERAGE
from ckpt_avg.formats.trainers import torch_dcp, transformers
from ckpt_avg.formats.trainers.file_names import (
    EARLIER_AVERAGE,
    is_ema,
    is_training_state_folder,
    names_a_moment,
    part_of,
    reason_to_skip,
    stem,
)
from ckpt_avg.formats.trainers.name_patterns import NO_CHECKPOINTS, SUFFIXES, UNFINISHED
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.trainer import Folder, Stored, WeightFiles
from ckpt_avg.text import argument, listing, quote
from ckpt_avg.wording import setting

DEEPEST = 3  # levels of folders that are searched for weights
_SIDECARS = {sidecar.name for trainer in TRAINERS for sidecar in trainer.sidecars if not sidecar.files}
JOIN = (
    "Join them with the tool of the framework that trained the model, then average the results. If each rank saved the "
    "whole model, copy the files of one rank to a folder of their own."
)


def find_weights(path: Path) -> WeightFiles | None:
    """Returns which files of a folder have the weights of one checkpoint; None if it is no checkpoint folder.

    Raises:
        CheckpointFormatError: the folder cannot be listed.
    """
    folder = _list(path)
    return _known(folder) or _marked(folder) or (_only_set(folder) if names_a_moment(name_of(path)) else None)


def _marked(folder: Folder) -> WeightFiles | None:
    """Returns that a folder has several models, if a file in it says so; the models are in folders of their own."""
    if not has_models_file(folder):
        return None
    models = models_in(folder)
    return WeightFiles(folder.path, problem=several(folder, list(models)), models=tuple(models)) if models else None


def has_models_file(folder: Folder) -> bool:
    """Whether a file says that each folder next to it may be one model of several."""
    return any(trainer.models_file in folder.names for trainer in TRAINERS if trainer.models_file)


def models_in(folder: Folder) -> dict[str, WeightFiles]:
    """Returns the weights in each folder inside, by its name; a running average only if nothing else is there."""
    found: dict[str, WeightFiles] = {}
    for inner in _folders(folder):
        weights = None if names_a_moment(inner.path.name) else _known(inner) or _only_set(inner)
        if weights and not weights.nested:
            found[inner.path.name] = weights
    raw = {name: weights for name, weights in found.items() if not is_ema(name)}
    return raw or found


def several(folder: Folder, names: Sequence[str]) -> str:
    """Says which models a folder has, and how to average all of them, or one."""
    pattern = re.sub(r"\d+([-+.:]\d+)*", "*", name_of(folder.path))
    one = f"ame one of each checkpoint: {argument(folder.path.parent)}/{pattern}/{names[0]}"
    are_folders = all(os.path.isdir(folder.path / name) for name in names)
    advice = f"`average` takes all of them with {setting('-o', 'FOLDER/')}. Or n{one}" if are_folders else f"N{one}"
    return f"the folder has several models: {listing(map(quote, names))}. {advice}"


def _list(path: Path) -> Folder:
    try:
        return Folder.of(path)
    except OSError as error:
        raise CheckpointFormatError(f"{path}: cannot be listed: {error.strerror}. Check its permissions.") from error


def _known(folder: Folder) -> WeightFiles | None:
    """Returns the weights of a folder whose names are those of a trainer's checkpoints."""
    marked = (each for each in TRAINERS if each.folder_files and all(map(folder.matching, each.folder_files)))
    kind = next((each.name for each in marked), None)
    for trainer in TRAINERS:
        # Each file may be sharded, with an index of the same name.
        found = [each for name in trainer.weight_files for each in (name, name + SUFFIX) if each in folder.names]
        if found:
            stored = Stored.INDEX if found[0].endswith(SUFFIX) else Stored.FILE
            own = kind if trainer.folder_files else trainer.name
            return WeightFiles(folder.path / found[0], stored, others=tuple(found[1:]), kind=own)
    for trainer in TRAINERS:
        if weights := trainer.weights(folder):
            weights = replace(weights, kind=kind or (None if trainer.folder_files else trainer.name))
            return _inside(weights) if weights.stored is Stored.FOLDER else weights
    for index in folder.matching(rf".*{re.escape(SUFFIX)}"):
        if not folder.names.isdisjoint(shards_of(folder.path / index)):
            return WeightFiles(folder.path / index, Stored.INDEX, kind=kind)
    ranks = [name for name in folder.names if not folder.names.isdisjoint(part_of(name))]
    if ranks and any(inner.path.name in ranks and _sets(inner, 1) for inner in _folders(folder)):
        problem = f"the folder has the parts of one checkpoint: {listing(map(quote, sorted(ranks)))}. {JOIN}"
        return WeightFiles(folder.path, problem=problem)
    return None


def _inside(weights: WeightFiles) -> WeightFiles | None:
    inner = find_weights(weights.path)
    others = (*weights.others, *(inner.others if inner else ()))
    return inner and replace(inner, kind=weights.kind or inner.kind, others=others, nested=weights.nested)


def _only_set(folder: Folder) -> WeightFiles | None:
    """Returns the weights of a folder that has one set of them; with a problem if it has several, but is no run."""
    sets = _sets(folder, DEEPEST)
    inside = [each.path.relative_to(folder.path) for each in sets]
    if not sets or (len(sets) > 1 and any(names_a_moment(part) for path in inside for part in path.parts)):
        return None  # no weights, or a run
    if len(sets) > 1:
        sets = [each for each in sets if _has_weights(each)] or sets
    names = _names(sets, folder.path)
    raw = [each for each in names if not any(map(is_ema, Path(each).parts))] or list(names)
    raw = [each for each in raw if stem(Path(each).name) in ("model", "modeling")] or raw
    if len(raw) == 1:
        averages = [name for name in names if any(map(is_ema, Path(name).parts))]
        ema = names[averages[0]] if len(averages) == 1 and averages != raw else None
        used = names[raw[0]]
        return replace(used, others=(*used.others, *(name for name in names if name != raw[0])), ema=ema)
    return WeightFiles(folder.path, problem=several(folder, raw), models=tuple(raw))


def _names(sets: list[WeightFiles], folder: Path) -> dict[str, WeightFiles]:
    """Returns the sets of weights by what to call them: the folder that each has for itself, or its file."""
    homes = Counter(each.path.parent for each in sets)
    return {
        str((path.parent if path.parent != folder and homes[path.parent] == 1 else path).relative_to(folder)): each
        for each in sets
        for path in [each.path]
    }


def _sets(folder: Folder, depth: int) -> list[WeightFiles]:
    """Returns every set of weights in a folder and in those inside it, without training state."""
    if known := _known(folder):
        moments = (inner for inner in _folders(folder) if depth and names_a_moment(inner.path.name))
        return [known, *(each for inner in moments for each in _sets(inner, depth - 1))]
    names = {name for name in checkpoint_files(folder) if _may_be_weights(name)}
    found: list[WeightFiles] = []
    if parts := [name for name in sorted(names) if not folder.names.isdisjoint(part_of(name))]:
        problem = f"the folder has the parts of one checkpoint: {listing(map(quote, parts))}. {JOIN}"
        found.append(WeightFiles(folder.path / parts[0], problem=problem))
    found += [WeightFiles(folder.path / name) for name in sorted(names - {*parts})]
    for inner in _folders(folder) if depth else ():
        found += _sets(inner, depth - 1)
    return found


def has_weights_inside(path: Path) -> bool:
    """Whether there are weights in a folder, or in those inside it."""
    return any(map(_has_weights, _sets(Folder.of(path), DEEPEST - 1)))


def revisions_of(path: Path) -> list[str]:
    """Returns the names of a revision in a Hugging Face cache, snapshots/HASH: what refers to it, such as step1000."""
    if path.parent.name != "snapshots":
        return []
    with suppress(OSError, UnicodeDecodeError):
        refs = sorted(ref for ref in (path.parent.parent / "refs").iterdir() if ref.is_file())
        return [ref.name for ref in refs if ref.stat().st_size < 100 and ref.read_text().strip() == path.name]
    return []


def _folders(folder: Folder) -> Iterator[Folder]:
    """Yields the folders inside that may have weights."""
    for name in sorted(folder.names):
        if may_have_weights(name) and os.path.isdir(folder.path / name):
            with suppress(OSError):
                yield Folder.of(folder.path / name)


def may_have_weights(folder: str) -> bool:
    """Whether a folder is looked into, by its name."""
    return not (is_training_state_folder(folder) or folder.startswith(".") or UNFINISHED.fullmatch(folder))


def _may_be_weights(file: str) -> bool:
    return reason_to_skip(file, is_checkpoint=True) in (None, EARLIER_AVERAGE) and file not in _SIDECARS


def file_has_weights(path: Path) -> bool:
    """Whether a file is not known to have no weights, by what it contains."""
    return _has_weights(WeightFiles(path))


def _has_weights(weights: WeightFiles) -> bool:
    if weights.stored is not Stored.FILE or weights.problem:
        return True
    try:
        open_file(weights.path, Reading()).close()
    except NoWeightsError:
        return False
    except CheckpointFormatError:
        return not starts_as_text(weights.path)  # if it is damaged, that is an error later
    return True


def checkpoint_files(folder: Folder) -> set[str]:
    """Returns the files that are checkpoints by their suffix or their first bytes, or that have such a file's name.

    Numbers in names don't count for that: ``g_0002000`` is one if ``g_0001000`` is, even if it is damaged.
    """

    def kind(name: str) -> str:
        return re.sub(r"\d+", "0", name)

    found = {name for name in folder.names if name.lower().endswith(SUFFIXES) and not os.path.isdir(folder.path / name)}
    others = {name for name in folder.names - found if not name.lower().endswith(NO_CHECKPOINTS)}
    files = {name for name in others if os.path.isfile(folder.path / name)}
    kinds = {kind(name) for name in files if starts_as_checkpoint(folder.path / name)}
    return found | {name for name in files if kind(name) in kinds}


def open_folder(path: Path, reading: Reading) -> Checkpoint:
    """Opens a checkpoint folder.

    Raises:
        CheckpointFormatError: it is none, cannot be opened here, or is damaged.
    """
    weights = find_weights(path)
    if weights is None:
        raise CheckpointFormatError(
            f"{path}: expected a checkpoint folder (with {', '.join(transformers.TRAINER.weight_files[:2])}, a shard "
            f"index, or {torch_dcp.METADATA}), got one with {listing(map(quote, sorted(os.listdir(path))))}. Name the "
            "checkpoint in it."
        )
    return open_weights(path, weights, reading)


def open_weights(path: Path, weights: WeightFiles, reading: Reading, *, read: Collection[str] = ()) -> Checkpoint:
    """Opens the weights that were found in a folder; ``read`` names others in it, which are read, too.

    Raises:
        CheckpointFormatError: they cannot be opened here, or are damaged.
    """
    if weights.problem:
        raise CheckpointFormatError(f"{path}: {weights.problem}")
    averaged = ""
    if reading.ema and weights.ema:
        weights, reading = weights.ema, replace(reading, ema=False)
        averaged = f"{RUNNING_AVERAGE}, in {quote(str(weights.path.relative_to(path)))}"
    others = [each for each in dict.fromkeys((*weights.others, *_beside(path, weights))) if each not in read]
    checkpoint = _open(weights, path, reading)
    spec = replace(checkpoint.spec, averaged=averaged or checkpoint.spec.averaged)
    notes = spec.notes
    if others:
        used, rest = quote(str(weights.path.relative_to(path))), listing(map(quote, others))
        hint = "; with --ema, the running average is" if weights.ema else ""
        notes = (f"the folder has other weights, too: {used} is read, not {rest}{hint}", *notes)
    return replace(checkpoint, spec=replace(spec, path=path, kind=weights.kind or spec.kind, notes=notes))


def _beside(path: Path, weights: WeightFiles) -> Iterator[str]:
    """Yields the files and folders in a checkpoint folder with weights that are not read."""
    folder = _list(path)
    shards = [shard for index in folder.matching(rf".*{re.escape(SUFFIX)}") for shard in shards_of(path / index)]
    read = {*weights.path.relative_to(path).parts[:1], *shards}
    if weights.stored is Stored.DCP_SAFETENSORS:
        read.update(folder.matching(torch_dcp.SHARD))
    for name in sorted(checkpoint_files(folder) - read):
        if _may_be_weights(name) and file_has_weights(path / name):
            yield name
    for inner in _folders(folder):
        sets = _sets(inner, DEEPEST - 1) if inner.path.name not in read else []
        if any(not each.nested and _has_weights(each) for each in sets):
            yield inner.path.name


def _open(weights: WeightFiles, folder: Path, reading: Reading) -> Checkpoint:
    if weights.stored is Stored.INDEX:
        return open_sharded(weights.path, folder, reading)
    if weights.stored is Stored.DCP:
        from ckpt_avg.formats.dcp import open_dcp

        return open_dcp(weights.path, folder, reading)
    if weights.stored is Stored.DCP_SAFETENSORS:
        from ckpt_avg.formats.dcp_safetensors import open_dcp_safetensors

        shards = Folder.of(weights.path).matching(torch_dcp.SHARD)
        return open_dcp_safetensors([weights.path / name for name in shards], folder, reading)
    return open_file(weights.path, reading)


def refuse_part(path: Path) -> None:
    """Raises PartError for a file that has, by its name, a part of a checkpoint."""
    for trainer in TRAINERS:
        if problem := trainer.refuse(path):
            raise PartError(f"{path}: {problem}")
    is_dcp = re.fullmatch(torch_dcp.SHARD, path.name)  # refused by its contents
    for other in [] if is_dcp else part_of(path.name):
        if other == path.name:
            index = " Name the folder, or the index of the shards." if "-of-" in path.name else ""
            raise PartError(f"{path}: the file is one of the parts of a checkpoint, by its name.{index} {JOIN}")
        if input_status(path.with_name(other)):
            raise PartError(
                f"{path}: the file has a part of a checkpoint, by its name ({quote(other)} is next to it). {JOIN}"
            )
