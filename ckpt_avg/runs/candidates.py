"""The discovered checkpoints, opened: in the order of their steps, copies counted once, with what each records."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ckpt_avg.checkpoint.spec import METHOD_KEY, Checkpoint
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, NoWeightsError, TooManyFilesError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.formats.open import open_with
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.trainers.file_names import record_from_name, stem
from ckpt_avg.runs.copies import find_copies
from ckpt_avg.runs.discover import Discovery, refuse_repeated
from ckpt_avg.runs.run_folder import Skipped, in_order, natural_key
from ckpt_avg.text import ends, escaped, listing, plural, quote

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
    """All checkpoints that could be averaged, each once and in order; what is skipped; what the user should know."""

    ordered: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()


def open_candidates(
    discovery: Discovery,
    reading: Reading,
    stack: ExitStack,
    wanted: Callable[[str], bool] = lambda name: True,
    *,
    compare_in_full: bool = True,
) -> Candidates:
    """Opens every discovered checkpoint whose file name is wanted; ``stack`` closes them.

    Copies are found by a few bytes of each tensor, and compared in full unless that is not wanted.

    Raises:
        IncompatibleError: nothing is wanted, or a run folder contains several series of checkpoints.
        UsageError: a checkpoint is listed twice.
    """
    paths = discovery.paths
    if not any(wanted(path.name) for path in paths):
        message = (
            f"nothing to average: --include and --exclude skip all {len(paths):,} checkpoints "
            f"({ends([escaped(path.name) for path in paths])}). Change the patterns, which match file "
            "names."
        )
        others = [quote(each.path.name) for each in discovery.skipped if wanted(each.path.name)]
        if others:
            message += f" These match, but run folders skip them: {listing(others)}. Name their paths to use them."
        raise IncompatibleError(message)
    candidates: list[Candidate] = []
    skipped = list(discovery.skipped)
    notes = [note for source in discovery.sources for note in source.notes]
    for source in discovery.sources:
        found: list[Candidate] = []
        try:
            found += (_open(path, reading, stack) for path in source.paths if wanted(path.name))
        except TooManyFilesError as error:
            raise _too_many_files(error, [*candidates, *found], sum(wanted(path.name) for path in paths)) from error
        if source.is_run:
            _advise_to_exclude(found)
            kept = _one_series(_in_order(_without_others(found, skipped, compare_in_full)), skipped, notes)
            paths_kept = {candidate.path for candidate in kept}
            for candidate in found:
                if candidate.checkpoint is not None and candidate.path not in paths_kept:
                    candidate.checkpoint.close()
            found = kept
        candidates += found
    if not candidates:
        reasons = listing((f"{quote(item.path.name)}: {item.reason}" for item in skipped), separator="; ")
        raise IncompatibleError(f"nothing to average: all checkpoints are skipped ({reasons}). Name others.")
    refuse_repeated((each.path, _identity(each)) for each in candidates)  # a folder, and the file in it
    return Candidates(tuple(candidates), tuple(skipped), tuple(notes))


def _too_many_files(error: TooManyFilesError, opened: Sequence[Candidate], count: int) -> TooManyFilesError:
    """Returns the error for all ``count`` checkpoints, which have as many files each as those that are open."""
    files = sum(len(each.checkpoint.files) for each in opened if each.checkpoint is not None)
    needed = files * count // max(len(opened), 1)
    return TooManyFilesError(plural(count, "checkpoint"), max(needed, error.limit + 1), error.limit)


def unit_of(candidates: Sequence[Candidate]) -> Unit | None:
    """Returns what orders all candidates: steps, unless they start again in each epoch; epochs; or nothing."""
    moments = sorted((each.record.epoch or 0, each.record.step or 0) for each in candidates)
    starts_again = any(after[1] < before[1] for before, after in itertools.pairwise(moments))
    all_steps = all(candidate.record.step is not None for candidate in candidates)
    all_epochs = all(candidate.record.epoch is not None for candidate in candidates)
    if all_steps and not (all_epochs and starts_again):
        return "step"
    return "epoch" if all_epochs else None


def position(candidate: Candidate, unit: Unit) -> int:
    """Returns the step or epoch of a candidate that has one."""
    return (candidate.record.step if unit == "step" else candidate.record.epoch) or 0


def _identity(candidate: Candidate) -> frozenset[tuple[int, int]]:
    files = candidate.checkpoint.files if candidate.checkpoint else ()
    return frozenset(file.identity for file in files if isinstance(file, InputFile))


def _open(path: Path, reading: Reading, stack: ExitStack) -> Candidate:
    try:
        checkpoint = stack.enter_context(open_with(path, reading))
    except CheckpointFormatError as error:
        return Candidate(path, None, error, record_from_name(path.name))
    return Candidate(path, checkpoint, None, checkpoint.spec.record)


def _advise_to_exclude(found: Sequence[Candidate]) -> None:
    """Adds to the errors of a run how to average the others, if there are others."""
    if any(candidate.checkpoint is not None for candidate in found):
        for each in found:
            if each.error is not None and not isinstance(each.error, NoWeightsError):
                each.error.args = (f"{each.error} To average the others, add --exclude {quote(each.path.name)}.",)


def _without_others(found: list[Candidate], skipped: list[Skipped], in_full: bool) -> list[Candidate]:
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
        return kept
    skipped += [Skipped(each.path, "it records no step or epoch, unlike the others") for each in strays]
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


def _one_series(found: list[Candidate], skipped: list[Skipped], notes: list[str]) -> list[Candidate]:
    """Keeps one series of checkpoints of a run that has several, such as raw weights and their EMA.

    Raises:
        IncompatibleError: several series have the same steps, such as the two networks of a GAN.
    """
    averages = [each for each in found if "ema" in re.split(r"[^a-z]+", stem(each.path.name).lower())]
    if averages and len(averages) < len(found):
        skipped += [Skipped(each.path, "EMA weights, by its name; --include selects them") for each in averages]
        found = [each for each in found if each not in averages]
    series: dict[tuple[int | None, int | None], list[str]] = {}
    for each in found:
        moment = (each.record.step, each.record.epoch)
        if moment != (None, None):
            series.setdefault(moment, []).append(each.path.name)
    shared = [names for names in series.values() if len(names) > 1]
    if any(re.search(r"(rank|shard|part)[-_]?\d", name) for names in shared for name in names):
        raise IncompatibleError(
            f"{found[0].path.parent}: expected complete checkpoints, got the parts of several ranks: "
            f"{listing(map(quote, shared[0]))}. Join them with the tool of the framework that trained it, then average "
            "the results."
        )
    if len(shared) > 1:
        kinds = sorted({re.sub(r"\d+(\.\d+)?", "*", stem(name)) for names in shared for name in names})
        pattern = kinds[0].rstrip("*") + "*" if len(kinds) > 1 else shared[0][0]
        raise IncompatibleError(
            f"{found[0].path.parent}: expected one series of checkpoints, got several with the same steps: "
            f"{listing(map(quote, kinds if len(kinds) > 1 else shared[0]))}. Select one with --include or --exclude, "
            f"for example --include {quote(pattern)}."
        )
    if shared:
        notes.append(
            f"several checkpoints have the same step, and all are used: {listing(map(quote, sorted(shared[0])))}"
        )
    return found


def _plainness(path: Path) -> tuple[object, ...]:
    words = stem(path.name).lower()
    is_marked = "best" in words or "last" in words
    return (is_marked, record_from_name(path.name) == Record(), path.is_symlink(), len(words), natural_key(path.name))


def _in_order(found: list[Candidate]) -> list[Candidate]:
    unit = unit_of(found)
    if unit is None:
        return sorted(found, key=lambda candidate: in_order(candidate.path))
    return sorted(found, key=lambda each: (position(each, unit), each.record.step or 0, in_order(each.path)))
