"""Where the trainers keep weights in a checkpoint: one table, read from the top.

Keys are those that each project's own code writes. ``raw`` are the weights that the optimizer updates and ``ema`` their
running average, wherever the trainer puts them: two of them swap the places when they save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Layout:
    """What one trainer writes.

    Attributes:
        kind: its name.
        marks: dotted keys that must all be there.
        raw: the dotted key of the weights.
        ema: the dotted key of their running average; empty if the trainer keeps none.
        beside: further state dicts that belong to the same model: key → what goes in front of their names.
        note: what the user should know of such weights.
    """

    kind: str
    marks: tuple[str, ...]
    raw: str
    ema: str = ""
    beside: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


LAYOUTS = (
    # The callback WeightAveraging puts the average where Lightning looks for the model.
    Layout("Lightning", ("pytorch-lightning_version", "current_model_state"), "current_model_state", "state_dict"),
    Layout("Lightning", ("pytorch-lightning_version", "state_dict"), "state_dict"),
    # So does mmengine's EMAHook: what it saves as ema_state_dict is the model that was trained.
    Layout("mmengine", ("meta", "state_dict", "ema_state_dict"), "ema_state_dict", "state_dict"),
    Layout("mmengine", ("meta", "state_dict", "message_hub"), "state_dict"),
    Layout("timm", ("arch", "state_dict", "version"), "state_dict", "state_dict_ema"),
    Layout("OpenNMT-py", ("model", "generator", "opt"), "model", beside={"generator": "generator."}),
    Layout("fairseq", ("model", "extra_state"), "model", "extra_state.ema"),
    Layout("icefall", ("model", "batch_idx_train"), "model", "model_avg"),
    Layout("Ultralytics", ("model", "train_args", "train_metrics"), "model", "ema"),
    Layout("Ultralytics", ("ema", "train_args"), "model", "ema"),
    Layout("torchvision", ("model", "lr_scheduler", "args"), "model", "model_ema"),
    Layout("Megatron-LM", ("model", "iteration", "checkpoint_version"), "model"),
    Layout("detectron2", ("model", "iteration"), "model", "ema_state"),
    Layout("detectron2", ("model", "__author__"), "model"),
    Layout("Composer", ("state.model", "state.timestamp"), "state.model"),
    Layout(
        "DeepSpeed",
        ("module", "ds_version"),
        "module",
        note="these are the weights in the dtype of training; the float32 masters are in the optimizer's shards "
        "(zero_to_fp32.py in the run's folder rebuilds them)",
    ),
)

RAW_KEYS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "module",
    "net",
    "network",
    "params",
    "weights",
    "state.model",
)
EMA_KEYS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "ema_state_dict",
    "ema_model",
    "model_ema_state_dict",
    "ema_model_state_dict",
    "params_ema",
    "model_avg",
    "averaged_model",
    "extra_state.ema",
)
# What lies under a key that holds one of these words is no model: moments of the optimizer, generators, counters.
TRAINING_STATE = ("optim", "sched", "scaler", "rng", "random", "sampler", "callback", "loops", "averaging_state")
