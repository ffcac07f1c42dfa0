"""What a running command carries from step to step."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.progress import Phase, Progress
from ckpt_avg.text import decimal_size
from ckpt_avg.wording import worded


class Context:
    """The ranks, the callbacks, the notices so far, the open files. Errors inside are reported to the other ranks.

    Attributes:
        phases_left: how many phases follow the present one; None if that is unknown.
    """

    def __init__(self, ranks: Ranks | None = None, progress: Progress | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.notices: list[str] = []
        self.files = ExitStack()
        self.phases_left: int | None = None
        self._callbacks = progress or Progress()
        self.progress = replace(self._callbacks, notice=self.notice)

    def notice(self, text: str) -> None:
        """Shows a notice, unless it was shown before."""
        text = worded(text)
        if text not in self.notices:
            self.notices.append(text)
            self._callbacks.notice(text)

    def phase(self, phase: Phase) -> None:
        """Tells the user that a phase of the work starts."""
        if self.phases_left is not None:
            self.phases_left = max(0, self.phases_left - 1)
        self.progress.phase(replace(phase, left=self.phases_left))

    def __enter__(self) -> Context:
        self.files.enter_context(self.ranks.share_errors())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.files.__exit__(kind, error, traceback)


def reading(what: str, count: int, nbytes: int) -> Phase:
    """Returns the phase that reads checkpoints of ``nbytes`` bytes each."""
    return Phase(f"{what} {count} × {decimal_size(nbytes)}", count * nbytes, "bytes")
