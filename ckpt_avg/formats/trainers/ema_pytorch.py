"""ema-pytorch: a state dict with online_model.*, ema_model.*, initted and step (ema_pytorch/ema_pytorch.py)."""

import re
from typing import Any

from ckpt_avg.formats.trainers.trainer import Layout, Trainer

_MODELS = re.compile(r"(\d+\.)?(online_model|ema_model)\.(.+)", re.DOTALL)  # numbered, if there are several


def separate_models(state: Any) -> None:
    """Puts the two models of the state dict of an EMA module into dicts of their own, in place."""
    if not isinstance(state, dict) or not {"initted", "0.initted"} & state.keys():
        return
    for name in [name for name in state if isinstance(name, str)]:
        if match := _MODELS.fullmatch(name):
            number, model, rest = match.groups(default="")
            state.setdefault(model, {})[number + rest] = state.pop(name)


TRAINER = Trainer(
    name="ema-pytorch",
    layouts=(
        Layout(("initted", "online_model", "ema_model"), raw="online_model", ema="ema_model"),
        Layout(("initted", "ema_model"), ema="ema_model"),
        Layout(("ema.initted", "ema.ema_model", "model"), raw="model", ema="ema.ema_model"),
        Layout(("ema.initted", "ema.ema_model", "ema.online_model"), raw="ema.online_model", ema="ema.ema_model"),
        Layout(("ema.initted", "ema.ema_model"), ema="ema.ema_model"),
    ),
    step=("step",),
)
