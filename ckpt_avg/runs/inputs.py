"""From discovered paths to open checkpoints: surveyed and selected."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ckpt_avg.checkpoint.spec import METHOD_KEY, Checkpoint
from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, UsageError
from ckpt_avg.files.status import is_folder, look, status_of
from ckpt_avg.formats.open import open_checkpoint, refuse_missing_prefix
from ckpt_avg.formats.sharded import is_index
from ckpt_avg.formats.state_dict import Reading
from ckpt_avg.formats.torch_file import RUNNING_AVERAGE
from ckpt_avg.limits import LIMITS
from ckpt_avg.runs.candidates import Compare, Survey, survey
from ckpt_avg.runs.discover import Discovery
from ckpt_avg.runs.select import Selection, select
from ckpt_avg.text import listing, plural, quote


@dataclass(frozen=True, slots=True)
class Inputs:
    """The checkpoints to average, open and in order, and all that were looked at."""

    checkpoints: tuple[Checkpoint, ...]
    survey: Survey


def open_inputs(
    discovery: Discovery,
    selection: Selection,
    reading: Reading,
    stack: ExitStack,
    notice: Callable[[str], None] = lambda text: None,
    *,
    compare: Compare = "all",
) -> Inputs:
    """Opens what the sources hold and keeps open what is selected.

    Args:
        discovery: what the sources hold.
        selection: which to take.
        reading: how to read them.
        stack: closes them in the end.
        notice: told what the user should know.
        compare: how copies in run folders are recognised.

    Raises:
        CkptAvgError: a selected checkpoint cannot be opened, or there is none.
    """
    for note in discovery.notes:
        notice(note)
    found = survey(discovery, reading, stack, selection.wants, compare=compare)
    for note in found.notes:
        notice(note)
    checkpoints = tuple(candidate.opened() for candidate in select(found.candidates, selection, notice))
    refuse_missing_prefix([checkpoint.spec for checkpoint in checkpoints], reading)
    chosen = set(map(id, checkpoints))
    for candidate in found.candidates:
        if candidate.checkpoint is not None and id(candidate.checkpoint) not in chosen:
            candidate.checkpoint.close()
    return Inputs(checkpoints, found)


def refuse_output_among(output: str | os.PathLike[str], discovery: Discovery) -> None:
    """Raises UsageError where the output would replace a file of any discovered checkpoint, selected or not.

    An average that was made here and lies in a run folder is no such file, so that the folder can hold the output of
    the run before.
    """
    try:
        status = look(output)
    except OSError as error:
        raise UsageError(f"{output}: cannot be used as output: {error.strerror}. Choose another path.") from error
    if status is None:
        return
    named = [path for group in discovery.groups if not group.is_run for path in group.paths]
    found = [path for group in discovery.groups if group.is_run for path in group.paths]
    for path in (*named, *found, *(each.path for each in discovery.skipped)):
        for file in itertools.islice(_files_of(path), LIMITS.files):
            if _is(file, status) and not (path not in named and _made_here(file)):
                raise UsageError(
                    f"{output}: expected a new file, got one of the checkpoints, {path}. Choose another path."
                )


def _files_of(path: Path) -> Iterator[Path]:
    """Yields the files that a checkpoint consists of, as far as names tell."""
    if is_folder(path):
        for folder, _, names in os.walk(path, onerror=_refuse_unlisted, followlinks=True):
            yield from (Path(folder) / name for name in names)
    elif is_index(path):
        yield path
        yield from (each for each in path.parent.iterdir() if re.search(r"-\d+-of-\d+\.", each.name))
    else:
        yield path


def _refuse_unlisted(error: OSError) -> NoReturn:
    raise CheckpointFormatError(f"{error.filename}: cannot be listed: {error.strerror}. Check its disk.") from error


def _is(file: Path, status: os.stat_result) -> bool:
    other = status_of(file)
    return other is not None and os.path.samestat(other, status)


def _made_here(path: Path) -> bool:
    try:
        with open_checkpoint(path) as checkpoint:
            return METHOD_KEY in checkpoint.spec.metadata
    except CheckpointFormatError:
        return False


def notice_what_is_read(
    checkpoints: Sequence[Checkpoint], notice: Callable[[str], None], *, copies: bool = True
) -> None:
    """Tells how the checkpoints were read, which are averages already, and which tensors are tied.

    Args:
        checkpoints: what will be read.
        notice: told what the user should know.
        copies: whether to say of a single checkpoint that it is copied, or an average already.
    """
    first = checkpoints[0].spec
    for spec in (checkpoint.spec for checkpoint in checkpoints):
        for note in spec.notes if spec.notes != first.notes or spec is first else ():
            notice(f"{spec.path}: {note}")
    if averaged := [spec for spec in (checkpoint.spec for checkpoint in checkpoints) if spec.averaged]:
        running = next((spec for spec in averaged if spec.averaged.startswith(RUNNING_AVERAGE)), None)
        if running and len(averaged) < len(checkpoints):
            raw = next(checkpoint.spec for checkpoint in checkpoints if not checkpoint.spec.averaged)
            raise IncompatibleError(
                f"{running.path}: {running.averaged} is all that it holds, while {raw.path} holds raw weights. Average "
                "either kind: choose with --include and --exclude, --ema or --state-key."
            )
        if copies or len(checkpoints) > 1:
            hold = "holds an average" if len(averaged) == 1 else "hold an average"
            notice(
                f"{len(averaged)} of {plural(len(checkpoints), 'checkpoint')} {hold} already "
                f"({averaged[0].path.name}: {averaged[0].averaged})"
            )
    if copies and len(checkpoints) == 1:
        notice(f"{first.path} is the only checkpoint, so its weights are copied")
    if tied := first.tied():
        notice(f"tied tensors are written under each name: {listing('='.join(map(quote, names)) for names in tied)}")
