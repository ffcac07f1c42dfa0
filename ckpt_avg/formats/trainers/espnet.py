"""ESPnet2: 12epoch.pth, a bare state dict, and links such as latest.pth (espnet2/train/trainer.py)."""

from ckpt_avg.formats.trainers.trainer import Trainer

TRAINER = Trainer(
    name="ESPnet2",
    file_names=(r"(?P<epoch>\d+)epoch\.pth",),
    aliases=("checkpoint",),  # what the training resumes from
)
