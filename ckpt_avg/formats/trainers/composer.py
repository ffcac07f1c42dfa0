"""Composer: ep1-ba100-rank0.pt, and the link latest-rank0.pt (composer/core/state.py)."""

from ckpt_avg.formats.trainers.trainer import Contents, Layout, Trainer

_KEYS = ("state.model", "state.timestamp")


def _has_ema(contents: Contents) -> bool:
    """Whether the EMA algorithm had put the average in the model's place when it was saved."""
    algorithms = contents.get("state.algorithms")
    pairs = algorithms if isinstance(algorithms, list) else []
    states = [pair[-1] for pair in pairs if isinstance(pair, tuple) and pair]
    return any(isinstance(state, dict) and state.get("ema_weights_active") is True for state in states)


TRAINER = Trainer(
    name="Composer",
    layouts=(Layout(_KEYS, ema="state.model", only_if=_has_ema), Layout(_KEYS, raw="state.model")),
    step=("state.timestamp.Timestamp.batch", "state.timestamp.batch"),
    epoch=("state.timestamp.Timestamp.epoch", "state.timestamp.epoch"),
    optimizer=("state.optimizers",),
    file_names=(r"(|.*?[^A-Za-z0-9])(ep(?P<epoch>\d+)-)?ba(?P<step>\d+)(-rank\d+)?\.pt",),
)
