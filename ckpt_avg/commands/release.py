"""What an output folder contains besides the weights, and how it is completed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.commands.card import model_card, read_config
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.prepare import Prepared
from ckpt_avg.formats.trainers.file_names import names_a_moment
from ckpt_avg.mean.plan import Plan
from ckpt_avg.output.config_dtype import with_true_dtype
from ckpt_avg.output.paths import checksum_line
from ckpt_avg.output.release_folder import ReleaseFolder
from ckpt_avg.output.shards import Shard, encode_index, index_metadata, index_name, split, whole
from ckpt_avg.output.side_files import CONFIG, SideFile, differences, find_side_files
from ckpt_avg.output.weights_name import ADAPTER_CONFIG, weights_name, without_variant
from ckpt_avg.text import listing, quote

if TYPE_CHECKING:
    from ckpt_avg.commands.draft import AverageResult

CARD, SUMS = "README.md", "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class Release:
    """The files of an output folder.

    Attributes:
        shards: the files of the weights; often a single one.
        copied: name → SHA-256 of each side file.
        made: the names of the other files.
        side_files: what is copied; empty on every rank but the first.
    """

    shards: tuple[Shard, ...]
    copied: Mapping[str, str]
    made: tuple[str, ...]
    side_files: tuple[SideFile, ...]

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
    notice = context.notice

    def combine(_: object) -> tuple[str, dict[str, str]]:
        paths = find_side_files(_around(prepared.last), notice)
        _notice_differences(prepared, notice)
        if not {CONFIG, ADAPTER_CONFIG} & set(paths):
            notice(f"{prepared.last.spec.path}: neither it nor its run folder has a {CONFIG}")
        found.extend(SideFile.of(name, path) for name, path in paths.items())
        found[:] = [_with_true_dtype(each, prepared.plan, notice) for each in found]
        source = prepared.last.files[0].path.name
        floats = {each.dtype.torch_name for each in prepared.plan.tensors if each.dtype.kind == "float"}
        return weights_name(source, paths, floats), {each.name: each.sha256 for each in found}

    name, copied = context.ranks.exchange("side files", None, combine)
    made = [CARD, *([SUMS] if sha256 else [])]
    shards = whole(prepared.plan, name)
    if max_shard_size is not None and prepared.plan.nbytes > max_shard_size:
        shards = split(prepared.plan, without_variant(name), max_shard_size)
        if larger := [shard.tensors[0].name for shard in shards if shard.nbytes > max_shard_size]:
            notice(f"larger than --max-shard-size, each in a shard of its own: {listing(map(quote, larger))}")
    if len(shards) > 1:
        made.append(index_name(shards[0].name))
    return Release(shards, copied, tuple(made), tuple(found))


def complete_folder(
    folder: ReleaseFolder, release: Release, result: AverageResult, sha256: Sequence[str] | None
) -> str | None:
    """Adds the files that this run makes: an index, the model card, and the list of SHA-256 if it was requested.

    Args:
        folder: with the weights and the side files.
        release: what it will contain.
        result: what the card describes.
        sha256: of each file of the weights, if SHA-256 was requested.

    Returns:
        SHA-256 of the list of SHA-256, if there is one.

    Raises:
        OutputError: the system refused.
    """
    config = read_config(folder.path)
    made = {CARD: model_card(result, name=folder.target.name, config=config, recorded=result.metadata).encode()}
    if len(release.shards) > 1:
        names = ((shard.name, (tensor.name for tensor in shard.tensors)) for shard in release.shards)
        metadata = index_metadata(sum(shard.nbytes for shard in release.shards), result.data_digest or "")
        made[index_name(release.shards[0].name)] = encode_index(names, metadata)
    for name, contents in made.items():
        folder.add(name, len(contents), [contents])
    if sha256 is None:
        return None
    digests = {**release.copied, **{name: hashlib.sha256(contents).hexdigest() for name, contents in made.items()}}
    digests |= {shard.name: digest for shard, digest in zip(release.shards, sha256, strict=True)}
    sums = b"".join(checksum_line(name, digest) for name, digest in sorted(digests.items()))
    folder.add(SUMS, len(sums), [sums])
    return hashlib.sha256(sums).hexdigest()


def _inside(checkpoint: Checkpoint) -> list[Path]:
    """Returns the folders of a checkpoint that may have side files: the one with the weights, then those around it."""
    path, first = checkpoint.spec.path, checkpoint.files[0].path.parent
    return [each for each in (first, *first.parents) if path in (each, *each.parents)] or [first]


def _around(checkpoint: Checkpoint) -> list[Path]:
    """Returns the same, and the run folder around the checkpoint."""
    inside = _inside(checkpoint)
    is_folder = inside[-1] == checkpoint.spec.path or names_a_moment(inside[-1].name)
    return [*inside, *([inside[-1].parent] if is_folder else [])]


def _notice_differences(prepared: Prepared, notice: Callable[[str], None]) -> None:
    """Tells which side files are not the same in all checkpoints."""
    *others, last = prepared.checkpoints
    apart = [each for each in others if _inside(each)[0] != _inside(last)[0]]
    files = {each.spec.path: find_side_files(_inside(each)) for each in apart}
    for text in differences(find_side_files(_inside(last)), files):
        notice(text)


def _with_true_dtype(file: SideFile, plan: Plan, notice: Callable[[str], None]) -> SideFile:
    if file.name != CONFIG:
        return file
    contents, what = with_true_dtype(b"".join(file.pieces()), plan)
    if not what:
        return file
    notice(f"{CONFIG}: {what}")
    return file.with_contents(contents)
