"""`inspect`: what a path contains and how it would be read, even if it cannot be averaged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ckpt_avg.checkpoint.spec import CheckpointSpec
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.commands.requests import InspectRequest, takes
from ckpt_avg.errors import CkptAvgError, IncompatibleError, PartError
from ckpt_avg.formats.folder import find_weights
from ckpt_avg.formats.open import open_checkpoint, open_with
from ckpt_avg.formats.single_file import starts_as_checkpoint
from ckpt_avg.formats.trainers.name_patterns import SUFFIXES, other_format
from ckpt_avg.progress import Phase
from ckpt_avg.results import Result, Rows, attributes, counted, notices_counted, number, numbers, paths_counted, plain
from ckpt_avg.runs.candidate import Candidate
from ckpt_avg.runs.candidates import open_candidates
from ckpt_avg.runs.discover import discover
from ckpt_avg.runs.metric_log import MetricLog, read_log
from ckpt_avg.runs.run_folder import Skipped, entries_of
from ckpt_avg.runs.select import skipping_options
from ckpt_avg.text import ends, escaped, plural
from ckpt_avg.wording import setting, worded, worded_all

_MOST = 100  # entries of a folder without checkpoints that are described


@dataclass(frozen=True, slots=True, repr=False)
class Listed(Result):
    """A checkpoint of a run.

    Attributes:
        spec: its tensors, and how it is read.
        record: what it, files next to it and copies of it record.
        skipped_by: the option of the selection that skips it, as the caller writes it; empty if it is selected.
    """

    spec: CheckpointSpec
    record: Record
    skipped_by: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as ``ckpt-avg inspect --json`` prints them of each checkpoint of a run."""
        spec = replace(self.spec, record=self.record).to_dict()
        return {**spec, "tensors": len(self.spec.tensors), "skipped_by": self.skipped_by or None}

    def _title(self) -> str:
        skipped = f"skipped by {self.skipped_by}" if self.skipped_by else ""
        return ", ".join(filter(None, (escaped(self.spec.name), self.record._title(), skipped)))


@dataclass(frozen=True, slots=True, repr=False)
class Inspection(Result):
    """What a path contains.

    Attributes:
        path: the path.
        checkpoint: the checkpoint at this path; None for a folder of checkpoints.
        listed: the checkpoints of a run folder, in order.
        unreadable: name → why it cannot be read.
        skipped: what `average` would skip.
        seen: (name, what it seems to be) for each entry of a folder without a readable checkpoint.
        needed: what to do about such a folder; empty otherwise.
        notes: what the user should know.
        selects: whether a selection was given, so that `Listed.skipped_by` tells what `average` would use.
    """

    path: Path
    checkpoint: CheckpointSpec | None = None
    listed: tuple[Listed, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    skipped: tuple[Skipped, ...] = ()
    seen: tuple[tuple[str, str], ...] = ()
    needed: str = ""
    notes: tuple[str, ...] = ()
    selects: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as ``ckpt-avg inspect --json`` prints them."""
        if self.checkpoint is not None:
            return self.checkpoint.to_dict()
        return {
            "path": str(self.path),
            "checkpoints": [each.to_dict() for each in self.listed],
            "unreadable": dict(self.unreadable),
            "skipped": plain(self.skipped),
            "seen": [{"name": name, "what": what} for name, what in self.seen],
            **attributes(self, ("needed", "notes")),
        }

    def _title(self) -> str:
        what = "one checkpoint" if self.checkpoint is not None else plural(len(self.listed), "checkpoint")
        return f"{escaped(self.path.name or str(self.path))}, {what}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        if self.checkpoint is not None:
            yield "checkpoint", self.checkpoint._title()
            yield from (fact for fact in self.checkpoint._facts() if fact[0] in ("tensors", "record", "notes"))
            return
        yield "listed", paths_counted([each.spec.path for each in self.listed])
        chosen = [each.spec.path for each in self.listed if not each.skipped_by]
        yield "selected", paths_counted(chosen) if self.selects else ""
        metrics = {name: None for each in self.listed for name in each.record.metrics}
        yield "metrics", ", ".join(map(escaped, metrics))
        yield "unreadable", counted(self.unreadable, [name for name, _ in self.unreadable])
        yield "skipped", paths_counted([each.path for each in self.skipped])
        yield "seen", counted(self.seen, [name for name, _ in self.seen])
        yield "needed", self.needed
        yield "notes", notices_counted(self.notes)

    def _tables(self) -> Iterator[Rows]:
        rows = [
            (each.spec.name, number(each.record.step), number(each.record.epoch), numbers(each.record.metrics))
            for each in self.listed
        ]
        yield Rows("listed", ("name", "step", "epoch", "metrics"), rows)


@takes(InspectRequest)
def inspect(request: InspectRequest) -> Inspection:
    """Returns what a checkpoint or a run folder contains, from headers only. Other folders are described, too.

    The options of the selection select no checkpoints here: they tell which ones `average` would use.

    Args:
        The fields of `InspectRequest`.

    Raises:
        UsageError: ``path`` does not exist.
        IncompatibleError: a selection was given, and nothing or too little fits it.
        CheckpointFormatError: it is a file or a checkpoint folder that cannot be read.

    Example:
        >>> inspect("fixtures/mnist_cnn", last=2)
        Inspection: mnist_cnn, 12 checkpoints
          listed    12: epoch_9.pt, epoch_10.pt, …, epoch_20.pt
          selected  2: epoch_19.pt, epoch_20.pt
          metrics   accuracy, loss
    """
    paths = [request.path] if isinstance(request.path, (str, os.PathLike)) else [*request.path]
    path = Path(paths[0] if len(paths) == 1 else os.path.commonpath(map(os.path.abspath, paths)) if paths else "")
    progress = request.callbacks
    progress.phase(Phase("opening checkpoints", left=0))
    try:
        discovery = discover(paths, request.include)
    except IncompatibleError as error:
        return Inspection(path, seen=_described_entries(path), needed=str(error))
    with ExitStack() as stack:
        if discovery.named == (path,) and not request.selects:
            return _one(stack.enter_context(open_with(path, request)).spec, request)
        try:
            found = open_candidates(discovery, request, stack, request, progress, compare_in_full=False)
        except (IncompatibleError, PartError) as error:
            if request.selects:
                raise
            return Inspection(path, skipped=discovery.skipped, seen=_described_entries(path), needed=str(error))
        notes = list(found.notes)
        log = None if request.log is None else read_log(found.ordered, request, notes.append)
        records = _with_logged(found.ordered, log, notes)
        skipped_by = skipping_options(found.ordered, request, notes.append, log)
        listed: list[Listed] = []
        unreadable: list[tuple[str, str]] = []
        for candidate, record, option in zip(found.ordered, records, skipped_by, strict=True):
            if candidate.checkpoint is not None:
                listed.append(Listed(candidate.checkpoint.spec, record, worded(option)))
            else:
                unreadable.append((candidate.path.name, str(candidate.error)))
                if request.selects and not option:
                    notes.append(f"{candidate.path.name}: is selected, but cannot be read, so average would stop")
        unwanted = [(each, request.pattern_against(each.name)) for each in discovery.paths]
        skipped = (*found.skipped, *(Skipped(each, option) for each, option in unwanted if option))
        needed = "" if listed else f"{path}: no checkpoint could be read (see the errors above)"
        seen = () if listed else _described_entries(path)
        return Inspection(
            path, None, tuple(listed), tuple(unreadable), skipped, seen, needed, worded_all(notes), request.selects
        )


def _one(spec: CheckpointSpec, request: InspectRequest) -> Inspection:
    notes: list[str] = []
    candidates = [Candidate(spec.path, None, None, spec.record)]
    log = None if request.log is None else read_log(candidates, request, notes.append)
    (record,) = _with_logged(candidates, log, notes)
    return Inspection(spec.path, replace(spec, record=record, notes=(*spec.notes, *worded_all(notes))))


def _with_logged(candidates: Sequence[Candidate], log: MetricLog | None, notes: list[str]) -> list[Record]:
    """Returns what is recorded of the checkpoints, with the metrics of the log before their own, if one was named."""
    records = [candidate.record for candidate in candidates]
    if log is None:
        return records
    logged = [log.metrics_of(each) for each in records]
    lacking = [escaped(each.path.name) for each, new in zip(candidates, logged, strict=True) if not new]
    if lacking:
        column = setting("--log-step", log.step.given)
        notes.append(f"{column}: {escaped(log.path.name)} has no metrics of {ends(lacking)}")
    # What the log has for others is not taken from a checkpoint.
    own = [{name: value for name, value in each.metrics.items() if name not in log.columns} for each in records]
    return [replace(each, metrics=new | old) for each, new, old in zip(records, logged, own, strict=True)]


def _described_entries(folder: Path) -> tuple[tuple[str, str], ...]:
    if not folder.is_dir():
        return ()
    entries = entries_of(folder)
    seen = [(path.name, _description(path)) for path in entries[:_MOST]]
    if len(entries) > _MOST:
        seen.append(("…", f"and {len(entries) - _MOST:,} more"))
    return tuple(seen)


def _description(path: Path) -> str:
    try:
        if path.is_dir():
            weights = find_weights(path)
            if weights is None:
                return f"a folder with {plural(len(entries_of(path)), 'entry')}"
            return weights.problem or "a checkpoint folder" + (f" ({weights.kind})" if weights.kind else "")
        if not path.is_file():
            return "a broken link, a device, a pipe or a socket"
        known = path.name.lower().endswith(SUFFIXES) or other_format(path.name)
        if not known and not starts_as_checkpoint(path):
            return f"not a checkpoint, by its name; {plural(path.stat().st_size, 'byte')}"
        with open_checkpoint(path) as checkpoint:
            return f"{checkpoint.spec.format} with {plural(len(checkpoint.spec.tensors), 'tensor')}"
    except (CkptAvgError, OSError) as error:
        return str(error).removeprefix(f"{path}: ")
