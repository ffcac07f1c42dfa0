"""`--resume FILE`: what `sweep` and `soup` measure, kept in a file from which the next run goes on.

The file is replaced as a whole after each measurement, by one rename: whenever a run ends, it has all that was
measured, and never half of an entry. It is small, so this takes no longer than adding a line would.

A measurement depends on the checkpoints, on what is done with them, on the user's code and data, and the machine. The
first two are recorded and compared. Whether code, data and machine still give the same numbers, only a measurement
tells: the last checkpoint and the first average of the file are measured again, and must be the same to the last bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from ckpt_avg.batchnorm.options import RefreshOptions
from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.commands.agreement import comparable
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.evaluations import Meter, led_by
from ckpt_avg.commands.options import ChoiceOptions, MeanOptions
from ckpt_avg.commands.prepare import Prepared
from ckpt_avg.commands.requests import MeanRequest, SoupRequest, SweepRequest, options_of
from ckpt_avg.errors import OutputError, UsageError
from ckpt_avg.formats.reading import Reading
from ckpt_avg.output.paths import check_target, json_bytes
from ckpt_avg.output.unpublished_file import publish_bytes
from ckpt_avg.results import plain
from ckpt_avg.runs.discover import Discovery
from ckpt_avg.text import argument, escaped, listing, plural
from ckpt_avg.user_code.comparison import Evaluation
from ckpt_avg.version import __version__
from ckpt_avg.wording import flag_of, setting

MARK = "ckpt_avg_measured"  # the first key of the file
LAST = "last"  # the key of the last checkpoint as it was saved
_DECIDING = {
    *(each.name for group in (Reading, MeanOptions, RefreshOptions) for each in fields(group)),
    *("evaluate", "eval_repeats", "keep_order"),
}
_OTHER = "Choose another file to measure everything again"


@dataclass(frozen=True, slots=True)
class ResumeFile:
    """A file for measurements: its path, how messages call it, and what is in it; None if it is new."""

    path: Path
    where: str
    contents: Mapping[str, Any] | None


def check_resume(choice: ChoiceOptions, discovery: Discovery) -> ResumeFile | None:
    """Returns the file to keep measurements in; None if none is wanted.

    Raises:
        UsageError: its name does not end in ``.json``, or it is one of the checkpoints.
        OutputError: it is another file, or its folder is not writable.
    """
    if choice.resume is None:
        return None
    where = setting("--resume", os.fspath(choice.resume))
    if not os.fspath(choice.resume).lower().endswith(".json"):
        raise UsageError(f"{where}: expected a name that ends in .json, for example sweep.json.")
    path = check_target(choice.resume, where, discovery)
    try:
        text = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise OutputError(f"{where}: cannot be read: {error.strerror}. Check the permissions.") from error
    if not text:
        return ResumeFile(path, where, None)
    try:
        found = json.loads(text)
        if next(iter(found)) != MARK:
            raise ValueError("no such file")
    except (ValueError, TypeError, StopIteration, RecursionError):
        raise OutputError(
            f"{where}: exists already, and is not a file that --resume wrote. Choose another path."
        ) from None
    return ResumeFile(path, where, found)


class Measurements:
    """What one run measures. With a file, what was measured before is not measured again, and all of it is kept there.

    As a context manager: if the run fails or is interrupted, the user is told what is kept, or how to keep it.

    Args:
        command: ``sweep`` or ``soup``.
        request, prepared, context, meter: of the run.
        file: what `check_resume` returned.

    Raises:
        UsageError: the file is that of another run, or the loader cannot be used with it.
        OutputError: the file is damaged.
    """

    def __init__(
        self,
        command: str,
        request: SweepRequest | SoupRequest,
        prepared: Prepared,
        context: Context,
        meter: Meter,
        file: ResumeFile | None,
    ) -> None:
        self._metric = request.target[1]
        self._command, self._context, self._meter, self._file = command, context, meter, file
        self._made: list[_Measurement] = []  # or taken from the file
        self._recorded: dict[str, _Measurement] = {}
        self._again: set[str] = set()  # keys that are measured once more
        self._run: dict[str, Any] = {}
        if file is None:
            return
        _refuse_generators(request.data, file.where)
        self._run = {
            "version": __version__,
            "options": _options(request, prepared),
            "checkpoints": [_described(each) for each in prepared.checkpoints],
        }
        if file.contents is None:
            return
        try:
            _refuse_other(file, self._run)
            self._recorded = {each["key"]: _Measurement.read(each) for each in file.contents["measured"]}
        except (KeyError, TypeError, AttributeError, ValueError):
            raise OutputError(f"{file.where}: is damaged. {_OTHER}.") from None
        self._again = {LAST, *[key for key in self._recorded if key[:1].isdigit()][:1]}

    def has(self, key: str) -> bool:
        """Whether the file has this measurement, so that it is not made."""
        return key in self._recorded and key not in self._again

    def measure(self, key: str, measure: Callable[[], Evaluation]) -> Evaluation:
        """Returns what the file has, or what is measured now, which is then kept.

        Raises:
            UsageError: what the file has is measured again, and has another result.
        """
        known = self._recorded.get(key)
        if known is not None and self.has(key):
            for text in known.notices:
                self._context.notice(text)
            self._made.append(known)
            self._show(known.found)
            return self._meter.compare_with_earlier(known.found)
        before = len(self._context.notices)
        found = measure()
        made = _Measurement(key, found, tuple(self._context.notices[before:]))
        if known is not None and self._file is not None and known.numbers != made.numbers:
            raise UsageError(
                f"{self._file.where}: {found.name} measures {made.numbers} now, and {known.numbers} in the file. The "
                f"code, the data or the machine is another, or the numbers are chance. {_OTHER}."
            )
        self._made.append(made)
        if known is None:
            self._recorded[key] = made
            self._write()
        self._show(found)  # what is shown is kept
        return found

    def _show(self, found: Evaluation) -> None:
        self._context.progress.measured(found.name, led_by([self._metric], found.metrics))

    def _write(self) -> None:
        if self._file is None:
            return
        measured = [each.document() for each in self._recorded.values()]
        document = {MARK: self._command, "run": self._run, "measured": measured}
        try:
            publish_bytes(self._file.path, json_bytes(document), overwrite=True)
        except OutputError as error:
            self._context.notice(f"{error} What is measured from here on is not kept")
            self._file = None

    def __enter__(self) -> Measurements:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or not self._made:
            return
        shown = [{"name": each.found.name, "metrics": plain(each.found.metrics)} for each in self._made]
        vars(error)["document"] = {**vars(error).get("document", {}), "measured": shown}
        count = plural(len(self._made), "measurement")
        if self._file is None:
            again = f"to keep them next time, add --resume {self._command}.json"
            self._context.progress.notice(f"{count} lost, except for what is shown above: {again}")
        else:
            path = argument(self._file.path)
            self._context.progress.notice(f"{count} in {path}: the same command goes on from there")


def key_of(indices: Collection[int], weights: Mapping[int, float] | None = None) -> str:
    """Returns the key of the average of checkpoints, by their indices in the order of the steps."""
    by = "" if weights is None else f" by {' '.join(repr(weights[index]) for index in sorted(indices))}"
    return f"{' '.join(map(str, sorted(indices)))}{by}"


@dataclass(frozen=True, slots=True)
class _Measurement:
    """What was measured, and the notices that came with it."""

    key: str
    found: Evaluation
    notices: tuple[str, ...]

    @property
    def numbers(self) -> str:
        """All that was measured, to the last bit."""
        samples = {f"{name} each time": each for name, each in self.found.samples.items()}
        return json.dumps({**self.found.metrics, **samples})

    def document(self) -> dict[str, Any]:
        """Returns it as JSON."""
        found = self.found
        values = {"metrics": dict(found.metrics), "samples": dict(found.samples), "refreshed": found.refreshed}
        return {"key": self.key, "name": found.name, **values, "notices": list(self.notices)}

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> _Measurement:
        """Returns what `document` wrote."""
        metrics = {str(name): float(value) for name, value in document["metrics"].items()}
        samples = {str(name): tuple(map(float, values)) for name, values in document["samples"].items()}
        found = Evaluation(str(document["name"]), None, metrics, bool(document["refreshed"]), samples)
        return cls(document["key"], found, tuple(map(str, document["notices"])))


def _options(request: MeanRequest, prepared: Prepared) -> dict[str, Any]:
    """Returns the options that a measured number depends on."""
    chosen = [option for _, option in options_of(type(request)) if option.name in _DECIDING]
    shared = [option for option in chosen if not option.metadata.get("per_rank")]
    values = comparable(request, shared)
    return {flag_of(each.name, each): values[each.name] for each in shared} | {"--device": prepared.model_device}


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what shows that a checkpoint was written again."""
    return {
        "name": checkpoint.spec.name,
        "header_sha256": checkpoint.spec.digest,
        "files": [[file.size, file.modified] for file in checkpoint.files],
    }


def _refuse_other(file: ResumeFile, run: Mapping[str, Any]) -> None:
    """Raises UsageError if the file was written by another run than this one."""
    before: Mapping[str, Any] = (file.contents or {})["run"]
    was, now = before["options"], run["options"]
    others = [
        f"{flag} {_value(value)} (then {_value(was.get(flag))})"
        for flag, value in now.items()
        if value != was.get(flag)
    ]
    if before["version"] != run["version"]:
        others.append(f"version {run['version']} of ckpt-avg (then {before['version']})")
    if others:
        raise UsageError(
            f"{file.where}: was written by another run. This one has {listing(others)}. Use the options of that run, "
            "or choose another file."
        )
    expected, names = ([each["name"] for each in of["checkpoints"]] for of in (before, run))
    if names != expected:
        raise UsageError(
            f"{file.where}: was written by a run of other checkpoints: {listing(map(escaped, expected))}; this one has "
            f"{listing(map(escaped, names))}. Select the same ones, or choose another file."
        )
    pairs = zip(run["checkpoints"], before["checkpoints"], strict=True)
    if changed := [escaped(each["name"]) for each, was in pairs if each != was]:
        raise UsageError(f"{file.where}: changed since it was written: {listing(changed)}. {_OTHER}.")


def _value(value: object) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _refuse_generators(data: object, where: str) -> None:
    """Raises UsageError for a loader whose random numbers depend on how often it was used."""
    generators = (getattr(each, "generator", None) for each in (data, getattr(data, "sampler", None)))
    if not callable(data) and any(each is not None for each in generators):
        raise UsageError(
            f"{where}: the loader of --data has a generator of its own, which goes on from refresh to refresh. Let "
            "--data name a function that makes the loader."
        )
