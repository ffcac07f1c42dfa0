"""Ultralytics YOLO: epoch3.pt, last.pt and best.pt, with a whole pickled model (ultralytics/engine/trainer.py)."""

from ckpt_avg.formats.trainers.trainer import Layout, Trainer

TRAINER = Trainer(
    name="Ultralytics",
    layouts=(
        Layout(("model", "train_args", "train_metrics"), raw="model", ema="ema"),
        Layout(("ema", "train_args"), raw="model", ema="ema"),  # model is None until the training ends
    ),
    epoch=("epoch",),
    metrics=("train_metrics",),
    optimizer=("optimizer",),
)
