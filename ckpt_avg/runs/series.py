"""Several series of checkpoints in one run folder: of several trainings, or of several networks at the same steps."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ckpt_avg.errors import IncompatibleError
from ckpt_avg.formats.trainers.file_names import is_ema, record_from_name, series_numbers, series_of, stem
from ckpt_avg.runs.candidate import Candidate
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.text import distinct_names, listing, quote
from ckpt_avg.wording import setting, worded

_SAVED_EVERY = 10  # Trainings are counted one by one, steps are not: agent_1000, agent_2000


def one_series(found: list[Candidate], skipped: list[Skipped], notes: list[str], *, is_chosen: bool) -> list[Candidate]:
    """Keeps one series of checkpoints of a run that has several, such as raw weights and their EMA.

    Raises:
        IncompatibleError: several series have the same steps, such as the two networks of a GAN, or are of different
            trainings by their names; unless the user has chosen names.
    """
    averages = [each for each in found if is_ema(each.path.name)]
    if averages and len(averages) < len(found):
        skipped += [Skipped(each.path, worded("EMA weights, by its name; --include selects them")) for each in averages]
        found = [each for each in found if each not in averages]
    trainings = notes_on_series(found)
    shared = _with_one_moment(found)
    if trainings or len(shared) > 1:
        names = [each.path.name for each in found] if trainings else [name for names in shared for name in names]
        kinds = _patterns(names, shared)
        if not is_chosen:
            every = f" With {setting('--include', '*')} all are averaged." if trainings else ""
            several = "several" if trainings else "several with the same steps"
            raise IncompatibleError(
                f"{found[0].path.parent}: expected one series of checkpoints, got {several}: "
                f"{listing(map(quote, kinds))}. Select one with --include or --exclude, for example "
                f"{setting('--include', kinds[0])}.{every}"
            )
        notes += trainings or [f"several series have the same steps, and all are used: {listing(map(quote, kinds))}"]
    else:
        notes += notes_on_moments(found)
    return found


def notes_on_series(found: Iterable[Candidate]) -> list[str]:
    """Says of which trainings checkpoints are by their names or folders, if of several; a number may be the step."""
    found = list(found)
    series, perhaps_steps = set(), dict[str, int]()
    for each, distinct in zip(found, distinct_names([each.path for each in found]), strict=True):
        for part in Path(distinct).parts:
            name, by_name = series_of(part), record_from_name(part)
            number = name.partition("_")[2]
            if number in (str(each.record.step), str(each.record.epoch)) and not each.record.is_lone_number:
                continue
            if by_name.is_lone_number and number == str(by_name.step):
                perhaps_steps[name] = int(number)
            elif name:
                series.add(name)
    if series or math.gcd(*perhaps_steps.values()) < _SAVED_EVERY:
        series.update(perhaps_steps)
    return [f"by their names these are of different trainings: {listing(sorted(series))}"] if len(series) > 1 else []


def notes_on_moments(found: Sequence[Candidate]) -> list[str]:
    """Says which checkpoints have the same step."""
    groups = [listing(map(quote, names)) for names in _with_one_moment(found)]
    return [f"several checkpoints have the same step, and all are used: {listing(groups, separator='; ')}"][
        : len(groups)
    ]


def _with_one_moment(found: Sequence[Candidate]) -> list[list[str]]:
    """Returns the names of checkpoints that record the same step and epoch, for each of these."""
    moments: dict[tuple[int | None, int | None], list[str]] = {}
    for each, name in zip(found, distinct_names([each.path for each in found]), strict=True):
        if each.record.step is not None or each.record.epoch is not None:
            moments.setdefault((each.record.step, each.record.epoch), []).append(name)
    return [sorted(names) for names in moments.values() if len(names) > 1]


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
