"""The discovered checkpoints, opened: in the order of their steps, copies counted once, with what each records."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt_avg.checkpoint.spec import METHOD_KEY
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, NoWeightsError, PartError, TooManyFilesError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.files.missing import nearest_name
from ckpt_avg.formats.folder import JOIN
from ckpt_avg.formats.open import open_with
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.trainers.file_names import record_from_name, stem, without_part
from ckpt_avg.progress import Phase, Progress
from ckpt_avg.runs.candidate import Candidate
from ckpt_avg.runs.copies import find_copies
from ckpt_avg.runs.discover import OWN_AVERAGE, Discovery, refuse_repeated
from ckpt_avg.runs.order import put_in_order, with_records_of_folders
from ckpt_avg.runs.run_folder import Skipped, in_order, natural_key
from ckpt_avg.runs.selection import Selection
from ckpt_avg.runs.series import notes_on_moments, notes_on_series, one_series
from ckpt_avg.text import distinct_names, ends, escaped, listing, plural, quote
from ckpt_avg.wording import setting

COPY = "the same weights as"  # why a copy is skipped


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
    progress: Progress | None = None,
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
    progress = progress or Progress()
    sources = discovery.sources
    paths = [path for source in sources for path in source.paths]
    skipped = [item for source in sources for item in source.skipped]
    if not any(wanted(path.name) for path in paths):
        message = (
            f"nothing to average: --include and --exclude skip all {len(paths):,} checkpoints "
            f"({ends([escaped(path.name) for path in paths])}). Change the patterns, which match file names."
        )
        nearest = [nearest_name(pattern, [path.name for path in paths]) for pattern in selection.include]
        message += "".join(f" Did you mean {near!r}?" for near in nearest if near)
        others = [quote(each.path.name) for each in skipped if wanted(each.path.name)]
        if others:
            message += f" These match, but run folders skip them: {listing(others)}. Name their paths to use them."
        raise IncompatibleError(message)
    progress.step(Phase("opening checkpoints", sum(wanted(path.name) for path in paths), "checkpoints"))
    given: list[Candidate] = []
    notes = [note for source in sources for note in source.notes]
    notes += _idle_patterns(selection, [path.name for path in (*paths, *(each.path for each in skipped))])
    for source in sources:
        found: list[Candidate] = []
        try:
            found += (_open(path, reading, stack, progress) for path in source.paths if wanted(path.name))
        except TooManyFilesError as error:
            raise _too_many_files(error, [*given, *found], sum(wanted(path.name) for path in paths)) from error
        if source.is_run:
            _advise_to_exclude(found)
        for part in (each.error for each in found if isinstance(each.error, PartError)):
            raise part  # whatever is selected, and before the others look like a series
        if source.is_run:
            kept = _without_others(found, skipped, notes, compare_in_full)
            kept = one_series(kept, skipped, notes, is_chosen=bool(selection.include))
            kept = put_in_order(sorted(kept, key=lambda each: in_order(each.path)), notes)
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
    _refuse_parts([each.path for each in given])
    ordered = given = with_records_of_folders(given)
    if len(sources) > 1:
        named = {source.paths[0] for source in sources if not source.is_run}
        notes += notes_on_series(each for each in given if each.path in named)
        notes += notes_on_moments(given)
        ordered = put_in_order(given, notes)
    if ordered != given and not selection.keep_order:
        names = ends(distinct_names([each.path for each in ordered]))
        notes.append(f"the checkpoints are in the order of their steps, not as given: {names} (see --keep-order)")
    return Candidates(tuple(ordered), tuple(given), tuple(skipped), tuple(notes))


def _idle_patterns(selection: Selection, names: Sequence[str]) -> list[str]:
    """Tells which patterns match no name: a typing error would otherwise select the wrong checkpoints in silence."""
    given = [("--include", pattern) for pattern in selection.include]
    given += [("--exclude", pattern) for pattern in selection.exclude]
    idle = [each for each in given if not any(fnmatchcase(name, each[1]) for name in names)]
    return [
        f"{setting(option, pattern)}: matches no checkpoint." + (f" Did you mean {near!r}?" if near else "")
        for option, pattern in idle
        for near in [nearest_name(pattern, names)]
    ]


def _too_many_files(error: TooManyFilesError, opened: Sequence[Candidate], count: int) -> TooManyFilesError:
    """Returns the error for all ``count`` checkpoints, which have as many files each as those that are open."""
    files = sum(len(each.checkpoint.files) for each in opened if each.checkpoint is not None)
    needed = files * count // max(len(opened), 1)
    return TooManyFilesError(plural(count, "checkpoint"), max(needed, error.limit + 1), error.limit)


def _identity(candidate: Candidate) -> frozenset[tuple[int, int]]:
    files = candidate.checkpoint.files if candidate.checkpoint else ()
    return frozenset(file.identity for file in files if isinstance(file, InputFile))


def _open(path: Path, reading: Reading, stack: ExitStack, progress: Progress) -> Candidate:
    try:
        checkpoint = stack.enter_context(open_with(path, reading))
    except CheckpointFormatError as error:
        return Candidate(path, None, error, record_from_name(path.name))
    finally:
        progress.advance(1)
    return Candidate(path, checkpoint, None, checkpoint.spec.record)


def _refuse_parts(paths: Sequence[Path]) -> None:
    """Raises PartError for two that differ in the number of a part alone, also if those between them are missing."""
    seen: dict[Path, Path] = {}
    for path in paths:
        pattern = Path(*map(without_part, path.parts))
        if pattern != path and pattern in seen:
            raise PartError(
                f"{path}: this and {quote(seen[pattern])} are parts of one checkpoint, by their names. {JOIN}"
            )
        seen[pattern] = path


def _advise_to_exclude(found: Sequence[Candidate]) -> None:
    """Adds to the errors of a run how to average the others, if there are others."""
    if any(candidate.checkpoint is not None for candidate in found):
        for each in found:
            if each.error is not None and not isinstance(each.error, NoWeightsError):
                each.error.args = (f"{each.error} To average the others, add {setting('--exclude', each.path.name)}.",)


def _without_others(found: list[Candidate], skipped: list[Skipped], notes: list[str], in_full: bool) -> list[Candidate]:
    """Skips what is no checkpoint of a run: earlier averages, files without weights, copies, exports."""
    kept: list[Candidate] = []
    weightless: list[Candidate] = []
    for candidate in found:
        if candidate.checkpoint is not None and METHOD_KEY in candidate.checkpoint.spec.metadata:
            skipped.append(Skipped(candidate.path, OWN_AVERAGE))
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
        skipped.append(Skipped(copy.path, f"{COPY} {first.path.name}{sampled}"))
    return list(kept.values())


def _plainness(path: Path) -> tuple[object, ...]:
    words = stem(path.name).lower()
    is_marked = "best" in words or "last" in words
    return (is_marked, record_from_name(path.name) == Record(), path.is_symlink(), len(words), natural_key(path.name))
