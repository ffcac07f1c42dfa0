"""The order of checkpoints: by what all of them record. docs/which-files.md has the rule."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.formats.folder import revisions_of
from ckpt_avg.formats.trainers.file_names import names_a_moment, record_from_name
from ckpt_avg.runs.candidate import Candidate
from ckpt_avg.text import ends, escaped

Unit = Literal["step", "epoch"]


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


def put_in_order(given: list[Candidate], notes: list[str]) -> list[Candidate]:
    """Orders checkpoints by what all of them record, else by the numbers in all names, else as they are given."""
    records = [each.record for each in given]
    by_name = [record_from_name(each.path.name) for each in given]
    if unit := unit_of(records):
        ordered = _sorted(given, records, unit)
        unrecorded = [each for each, name in zip(given, by_name, strict=True) if _is_from_name(each.record, name)]
        if 0 < len(unrecorded) < len(given) and unit_of(by_name) == unit and ordered != _sorted(given, by_name, unit):
            only = ends([escaped(each.path.name) for each in unrecorded])
            notes.append(
                f"the {unit}s of {only} are known from the names alone, and the others record other numbers than their "
                "names, so the checkpoints are ordered by the numbers in their names"
            )
            return _sorted(given, by_name, unit)
        return ordered
    unit = unit_of(by_name)
    lacking = [each for each in given if each.record.is_lone_number or each.record.step is each.record.epoch is None]
    if 0 < len(lacking) < len(given) and not any(each.error for each in lacking):
        names = ends([escaped(each.path.name) for each in lacking])
        order = "ordered by the numbers in their names" if unit else "not ordered by steps"
        notes.append(f"no step or epoch is recorded in {names}, unlike the others, so the checkpoints are {order}")
    return _sorted(given, by_name, unit) if unit else given


def with_records_of_folders(given: list[Candidate]) -> list[Candidate]:
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


def _is_from_name(record: Record, name: Record) -> bool:
    return (record.step, record.epoch) == (name.step, name.epoch)


def _sorted(found: Sequence[Candidate], records: Sequence[Record], unit: Unit) -> list[Candidate]:
    keys = [(position(each, unit), each.step or 0) for each in records]
    return [found[index] for index in sorted(range(len(found)), key=keys.__getitem__)]
