"""An output folder for `verify`: which files it records, and whether its shards and their index belong together."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt_avg.errors import CheckpointFormatError, UsageError, VerificationError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.limits import LIMITS
from ckpt_avg.output.digests import digest_stream
from ckpt_avg.output.provenance import MODEL, recorded_files, recorded_shard, shards_digest
from ckpt_avg.output.shards import SAFETENSORS, SHARD_NAME, encode_index, index_metadata, index_name
from ckpt_avg.output.written_file import ADVICE, WrittenFile, is_written
from ckpt_avg.text import argument, listing, quote

_LOADED = (SAFETENSORS, f"{SAFETENSORS}.index.json")  # of what a loader takes for weights


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """What an output folder should contain, as its weights record.

    Attributes:
        path: the folder.
        weights: the names of the files with weights, in order.
        others: name → SHA-256 of each other file, in hex; None if it is not recorded.
        unknown: the names of files that are not recorded.
    """

    path: Path
    weights: tuple[str, ...]
    others: Mapping[str, str | None]
    unknown: tuple[str, ...]


def read_folder(path: Path) -> OutputFolder:
    """Returns what a folder should contain; all weights are there.

    Raises:
        VerificationError: it has no weights that this package wrote, or lacks some.
        UsageError: it has no weights, or this package wrote some there, but not the folder.
    """
    names = sorted(_names(path))
    recorded: dict[str, dict[str, str | None]] = {}
    models: dict[str, str] = {}
    damaged: dict[str, CheckpointFormatError] = {}
    for name in names:
        if name.endswith(SAFETENSORS):
            try:
                with InputFile(path / name) as file:
                    if is_written(file):
                        metadata = WrittenFile.of(file).metadata
                        recorded[name], models[name] = recorded_files(metadata), metadata.get(MODEL, "")
            except CheckpointFormatError as error:
                damaged[name] = error
    if not any(name.endswith(SAFETENSORS) for name in names):
        raise UsageError(f"{path}: contains no weights. Name an output of ckpt-avg.")
    if not recorded:
        for cause in damaged.values():
            raise VerificationError(str(cause)) from cause
        raise VerificationError(f"{path}: contains no weights that ckpt-avg wrote. Name an output of ckpt-avg.")
    first = next((name for name in sorted(recorded) if recorded[name]), min(recorded))
    prefix = _prefix(path, first, recorded[first])
    for name in (name for name in sorted(recorded) if prefix + name in recorded[first]):
        if recorded[name] != recorded[first]:
            raise VerificationError(
                f"{path / name}: records other files of its folder than {path / first}: they were not written "
                f"together. {ADVICE}"
            )
        if (folder := (prefix + name).rpartition("/")[0]) != models[name]:
            raise VerificationError(
                f"{path / name}: has the model {quote(models[name])}, not {quote(folder)}. {ADVICE}"
            )
    files = {name.removeprefix(prefix): digest for name, digest in recorded[first].items() if name.startswith(prefix)}
    weights = tuple(name for name in files if name.endswith(SAFETENSORS))
    missing = [name for name, digest in files.items() if name not in names and (digest or _is_needed(name))]
    if missing:
        raise VerificationError(f"{path}: incomplete: {listing(map(quote, missing))} missing. {ADVICE}")
    loaded = set(map(_loaded_as, weights))
    strange = [name for name in names if name not in files and name.endswith(_LOADED) and _loaded_as(name) in loaded]
    if strange:
        raise VerificationError(
            f"{path}: contains weights that were not written with it: {listing(map(quote, strange))}. A loader may "
            "take them. Move them away."
        )
    return OutputFolder(
        path,
        weights,
        {name: digest for name, digest in files.items() if name not in weights and name in names},
        tuple(name for name in names if name not in files),
    )


def _names(path: Path) -> Iterator[str]:
    """Yields the files in a folder and in those inside it, relative to it, with ``/``."""

    def refuse(error: OSError) -> None:
        raise CheckpointFormatError(f"{error.filename}: cannot be listed: {error.strerror}. Check its permissions.")

    for place, _, files in os.walk(path, onerror=refuse):
        for name in files:
            yield Path(place, name).relative_to(path).as_posix()


def _loaded_as(name: str) -> str:
    """Returns the name of weights for a loader: without suffix, variant and the number of a shard."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{re.sub(r'-[0-9]+-of-[0-9]+', '', file).partition('.')[0]}"


def _is_needed(name: str) -> bool:
    return name.endswith((SAFETENSORS, ".json"))


def _prefix(path: Path, name: str, files: Mapping[str, str | None]) -> str:
    """Returns what the recorded names have before the names in this folder: nothing, or that of a model's folder.

    Raises UsageError if the folder is not the one that was written.
    """
    if name in files:
        return ""
    whole = Path(os.path.abspath(path), name).as_posix()
    for each in files:
        if each.endswith(f"/{name}") and whole.endswith(f"/{each}"):
            return each.removesuffix(name)
    inner = next((name.removesuffix(each) for each in files if name.endswith(f"/{each}")), None)
    target = path / name if inner is None else path / inner
    raise UsageError(
        f"{path}: is not an output folder, but contains an output. Write ckpt-avg verify {argument(target)}."
    )


def refuse_changed(folder: OutputFolder) -> None:
    """Raises VerificationError if a file that was copied to the folder has other contents now."""
    for name, expected in folder.others.items():
        if expected is None:
            continue
        with InputFile(folder.path / name) as file:
            found = digest_stream(file.read, file.size)
        if found != expected:
            raise VerificationError(
                f"{folder.path / name}: was changed or is damaged: expected SHA-256 {expected}, got {found}. {ADVICE}"
            )


def refuse_exchanged(files: Sequence[WrittenFile]) -> None:
    """Raises VerificationError if shards and their index were not written together. Each is undamaged by itself."""
    sets: dict[Path, list[WrittenFile]] = {}
    for file in files:
        if recorded_shard(file.metadata) is not None:
            sets.setdefault(file.path.parent, []).append(file)
    for folder, shards in sets.items():
        _refuse_exchanged(folder, shards)


def _refuse_exchanged(folder: Path, shards: Sequence[WrittenFile]) -> None:
    for file in shards:
        number, count, _ = recorded_shard(file.metadata) or (0, 0, "")
        name = SHARD_NAME.fullmatch(file.path.name)
        if name is None or (int(name["number"]), int(name["count"])) != (number, count) or count != len(shards):
            raise VerificationError(
                f"{file.path}: is another shard than its name says: number {number} of {count}. {ADVICE}"
            )
    index = folder / index_name(shards[0].path.name)
    found = _read_index(index)
    recorded = [(recorded_shard(file.metadata) or (0, 0, ""))[2] for file in shards]
    computed = shards_digest(file.recorded.data for file in shards)
    metadata = index_metadata(sum(file.nbytes for file in shards), computed)
    expected = encode_index(((file.path.name, file.tensors) for file in shards), metadata)
    if set(recorded) != {computed}:
        # The index tells which shards belong to it; without it, the majority.
        written = re.findall(rb"sha256:([0-9a-f]{64})", found)
        common = next((each for each in map(bytes.decode, written) if each in recorded), None)
        common = common or Counter(recorded).most_common(1)[0][0]
        others = [file.path for file, digest in zip(shards, recorded, strict=True) if digest != common]
        raise VerificationError(
            f"{listing(map(str, others or [folder]))}: from another output than the other shards. {ADVICE}"
        )
    if found != expected:
        raise VerificationError(f"{index}: does not fit the shards: {_difference(found, expected)}. {ADVICE}")


def _read_index(path: Path) -> bytes:
    try:
        with InputFile(path) as file:
            return file.read(0, min(file.size, LIMITS.index))
    except CheckpointFormatError as error:
        raise VerificationError(str(error)) from error


def _difference(found: bytes, expected: bytes) -> str:
    """Says where an index differs from the one that was written."""
    try:
        ours, theirs = json.loads(expected)["weight_map"], json.loads(found)["weight_map"]
        name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, StopIteration):
        return f"expected SHA-256 {hashlib.sha256(expected).hexdigest()}, got {hashlib.sha256(found).hexdigest()}"
    return f"it says that {quote(name)} is in {quote(theirs.get(name))}, and it is in {quote(ours.get(name))}"
