"""What the name of a checkpoint tells: step, epoch, metrics, whether it is an average or an alias."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ckpt_avg.checkpoint.training_record import Record, measure

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
_NUMBER = r"(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
_EPOCH = re.compile(r"(?:epoch|(?<![a-z0-9])ep)[-_=]?(\d+)|(?<![\d.])(\d+)epoch", re.I)
_STEP = re.compile(r"(?:step|iter|iteration|(?<![a-z0-9])ba|batch[-_=]|update)s?[-_=]?(\d+)", re.I)
_METRIC = re.compile(rf"(?:^|[-_.]|(?<=\d))([A-Za-z][\w/@]*?)={_NUMBER}(?=$|[-_.]|[A-Za-z])")
_BEFORE_METRIC = re.compile(r"^.*?(epoch|step|iter)\D?\d+[-_]")  # epoch_3_val_loss → val_loss
_FAIRSEQ_UPDATES = re.compile(r"checkpoint_(\d+)_(\d+)")
_FAIRSEQ_BEST = re.compile(r"checkpoint\.best_(.+)_(-?\d+\.\d{3})\d?")  # fairseq appends a random digit against ties
# At the end, behind a sign or a word that comes before a step: checkpoint-500, 12, model_7; no date or version.
_LONE_NUMBER = re.compile(r"(?:^|(?<!\d)[-_=.]|checkpoint|ckpt|model|snapshot)(\d+)()$", re.I)
_THOUSANDS = re.compile(r"(?:checkpoint|ckpt|model|snapshot)[-_=.]?(\d+)([km])$", re.I)
_LEADING_NUMBER = re.compile(r"(\d+)()(?=[-_]\D)")
_ALIAS = {"last", "latest", "best", "final"}
_AVERAGE = re.compile(
    r"(^|[-_.])(ave|avg|average|averaged|swa)(?=$|[-_.\d])(?![-_.]?(pool|meter))|(^|[-_.])avg\d+$", re.I
)


def stem(name: str) -> str:
    """Returns a name without the suffix of a checkpoint file."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def record_from_name(name: str, *, bare_number: bool = True) -> Record:
    """Returns the step, epoch and metrics that a name tells.

    Args:
        name: of a file or folder.
        bare_number: whether a number that nothing explains is taken for the step.

    Example:
        >>> record_from_name("epoch=2-val_loss=0.12.ckpt")
        Record(step=None, epoch=2, metrics={'val_loss': 0.12}, learning_rate=None, rates=())
    """
    text = stem(name)
    if best := _FAIRSEQ_BEST.fullmatch(text):
        return Record(metrics=_metrics([(best[1], best[2])]))
    if updates := _FAIRSEQ_UPDATES.fullmatch(text):
        return Record(step=int(updates[2]), epoch=int(updates[1]))
    step, epoch = _STEP.search(text), _EPOCH.search(text)
    metrics = _metrics((key, value) for key, value in _METRIC.findall(text) if key.lower() not in ("epoch", "step"))
    found = Record(_plain(step[1]) if step else None, _plain(epoch[1] or epoch[2]) if epoch else None, metrics)
    bare = re.sub(r"-v\d+$|[-_.]?rank\d+$", "", text)
    number = _LONE_NUMBER.search(bare) or _THOUSANDS.search(bare) or _LEADING_NUMBER.match(bare)
    if found.step is None and found.epoch is None and number and bare_number and not metrics:
        step_in_name = _plain(number[1])
        return Record(
            step=step_in_name and step_in_name * {"k": 1_000, "m": 1_000_000}.get((number[2] or "").lower(), 1)
        )
    return found


def kind_from_name(path: Path) -> str | None:
    """Returns the trainer whose way of naming bare state dicts this is."""
    if re.fullmatch(r"\d+epoch\.pth", path.name):
        return "ESPnet2"
    if path.suffix == ".pt" and re.fullmatch(r"(epoch_|step_)?\d+", path.stem) and path.with_suffix(".yaml").is_file():
        return "WeNet"
    return None


def is_alias(name: str) -> bool:
    """Whether a name says that it is another name of some checkpoint: ``last.ckpt``, ``model_best.pth.tar``.

    A name that tells a step, an epoch or a metric (``best-epoch=3.ckpt``, ``best_0.91.pt``) is that of a checkpoint.
    """
    text = re.sub(r"-v\d+$|[-_.]?rank\d+", "", stem(name))
    if text == "checkpoint":  # torchvision's references and ESPnet2: what the run resumes from
        return True
    words = set(re.split(r"[-_.]", text.lower()))
    behind = re.split("|".join(_ALIAS), text.lower())[-1]
    return bool(words & _ALIAS) and not re.search(r"\d", behind) and record_from_name(name) == Record()


def is_average(name: str) -> bool:
    """Whether a name says that the file is an average of checkpoints: ``valid.acc.ave_10best.pth``, ``avg_10.pt``."""
    return bool(_AVERAGE.search(re.sub(r"[A-Za-z][\w/@]*=[^-]*", "", stem(name))))  # avg_val_loss=0.1 is a metric


def _plain(digits: str) -> int | None:
    return int(digits) if len(digits) <= 18 else None


def _metrics(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    found = {}
    for key, value in pairs:
        if (number := measure(float(value))) is not None:
            found[_BEFORE_METRIC.sub("", key)] = number
    return found
