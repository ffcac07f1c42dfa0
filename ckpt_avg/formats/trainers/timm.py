"""timm: checkpoint-12.pth.tar, with hard links to it (last, model_best), and summary.csv, a row for each epoch."""

import csv
import functools

from ckpt_avg.checkpoint.training_record import Record, measure
from ckpt_avg.formats.trainers.trainer import Contents, Layout, Sidecar, Trainer


def _summary(text: str, epoch: int | None) -> Record:
    row = _rows(text).get(str(epoch), {})
    return Record(metrics={name: value for name, value in row.items() if name not in ("epoch", "lr")})


@functools.lru_cache(maxsize=1)
def _rows(text: str) -> dict[str, dict[str, float]]:
    """Reads the table, once for all checkpoints next to it: epoch → name → number."""
    found: dict[str, dict[str, float]] = {}
    try:
        for row in csv.DictReader(text.splitlines()):
            found.setdefault(row.get("epoch") or "", Contents(row, _number).numbers(row.items()))
    except csv.Error:
        return {}
    return found


def _number(text: object) -> float | None:
    try:
        return measure(float(text)) if isinstance(text, str) else None
    except ValueError:
        return None


TRAINER = Trainer(
    name="timm",
    layouts=(Layout(("arch", "state_dict", "version"), raw="state_dict", ema="state_dict_ema"),),
    epoch=("epoch",),
    metrics=("metric",),
    optimizer=("optimizer",),
    sidecar=Sidecar("summary.csv", _summary, files=".*"),
    skip={r"recovery-\d+-\d+\.pth\.tar": "a recovery file from the middle of an epoch, by its name"},
)
