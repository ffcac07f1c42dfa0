"""Step, epoch, metrics and learning rate in a torch file, by the keys of `TRAINERS` and of `any_script`."""

from __future__ import annotations

import itertools
from dataclasses import replace

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.formats.trainers.any_script import ANY_SCRIPT
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.schedulers import rate_of_last_step
from ckpt_avg.formats.trainers.trainer import Contents, Layout, Trainer


def recognise(contents: Contents) -> tuple[Trainer, Layout] | None:
    """Returns the trainer of a torch file and its layout; None if no layout fits."""
    for trainer in TRAINERS:
        for layout in trainer.layouts:
            if all(contents.get(key) is not None for key in layout.keys) and layout.only_if(contents):
                return trainer, layout
    return None


def record_of(contents: Contents, trainer: Trainer | None = None) -> Record:
    """Returns what a torch file records: by the keys of its trainer, then of any script, then of other trainers."""
    if not isinstance(contents.root, dict):
        return Record()
    trainers = (*([trainer] if trainer else ()), ANY_SCRIPT, *TRAINERS)
    record = Record()
    for each in trainers:
        record = record.or_else(_by_keys(contents, each)).or_else(each.record(contents))
    states = (contents.get(key) for each in trainers for key in each.scheduler)
    firsts = (state[0] if isinstance(state, list) and state else state for state in states)
    state = next((state for state in firsts if isinstance(state, dict)), None)
    rate = rate_of_last_step(state, record.step, record.epoch)
    return record if rate is None else replace(record, learning_rate=rate)


def _by_keys(contents: Contents, trainer: Trainer) -> Record:
    def first(keys: tuple[str, ...]) -> int | None:
        return next((number for key in keys if (number := contents.count(key)) is not None), None)

    metrics: dict[str, float] = {}
    for key in trainer.metrics:
        value = contents.get(key)
        metrics |= contents.numbers(value.items() if isinstance(value, dict) else [(key.rpartition(".")[2], value)])
    rates = (_learning_rate(contents, key) for key in trainer.optimizer)
    rate = next((rate for rate in rates if rate is not None), None)
    return Record(first(trainer.step), first(trainer.epoch), metrics, rate)


def _learning_rate(contents: Contents, key: str) -> float | None:
    """Returns the rate of the first parameter group of an optimizer, or of the first of several by name."""
    state = contents.get(key)
    optimizers = itertools.chain([state], state.values() if isinstance(state, dict) else ())
    rates = (Contents(each, contents.scalar).number("param_groups.lr") for each in optimizers)
    return next((rate for rate in rates if rate is not None), None)
