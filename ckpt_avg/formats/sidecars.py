"""What trainers record in files beside the weights, where no pickle is needed to read it.

``trainer_state.json`` of transformers, ``meta.pt`` of Lightning's folders, ``summary.csv`` of timm, ``N.yaml`` of
WeNet. A file that is not in its usual form tells nothing: the weights can be averaged all the same.
"""

from __future__ import annotations

import csv
import functools
import json
import re
from pathlib import Path

from ckpt_avg.checkpoint.training_record import Record, count, measure
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.files.input_file import MappedFile
from ckpt_avg.files.status import is_file, is_folder
from ckpt_avg.formats import torch_zip
from ckpt_avg.formats.trainers.contents import record_of
from ckpt_avg.limits import LIMITS

_YAML_NUMBER = re.compile(r"\s*([\w./-]+):\s*(-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*")


def record_beside(path: Path, epoch: int | None) -> Record:
    """Returns what files beside the weights record.

    Args:
        path: the checkpoint, a file or a folder.
        epoch: the epoch that the checkpoint itself records; timm's table is read by it.
    """
    is_whole_folder = is_folder(path)
    folder = path if is_whole_folder else path.parent
    record = Record()
    # Beside other files it is the state of the whole run.
    is_whole = is_whole_folder or path.name.startswith(("model", "pytorch_model", "adapter_model"))
    if is_whole and is_file(folder / "trainer_state.json"):
        record = _trainer_state(folder / "trainer_state.json")
    elif is_whole_folder and is_file(folder / "meta.pt"):
        record = _lightning_meta(folder / "meta.pt")
    elif path.suffix == ".pt" and is_file(path.with_suffix(".yaml")):
        record = _wenet(path.with_suffix(".yaml"))
    if epoch is not None and is_file(folder / "summary.csv"):
        record = record.or_else(Record(metrics=_summary(folder / "summary.csv", epoch)))
    return record


def _text(path: Path) -> str:
    try:
        with MappedFile(path) as file:
            return file.read(0, file.size).decode("utf-8") if file.size <= LIMITS.log else ""
    except (CheckpointFormatError, UnicodeDecodeError):
        return ""


def _trainer_state(path: Path) -> Record:
    try:
        state = json.loads(_text(path) or "{}")
    except (ValueError, RecursionError):
        return Record()
    if not isinstance(state, dict):
        return Record()
    step = count(state.get("global_step"))
    history = state.get("log_history")
    rates: list[tuple[int, float]] = []
    metrics: dict[str, float] = {}
    for entry in history if isinstance(history, list) else ():
        at = count(entry.get("step")) if isinstance(entry, dict) else None
        if at is None:
            continue
        if (rate := measure(entry.get("learning_rate"))) is not None:
            rates.append((at, rate))
        if at == step:
            metrics.update(
                {
                    name: number
                    for name, value in entry.items()
                    if name not in ("step", "epoch", "learning_rate") and (number := measure(value)) is not None
                }
            )
    epoch = measure(state.get("epoch"))
    whole = None if epoch is None else count(float(int(epoch)))
    return Record(step, whole, metrics, rates[-1][1] if rates else None, tuple(rates))


def _lightning_meta(path: Path) -> Record:
    try:
        with MappedFile(path) as file:
            return record_of(torch_zip.read_contents(file).objects, lambda leaf: None)
    except CheckpointFormatError:
        return Record()


def _wenet(path: Path) -> Record:
    """Reads the lines ``name: number`` of the YAML that WeNet writes: at the top, and those in ``loss_dict``."""
    top: dict[str, float] = {}
    losses: dict[str, float] = {}
    block = ""
    for line in _text(path).splitlines():
        inside = line.startswith(" ")
        block = block if inside else line.partition(":")[0]
        if (match := _YAML_NUMBER.fullmatch(line)) and (not inside or block == "loss_dict"):
            (losses if inside else top)[match[1]] = float(match[2])
    losses.update({name: value for name, value in top.items() if name == "cv_loss"})
    metrics = {name: value for name, value in losses.items() if measure(value) is not None}
    return Record(count(top.get("step")), count(top.get("epoch")), metrics, measure(top.get("lr")))


def _summary(path: Path, epoch: int) -> dict[str, float]:
    try:
        status = path.stat()
    except OSError:
        return {}
    for row in _rows(path, status.st_mtime_ns, status.st_size):
        if row.get("epoch") == str(epoch):
            return {
                name: number
                for name, value in row.items()
                if name not in ("epoch", "lr") and (number := _number(value)) is not None
            }
    return {}


@functools.lru_cache(maxsize=1)
def _rows(path: Path, _modified: int, _size: int) -> list[dict[str, str]]:
    """Reads a table once for all the checkpoints beside it, unless it changes meanwhile."""
    try:
        rows = list(csv.DictReader(_text(path).splitlines()))
    except csv.Error:
        return []
    return [
        {key: value for key, value in row.items() if isinstance(key, str) and isinstance(value, str)} for row in rows
    ]


def _number(text: str) -> float | None:
    try:
        return measure(float(text))
    except ValueError:
        return None
