"""NeMo: archives of a configuration and weights."""

from __future__ import annotations

from ckpt_avg.formats.trainers.trainer import Trainer

TRAINER = Trainer(
    name="NeMo",
    skip={r".*\.nemo": "a NeMo archive, packed from a checkpoint (tar xf unpacks it)"},
)
