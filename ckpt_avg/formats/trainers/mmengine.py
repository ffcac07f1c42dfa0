"""mmengine (and mmcv): epoch_12.pth or iter_4000.pth."""

from ckpt_avg.formats.trainers.trainer import Layout, Trainer

TRAINER = Trainer(
    name="mmengine",
    layouts=(
        # EMAHook swaps them: the model that was trained is saved as ema_state_dict.
        Layout(("meta", "state_dict", "ema_state_dict"), raw="ema_state_dict", ema="state_dict"),
        Layout(("meta", "state_dict", "message_hub"), raw="state_dict"),
    ),
    step=("meta.iter",),
    epoch=("meta.epoch",),
    optimizer=("optimizer",),
    counter="steps",
)
