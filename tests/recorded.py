"""What a command tells of its progress, recorded; and what a terminal shows of it."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_avg.progress import Phase, Progress


class Recorded:
    """Records the calls; ``progress`` is what a command takes.

    Attributes:
        phases: each phase.
        counted: each phase and each step of one, and how much of it was done.
        measured: the name of what was measured.
        notices: each notice.
    """

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.counted: list[tuple[Phase, int]] = []
        self.measured: list[str] = []
        self.notices: list[str] = []
        self.progress = Progress(self._phase, self._step, self._advance, self._measured, self.notices.append)

    def _phase(self, phase: Phase) -> None:
        self.phases.append(phase)
        self._step(phase)

    def _step(self, step: Phase) -> None:
        self.counted.append((step, 0))

    def _advance(self, amount: int) -> None:
        step, done = self.counted[-1]
        self.counted[-1] = step, done + amount

    def _measured(self, name: str, metrics: Mapping[str, float]) -> None:
        self.measured.append(name)

    def passes(self, of: str = "bytes") -> list[int]:
        """Returns the totals of what was counted in this unit; all of it was done."""
        counted = [(step.total, done) for step, done in self.counted if step.unit == of]
        assert [done for _, done in counted] == [total for total, _ in counted]
        return [done for _, done in counted]


def on_screen(text: str) -> list[str]:
    """The lines that a terminal shows: a carriage return goes back, and later signs replace earlier ones."""
    rows = []
    for row in text.split("\n"):
        cells: list[str] = []
        for part in row.split("\r"):
            cells[: len(part)] = part
        rows.append("".join(cells).rstrip())
    return rows
