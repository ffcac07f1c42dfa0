"""torchvision's reference scripts: model_12.pth, and checkpoint.pth with the same contents as the last one."""

from ckpt_avg.formats.trainers.trainer import Layout, Trainer

TRAINER = Trainer(
    name="torchvision",
    layouts=(Layout(("model", "lr_scheduler", "args"), raw="model", ema="model_ema"),),
    epoch=("epoch",),
    optimizer=("optimizer",),
    scheduler=("lr_scheduler",),
    aliases=("checkpoint",),
)
