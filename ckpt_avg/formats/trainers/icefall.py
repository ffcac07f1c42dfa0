"""icefall: epoch-12.pt and checkpoint-4000.pt, with all parameters of the run at the top (icefall/checkpoint.py)."""

from ckpt_avg.formats.trainers.trainer import Layout, Trainer

TRAINER = Trainer(
    name="icefall",
    layouts=(Layout(("model", "batch_idx_train"), raw="model", ema="model_avg"),),
    step=("batch_idx_train",),
    epoch=("cur_epoch",),
    optimizer=("optimizer",),
    scheduler=("scheduler",),
)
