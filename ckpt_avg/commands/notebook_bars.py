"""Progress for Python callers who ask for it: lines as on the command line, or bars in a notebook."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ckpt_avg.progress import Phase, Progress
from ckpt_avg.progress_lines import shown
from ckpt_avg.results import numbers
from ckpt_avg.text import one_line

if TYPE_CHECKING:
    from tqdm import tqdm


class _Bars:
    """Draws a bar for each phase, as tqdm does in notebooks. Results and notices are lines."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._total: int | None = None  # of the phase
        self._has_step = False

    def phase(self, phase: Phase) -> None:
        from tqdm.auto import tqdm

        self.close()
        self._total, self._has_step = phase.total, False
        is_in_bytes = phase.unit == "bytes"
        unit = "B" if is_in_bytes else f" {phase.unit}"
        self._bar = tqdm(desc=one_line(phase.title), total=phase.total, unit=unit, unit_scale=is_in_bytes)

    def step(self, step: Phase) -> None:
        if self._bar is None:
            return
        self._has_step = True
        if self._total is None and step.total is not None:
            self._bar.unit = f" {step.unit}"
            self._bar.reset(total=step.total)
        self._bar.set_postfix_str(one_line(step.title))

    def advance(self, amount: int) -> None:
        if self._bar is not None and not (self._has_step and self._total is not None):
            self._bar.update(amount)

    def measured(self, name: str, metrics: Mapping[str, float]) -> None:
        print(one_line(f"{name}: {numbers(metrics)}"), file=sys.stderr)
        if self._bar is not None and (self._total or 0) > 1:
            self._bar.update(1)

    @staticmethod
    def notice(text: str) -> None:
        print(f"Notice: {one_line(text)}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextlib.contextmanager
def shown_on_request() -> Iterator[Progress]:
    """Yields callbacks that show how far the work is."""
    if "ipykernel" not in sys.modules or sys.stderr.isatty():
        with shown() as progress:
            yield progress
        return
    bars = _Bars()
    with contextlib.closing(bars):
        yield Progress(bars.phase, bars.step, bars.advance, bars.measured, bars.notice)
