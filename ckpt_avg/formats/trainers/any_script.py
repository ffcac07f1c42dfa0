"""What any script may write: keys and names that belong to no trainer, such as those of PyTorch's tutorials."""

from __future__ import annotations

import re

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.formats.trainers.trainer import Contents, Trainer

RAW_KEYS = (
    "state_dict", "model", "model_state_dict", "model_state", "module", "net", "network", "params", "weights",
    "state.model",
)  # fmt: skip
EMA_KEYS = (
    "state_dict_ema", "model_ema", "ema", "ema_state_dict", "ema_model", "model_ema_state_dict",
    "ema_model_state_dict", "params_ema", "averaged_model", "swa_model", "swa_state_dict",
)  # fmt: skip
# Under keys with these words are no weights but moments of optimizers, states of generators, counters.
_TRAINING_STATE = re.compile(
    r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))"  # whole words: not upsampler, optimus
    r"(?i:optim(?:s|i[sz]ers?)?|(?:opt|adamw?|sgd|muon|lion)_?states?|(?:lr|loss|grad)?(?:sched(?:s|ulers?)?|scalers?)|rngs?|random|samplers?|callbacks?|loops"
    r"|averaging_state|train(?:er|ing)?_state|loss(?:es)?|criteri(?:on|a))(?![a-z])|_extra_state$"
)
# Names of its tensors in a flat dict.
OPTIMIZER_TENSOR = re.compile(r"(?:chained_\d+\.)?optim(?:izers?)?[\d_]*\.(?:state|param_groups)\..+", re.DOTALL)
_MOMENTS = {"exp_avg", "exp_avg_sq", "momentum_buffer"}
RNG_STATE = re.compile(r"(?:[a-z]+_)?(?:rng|(?:rng|random)_states?)(?:_[a-z0-9]+)*", re.IGNORECASE)
# Words in names of settings and counts, or of the best value so far, which another checkpoint may have.
_NO_METRIC = {"epoch", "step", "iter", "version", "time", "seed", "lr", "rate", "size", "num", "n", "best", "decay"}


def is_training_state(key: str, value: object) -> bool:
    """Whether an entry of a torch file belongs to the training and not to the model, by its key or its own keys."""
    return bool(_TRAINING_STATE.search(key)) or describe_training_state(value) != ""


def describe_training_state(value: object) -> str:
    """Returns what a dict is by its keys: the state of an optimizer or of random generators; empty for others."""
    if not isinstance(value, dict):
        return ""
    number, inner = next(iter(value.items()), (None, None))  # of the first parameter, if they are numbered
    keys = value.keys() | (inner.keys() if isinstance(inner, dict) and isinstance(number, int) else set())
    if {"state", "param_groups"} <= value.keys() or _MOMENTS & keys:
        return "the state of an optimizer"
    return "the states of random generators" if {"python", "numpy"} <= value.keys() else ""


def is_ema_key(key: str) -> bool:
    """Whether a key has the word EMA."""
    return "ema" in re.split(r"[-_.]", re.sub("(?<=[a-z])(?=[A-Z])", "_", key).lower())


def _numbers_at_the_top(contents: Contents) -> Record:
    """Returns the numbers next to the weights, such as `loss`. Integers are counts."""
    items = contents.root.items() if isinstance(contents.root, dict) else ()
    return Record(
        metrics=contents.numbers(
            (name, value)
            for name, value in items
            if isinstance(name, str)
            and not isinstance(value, int)
            and not _NO_METRIC & set(re.split(r"[^a-z]+", name.lower()))
        )
    )


_WRONG = "saved because something went wrong, by its name"
ANY_SCRIPT = Trainer(
    name="",
    step=("global_step", "step", "steps", "iteration", "iter", "num_updates"),
    epoch=("epoch",),
    metrics=("metrics", "train_metrics", "val_metrics", "eval_metrics"),
    optimizer=("optimizer", "optimizer_state_dict", "optimizer_state", "optim"),
    scheduler=("lr_scheduler", "scheduler", "scheduler_state_dict", "lr_scheduler_state_dict"),
    record=_numbers_at_the_top,
    training_state=(
        "optim(izer)?s?(_states?)?",
        "(lr_)?scheduler",
        "(grad_)?scaler",
        "rng(_states?)?",
        "train(er|ing)?_state",
        "queue",
        "memory_bank",
    ),
    skip={
        r"init(ial)?\.\w+(\.tar)?": "initial weights, by its name",
        r".*(\.(bak|backup|old|orig|prev|save)\d*|~)": "a backup, by its name",
        r"(bad|nan|crash(ed)?|broken|diverged|exception|emergency)([-_].*)?\.\w+": _WRONG,
        r"(\w+_)?batch[-_]([0-9a-f]{8}-[0-9a-f-]{27}|(?<=last_batch_)\d+)\.\w+": "a batch of data, by its name",
    },
)
