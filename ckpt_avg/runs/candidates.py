"""The discovered checkpoints, opened: in order of their steps, copies counted once, with what each records."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ckpt_avg.checkpoint.spec import METHOD_KEY, Checkpoint
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, NoWeightsError, UsageError
from ckpt_avg.files.input_file import MappedFile
from ckpt_avg.formats.open import open_with
from ckpt_avg.formats.state_dict import Reading
from ckpt_avg.formats.trainers.file_names import record_from_name, stem
from ckpt_avg.runs.copies import find_copies
from ckpt_avg.runs.discover import Discovery
from ckpt_avg.runs.run_folder import Skipped, in_order, natural_key
from ckpt_avg.text import escaped, listing, quote

EARLIER_AVERAGE = "an earlier average made by ckpt-avg"
Unit = Literal["step", "epoch"]
# How copies are recognised: by all bytes; by a few of each tensor; or by these only among those of one step.
Compare = Literal["all", "samples", "same step"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One checkpoint that could be averaged.

    Attributes:
        path: where it is.
        checkpoint: it, open; None where it could not be opened.
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
class Survey:
    """The candidates in order, what was left out, and what the user should know."""

    candidates: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()


def survey(
    discovery: Discovery,
    reading: Reading,
    stack: ExitStack,
    wanted: Callable[[str], bool] = lambda name: True,
    *,
    compare: Compare = "all",
) -> Survey:
    """Opens every discovered checkpoint whose name is wanted.

    Args:
        discovery: the checkpoints.
        reading: how to read them.
        stack: closes them.
        wanted: takes a file name.
        compare: how copies in a run folder are recognised.

    Raises:
        IncompatibleError: no name is wanted.
    """
    paths = discovery.paths
    if not any(wanted(path.name) for path in paths):
        raise IncompatibleError(
            f"nothing to average: --include and --exclude leave none of {len(paths):,} checkpoints "
            f"({listing(escaped(path.name) for path in paths)}). The patterns are matched with file names; change "
            "them." + _left_out_before(discovery, wanted)
        )
    candidates: list[Candidate] = []
    skipped, notes = list(discovery.skipped), list[str]()
    for group in discovery.groups:
        found = [_open(path, reading, stack, group.is_run) for path in group.paths if wanted(path.name)]
        if group.is_run:
            kept = _one_series(_in_order(_leave_out(found, skipped, compare)), skipped, notes)
            paths_kept = {candidate.path for candidate in kept}
            for candidate in found:
                if candidate.checkpoint is not None and candidate.path not in paths_kept:
                    candidate.checkpoint.close()
            found = kept
        candidates += found
    if not candidates:
        reasons = listing((f"{quote(item.path.name)}: {item.reason}" for item in skipped), separator="; ")
        raise IncompatibleError(f"nothing to average: each checkpoint is left out ({reasons}). Name others.")
    _refuse_same(candidates)
    return Survey(tuple(candidates), tuple(skipped), tuple(notes))


def _left_out_before(discovery: Discovery, wanted: Callable[[str], bool]) -> str:
    names = [quote(each.path.name) for each in discovery.skipped if wanted(each.path.name)]
    return f" Left out before, and to be named by hand: {listing(names)}." if names else ""


def unit_of(candidates: Sequence[Candidate]) -> Unit | None:
    """Returns what all checkpoints can be ordered by: steps, unless they start anew in each epoch; epochs; nothing."""
    moments = sorted((each.record.epoch or 0, each.record.step or 0) for each in candidates)
    starts_anew = any(after[1] < before[1] for before, after in itertools.pairwise(moments))
    all_steps = all(candidate.record.step is not None for candidate in candidates)
    all_epochs = all(candidate.record.epoch is not None for candidate in candidates)
    if all_steps and not (all_epochs and starts_anew):
        return "step"
    return "epoch" if all_epochs else None


def position(candidate: Candidate, unit: Unit) -> int:
    """Returns the step or epoch of a candidate that has one."""
    return (candidate.record.step if unit == "step" else candidate.record.epoch) or 0


def _refuse_same(candidates: Sequence[Candidate]) -> None:
    """Raises UsageError where two sources led to the same files: a checkpoint folder and the file in it."""
    seen: dict[frozenset[tuple[int, int]], Path] = {}
    for candidate in candidates:
        files = candidate.checkpoint.files if candidate.checkpoint else ()
        identity = frozenset(file.identity for file in files if isinstance(file, MappedFile))
        if identity in seen:
            raise UsageError(
                f"{candidate.path}: the same checkpoint is named twice (also as {seen[identity]}), so it would count "
                "double. Name it once."
            )
        if identity:
            seen[identity] = candidate.path


def _open(path: Path, reading: Reading, stack: ExitStack, is_run: bool) -> Candidate:
    try:
        checkpoint = stack.enter_context(open_with(path, reading))
    except CheckpointFormatError as error:
        if is_run and not isinstance(error, NoWeightsError):
            error.args = (f"{error} To average the others, leave it out: --exclude {quote(path.name)}.",)
        return Candidate(path, None, error, record_from_name(path.name))
    return Candidate(path, checkpoint, None, checkpoint.spec.record)


def _leave_out(found: list[Candidate], skipped: list[Skipped], compare: Compare) -> list[Candidate]:
    """Leaves out of a run what is no checkpoint of it: earlier averages, files without weights, copies."""
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
    skipped += [Skipped(each.path, f"it holds no weights: {_without_path(each)}") for each in weightless]
    # Of copies the one with the plainest name stays.
    readable = sorted(
        (candidate for candidate in kept if candidate.checkpoint is not None), key=lambda each: _plainness(each.path)
    )
    if compare == "same step":
        moments = Counter((each.record.step, each.record.epoch) for each in readable)
        readable = [each for each in readable if moments[each.record.step, each.record.epoch] > 1]
    copies = find_copies([candidate.opened() for candidate in readable], in_full=compare == "all")
    merged = {id(candidate): candidate for candidate in kept}
    for index, original in copies.items():
        copy, first = readable[index], readable[original]
        merged.pop(id(copy))
        merged[id(first)] = replace(first, record=merged[id(first)].record.or_else(copy.record))
        sampled = "" if compare == "all" else ", as far as samples show"
        skipped.append(Skipped(copy.path, f"the same weights as {first.path.name}{sampled}"))
    return _without_strays(list(merged.values()), skipped)


def _without_strays(found: list[Candidate], skipped: list[Skipped]) -> list[Candidate]:
    """Leaves out what records neither step nor epoch where most do: exports, pretrained weights."""
    strays = [each for each in found if each.checkpoint and each.record.step is None and each.record.epoch is None]
    if 2 * len(strays) >= len(found):
        return found
    skipped += [Skipped(each.path, "it records neither step nor epoch, as the others do") for each in strays]
    return [each for each in found if each not in strays]


def _without_path(candidate: Candidate) -> str:
    return str(candidate.error).removeprefix(f"{candidate.path}: ").rstrip(".")


def _one_series(found: list[Candidate], skipped: list[Skipped], notes: list[str]) -> list[Candidate]:
    """Keeps one series of checkpoints of a run that holds several: raw weights and their EMA, two networks of a GAN.

    Raises:
        IncompatibleError: several series go through the same steps, and nothing tells which is meant.
    """
    averages = [each for each in found if "ema" in re.split(r"[^a-z]+", stem(each.path.name).lower())]
    if averages and len(averages) < len(found):
        skipped += [Skipped(each.path, "EMA weights, by its name: --include takes them alone") for each in averages]
        found = [each for each in found if each not in averages]
    series: dict[tuple[int | None, int | None], list[str]] = {}
    for each in found:
        moment = (each.record.step, each.record.epoch)
        if moment != (None, None):
            series.setdefault(moment, []).append(each.path.name)
    shared = [names for names in series.values() if len(names) > 1]
    are_parts = any(re.search(r"(rank|shard|part)[-_]?\d", name) for names in shared for name in names)
    if are_parts:
        raise IncompatibleError(
            f"{found[0].path.parent}: expected whole weights, got the parts of several ranks: "
            f"{listing(map(quote, shared[0]))}. Join them with the tool of the framework that trained it, then average "
            "the results."
        )
    if len(shared) > 1:
        kinds = sorted({re.sub(r"\d+(\.\d+)?", "*", stem(name)) for names in shared for name in names})
        kinds = kinds if len(kinds) > 1 else shared[0]
        raise IncompatibleError(
            f"{found[0].path.parent}: expected one series of checkpoints, got several that go through the same steps: "
            f"{listing(map(quote, kinds))}. Choose one with --include and --exclude, for example --include "
            f"{quote(kinds[0] if kinds is shared[0] else kinds[0].rstrip('*') + '*')}."
        )
    if shared:
        notes.append(f"several checkpoints of one step are taken: {listing(map(quote, sorted(shared[0])))}")
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
