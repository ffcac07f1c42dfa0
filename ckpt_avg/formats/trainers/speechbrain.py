"""SpeechBrain: CKPT+2024-05-01+10-20-30+00/, with model.ckpt and CKPT.yaml (speechbrain/utils/checkpoints.py)."""

import re

from ckpt_avg.checkpoint.training_record import Record, count, measure
from ckpt_avg.formats.trainers.trainer import Folder, Sidecar, Trainer, WeightFiles

_NUMBER = re.compile(r"([^\s:#][^:]*):\s*([-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*")


def _metadata(text: str, _name: str, _record: Record) -> Record:
    """Reads lines ``name: number``, which the recipe chose, such as WER."""
    found = {match[1]: float(match[2]) for line in text.splitlines() if (match := _NUMBER.fullmatch(line))}
    epoch = count(found.pop("epoch", None))
    metrics = {name: value for name, value in found.items() if name != "unixtime" and measure(value) is not None}
    return Record(epoch=epoch, metrics=metrics)


def _weights(folder: Folder) -> WeightFiles | None:
    """Finds the file of the object that recipes call model. Without one the folder is looked through as any other."""
    is_checkpoint = {"CKPT.yaml", "model.ckpt"} <= folder.names
    return WeightFiles(folder.path / "model.ckpt") if is_checkpoint else None


TRAINER = Trainer(
    name="SpeechBrain",
    folder_files=(r"CKPT\.yaml",),
    weights=_weights,
    sidecars=(Sidecar("CKPT.yaml", read=_metadata),),
    folder_names=(r"CKPT\+.*",),
)
