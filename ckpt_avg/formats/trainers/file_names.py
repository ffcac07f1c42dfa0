"""What the name of a checkpoint tells: step, epoch, metrics, its trainer, and whether it is an average or an alias.

The patterns are the trainers' (`TRAINERS`), and those of `any_script`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ckpt_avg.checkpoint.training_record import Record, measure
from ckpt_avg.formats.trainers import any_script
from ckpt_avg.formats.trainers.any_script import ANY_SCRIPT, SUFFIXES
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.trainer import INCOMPLETE, Trainer

_ALL = (*TRAINERS, ANY_SCRIPT)
_WITH_GROUPS = [each for trainer in TRAINERS for each in map(re.compile, trainer.file_names) if each.groupindex]
_SKIPPED = [(re.compile(pattern, re.IGNORECASE), each.skip[pattern]) for each in _ALL for pattern in each.skip]
_TRAINING_STATE = re.compile(
    rf"({'|'.join(name for each in _ALL for name in each.training_state)})[\d_]*\..*", re.IGNORECASE
)
EARLIER_AVERAGE = "an earlier average, by its name"


def stem(name: str) -> str:
    """Returns a name without the suffix of a checkpoint file."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def record_from_name(name: str, *, bare_number: bool = True) -> Record:
    """Returns the step, epoch and metrics in the name of a file or folder.

    Args:
        name: the name.
        bare_number: whether a number without a word is the step.

    Example:
        >>> record_from_name("epoch=2-val_loss=0.12.ckpt")
        Record(step=None, epoch=2, metrics={'val_loss': 0.12}, learning_rate=None, rates=())
    """
    for pattern in _WITH_GROUPS:
        if match := pattern.fullmatch(name):
            found = match.groupdict()
            metrics = _metrics([(found["metric"], found["value"])]) if "metric" in found else {}
            return Record(_count(found.get("step")), _count(found.get("epoch")), metrics)
    text = stem(name)
    step, epoch = any_script.STEP.search(text), any_script.EPOCH.search(text)
    pairs = [(key, value) for key, value in any_script.METRIC.findall(text) if key.lower() not in ("epoch", "step")]
    record = Record(step and _count(step[1]), epoch and _count(epoch[1] or epoch[2]), _metrics(pairs))
    if record == Record() and bare_number:
        numbers = (pattern.search(any_script.VERSION.sub("", text)) for pattern in any_script.LONE_NUMBERS)
        if (number := next(filter(None, numbers), None)) and (count := _count(number["step"])) is not None:
            return Record(count * {"k": 1_000, "m": 1_000_000}.get(number["unit"].lower(), 1))
    return record


def trainer_from_name(path: Path) -> Trainer | None:
    """Returns the trainer that gives a bare state dict such a name."""
    for trainer in TRAINERS:
        is_named = any(re.fullmatch(pattern, path.name) for pattern in trainer.file_names)
        if is_named and (not trainer.sidecar or trainer.sidecar.path_for(path)):
            return trainer
    return None


def is_alias(name: str) -> bool:
    """Whether a name is a second name of some checkpoint: ``last.ckpt``, ``model_best.pth.tar``.

    A name with a step, an epoch or a metric (``best-epoch=3.ckpt``, ``best_0.91.pt``) is a checkpoint's own.
    """
    text = any_script.VERSION.sub("", stem(name))
    if any(re.fullmatch(alias, text) for trainer in TRAINERS for alias in trainer.aliases):
        return True
    after = re.split("|".join(any_script.ALIASES), text.lower())[-1]
    words = set(re.split(r"[-_.]", text.lower()))
    return bool(words & any_script.ALIASES) and not re.search(r"\d", after) and record_from_name(name) == Record()


def is_average(name: str) -> bool:
    """Whether a name says that the file is an average of checkpoints: ``valid.acc.ave_10best.pth``, ``avg_10.pt``."""
    return bool(any_script.AVERAGE.search(re.sub(r"[A-Za-z][\w/@]*=[^-]*", "", stem(name))))  # avg_loss=0.1 is a metric


def reason_to_skip(name: str) -> str | None:
    """Returns why a file in a run folder is not a checkpoint, by its name; None if nothing says so."""
    if name.endswith(any_script.UNFINISHED):
        return INCOMPLETE
    for pattern, reason in _SKIPPED:
        if pattern.fullmatch(name):
            return reason
    if not name.lower().endswith(SUFFIXES):
        return None
    if _TRAINING_STATE.fullmatch(name):
        return "training state, by its name"
    if name.startswith("."):
        return "a hidden file"
    return EARLIER_AVERAGE if is_average(name) else None


def _count(digits: str | None) -> int | None:
    return int(digits) if digits and len(digits) <= 18 else None


def _metrics(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    values = {any_script.BEFORE_METRIC.sub("", name): measure(float(value)) for name, value in pairs}
    return {name: value for name, value in values.items() if value is not None}
