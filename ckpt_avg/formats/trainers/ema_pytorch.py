"""ema-pytorch: a state dict with online_model.*, ema_model.*, initted and step (ema_pytorch/ema_pytorch.py)."""

import re
from typing import Any

from ckpt_avg.formats.trainers.trainer import Layout, Trainer

# Names are numbered if there are several such modules.
_MODELS = re.compile(r"(\d+\.)?(online_model|ema_model)\.(.+)", re.DOTALL)
_COUNTERS = re.compile(r"(\d+\.)?(initted|step)")


def separate_models(state: Any) -> None:
    """Puts the two models of the state dict of an EMA module into dicts of their own, in place."""
    names = [name for name in state if isinstance(name, str)] if isinstance(state, dict) else []
    models = {name: match.groups(default="") for name in names if (match := _MODELS.fullmatch(name))}
    if models and all(name in models or _COUNTERS.fullmatch(name) for name in names):
        for name, (number, model, rest) in models.items():
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
