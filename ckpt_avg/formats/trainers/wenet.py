"""WeNet: 12.pt, a bare state dict, and 12.yaml, which records step, epoch and losses (wenet/utils/checkpoint.py)."""

import re

from ckpt_avg.checkpoint.training_record import Record, count, measure
from ckpt_avg.formats.trainers.trainer import Sidecar, Trainer

_NUMBER = re.compile(r"\s*([\w./-]+):\s*(-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*")


def _yaml(text: str, _name: str, _record: Record) -> Record:
    """Reads lines ``name: number``: those at the top, and those in ``loss_dict``. The rest is the configuration."""
    top: dict[str, float] = {}
    losses: dict[str, float] = {}
    section = ""
    for line in text.splitlines():
        is_inside = line.startswith(" ")
        section = section if is_inside else line.partition(":")[0]
        if (match := _NUMBER.fullmatch(line)) and (not is_inside or section == "loss_dict"):
            (losses if is_inside else top)[match[1]] = float(match[2])
    losses |= {name: value for name, value in top.items() if name == "cv_loss"}
    metrics = {name: value for name, value in losses.items() if measure(value) is not None}
    return Record(count(top.get("step")), count(top.get("epoch")), metrics, measure(top.get("lr")))


TRAINER = Trainer(
    name="WeNet",
    sidecars=(Sidecar("{stem}.yaml", r".*\.pt", _yaml, identifies=True),),
    file_names=(r"(epoch_|step_)?\d+\.pt",),
)
