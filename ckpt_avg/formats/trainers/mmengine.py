"""mmengine (and mmcv): epoch_12.pth or iter_4000.pth; 20240501_101112/vis_data/scalars.json next to them."""

import json

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.formats.trainers.trainer import Contents, Layout, Sidecar, Trainer


def _scalars(text: str, name: str, record: Record) -> Record:
    """Reads JSON lines: those without an iteration are of a validation, whose step is the epoch or the iteration."""
    at = record.step if "iter_" in name else record.epoch
    metrics: dict[str, float] = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line may be incomplete
        if isinstance(row, dict) and "iter" not in row and at is not None and row.get("step") == at:
            metrics |= Contents(row).numbers(row.items())
    return Record(metrics={key: value for key, value in metrics.items() if key not in ("step", "time", "data_time")})


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
    sidecars=(Sidecar("*/vis_data/scalars.json", r"(best_.*_)?(epoch|iter)_\d+\.pth", _scalars),),
)
