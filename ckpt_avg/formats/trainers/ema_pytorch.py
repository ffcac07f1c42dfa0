"""ema-pytorch: a state dict with online_model.*, ema_model.*, initted and step (ema_pytorch/ema_pytorch.py)."""

from typing import Any

from ckpt_avg.formats.trainers.trainer import Layout, Trainer

_MODELS = ("online_model", "ema_model")


def separate_models(state: Any) -> None:
    """Puts the two models of the state dict of an EMA module into dicts of their own, in place."""
    if not isinstance(state, dict) or "initted" not in state:
        return
    models: dict[str, dict[str, object]] = {model: {} for model in _MODELS}
    for name in [name for name in state if isinstance(name, str)]:
        model, _, rest = name.partition(".")
        if model in models and rest:
            models[model][rest] = state.pop(name)
    state.update({model: weights for model, weights in models.items() if weights})


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
