"""Side files: what is next to the weights of a checkpoint and is needed to load them. docs/releasing.md has the rules.

Names decide. Weights, training state, logs and files whose names say nothing are not copied.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_avg.errors import ChangedWhileReadingError, CheckpointFormatError, fail
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.status import input_status, is_file
from ckpt_avg.formats.sharded import SUFFIX as INDEX_SUFFIX
from ckpt_avg.limits import LIMITS
from ckpt_avg.text import listing, quote

CONFIG = "config.json"
_PIECE = 2**20
_CONFIGS = re.compile(
    r"config\.json|[\w.-]+_config\.json|config_[\w-]+\.json|modules\.json|model_index\.json"
    r"|(LICEN[CS]E|NOTICE)(\.txt|\.md)?"
)
# How training was set up, which no loader reads.
_TRAINING = re.compile(
    r"(?i:ds|deepspeed|zero|accelerate|fsdp|train|training|trainer|run|wandb|sweep|data|dataset|eval|optim\w*)[-_].*"
)
_TEXT = re.compile(
    r"(?i:"
    r"[\w.-]*(token|vocab|merges|sentencepiece|spiece|processor|preprocess|feature_extract|chat_template|bpe)[\w.-]*"
    r"\.(json|txt|jinja|model|model\.v\d+|codes|vocab|tokenizer)"
    r"|[\w.-]+\.(spm|tiktoken|jinja)|special_tokens_map\.json|tekken\.json|normalizer\.json|(id2label|label2id)\.json"
    r")"
)
_PIPELINE, _MODULES = "model_index.json", "modules.json"
_TEMPLATES = "additional_chat_templates"  # a folder of *.jinja
_CLASS = re.compile(r"(\w+)\.\w+")
_IMPORT = re.compile(
    r"^[ \t]*from[ \t]+\.(\w+)[ \t]+import|^[ \t]*from[ \t]+\.[ \t]+import[ \t]+([\w, \t]+)", re.MULTILINE
)
# Folders of a pipeline without weights.
_NO_MODELS = re.compile(r"(tokenizer|scheduler|feature_extractor|image_processor|processor)[\w-]*")


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of an output folder that is not computed.

    Attributes:
        name: relative to the folder, with ``/``.
        path: the file that is copied.
        size: in bytes.
        sha256: of the contents, in hex.
        changed: the contents, if they are not those of the file.
    """

    name: str
    path: Path
    size: int
    sha256: str
    changed: bytes | None = None

    @classmethod
    def of(cls, name: str, path: Path) -> SideFile:
        """Reads the file once.

        Raises:
            CheckpointFormatError: it cannot be read, or is larger than any side file.
        """
        digest, size = hashlib.sha256(), 0
        for piece in _pieces(path):
            digest.update(piece)
            size += len(piece)
        return cls(name, path, size, digest.hexdigest())

    def with_contents(self, contents: bytes) -> SideFile:
        """Returns the same file with other contents."""
        return SideFile(self.name, self.path, len(contents), hashlib.sha256(contents).hexdigest(), contents)

    def pieces(self) -> Iterator[bytes]:
        """Yields the contents.

        Raises:
            CheckpointFormatError: the file cannot be read, or was changed since `of`.
        """
        if self.changed is not None:
            yield self.changed
            return
        digest, size = hashlib.sha256(), 0
        for piece in _pieces(self.path):
            digest.update(piece)
            size += len(piece)
            if size > self.size:
                break
            yield piece
        if digest.hexdigest() != self.sha256:
            raise ChangedWhileReadingError(f"{self.path}: was changed during the run. Run again.")


def _pieces(path: Path) -> Iterator[bytes]:
    with InputFile(path, reserve=0) as file:
        if file.size > LIMITS.side_file:
            fail(
                path, f"expected at most {LIMITS.side_file:,} bytes, got {file.size:,}", "Move it out of the checkpoint"
            )
        for offset in range(0, file.size, _PIECE):
            yield file.read(offset, min(_PIECE, file.size - offset))
        file.check_unchanged()


def json_of(path: Path) -> Any:
    """Returns the JSON in a file; an empty object if there is none."""
    if not is_file(path):
        return {}
    with InputFile(path, reserve=0) as file:
        text = file.read(0, file.size) if file.size <= LIMITS.log else b""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {}


def folders_of_models(path: Path, models: Collection[str]) -> list[Path]:
    """Returns the folders in one of several models that have models, tokenizers and the like.

    A diffusers pipeline names them in ``model_index.json``, and sentence-transformers in ``modules.json``. Without such
    a file their names tell.
    """
    index, modules = json_of(path / _PIPELINE), json_of(path / _MODULES)
    named = set(index) if isinstance(index, dict) else set()
    listed = modules if isinstance(modules, list) else []
    named |= {str(each["path"]) for each in listed if isinstance(each, dict) and "path" in each}
    names = sorted(name for name in os.listdir(path) if (path / name).is_dir())
    return [path / name for name in names if name in models or (name in named if named else _NO_MODELS.fullmatch(name))]


def find_side_files(folders: Sequence[Path], notice: Callable[[str], None] = lambda text: None) -> dict[str, Path]:
    """Returns the side files of a checkpoint by name, sorted.

    Args:
        folders: the folder with the weights, then those around it, up to the run folder. A kind of file (configuration,
            tokenizer and processor) that one lacks is taken from the next.
        notice: called with what the user should know.

    Raises:
        CheckpointFormatError: one cannot be read, or is a link to somewhere else.
    """
    found: dict[str, Path] = {}
    for pattern, what in ((_CONFIGS, "configuration"), (_TEXT, "tokenizer or processor")):
        for folder in folders:
            here = _matching(folder, pattern)
            if here:
                found |= here
                if folder != folders[0]:
                    names = listing(map(quote, sorted(here)))
                    notice(f"{folders[0]}: has no {what} files, so those of {folder} are copied: {names}")
                break
    found |= _code(found, notice)
    for path in found.values():
        _refuse_other_links(path, folders, notice)
    return dict(sorted(found.items()))


def _matching(folder: Path, pattern: re.Pattern[str]) -> dict[str, Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointFormatError(f"{folder}: cannot be listed: {error.strerror}. Check its permissions.") from error
    kept = [name for name in names if pattern.fullmatch(name) and _may_be_side_file(name)]
    if pattern is _TEXT and _TEMPLATES in names and (folder / _TEMPLATES).is_dir():
        inner = sorted(name for name in os.listdir(folder / _TEMPLATES) if name.endswith(".jinja") and name[0] != ".")
        kept += [f"{_TEMPLATES}/{name}" for name in inner]
    return {name: folder / name for name in kept if is_file(folder / name)}


def _may_be_side_file(name: str) -> bool:
    return not (name.startswith(".") or name.endswith(INDEX_SUFFIX) or _TRAINING.fullmatch(name))


def _code(found: Mapping[str, Path], notice: Callable[[str], None]) -> dict[str, Path]:
    """Returns the Python files that the configuration names as the code of the model, and what they import."""
    code: dict[str, Path] = {}
    for path in [each for name, each in found.items() if name.endswith(".json")]:
        config = json_of(path)
        for name in _auto_map(config):
            if not is_file(path.with_name(f"{name}.py")):
                notice(f"{path.parent}: {path.name} names {name}.py, which is not there")
        wanted = [*_auto_map(config), *(_custom_parts(config) if path.name in (_PIPELINE, _MODULES) else ())]
        while wanted:
            name = wanted.pop()
            file = path.parent / f"{name}.py"
            if f"{name}.py" in code or not is_file(file):
                continue
            code[f"{name}.py"] = file
            with InputFile(file, reserve=0) as opened:
                text = opened.read(0, min(opened.size, LIMITS.log)).decode(errors="replace")
            imported = [each for pair in _IMPORT.findall(text) for each in re.findall(r"\w+", " ".join(pair))]
            wanted += [f"{name[: name.rfind('/') + 1]}{each}" for each in imported]
    return code


def _auto_map(config: Any) -> list[str]:
    """Returns the modules that ``auto_map`` names, except those of another repository: ``org/name--module.Class``."""
    mapped = config.get("auto_map") if isinstance(config, dict) else None
    classes = list(mapped.values()) if isinstance(mapped, dict) else [mapped]
    flat = [each for value in classes for each in (value if isinstance(value, list) else [value])]
    return [match[1] for each in flat if isinstance(each, str) and (match := _CLASS.fullmatch(each))]


def _custom_parts(config: Any) -> list[str]:
    """Returns the modules that a pipeline names; most are those of a library, and no file."""
    if isinstance(config, list):  # modules.json
        types = [each.get("type") for each in config if isinstance(each, dict)]
        return [match[1] for each in types if isinstance(each, str) and (match := _CLASS.fullmatch(each))]
    pairs = config.items() if isinstance(config, dict) else ()
    modules = [
        ("" if key == "_class_name" else f"{key}/", value[0])
        for key, value in pairs
        if isinstance(value, list) and value and re.fullmatch(r"\w+", key)
    ]
    return [folder + name for folder, name in modules if isinstance(name, str) and re.fullmatch(r"\w+", name)]


def _refuse_other_links(path: Path, folders: Sequence[Path], notice: Callable[[str], None]) -> None:
    """Follows links that stay in the run, or in the cache of the Hugging Face Hub; raises CheckpointFormatError."""
    if not path.is_symlink():
        return
    target = Path(os.path.realpath(path))
    homes = [Path(os.path.realpath(each)) for each in folders]
    if homes[0] in target.parents:
        return
    if homes[0].parent.name == "snapshots" and target.parent == homes[0].parent.parent / "blobs":
        return
    if not any(home in target.parents for home in homes):
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
            found.append(f"{name}: is not copied: {_names(having)} has it, and the last checkpoint does not")
            continue
        lacking = [path for path in others if path not in having]
        differing = {path: file for path, file in having.items() if not _is_same(file, last[name])}
        if differing:
            keys = _keys(name, last[name], list(differing.values()))
            found.append(f"{name}: the last checkpoint's is copied, and differs from that of {_names(differing)}{keys}")
        if lacking:
            found.append(f"{name}: the last checkpoint's is copied, and {_names(lacking)} has none")
    return found


def _names(paths: Iterable[Path]) -> str:
    return listing(path.name for path in paths)


def _is_same(one: Path, other: Path) -> bool:
    first, second = input_status(one), input_status(other)
    if first is None or second is None or first.st_size != second.st_size:
        return False
    return os.path.samestat(first, second) or SideFile.of("", one).sha256 == SideFile.of("", other).sha256


def _keys(name: str, last: Path, others: Sequence[Path]) -> str:
    found = [json_of(each) for each in (last, *others)] if name.endswith(".json") else []
    if not found or not all(isinstance(each, dict) for each in found):
        return ""
    (ours, *theirs), missing = found, object()
    names = sorted({*ours, *(key for each in theirs for key in each)})
    differ = [key for key in names if any(each.get(key, missing) != ours.get(key, missing) for each in theirs)]
    return f" in {listing(map(quote, differ))}" if differ else ""
