"""NeMo: archives of a configuration and weights."""

from ckpt_avg.formats.trainers.trainer import Trainer

TRAINER = Trainer(
    name="NeMo",
    skip={r".*\.nemo": "a NeMo archive (unpack it with tar xf)"},
)
