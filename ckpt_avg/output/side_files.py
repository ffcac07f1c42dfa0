"""Which files of a checkpoint are copied to the output folder, and how they differ between checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from ckpt_avg.errors import CheckpointFormatError, fail
from ckpt_avg.files.status import input_status, is_file
from ckpt_avg.output.model_code import find_code
from ckpt_avg.output.side_file import SideFile, is_damaged_json, json_of
from ckpt_avg.output.side_file_names import KINDS, MAIN, MODULES, PIPELINE, TEMPLATES, TEXT, is_of_run, kind_of
from ckpt_avg.text import listing, quote

# Folders of a pipeline without weights.
_NO_MODELS = re.compile(r"(tokenizer|scheduler|feature_extractor|image_processor|processor)[\w-]*")


def folders_of_models(path: Path, models: Collection[str]) -> list[Path]:
    """Returns the folders in one of several models that have models, tokenizers and the like.

    A diffusers pipeline names them in ``model_index.json``, and sentence-transformers in ``modules.json``. Without such
    a file their names tell.
    """
    index, modules = json_of(path / PIPELINE), json_of(path / MODULES)
    named = set(index) if isinstance(index, dict) else set()
    listed = modules if isinstance(modules, list) else []
    named |= {str(each["path"]) for each in listed if isinstance(each, dict) and "path" in each}
    names = [name for name in _list(path) if (path / name).is_dir()]
    return [path / name for name in names if name in models or (name in named if named else _NO_MODELS.fullmatch(name))]


def find_side_files(
    folders: Sequence[Path], run: Path | None = None, notice: Callable[[str], None] = lambda text: None
) -> dict[str, Path]:
    """Returns the side files of a checkpoint by name, sorted.

    Args:
        folders: the folder with the weights, then those around it, up to that of the checkpoint. A kind of file that
            one lacks is taken from the next.
        run: the run folder, where files of a kind are looked for at last.
        notice: called with what the user should know.

    Raises:
        CheckpointFormatError: a folder cannot be listed, or a link leads nowhere.
    """
    found: dict[str, Path] = {}
    for kind in KINDS:
        for folder in (*folders, *([run] if run is not None else [])):
            here = {name: path for name, path in _side_files_in(folder).items() if kind_of(path.name) == kind}
            if folder == run:
                here = {name: path for name, path in here.items() if is_of_run(path.name)}
            is_complete = bool(here) if kind == TEXT else not MAIN.isdisjoint(here)
            if is_complete or folder == folders[0]:
                found = {**here, **found}
            if is_complete and folder == run:
                names = listing(map(quote, sorted(here)))
                notice(f"{folders[-1]}: has no {kind}, so that of its run folder is copied: {names}")
            if is_complete:
                break
    found |= find_code(found, notice)
    return dict(sorted(found.items()))


def _side_files_in(folder: Path) -> dict[str, Path]:
    names = _list(folder)
    kept = [name for name in names if kind_of(name)]
    if TEMPLATES in names and (folder / TEMPLATES).is_dir():
        kept += [f"{TEMPLATES}/{name}" for name in _list(folder / TEMPLATES) if kind_of(name) == TEXT]
    for name in kept:
        if (folder / name).is_symlink() and not (folder / name).exists():
            fail(folder / name, "is a link that leads nowhere", "Copy the file there, or remove the link")
    return {name: folder / name for name in kept if is_file(folder / name)}


def _list(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointFormatError(f"{folder}: cannot be listed: {error.strerror}. Check its permissions.") from error


def refuse_other_links(
    paths: Iterable[Path], checkpoint: Path, run: Path | None, notice: Callable[[str], None]
) -> None:
    """Follows links that stay in the run, or in the cache of the Hugging Face Hub.

    Raises:
        CheckpointFormatError: a link leads elsewhere.
    """
    real = Path(os.path.realpath(checkpoint))
    caches = [each.parent / "blobs" for each in real.parents if each.name == "snapshots"]
    for path in paths:
        target = Path(os.path.realpath(path))
        if not path.is_symlink() or real in target.parents or target.parent in caches:
            continue
        if run is None or Path(os.path.realpath(run)) not in target.parents:
            fail(path, f"is a link out of the run, to {quote(target)}", "Copy the file there, or remove the link")
        notice(f"{path}: is a link to {target}, whose contents are copied")


def differences(last: Mapping[str, Path], others: Mapping[Path, Mapping[str, Path]]) -> list[str]:
    """Returns a sentence for each side file that is not the same in all checkpoints.

    Args:
        last: the side files of the last checkpoint, which are copied.
        others: those of each other checkpoint.
    """
    found = []
    for name in sorted({*last, *(name for files in others.values() for name in files)}):
        having = {path: files[name] for path, files in others.items() if name in files}
        if name not in last:
            found.append(f"{name}: is not copied, because the last checkpoint lacks it: it is in {_names(having)}")
            continue
        lacking = [path for path in others if path not in having]
        differing = {path: file for path, file in having.items() if not _is_same(file, last[name])}
        if differing:
            keys = _keys(name, last[name], list(differing.values()))
            found.append(f"{name}: is copied from the last checkpoint, and differs in {_names(differing)}{keys}")
        if lacking:
            found.append(f"{name}: is copied from the last checkpoint, and missing in {_names(lacking)}")
    return found


def _names(paths: Iterable[Path]) -> str:
    return listing(path.name for path in paths)


def _is_same(one: Path, other: Path) -> bool:
    first, second = input_status(one), input_status(other)
    if first is None or second is None or first.st_size != second.st_size:
        return False
    return os.path.samestat(first, second) or SideFile.of("", one).sha256 == SideFile.of("", other).sha256


def _keys(name: str, last: Path, others: Sequence[Path]) -> str:
    if not name.endswith(".json") or any(map(is_damaged_json, (last, *others))):
        return ""
    found = [json_of(each) for each in (last, *others)]
    if not all(isinstance(each, dict) for each in found):
        return ""
    (ours, *theirs), missing = found, object()
    names = sorted({*ours, *(key for each in theirs for key in each)})
    differ = [key for key in names if any(each.get(key, missing) != ours.get(key, missing) for each in theirs)]
    return f": {listing(map(quote, differ))}" if differ else ""
