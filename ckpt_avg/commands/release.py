"""What an output folder contains besides the weights, and how it is completed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ckpt_avg.checkpoint.spec import Checkpoint, CheckpointSpec
from ckpt_avg.commands.card import CONFIGS, card_notice, model_card, read_config
from ckpt_avg.commands.check import notice_tied
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.parts import Part, dtypes_of, parts_of
from ckpt_avg.commands.prepare import Prepared
from ckpt_avg.formats.models import prefix_of
from ckpt_avg.formats.trainers.file_names import names_a_moment
from ckpt_avg.mean.plan import Plan
from ckpt_avg.output.config_dtype import with_true_dtype
from ckpt_avg.output.paths import checksum_line
from ckpt_avg.output.provenance import digest_of
from ckpt_avg.output.release_folder import ReleaseFolder
from ckpt_avg.output.shards import Shard, encode_index, index_metadata, index_name
from ckpt_avg.output.side_file import SideFile, is_damaged_json, json_of
from ckpt_avg.output.side_file_names import CONFIG, MAIN
from ckpt_avg.output.side_files import differences, find_side_files, folders_of_models, refuse_other_links
from ckpt_avg.output.weights_name import weights_name
from ckpt_avg.text import listing, quote

if TYPE_CHECKING:
    from ckpt_avg.commands.draft import AverageResult

_HEAD = re.compile(r"(^|[._])heads?([._]|$)")
_EMBEDDING = re.compile(r"emb|wte|shared|predictions|(^|[._])heads?[._]")
CARD, SUMS = "README.md", "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class Release:
    """The files of an output folder.

    Attributes:
        parts: the models, with the files of the weights.
        copied: name → SHA-256 of each side file.
        made: the names of the files that are neither weights nor copied.
        side_files: what is copied; empty on every rank but the first.
    """

    parts: tuple[Part, ...]
    copied: Mapping[str, str]
    made: tuple[str, ...]
    side_files: tuple[SideFile, ...]

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files of the weights."""
        return tuple(shard for part in self.parts for shard in part.shards)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files, the weights first."""
        return (*(shard.name for shard in self.shards), *sorted((*self.copied, *self.made)))

    @property
    def recorded(self) -> dict[str, str | None]:
        """What the weights record of the folder: name → SHA-256, if the file is copied."""
        return {**dict.fromkeys(self.files), **self.copied}


def plan_release(prepared: Prepared, context: Context, *, sha256: bool, max_shard_size: int | None) -> Release:
    """Finds the side files, on rank 0 for all, and tells what the user should know of them and of the shards.

    Raises:
        CheckpointFormatError: one cannot be read, or is a link to somewhere else.
    """
    found: list[SideFile] = []

    def combine(_: object) -> tuple[dict[str, str], dict[str, dict[str, str]], dict[str, str]]:
        paths = _find(prepared.last, context.notice)
        refuse_other_links(paths.values(), _inside(prepared.last)[-1], _run_of(prepared.last), context.notice)
        _notice_differences(prepared, context.notice)
        for path in paths.values():
            if path.suffix == ".json" and is_damaged_json(path):
                context.notice(f"{path}: is no JSON, and copied as it is. Copy it from another checkpoint")
        names, tied = {}, {}
        for model, checkpoint in (prepared.last.models or {"": prepared.last}).items():
            folder = f"{model}/" if model else ""
            own = {name.removeprefix(folder): path for name, path in paths.items() if name.startswith(folder)}
            names[model] = folder + weights_name(checkpoint.files[0].path.name, own, dtypes_of(prepared, model))
            tied[model] = _not_stored(checkpoint.spec, own, prepared.plan, context.notice)
            if MAIN.isdisjoint(own):
                context.notice(f"{checkpoint.spec.path}: neither it nor its run folder has a {CONFIG}")
        config = next((path.parent for name, path in paths.items() if name in CONFIGS), None)
        if unknown := card_notice(None if config is None else read_config(config)):
            context.notice(f"{CARD}: {unknown}")
        found.extend(_with_true_dtype(SideFile.of(*each), prepared, context.notice) for each in paths.items())
        return names, tied, {each.name: each.sha256 for each in found}

    names, tied, copied = context.ranks.exchange("side files", None, combine)
    parts = parts_of(prepared, names, tied, max_shard_size)
    shards = [shard for part in parts for shard in part.shards]
    if larger := [each.tensors[0].name for each in shards if max_shard_size and each.nbytes > max_shard_size]:
        context.notice(f"larger than --max-shard-size, each in a shard of its own: {listing(map(quote, larger))}")
    indices = [index_name(part.shards[0].name) for part in parts if len(part.shards) > 1]
    return Release(parts, copied, (CARD, *([SUMS] if sha256 else []), *indices), tuple(found))


def complete_folder(
    folder: ReleaseFolder, release: Release, result: AverageResult, data_digests: Sequence[str], sha256: Sequence[str]
) -> str | None:
    """Adds the files that this run makes: an index, the model card, and the list of SHA-256 if it was requested.

    Args:
        folder: with the weights and the side files.
        release: what it will contain.
        result: what the card describes.
        data_digests: of the data section of each file of the weights.
        sha256: of each file of the weights, if SHA-256 was requested.

    Returns:
        SHA-256 of the list of SHA-256, if there is one.

    Raises:
        OutputError: the system refused.
    """
    config = read_config(folder.path)
    made = {CARD: model_card(result, name=folder.target.name, config=config, recorded=result.metadata).encode()}
    known = dict(zip((shard.name for shard in release.shards), data_digests, strict=True))
    for part in (part for part in release.parts if len(part.shards) > 1):
        digest = digest_of([known[shard.name] for shard in part.shards])
        metadata = index_metadata(sum(shard.nbytes for shard in part.shards), digest)
        made[index_name(part.shards[0].name)] = encode_index(map(_contents, part.shards), metadata)
    for name, contents in made.items():
        folder.add(name, len(contents), [contents])
    if SUMS not in release.made:
        return None
    digests = {**release.copied, **{name: hashlib.sha256(contents).hexdigest() for name, contents in made.items()}}
    digests |= {shard.name: digest for shard, digest in zip(release.shards, sha256, strict=True)}
    sums = b"".join(checksum_line(name, digest) for name, digest in sorted(digests.items()))
    folder.add(SUMS, len(sums), [sums])
    return hashlib.sha256(sums).hexdigest()


def _not_stored(
    spec: CheckpointSpec, side_files: Mapping[str, Path], plan: Plan, notice: Callable[[str], None]
) -> dict[str, str]:
    """Returns which tied tensors transformers leaves out, as `Part.tied`, and tells the user.

    It stores the one that the others are tied to: the first in the order of the model that is not in its head. What
    no loader of it ties again is written under each name: layers that share weights, and embeddings that its
    configuration does not tie.
    """
    groups = spec.tied()
    if not groups:
        return {}
    config = json_of(side_files[CONFIG]) if CONFIG in side_files else {}
    is_known = isinstance(config, dict) and not {"model_type", "architectures"}.isdisjoint(config)
    once = [group for group in groups if is_known and _ties(config) and any(map(_EMBEDDING.search, group))]
    notice_tied([group for group in groups if group not in once], notice)
    if not once:
        return {}
    prefix, planned = prefix_of(spec.model), plan.by_name()
    plain = {name for name, tensor in planned.items() if tensor.rule == "mean" and name not in plan.kinds}
    stored = [next((name for name in group if not _HEAD.search(name)), group[0]) for group in once]
    tied = {
        name: kept
        for kept, group in zip(stored, once, strict=True)
        for name in group
        if name != kept and prefix + name in plain
    }
    if tied:
        pairs = listing(f"{quote(name)} as {quote(kept)}" for name, kept in tied.items())
        notice(f"tied weights are stored once, as transformers stores them: {pairs}")
    return tied


def _ties(config: Mapping[str, Any]) -> bool:
    """Whether a configuration lets transformers tie embeddings; one of several models has configurations inside."""
    inner = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)]
    return all(each.get("tie_word_embeddings", True) for each in (config, *inner))


def _contents(shard: Shard) -> tuple[str, list[str]]:
    """Returns what an index says of a shard."""
    return PurePosixPath(shard.name).name, [tensor.name.removeprefix(shard.prefix) for tensor in shard.tensors]


def _find(checkpoint: Checkpoint, notice: Callable[[str], None], *, around: bool = True) -> dict[str, Path]:
    """Returns the side files of a checkpoint by their names in the output folder; also those of the run folder."""
    path = checkpoint.spec.path
    if not checkpoint.models:
        return find_side_files(_inside(checkpoint), _run_of(checkpoint) if around else None, notice)
    found = find_side_files([path], notice=notice)
    for folder in folders_of_models(path, checkpoint.models):
        found |= {f"{folder.name}/{name}": each for name, each in find_side_files([folder], notice=notice).items()}
    return found


def _inside(checkpoint: Checkpoint) -> list[Path]:
    """Returns the folders of a checkpoint that may have side files: the one with the weights, then those around it."""
    path, first = checkpoint.spec.path, checkpoint.files[0].path.parent
    return [each for each in (first, *first.parents) if path in (each, *each.parents)] or [first]


def _run_of(checkpoint: Checkpoint) -> Path | None:
    """Returns the run folder around a checkpoint folder."""
    folder = _inside(checkpoint)[-1]
    return folder.parent if folder == checkpoint.spec.path or names_a_moment(folder.name) else None


def _notice_differences(prepared: Prepared, notice: Callable[[str], None]) -> None:
    """Tells which side files are not the same in all checkpoints."""
    *others, last = prepared.checkpoints
    apart = [each for each in others if _inside(each)[0] != _inside(last)[0]]
    files = {each.spec.path: _find(each, lambda text: None, around=False) for each in apart}
    for text in differences(_find(last, lambda text: None, around=False), files):
        notice(text)


def _with_true_dtype(file: SideFile, prepared: Prepared, notice: Callable[[str], None]) -> SideFile:
    model, _, name = file.name.rpartition("/")
    if name != CONFIG or model not in (prepared.last.models or {""}):
        return file
    contents, what = with_true_dtype(b"".join(file.pieces()), dtypes_of(prepared, model))
    if not what:
        return file
    notice(f"{file.name}: {what}")
    return file.with_contents(contents)
