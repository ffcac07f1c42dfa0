"""timm: checkpoint-12.pth.tar, with hard links to it (last, model_best), and summary.csv, a row for each epoch."""

import csv
import functools

from ckpt_avg.checkpoint.training_record import Record, number_in
from ckpt_avg.formats.trainers.trainer import Contents, Layout, Sidecar, Trainer


def _summary(text: str, _name: str, record: Record) -> Record:
    row = _rows(text).get(str(record.epoch), {})
    return Record(metrics={name: value for name, value in row.items() if name not in ("epoch", "lr")})


@functools.lru_cache(maxsize=1)
def _rows(text: str) -> dict[str, dict[str, float]]:
    """Reads the table, once for all checkpoints next to it: epoch → name → number."""
    found: dict[str, dict[str, float]] = {}
    try:
        for row in csv.DictReader(text.splitlines()):
            found.setdefault(row.get("epoch") or "", Contents(row, number_in).numbers(row.items()))
    except csv.Error:
        return {}
    return found


TRAINER = Trainer(
    name="timm",
    layouts=(Layout(("arch", "state_dict", "version"), raw="state_dict", ema="state_dict_ema"),),
    epoch=("epoch",),
    metrics=("metric",),
    optimizer=("optimizer",),
    sidecars=(Sidecar("summary.csv", ".*", _summary),),
    skip={r"recovery-\d+-\d+\.pth\.tar": "a recovery file from the middle of an epoch, by its name"},
)
