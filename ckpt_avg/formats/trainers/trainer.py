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

from ckpt_avg.checkpoint.training_record import Record, as_number, count, measure
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
    scalar: Callable[[object], float | None] = as_number

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
        return measure(self.scalar(self.get(key)))

    def count(self, key: str) -> int | None:
        """Returns the step or epoch under a key."""
        return count(self.number(key))

    def numbers(self, pairs: Iterable[tuple[object, object]]) -> dict[str, float]:
        """Returns those of the named values that are numbers; NaN and infinity, too."""
        values = ((name, self.scalar(value)) for name, value in pairs)
        return {name: value for name, value in values if isinstance(name, str) and value is not None}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a torch file has its weights."""

    keys: tuple[str, ...]  # dotted keys; a file that contains all of them is recognised
    raw: str = ""  # the dotted key of the weights that the optimizer updates
    ema: str = ""  # the dotted key of their running average
    also: Mapping[str, str] = field(default_factory=dict)  # more state dicts of the model: key → prefix of its names
    only_if: Callable[[Contents], bool] = lambda contents: True


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A file in a checkpoint folder, or next to a checkpoint, that records step, epoch, metrics or rates.

    In a checkpoint folder it is always read. Without a reader it is a torch file with the trainer's keys.
    """

    name: str  # {stem} in it is replaced by the checkpoint's name without suffix; folders in it may have a *
    files: str = ""  # pattern of the checkpoint files and folders that it may be next to
    # Its text, the checkpoint's name and what the checkpoint itself records → what the text records of it.
    read: Callable[[str, str, Record], Record] | None = None
    read_contents: Callable[[Contents, str, Record], Record] | None = None  # the same for a torch file
    identifies: bool = False  # whether a bare state dict is the trainer's only with it

    def paths_for(self, checkpoint: Path) -> list[Path]:
        """Returns the sidecars of a checkpoint that exist, the last one first."""
        if is_folder(checkpoint) and is_file(checkpoint / self.name):
            return [checkpoint / self.name]
        if not re.fullmatch(self.files, checkpoint.name):
            return []
        name = self.name.replace("{stem}", checkpoint.stem)
        found = [checkpoint.parent / name] if "*" not in name else checkpoint.parent.glob(name)
        return [path for path in sorted(found, reverse=True) if is_file(path)]


class Stored(Enum):
    """How a checkpoint folder stores its weights: what opens them."""

    FILE = auto()
    INDEX = auto()  # of shards
    FOLDER = auto()  # a folder inside, which is a checkpoint folder itself
    DCP = auto()
    DCP_SAFETENSORS = auto()


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """Which part of a checkpoint folder has the weights."""

    path: Path  # the file or folder with the weights
    stored: Stored = Stored.FILE
    problem: str = ""  # why it cannot be opened, and what to do
    incomplete: bool = False  # whether the problem is that saving was interrupted
    others: tuple[str, ...] = ()  # names of other weights in the folder, which are not read
    kind: str | None = None  # the trainer's name
    ema: WeightFiles | None = None  # the running average of the same weights
    models: tuple[str, ...] = ()  # the names of several models in the folder, of which this is none
    nested: bool = False  # whether the folder may be a part of another trainer's checkpoint folder

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Trainer:
    """What one trainer writes, and what users should know of it."""

    name: str  # as inspect shows it

    # --- its torch files ---
    layouts: tuple[Layout, ...] = ()  # the first that fits is used
    step: tuple[str, ...] = ()  # dotted keys; the first that leads to a number is used
    epoch: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()  # dotted keys of numbers, or of dicts of numbers, measured at this checkpoint
    optimizer: tuple[str, ...] = ()  # dotted keys of the state of the optimizer, or of several in a list or dict
    scheduler: tuple[str, ...] = ()
    record: Callable[[Contents], Record] = lambda contents: Record()  # what these keys cannot express
    record_metadata: Callable[[Mapping[str, object]], Record] = lambda metadata: Record()  # of a safetensors file
    counter: str = ""  # a scalar among averaged weights, which is no weight
    tensor_names: str = ""  # pattern of what only its tensor names contain; every digit in them counts as 0

    # --- its checkpoint folders ---
    folder_files: tuple[str, ...] = ()  # patterns; a folder that contains all of them is recognised
    weight_files: tuple[str, ...] = ()  # names, the preferred one first; each may be sharded, with an index
    weights: Callable[[Folder], WeightFiles | None] = lambda folder: None  # finds them in any other folder
    models_file: str = ""  # the name of a file that says that each folder next to it may be one model of several
    written_last: str = ""  # the name of the last file: without it the folder is incomplete
    sidecars: tuple[Sidecar, ...] = ()
    settings_file: str = ""  # the name of a JSON file next to the weights, or in the checkpoint folder
    settings: tuple[str, ...] = ()  # keys in it that must be equal in checkpoints that are averaged
    folder_names: tuple[str, ...] = ()  # patterns of checkpoint folders whose names tell no step

    # --- other names ---
    # Patterns of checkpoint files, with the groups step, epoch, or metric and value. A bare state dict with such a
    # name, and with the sidecar that identifies it if there is one, is recognised.
    file_names: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()  # patterns of second names of a checkpoint, without suffix
    training_state: tuple[str, ...] = ()  # patterns of files without weights, up to the first dot or number
    skip: Mapping[str, str] = field(default_factory=dict)  # pattern of another file that is not averaged → why
    part_files: tuple[str, ...] = ()  # patterns of files with a part of each tensor, with the group number

    # --- what to say ---
    note: str = ""  # on its weights
    refuse: Callable[[Path], str] = lambda path: ""  # why a file cannot be opened, by its name, and what to do
