"""What the name of a checkpoint tells: step, epoch, metrics; whether it is a part, an average, an alias.

The patterns are the trainers' (`TRAINERS`), and those of `any_script`. docs/which-files.md has the rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ckpt_avg.checkpoint.training_record import Record, measure
from ckpt_avg.formats.trainers import name_patterns
from ckpt_avg.formats.trainers.any_script import ANY_SCRIPT
from ckpt_avg.formats.trainers.registry import TRAINERS
from ckpt_avg.formats.trainers.trainer import INCOMPLETE, Trainer

_ALL = (*TRAINERS, ANY_SCRIPT)
_WITH_GROUPS = [each for trainer in TRAINERS for each in map(re.compile, trainer.file_names) if each.groupindex]
_FOLDER_NAMES = [re.compile(pattern) for trainer in TRAINERS for pattern in trainer.folder_names]
_SKIPPED = [(re.compile(pattern, re.IGNORECASE), each.skip[pattern]) for each in _ALL for pattern in each.skip]
_TRAINING_STATE = re.compile(
    rf"(\d+[-_])?({'|'.join(name for each in _ALL for name in each.training_state)})(?i:[A-Z]?)[\d_]*(\..*)?",
    re.IGNORECASE,
)
_TRAINING_STATE_FOLDER = re.compile(
    r".*\d[-_]state|(.*[-_])?(train|training|trainer|optim|optimizer)[-_]?states?|optimizers?|states?", re.IGNORECASE
)
_SUFFIXES = sorted(name_patterns.SUFFIXES, key=len, reverse=True)
EARLIER_AVERAGE = "an earlier average, by its name"
TRAINING_STATE = "training state, by its name"


def stem(name: str) -> str:
    """Returns a name without the suffix of a checkpoint file, whatever that is."""
    suffix = next((suffix for suffix in _SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: -len(suffix)] if suffix else name_patterns.OTHER_SUFFIX.sub("", name)


def record_from_name(name: str, *, bare_number: bool = True) -> Record:
    """Returns the step, epoch and metrics in the name of a file or folder.

    Args:
        name: the name.
        bare_number: whether a number without a word is the step.

    Example:
        >>> record_from_name("epoch=2-val_loss=0.12.ckpt")
        Record(epoch 2, val_loss 0.12)
    """
    for pattern in _WITH_GROUPS:
        if match := pattern.fullmatch(name):
            found = match.groupdict()
            metrics = _metrics([(found["metric"], found["value"])]) if "metric" in found else {}
            return Record(_count(found.get("step")), _count(found.get("epoch")), metrics)
    text = _without_numbers_of_parts(stem(name))
    if keras := name_patterns.KERAS.fullmatch(text):
        return Record(None, _count(keras["epoch"]), _metrics([("score", keras["value"])]))
    step, epoch = name_patterns.STEP.search(text), name_patterns.EPOCH.search(text)
    measured = [match for match in name_patterns.METRIC.finditer(text) if match[1].lower() not in ("epoch", "step")]
    measured = measured or list(name_patterns.WORD_METRIC.finditer(text))
    metrics = _metrics((match[1], match[2]) for match in measured)
    record = Record(step and _count(step[1]), epoch and _count(epoch[1] or epoch[2]), metrics)
    if bare_number and record.step is None and record.epoch is None:
        if measured:
            before = name_patterns.BEFORE_METRIC.match(measured[0][1])
            text = text[: measured[0].start(1)] + (before[0] if before else "")
        patterns = (*name_patterns.LONE_NUMBERS, *([name_patterns.LEADING_NUMBER] if stem(name) != name else []))
        text = name_patterns.VERSION.sub("", text.rstrip("-_."))
        numbers = (*(pattern.search(text) for pattern in patterns), name_patterns.RUN_NUMBER.search(stem(name)))
        if (number := next(filter(None, numbers), None)) and (count := _count(number["step"])) is not None:
            scale = {"k": 1_000, "m": 1_000_000}.get(number["unit"].lower(), 1)
            return replace(record, step=count * scale, is_lone_number=True)
    return record


def names_a_moment(folder: str) -> bool:
    """Whether a folder's name tells a step, an epoch or a measure by a word, or is that of a trainer's checkpoint.

    Other numbers may be those of trainings: out_2, 0, lr=0.1.
    """
    if name_patterns.CHECKPOINT_NUMBER.search(folder) or any(each.fullmatch(folder) for each in _FOLDER_NAMES):
        return True
    found = record_from_name(folder, bare_number=False)
    is_measured = any(map(name_patterns.MEASURE.fullmatch, found.metrics))
    has_moment = found.step is not None or found.epoch is not None or is_measured
    return has_moment and not name_patterns.SETTING.search(folder)


def ends_in_a_number(folder: str) -> bool:
    """Whether a folder may be a checkpoint of a run by the number at the end of its name."""
    return record_from_name(folder).is_lone_number and not name_patterns.SETTING.search(folder)


def part_of(name: str) -> list[str]:
    """Returns names that another part of the same checkpoint would have; the name itself if it says how many there are.

    Example:
        >>> part_of("model_rank_1.pt"), part_of("model-00001-of-00002.bin"), part_of("step_1.pt")
        (['model_rank_1.pt.1', 'model_rank_0.pt', 'model_rank_2.pt'], ['model-00001-of-00002.bin'], ['step_1.pt.1'])
    """
    text = stem(name)
    counts = [*name_patterns.PART_OF.finditer(text), *name_patterns.WORLD_SIZE.finditer(text)]
    if any((count := _count(match["count"])) is None or count > 1 for match in counts):
        return [name]
    own = (re.fullmatch(pattern, name) for trainer in TRAINERS for pattern in trainer.part_files)
    after = name_patterns.PART_AFTER_SUFFIX.fullmatch(name)
    others = [f"{name}.1"] + ([name[: after.start("number") - 1]] if after else [])
    for begin, end in [match.span("number") for match in (*_numbers_of_parts(text), *filter(None, (after, *own)))]:
        number = name[begin:end]
        near = (int(number) - 1, int(number) + 1) if len(number) <= 18 else ()
        others += [f"{name[:begin]}{other:0{len(number)}}{name[end:]}" for other in near if other >= 0]
    return others


def without_part(name: str) -> str:
    """Returns a name with a * for each number of a part, so that it is the same for all parts of a checkpoint."""
    pieces, end = list[str](), 0
    for begin, after in sorted({match.span("number") for match in _numbers_of_parts(stem(name))}):
        pieces += (name[end:begin], "*")
        end = after
    return "".join((*pieces, name[end:]))


def series_of(name: str) -> str:
    """Returns which of several trainings a name says that it is of, such as ``fold_3``; empty if it says nothing."""
    return " ".join(f"{match['word'].lower()}_{int(match['number'])}" for match in _series(stem(name)))


def series_numbers(name: str) -> set[int]:
    """Returns where in a name the numbers of `series_of` begin."""
    return {match.start("number") for match in _series(stem(name))}


def _series(text: str) -> list[re.Match[str]]:
    return [match for match in name_patterns.SERIES.finditer(text) if len(match["number"]) <= 18]


def _numbers_of_parts(text: str) -> list[re.Match[str]]:
    found = list(name_patterns.PART.finditer(text))
    is_parallel = any(name_patterns.PARALLEL.match(match[0]) for match in found)
    return [*found, *name_patterns.PART_TOO.finditer(text)] if is_parallel else found


def _without_numbers_of_parts(text: str) -> str:
    """Removes the numbers of ranks, shards, folds and versions, which are never a step."""
    for match in _numbers_of_parts(text):
        text = text.replace(match[0], "")
    for pattern in (name_patterns.PART_OF, name_patterns.WORLD_SIZE, name_patterns.SERIES, name_patterns.VERSION):
        text = pattern.sub("", text)
    return text


def trainer_from_name(path: Path) -> Trainer | None:
    """Returns the trainer that gives a bare state dict such a name."""
    for trainer in TRAINERS:
        is_named = any(re.fullmatch(pattern, path.name) for pattern in trainer.file_names)
        if is_named and all(each.paths_for(path) for each in trainer.sidecars if each.identifies):
            return trainer
    return None


def is_alias(name: str) -> bool:
    """Whether a name is a second name of some checkpoint: ``last.ckpt``, ``model_best.pth.tar``.

    A name with a step, an epoch or a metric (``best-epoch=3.ckpt``, ``best_0.91.pt``) is a checkpoint's own.
    """
    text = _without_numbers_of_parts(stem(name)).strip("-_.")
    if any(re.fullmatch(alias, text) for trainer in TRAINERS for alias in trainer.aliases):
        return True
    after = re.split("|".join(name_patterns.ALIASES), text.lower())[-1]
    words = set(re.split(r"[-_.]", text.lower()))
    return bool(words & name_patterns.ALIASES) and not re.search(r"\d", after) and record_from_name(name) == Record()


def is_ema(name: str) -> bool:
    """Whether a name says that the weights are a running average."""
    return "ema" in re.split(r"[^a-z]+", stem(name).lower())


def is_average(name: str) -> bool:
    """Whether a name says that the file is an average of checkpoints: ``valid.acc.ave_10best.pth``, ``avg_10.pt``."""
    text = re.sub(r"[A-Za-z][\w/@]*=[^-]*", "", stem(name))  # avg_loss=0.1 is a metric
    text = re.sub(
        r"swa[-_.]?(?=(epoch|step|iter)\D?\d)", "", text, flags=re.IGNORECASE
    )  # of the phase before the average
    return bool(name_patterns.AVERAGE.search(text))


def reason_to_skip(name: str, *, is_checkpoint: bool) -> str | None:
    """Returns why a file in a run folder is not a checkpoint, by its name; None if nothing says so.

    Args:
        name: the name.
        is_checkpoint: whether its suffix or its first bytes are those of checkpoints.
    """
    if name_patterns.UNFINISHED.fullmatch(name):
        return INCOMPLETE
    for pattern, reason in _SKIPPED:
        if pattern.fullmatch(name):
            return reason
    if not is_checkpoint:
        return None
    if is_training_state(name):
        return TRAINING_STATE
    if name.startswith("."):
        return "a hidden file"
    return EARLIER_AVERAGE if is_average(name) else None


def is_training_state(name: str) -> bool:
    """Whether a file has, by its name, the state of an optimizer or the like, and no weights."""
    return bool(_TRAINING_STATE.fullmatch(name))


def is_training_state_folder(name: str) -> bool:
    """Whether a folder has, by its name, the state of an optimizer or the like, and no weights."""
    return is_training_state(name) or bool(_TRAINING_STATE_FOLDER.fullmatch(name))


def is_pretrained(name: str) -> bool:
    """Whether a name says that the weights are those from before the training."""
    return bool(name_patterns.PRETRAINED.search(stem(name)))


def _count(digits: str | None) -> int | None:
    return int(digits) if digits and len(digits) <= 18 else None


def _metrics(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    values = {name_patterns.BEFORE_METRIC.sub("", name): measure(float(value)) for name, value in pairs}
    return {name: value for name, value in values.items() if value is not None}
