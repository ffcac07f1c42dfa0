"""detectron2 (fvcore): model_0004999.pth and model_final.pth, which is the last of them once more."""

from ckpt_avg.formats.trainers.trainer import Layout, Trainer

TRAINER = Trainer(
    name="detectron2",
    layouts=(
        Layout(("model", "iteration"), raw="model", ema="ema_state"),
        Layout(("model", "__author__"), raw="model"),
    ),
    step=("iteration",),
    optimizer=("optimizer",),
    scheduler=("scheduler",),
)
