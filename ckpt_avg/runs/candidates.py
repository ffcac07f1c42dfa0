"""The discovered checkpoints, opened: in the order of their steps, copies counted once, with what each records."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ckpt_avg.checkpoint.spec import METHOD_KEY, Checkpoint
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, NoWeightsError, PartError, TooManyFilesError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.folder import revisions_of
from ckpt_avg.formats.open import open_with
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.trainers.file_names import (
    is_ema,
    names_a_moment,
    record_from_name,
    series_numbers,
    series_of,
    stem,
)
from ckpt_avg.runs.copies import find_copies
from ckpt_avg.runs.discover import Discovery, refuse_repeated
from ckpt_avg.runs.run_folder import Skipped, in_order, natural_key
from ckpt_avg.runs.selection import Selection
from ckpt_avg.text import distinct_names, ends, escaped, listing, plural, quote

EARLIER_AVERAGE = "an earlier average made by ckpt-avg"
Unit = Literal["step", "epoch"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that could be averaged.

    Attributes:
        path: where it is.
        checkpoint: the open checkpoint; None if it could not be opened.
        error: why not.
        record: step, epoch and metrics.
    """

    path: Path
    checkpoint: Checkpoint | None
    error: CheckpointFormatError | None
    record: Record

    def opened(self) -> Checkpoint:
        """Returns the open checkpoint.

        Raises:
            CheckpointFormatError: it could not be opened.
        """
        if self.checkpoint is None:
            raise self.error or CheckpointFormatError(f"{self.path}: cannot be opened.")
        return self.checkpoint


@dataclass(frozen=True, slots=True)
class Candidates:
    """All checkpoints that could be averaged, each once.

    Attributes:
        ordered: in the order of their steps or epochs, if all record them.
        given: in the order of the sources.
        skipped: what is not averaged, and why.
        notes: what the user should know.
    """

    ordered: tuple[Candidate, ...]
    given: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()


def open_candidates(
    discovery: Discovery,
    reading: Reading,
    stack: ExitStack,
    selection: Selection | None = None,
    *,
    compare_in_full: bool = True,
) -> Candidates:
    """Opens every discovered checkpoint whose file name is selected; ``stack`` closes them.

    Copies are found by a few bytes of each tensor, and compared in full unless that is not wanted.

    Raises:
        IncompatibleError: nothing is selected, or a run folder contains several series of checkpoints.
        UsageError: a checkpoint is listed twice.
    """
    selection = selection or Selection()
    wanted = selection.wants
    sources = discovery.sources
    paths = [path for source in sources for path in source.paths]
    skipped = [item for source in sources for item in source.skipped]
    if not any(wanted(path.name) for path in paths):
        message = (
            f"nothing to average: --include and --exclude skip all {len(paths):,} checkpoints "
            f"({ends([escaped(path.name) for path in paths])}). Change the patterns, which match file names."
        )
        others = [quote(each.path.name) for each in skipped if wanted(each.path.name)]
        if others:
            message += f" These match, but run folders skip them: {listing(others)}. Name their paths to use them."
        raise IncompatibleError(message)
    given: list[Candidate] = []
    notes = [note for source in sources for note in source.notes]
    for source in sources:
        found: list[Candidate] = []
        try:
            found += (_open(path, reading, stack) for path in source.paths if wanted(path.name))
        except TooManyFilesError as error:
            raise _too_many_files(error, [*given, *found], sum(wanted(path.name) for path in paths)) from error
        for part in (each.error for each in found if isinstance(each.error, PartError)):
            raise part  # whatever is selected, and before the others look like a series
        if source.is_run:
            _advise_to_exclude(found)
            kept = _without_others(found, skipped, notes, compare_in_full)
            kept = _one_series(kept, skipped, notes, is_chosen=bool(selection.include))
            kept = _in_order(sorted(kept, key=lambda each: in_order(each.path)), notes)
            paths_kept = {candidate.path for candidate in kept}
            for candidate in found:
                if candidate.checkpoint is not None and candidate.path not in paths_kept:
                    candidate.checkpoint.close()
            found = kept
        given += found
    if not given:
        reasons = listing((f"{quote(item.path.name)}: {item.reason}" for item in skipped), separator="; ")
        raise IncompatibleError(f"nothing to average: all checkpoints are skipped ({reasons}). Name others.")
    refuse_repeated((each.path, _identity(each)) for each in given)  # a folder, and the file in it
    ordered = given = _with_records_of_folders(given)
    if len(sources) > 1:
        named = {source.paths[0] for source in sources if not source.is_run}
        notes += _notes_on_series(each for each in given if each.path in named)
        notes += _notes_on_moments(given)
        ordered = _in_order(given, notes)
    if ordered != given and not selection.keep_order:
        names = ends(distinct_names([each.path for each in ordered]))
        notes.append(f"the checkpoints are in the order of their steps, not as given: {names} (see --keep-order)")
    return Candidates(tuple(ordered), tuple(given), tuple(skipped), tuple(notes))


def _too_many_files(error: TooManyFilesError, opened: Sequence[Candidate], count: int) -> TooManyFilesError:
    """Returns the error for all ``count`` checkpoints, which have as many files each as those that are open."""
    files = sum(len(each.checkpoint.files) for each in opened if each.checkpoint is not None)
    needed = files * count // max(len(opened), 1)
    return TooManyFilesError(plural(count, "checkpoint"), max(needed, error.limit + 1), error.limit)


def unit_of(records: Iterable[Record]) -> Unit | None:
    """Returns what orders all records: steps, unless they start again in each epoch; epochs; or nothing.

    A number in a name whose unit is unknown is never compared with recorded steps.
    """
    records = list(records)
    moments = sorted((each.epoch or 0, each.step or 0) for each in records)
    starts_again = any(after[1] < before[1] for before, after in itertools.pairwise(moments))
    of_one_kind = len({each.is_lone_number for each in records}) == 1
    all_steps = of_one_kind and all(each.step is not None for each in records)
    all_epochs = all(each.epoch is not None for each in records)
    if all_steps and not (all_epochs and starts_again):
        return "step"
    return "epoch" if all_epochs else None


def position(record: Record, unit: Unit) -> int:
    """Returns the step or epoch of a record that has one."""
    return (record.step if unit == "step" else record.epoch) or 0


def _sorted(found: Sequence[Candidate], records: Sequence[Record], unit: Unit) -> list[Candidate]:
    keys = [(position(each, unit), each.step or 0) for each in records]
    return [found[index] for index in sorted(range(len(found)), key=keys.__getitem__)]


def _in_order(given: list[Candidate], notes: list[str]) -> list[Candidate]:
    """Orders checkpoints by what all of them record, else by the numbers in all names, else as they are given."""
    records = [each.record for each in given]
    if unit := unit_of(records):
        return _sorted(given, records, unit)
    by_name = [record_from_name(each.path.name) for each in given]
    unit = unit_of(by_name)
    lacking = [each for each in given if each.record.is_lone_number or each.record.step is each.record.epoch is None]
    if 0 < len(lacking) < len(given) and not any(each.error for each in lacking):
        names = ends([escaped(each.path.name) for each in lacking])
        order = "ordered by the numbers in their names" if unit else "not ordered by steps"
        notes.append(f"no step or epoch is recorded in {names}, unlike the others, so the checkpoints are {order}")
    return _sorted(given, by_name, unit) if unit else given


def _notes_on_series(found: Iterable[Candidate]) -> list[str]:
    """Says of which trainings checkpoints are by their names, if these are several; a number may be the step."""
    series = set()
    for each in found:
        name = series_of(each.path.name)
        if name and name.partition("_")[2] not in (str(each.record.step), str(each.record.epoch)):
            series.add(name)
    return [f"by their names these are of different trainings: {listing(sorted(series))}"] if len(series) > 1 else []


def _identity(candidate: Candidate) -> frozenset[tuple[int, int]]:
    files = candidate.checkpoint.files if candidate.checkpoint else ()
    return frozenset(file.identity for file in files if isinstance(file, InputFile))


def _open(path: Path, reading: Reading, stack: ExitStack) -> Candidate:
    try:
        checkpoint = stack.enter_context(open_with(path, reading))
    except CheckpointFormatError as error:
        return Candidate(path, None, error, record_from_name(path.name))
    return Candidate(path, checkpoint, None, checkpoint.spec.record)


def _with_records_of_folders(given: list[Candidate]) -> list[Candidate]:
    """Adds what the names of differing folders around checkpoints tell, such as checkpoint-500/unet, if these don't."""
    paths = [each.path.absolute() for each in given]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    found = []
    for candidate, path in zip(given, paths, strict=True):
        record = candidate.record
        if record.step is None and record.epoch is None:
            folders = path.relative_to(common).parent.parts[::-1]
            names = [*revisions_of(path), *(name for name in folders if name.isdecimal() or names_a_moment(name))]
            record = functools.reduce(Record.or_else, map(record_from_name, names), record)
        found.append(replace(candidate, record=record))
    return found


def _advise_to_exclude(found: Sequence[Candidate]) -> None:
    """Adds to the errors of a run how to average the others, if there are others."""
    if any(candidate.checkpoint is not None for candidate in found):
        for each in found:
            if each.error is not None and not isinstance(each.error, NoWeightsError):
                each.error.args = (f"{each.error} To average the others, add --exclude {quote(each.path.name)}.",)


def _without_others(found: list[Candidate], skipped: list[Skipped], notes: list[str], in_full: bool) -> list[Candidate]:
    """Skips what is no checkpoint of a run: earlier averages, files without weights, copies, exports."""
    kept: list[Candidate] = []
    weightless: list[Candidate] = []
    for candidate in found:
        if candidate.checkpoint is not None and METHOD_KEY in candidate.checkpoint.spec.metadata:
            skipped.append(Skipped(candidate.path, EARLIER_AVERAGE))
        elif isinstance(candidate.error, NoWeightsError):
            weightless.append(candidate)
        else:
            kept.append(candidate)
    if not kept:
        return weightless  # so that the first of them says what is wrong
    for each in weightless:
        why = str(each.error).removeprefix(f"{each.path}: ").rstrip(".")
        skipped.append(Skipped(each.path, f"it contains no weights: {why}"))
    kept = _without_copies(kept, skipped, in_full)
    strays = [each for each in kept if each.checkpoint and each.record.step is None and each.record.epoch is None]
    if 2 * len(strays) >= len(kept):
        recorded = {
            name for each in kept if each.checkpoint and each not in strays for name in each.opened().spec.tensors
        }
        strays = [each for each in strays if recorded and recorded.isdisjoint(each.opened().spec.tensors)]
    skipped += [Skipped(each.path, "it records no step or epoch, unlike the others") for each in strays]
    if strays:
        names = ends([quote(each.path.name) for each in strays])
        notes.append(f"skipped, because no step or epoch is recorded in them, unlike in the others: {names}")
    return [each for each in kept if each not in strays]


def _without_copies(found: list[Candidate], skipped: list[Skipped], in_full: bool) -> list[Candidate]:
    """Keeps the plainest name of each checkpoint; it inherits what its copies record."""
    readable = sorted((each for each in found if each.checkpoint is not None), key=lambda each: _plainness(each.path))
    kept = {each.path: each for each in found}
    copies = find_copies([each.opened() for each in readable], in_full=in_full)
    for index, original in copies.items():
        copy, first = readable[index], kept[readable[original].path]
        del kept[copy.path]
        kept[first.path] = replace(first, record=first.record.or_else(copy.record))
        sampled = "" if in_full else ", judging by samples"
        skipped.append(Skipped(copy.path, f"the same weights as {first.path.name}{sampled}"))
    return list(kept.values())


def _one_series(
    found: list[Candidate], skipped: list[Skipped], notes: list[str], *, is_chosen: bool
) -> list[Candidate]:
    """Keeps one series of checkpoints of a run that has several, such as raw weights and their EMA.

    Raises:
        IncompatibleError: several series have the same steps, such as the two networks of a GAN, or are of different
            trainings by their names; unless the user has chosen names.
    """
    averages = [each for each in found if is_ema(each.path.name)]
    if averages and len(averages) < len(found):
        skipped += [Skipped(each.path, "EMA weights, by its name; --include selects them") for each in averages]
        found = [each for each in found if each not in averages]
    trainings = _notes_on_series(found)
    shared = _with_one_moment(found)
    if trainings or len(shared) > 1:
        names = [each.path.name for each in found] if trainings else [name for names in shared for name in names]
        kinds = _patterns(names, shared)
        if not is_chosen:
            several = "several" if trainings else "several with the same steps"
            raise IncompatibleError(
                f"{found[0].path.parent}: expected one series of checkpoints, got {several}: "
                f"{listing(map(quote, kinds))}. Select one with --include or --exclude, for example --include "
                f"{quote(kinds[0])}.{' With --include ' + quote('*') + ' all are averaged.' if trainings else ''}"
            )
        notes += trainings or [f"several series have the same steps, and all are used: {listing(map(quote, kinds))}"]
    else:
        notes += _notes_on_moments(found)
    return found


def _with_one_moment(found: Sequence[Candidate]) -> list[list[str]]:
    """Returns the names of checkpoints that record the same step and epoch, for each of these."""
    moments: dict[tuple[int | None, int | None], list[str]] = {}
    for each, name in zip(found, distinct_names([each.path for each in found]), strict=True):
        if each.record.step is not None or each.record.epoch is not None:
            moments.setdefault((each.record.step, each.record.epoch), []).append(name)
    return [sorted(names) for names in moments.values() if len(names) > 1]


def _notes_on_moments(found: Sequence[Candidate]) -> list[str]:
    return [
        f"several checkpoints have the same step, and all are used: {listing(map(quote, names))}"
        for names in _with_one_moment(found)
    ]


def _patterns(names: Sequence[str], shared: Sequence[Sequence[str]]) -> list[str]:
    """Returns a pattern for each series, with a * for the numbers that differ inside it; the names if there is none.

    A number tells the series if names of the same step differ in it, or if it is that of a fold or the like.
    """
    pieces = {name: re.split(r"(\d+)", stem(name)) for name in names}
    telling: dict[tuple[str, ...], set[int]] = {}
    for name, parts in pieces.items():
        begins = itertools.accumulate(map(len, parts), initial=0)
        positions = {position for position, begin in enumerate(begins) if begin in series_numbers(name)}
        telling.setdefault(tuple(parts[::2]), set()).update(positions)
    for group in shared:
        for one, other in itertools.combinations([pieces[name] for name in group[:10]], 2):
            if one[::2] == other[::2]:
                telling[tuple(one[::2])].update(index for index, part in enumerate(one) if part != other[index])
    patterns = set()
    for parts in pieces.values():
        kept = telling[tuple(parts[::2])]
        pattern = "".join(part if index % 2 == 0 or index in kept else "*" for index, part in enumerate(parts))
        patterns.add(f"{pattern.rstrip('*')}*")
    return sorted(patterns if len(patterns) > 1 else names)


def _plainness(path: Path) -> tuple[object, ...]:
    words = stem(path.name).lower()
    is_marked = "best" in words or "last" in words
    return (is_marked, record_from_name(path.name) == Record(), path.is_symlink(), len(words), natural_key(path.name))
