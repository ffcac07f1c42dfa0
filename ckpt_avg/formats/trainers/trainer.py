"""`Trainer`: everything that is known of one trainer. Each has a file of its own in this folder.

docs/adding-a-trainer.md shows how to add one. Patterns are regular expressions that match a whole name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from ckpt_avg.checkpoint.training_record import Record, count, measure
from ckpt_avg.files.status import is_file, is_folder

INCOMPLETE = "incomplete, by its name"


@dataclass(frozen=True, slots=True)
class Contents:
    """What a torch file contains, read by dotted keys.

    Attributes:
        root: the object in the file.
        scalar: returns the value of a number or of a stored tensor with one element; None for anything else.
    """

    root: object
    scalar: Callable[[object], float | None] = measure

    def get(self, key: str) -> object:
        """Returns what a dotted key leads to, through dicts and the first elements of lists; None if nothing."""
        value = self.root
        for name in key.split("."):
            if isinstance(value, (list, tuple)):
                value = value[0] if value else None
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def number(self, key: str) -> float | None:
        """Returns the finite number under a key."""
        return self.scalar(self.get(key))

    def count(self, key: str) -> int | None:
        """Returns the step or epoch under a key."""
        return count(self.number(key))

    def numbers(self, pairs: Iterable[tuple[object, object]]) -> dict[str, float]:
        """Returns those of the named values that are finite numbers."""
        values = ((name, self.scalar(value)) for name, value in pairs)
        return {name: value for name, value in values if isinstance(name, str) and value is not None}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a torch file has its weights.

    Attributes:
        keys: dotted keys. A file that contains all of them is recognised as the trainer's.
        raw: the dotted key of the weights that the optimizer updates.
        ema: the dotted key of their running average.
        beside: further state dicts of the same model: key → prefix of their names in the whole model.
        only_if: a condition that keys cannot express.
    """

    keys: tuple[str, ...]
    raw: str = ""
    ema: str = ""
    beside: Mapping[str, str] = field(default_factory=dict)
    only_if: Callable[[Contents], bool] = lambda contents: True


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A file in a checkpoint folder, or next to a checkpoint file, that records step, epoch, metrics or rates.

    Attributes:
        name: its name; ``{stem}`` stands for the checkpoint's name without its suffix.
        read: returns what its text records of the checkpoint of an epoch. None: the sidecar is a torch file with the
            trainer's keys.
        files: pattern of the checkpoint files that it may be next to. In a checkpoint folder it is always read.
    """

    name: str
    read: Callable[[str, int | None], Record] | None = None
    files: str = ""

    def path_for(self, checkpoint: Path) -> Path | None:
        """Returns the sidecar of a checkpoint, if it exists."""
        path = checkpoint / self.name
        if not is_folder(checkpoint):
            if not re.fullmatch(self.files, checkpoint.name):
                return None
            path = checkpoint.with_name(self.name.replace("{stem}", checkpoint.stem))
        return path if is_file(path) else None


class Stored(Enum):
    """How a checkpoint folder stores its weights: what opens them."""

    FILE = auto()
    INDEX = auto()  # of shards
    FOLDER = auto()  # a folder inside, which is a checkpoint folder itself
    DCP = auto()
    DCP_SAFETENSORS = auto()


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Which part of a checkpoint folder has the weights.

    Attributes:
        path: the file or folder with the weights.
        stored: what opens it.
        problem: why it cannot be opened, and what to do; empty if it can.
        incomplete: whether the problem is that saving was interrupted.
        others: names of other weights in the folder, which are not read.
        kind: the trainer's name.
        nested: whether the folder may be inside a checkpoint folder of another trainer, as a part of it.
    """

    path: Path
    stored: Stored = Stored.FILE
    problem: str = ""
    incomplete: bool = False
    others: tuple[str, ...] = ()
    kind: str | None = None
    nested: bool = False

    def is_inside(self, folder: Path) -> bool:
        """Whether the weights are in a folder inside ``folder``."""
        return (self.path.parent if self.stored in (Stored.FILE, Stored.INDEX) else self.path) != folder


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder and the names of its entries."""

    path: Path
    names: frozenset[str]

    @classmethod
    def of(cls, path: Path) -> Folder:
        """Lists a folder; raises OSError if that fails."""
        return cls(path, frozenset(os.listdir(path)))

    def matching(self, pattern: str) -> list[str]:
        """Returns the entries that match a pattern, sorted."""
        return sorted(filter(re.compile(pattern).fullmatch, self.names))

    def folders(self, pattern: str) -> list[str]:
        """Returns the folders that match a pattern, sorted."""
        return [name for name in self.matching(pattern) if (self.path / name).is_dir()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """What one trainer writes, and what users should know of it.

    Attributes:
        name: what ``inspect`` calls it.

        layouts: where its torch files have the weights. The first that fits is used.
        step, epoch: dotted keys of its torch files. The first that leads to a number is used.
        metrics: dotted keys of a number or of a dict of numbers, which were measured at this checkpoint.
        optimizer, scheduler: dotted keys of the states of the (first) optimizer and learning-rate scheduler.
        record: what these keys cannot express.
        counter: the scalar that it stores among averaged weights; it is not a weight.
        tensor_names: pattern of tensor names that only its checkpoints contain.

        folder_files: patterns of files. A checkpoint folder that contains all of them is recognised as the trainer's.
        weight_files: names of the file with the weights in a checkpoint folder, the preferred one first.
        weights: finds the weights in a checkpoint folder that has no such file.
        written_last: the file that is written last into a checkpoint folder.
        sidecar: a file that records what the weights' own file does not.

        file_names: patterns of names of its checkpoint files, with the groups ``step``, ``epoch``, or ``metric`` and
            ``value``. A bare state dict with such a name, and with the sidecar if there is one, is recognised.
        aliases: patterns of second names of a checkpoint, without suffix.
        training_state: patterns of names of files without weights, up to the first dot.
        skip: patterns of names of other files and folders in a run folder that are not averaged → why.
        rank_files: patterns of files with one rank's part of each tensor; the group is the rank.

        note: what users should know of its weights.
        refuse: returns why a file, by its name, cannot be opened, and what to do.
    """

    name: str
    layouts: tuple[Layout, ...] = ()
    step: tuple[str, ...] = ()
    epoch: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    optimizer: tuple[str, ...] = ()
    scheduler: tuple[str, ...] = ()
    record: Callable[[Contents], Record] = lambda contents: Record()
    counter: str = ""
    tensor_names: str = ""
    folder_files: tuple[str, ...] = ()
    weight_files: tuple[str, ...] = ()
    weights: Callable[[Folder], WeightFiles | None] = lambda folder: None
    written_last: str = ""
    sidecar: Sidecar | None = None
    file_names: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    training_state: tuple[str, ...] = ()
    skip: Mapping[str, str] = field(default_factory=dict)
    rank_files: tuple[str, ...] = ()
    note: str = ""
    refuse: Callable[[Path], str] = lambda path: ""
