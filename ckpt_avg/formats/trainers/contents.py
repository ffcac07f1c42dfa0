"""Step, epoch, metrics and learning rate out of what a torch file holds beside the weights.

Each trainer has its own place for them. What is not there is left open: `Record` says so by None.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping

from ckpt_avg.checkpoint.spec import DType
from ckpt_avg.checkpoint.training_record import Record, count, measure
from ckpt_avg.formats.pickles.leaves import Leaf
from ckpt_avg.formats.pickles.stand_ins import Foreign

# Reads a stored tensor of one element; None for any other.
Scalar = Callable[[Leaf], float | None]

_STEPS = (
    "global_step",
    "global_steps",
    "step",
    "steps",
    "iteration",
    "iter",
    "num_updates",
    "batch_idx_train",
    "meta.iter",
    "state.timestamp.Timestamp.batch",
    "state.timestamp.batch",
)
_EPOCHS = ("epoch", "cur_epoch", "meta.epoch", "state.timestamp.Timestamp.epoch", "state.timestamp.epoch")
_METRICS = ("metrics", "train_metrics", "val_metrics", "eval_metrics")
_OPTIMIZERS = (
    "optimizer",
    "optimizer_states",
    "optimizer_state_dict",
    "optimizer_state",
    "optim",
    "optim.optimizer",
    "last_optimizer_state",
    "state.optimizers",
)
_SCHEDULERS = ("lr_schedulers", "lr_scheduler", "scheduler", "scheduler_state_dict", "lr_scheduler_state_dict")
# Words of names that tell of settings and counts, or of other checkpoints than this one.
_NO_METRICS = {"epoch", "step", "iter", "version", "time", "seed", "lr", "rate", "size", "num", "n", "best", "decay"}


def record_of(contents: object, scalar: Scalar) -> Record:
    """Returns what a torch file records beside the weights.

    Args:
        contents: what the file holds.
        scalar: reads a stored tensor of one element.
    """
    if not isinstance(contents, dict):
        return Record()

    def number(value: object) -> float | None:
        return scalar(value) if isinstance(value, Leaf) else measure(value)

    def first(paths: tuple[str, ...]) -> int | None:
        values = (count(number(follow(contents, path))) for path in paths)
        return next((value for value in values if value is not None), None)

    step, epoch = first(_STEPS), first(_EPOCHS)
    history = follow(contents, "optimizer_history")
    if step is None and isinstance(history, list) and history:  # fairseq
        step = count(follow(history[-1], "num_updates"))
    if step is None and (following := first(("optim.training_step",))):  # OpenNMT-py counts the step that comes next
        step = following - 1
    if epoch is None and (epoch := first(("extra_state.train_iterator.epoch",))):
        # At the end of an epoch fairseq's iterator stands at the start of the next.
        epoch -= follow(contents, "extra_state.train_iterator.iterations_in_epoch") == 0
    rate = _rate_of_last_step(contents, step, epoch)
    return Record(
        step, epoch, _metrics(contents, number), rate if rate is not None else _learning_rate(contents, number)
    )


def plain_values(root: object) -> dict[str, str | int | float | bool | None]:
    """Returns the plain values at the top of a torch file: epoch, step, metric, version and the like."""
    if not isinstance(root, dict):
        return {}
    return {
        key: value
        for key, value in root.items()
        if isinstance(key, str)
        # What JSON cannot hold tells nothing: NaN, Inf, integers of thousands of digits.
        and (isinstance(value, (str, bool, type(None))) or (isinstance(value, (int, float)) and abs(value) < 2.0**1000))
    }


def follow(value: object, path: str) -> object:
    """Returns what a dotted path leads to through dicts and the first elements of lists; None if nothing."""
    for key in path.split("."):
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        value = value.get(key) if isinstance(value, dict) else None
    return value


def element(dtype: DType, contents: bytes) -> float | None:
    """Returns the value of one stored element of a float or integer dtype."""
    if dtype.name == "BF16":
        contents, letter = b"\0\0" + contents, "f"
    else:
        letter = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}.get(
            dtype.name, ""
        )
    if not letter or struct.calcsize(letter) != len(contents):
        return None
    value = float(struct.unpack(f"<{letter}", contents)[0])
    return value if math.isfinite(value) else None


def _metrics(contents: Mapping[object, object], number: Callable[[object], float | None]) -> dict[str, float]:
    found: dict[str, float] = {}

    def take(name: object, value: object) -> None:
        if isinstance(name, str) and (got := number(value)) is not None:
            found[name] = got

    for name, value in contents.items():
        if isinstance(name, str) and not _NO_METRICS & set(re.split(r"[^a-z]+", name.lower())):
            take(name, value if not isinstance(value, int) else None)  # a count is no measurement
    take("metric", contents.get("metric"))  # timm
    take("val_loss", follow(contents, "extra_state.val_loss"))  # fairseq
    for key in _METRICS:
        if isinstance(inner := contents.get(key), dict):
            for name, value in inner.items():
                take(name, value)
    callbacks = contents.get("callbacks")
    for key, state in callbacks.items() if isinstance(callbacks, dict) else ():
        if isinstance(key, str) and key.startswith("ModelCheckpoint") and isinstance(state, dict):  # Lightning
            take(state.get("monitor"), state.get("current_score"))
    return found


def _rate_of_last_step(contents: object, step: int | None, epoch: int | None) -> float | None:
    """Returns the rate of the last step, where a scheduler with restarts had already set that of the next.

    A checkpoint saved at the end of a cycle would else record the top of the next one. Only the state of
    CosineAnnealingWarmRestarts tells: η = η_min + (η_0 − η_min)·(1 + cos(π·T_cur/T_i))/2 (Loshchilov & Hutter 2017).
    """
    candidates = (follow(contents, path) for path in _SCHEDULERS)
    firsts = (each[0] if isinstance(each, list) and each else each for each in candidates)
    state = next((each for each in firsts if isinstance(each, dict)), {})
    rates = state.get("base_lrs")
    found = [measure(state.get(name)) for name in ("T_cur", "T_i", "T_mult", "eta_min", "last_epoch")]
    found.append(measure(rates[0]) if isinstance(rates, list) and rates else None)
    numbers = [number for number in found if number is not None]
    if len(numbers) < len(found):
        return None
    now, length, growth, lowest, done, highest = numbers
    if not done or done not in (step, None if epoch is None else epoch + 1):
        return None  # it counts something else, or has not stepped yet
    if now < 1:  # a cycle has just begun: the last step was the last of the one before
        length = max(1.0, length / max(growth, 1.0))
        now = length
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * (now - 1) / max(length, 1.0))) / 2


def _learning_rate(contents: object, number: Callable[[object], float | None]) -> float | None:
    for path in _OPTIMIZERS:
        optimizer = follow(contents, path)
        groups = follow(optimizer, "param_groups")
        if groups is None and isinstance(optimizer, dict):  # Composer: by the optimizer's class
            groups = next((found for each in optimizer.values() if (found := follow(each, "param_groups"))), None)
        if isinstance(groups, (list, tuple)) and groups and isinstance(groups[0], dict):
            return number(groups[0].get("lr"))
        if isinstance(groups, Foreign):
            return None
    return None
