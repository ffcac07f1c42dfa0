"""Shows progress on stderr: a line for each phase, which is redrawn on a terminal, and stays when the phase is done.

Without a terminal there is a line only for what takes long, so that logs stay short.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from ckpt_avg.progress import Phase, Progress
from ckpt_avg.tables import columns_of, shortened
from ckpt_avg.text import decimal_size, one_line, safe_text

_REDRAWN = 0.25  # seconds between two states of a line on a terminal
_LONG = 30.0  # seconds after which a phase has a line in a log, and between two such lines
_WIDEST = 30  # columns of a name
_MOST_METRICS = 3
_DRAWING = threading.RLock()
if hasattr(os, "register_at_fork"):  # a data loader's worker must not inherit a lock that nobody will release
    os.register_at_fork(before=_DRAWING.acquire, after_in_parent=_DRAWING.release, after_in_child=_DRAWING.release)


class _Count:
    """How far a phase or a step is."""

    def __init__(self, phase: Phase, begin: float) -> None:
        self.phase, self.begin, self.done = phase, begin, 0
        self.known = 0  # of ``done``, what took no time

    def rate(self, seconds: float) -> str:
        """Returns what was done per second; nothing if that is unknown, or the time too short to tell."""
        if not self.done or not self.phase.unit or seconds < 0.05:
            return ""
        done = self.done / seconds
        return f"{decimal_size(done)}/s" if self.phase.unit == "bytes" else f"{done:.3g} {self.phase.unit}/s"

    def left(self, seconds: float, since: float = 0.0) -> str:
        """Returns for how long it will go on, if known: what is done took ``seconds``, then ``since`` passed."""
        if self.done == self.known or not self.phase.total or self.done >= self.phase.total:
            return ""
        each, others = seconds / (self.done - self.known), self.phase.total - self.done
        return f"{duration(each * others - min(since, each))} left"

    @property
    def share(self) -> str:
        """How much of the total is done, in percent."""
        return f"{min(100, 100 * self.done // self.phase.total)} %" if self.phase.total else ""


class Lines:
    """Draws the phases of one run.

    Args:
        stream: what is written to.
        is_terminal: whether lines can be redrawn.
        keep: whether a phase leaves a line when it is done.
        paint: puts colours into a line.
        clock: the time in seconds.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        is_terminal: bool,
        keep: bool = True,
        paint: Callable[[str], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._is_terminal, self._keep, self._clock = stream, is_terminal, keep, clock
        self._paint = paint
        self._phase: _Count | None = None
        self._step: _Count | None = None
        self._number = 0
        self._measured = ""  # what a phase of one measurement found
        self._last = 0.0  # when the last measurement ended, or the phase began
        self._said = 0.0  # when the last line of this phase was written
        self._held: list[str] | None = [] if is_terminal else None  # lines, until it is known that the run takes long
        self._drawn = 0  # how long the line is that may be redrawn
        self._is_free = True  # whether the cursor is at the beginning of a line
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None

    def phase(self, phase: Phase) -> None:
        """Ends the phase before, and starts this one."""
        with _DRAWING:
            now = self._clock()
            self._finish(now, -1 if phase.left is None else phase.left + 1)
            self._phase, self._step, self._measured = _Count(phase, now), None, ""
            self._number += 1
            self._last = self._said = now
            if self._ticker is None:
                self._ticker = threading.Thread(target=self._tick, name="ckpt-avg progress", daemon=True)
                with contextlib.suppress(RuntimeError):  # no memory for a thread: nothing is redrawn
                    self._ticker.start()

    def step(self, step: Phase) -> None:
        """Starts a part of the phase."""
        self._step = _Count(step, self._clock())

    def advance(self, amount: int) -> None:
        """Counts what was done."""
        counted = self._step or self._phase
        if counted is not None:
            counted.done += amount

    def measured(self, name: str, metrics: Mapping[str, float]) -> None:
        """Shows a result."""
        with _DRAWING:
            now, found = self._clock(), _found(metrics)
            phase = self._phase
            if phase is None or (phase.phase.total or 1) == 1:
                self._measured = found
                return
            phase.done += 1
            phase.known += self._step is None
            took = "known before" if self._step is None else duration(now - self._last)
            self._step = None
            self._release()
            self.write(f"{self._place(phase, phase.done)}, {shortened(name, _WIDEST)}: {found}, {took}")
            self._last = self._said = now

    def notice(self, text: str) -> None:
        """Shows a notice."""
        self.write(f"Notice: {text}")

    def write(self, line: str) -> None:
        """Writes a line above the one that is redrawn. A broken stderr must not stop the work."""
        with _DRAWING, contextlib.suppress(OSError, ValueError):
            self._erase()
            self._stream.write(f"{self._paint(safe_text(one_line(line)))}\n")
            self._stream.flush()

    def pass_on(self, text: str) -> None:
        """Writes what the user's code prints. A line that it has not ended is not drawn over."""
        with _DRAWING:
            self._erase()
            self._stream.write(text)
            self._is_free = text[-1:] in ("\n", "\r") if text else self._is_free

    def close(self, *, failed: bool) -> None:
        """Ends the last phase."""
        self._ended.set()
        with _DRAWING, contextlib.suppress(OSError, ValueError):
            now = self._clock()
            if not failed:
                self._finish(now, 0)
            elif self._phase is not None and self._is_terminal and self._held is None:
                after = f"stopped after {duration(now - self._phase.begin)}"
                self.write(", ".join(filter(None, (f"{self._head()}: {after}", self._phase.share))))
            self._phase = None
            self._erase()
            self._stream.flush()

    def draw(self) -> None:
        """Draws the state of the phase: again and again on a terminal, rarely elsewhere."""
        with _DRAWING, contextlib.suppress(OSError, ValueError):
            now = self._clock()
            if self._phase is None:
                return
            if self._is_terminal:
                if self._is_free:
                    self._release()
                    self._redraw(self._state(now))
            elif now - self._said >= _LONG:
                self._said = now
                self.write(self._state(now))

    def _tick(self) -> None:
        while not self._ended.wait(_REDRAWN):
            self.draw()

    def _finish(self, now: float, left: int) -> None:
        """Writes the line of a phase that is done, before ``left`` others; -1 if that is unknown."""
        counted = self._phase
        if counted is None or not self._keep or (not self._is_terminal and now - counted.begin < _LONG):
            return
        seconds = now - counted.begin
        rated = self._step if counted.phase.total is None and self._step is not None else counted
        facts = [self._measured, duration(seconds), rated.rate(now - rated.begin)]
        if counted.phase.unit != "bytes" and (counted.phase.total or 1) > 1:
            facts[-1] = f"{duration(seconds / (counted.phase.total or 1))} each"
        line = f"{self._head(left)}: {', '.join(filter(None, facts))}"
        if self._held is None:
            self.write(line)
        else:
            self._held.append(line)

    def _release(self) -> None:
        """Writes the lines that were held back: the run is none that is over at once."""
        held, self._held = self._held or [], None
        for line in held:
            self.write(line)

    def _head(self, left: int = -1) -> str:
        """Returns which phase this is, of how many, and its title; ``left`` phases follow if it does not know."""
        if self._phase is None:
            return ""
        phase = self._phase.phase
        left = left if phase.left is None else phase.left
        return f"[{self._number}/{'…' if left < 0 else self._number + left}] {phase.title}"

    def _state(self, now: float) -> str:
        counted, step = self._phase, self._step
        if counted is None:
            return ""
        head, inner = self._head(), step or counted
        if step is not None and counted.phase.total:
            head = f"{head.partition(']')[0]}] {self._place(counted, counted.done + 1)}"
        if step is not None and (counted.phase.total or not counted.phase.title.startswith(step.phase.title)):
            head += f", {step.phase.title}"
        seconds = now - inner.begin
        left = inner.left(seconds)
        if step is not None and counted.phase.total:
            left = counted.left(self._last - counted.begin, now - self._last)
        facts = [inner.share, inner.rate(seconds), left]
        if not inner.done:
            facts.insert(0, duration(seconds))
        return f"{safe_text(one_line(head))}: {', '.join(filter(None, facts))}"

    @staticmethod
    def _place(counted: _Count, number: int) -> str:
        return f"{counted.phase.unit[:-1]} {number} of {counted.phase.total}"

    def _redraw(self, text: str) -> None:
        text = shortened(text, _columns(self._stream) - 1)
        width = columns_of(text)
        self._stream.write(f"\r{text}{' ' * (self._drawn - width)}")
        self._stream.flush()
        self._drawn = width

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(f"\r{' ' * self._drawn}\r")
            self._drawn = 0


class _Through:
    """A stream for the user's code, which does not write into the line that is redrawn."""

    def __init__(self, lines: Lines, stream: TextIO) -> None:
        self._lines, self._stream = lines, stream

    def write(self, text: str) -> int:
        self._lines.pass_on(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def shown(*, quiet: bool = False, keep: bool = True, paint: Callable[[str], str] = str) -> Iterator[Progress]:
    """Yields callbacks that show phases, results and notices on stderr; nothing if ``quiet``.

    Without ``keep`` a phase leaves no line when it is done. ``paint`` puts colours into a line.
    """
    if quiet:
        yield Progress()
        return
    stream = sys.stderr
    lines = Lines(stream, is_terminal=stream.isatty(), keep=keep, paint=paint)
    progress = Progress(lines.phase, lines.step, lines.advance, lines.measured, lines.notice)
    through: Any = _Through(lines, stream) if stream.isatty() else stream
    failed = True
    try:
        with contextlib.redirect_stderr(through):
            yield progress
        failed = False
    finally:
        lines.close(failed=failed)


def _found(metrics: Mapping[str, float]) -> str:
    shown = [f"{shortened(metric, _WIDEST)} {value:.6g}" for metric, value in list(metrics.items())[:_MOST_METRICS]]
    more = len(metrics) - len(shown)
    return ", ".join([*shown, *([f"… {more} more"] if more else [])])


def duration(seconds: float) -> str:
    """Returns a time for people: ``0.02 s``, ``1.7 s``, ``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 99.5:
        return f"{seconds:.2f} s" if seconds < 0.095 else f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
