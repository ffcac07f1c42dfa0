"""Ray: checkpoint_000001/, and next to it result.json and progress.csv, a row for each result (ray/tune/logger)."""

import csv
import json
from collections.abc import Mapping

from ckpt_avg.checkpoint.training_record import Record, number_in
from ckpt_avg.formats.trainers.trainer import Contents, Sidecar, Trainer

_FOLDERS = r"checkpoint_\d+"
_NO_METRICS = {
    "training_iteration", "timestamp", "pid", "time_this_iter_s", "time_total_s", "time_since_restore", "epoch",
    "iterations_since_restore", "timesteps_total", "episodes_total", "warmup_time", "timesteps_since_restore",
}  # fmt: skip


def _results(text: str, name: str, _record: Record) -> Record:
    """Reads JSON lines."""
    found = Record()
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line may be incomplete
        found = _row(row, name, Contents(row)).or_else(found) if isinstance(row, dict) else found
    return found


def _progress(text: str, name: str, _record: Record) -> Record:
    found = Record()
    try:
        for row in csv.DictReader(text.splitlines()):
            found = _row(row, name, Contents(row, number_in)).or_else(found)
    except csv.Error:
        return Record()
    return found


def _row(row: Mapping[str, object], name: str, contents: Contents) -> Record:
    """Returns what a result says of a checkpoint: its name is in the result, or its number that of the iteration."""
    iteration = contents.count("training_iteration")
    named = row.get("checkpoint_dir_name")
    if name != named and (named is not None or iteration is None or iteration != int(name.rpartition("_")[2])):
        return Record()
    metrics = contents.numbers((key, value) for key, value in row.items() if key not in _NO_METRICS)
    return Record(iteration, contents.count("epoch"), metrics)


TRAINER = Trainer(
    name="Ray",
    sidecars=(Sidecar("result.json", _FOLDERS, _results), Sidecar("progress.csv", _FOLDERS, _progress)),
)
