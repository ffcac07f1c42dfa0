"""Progress bars and notices on stderr. Without a terminal there are no bars, and tqdm is not imported."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ckpt_avg.cli.colours import coloured
from ckpt_avg.progress import Progress
from ckpt_avg.text import one_line, safe_text

if TYPE_CHECKING:
    from tqdm import tqdm


class _Bars:
    """Draws one bar at a time: for a pass over the files, a refresh or an evaluation."""

    def __init__(self, reading: str, quiet: bool) -> None:
        self._reading = reading
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None

    def _open(self, **options: Any) -> None:
        self.close()
        if not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(file=sys.stderr, **options)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total: int) -> None:
        self._open(desc=self._reading, total=total, unit="B", unit_scale=True, unit_divisor=1024)

    def read(self, nbytes: int) -> None:
        if self._bar is not None:
            self._bar.update(nbytes)

    def refreshing(self, batches: int | None) -> None:
        self._open(desc="BatchNorm refresh", total=batches, unit=" batches")

    def refreshed(self, batches: int, samples: int) -> None:
        if self._bar is not None:
            rate = samples / max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(f"{samples:,} samples, {rate:,.0f}/s", refresh=False)
            self._bar.update(batches - self._bar.n)  # other ranks run batches, too

    def evaluating(self, name: str) -> None:
        self._open(desc=safe_text(one_line(f"evaluating {name}")), bar_format="{desc} … {elapsed}")

    def notice(self, text: str) -> None:
        write = print if self._bar is None else self._bar.write  # above the bar
        if not self._quiet:
            with contextlib.suppress(OSError):  # a broken stderr must not stop the averaging
                write(coloured(safe_text(f"Notice: {one_line(text)}"), sys.stderr), file=sys.stderr)


@contextlib.contextmanager
def bars(*, quiet: bool, reading: str = "averaging") -> Iterator[Progress]:
    """Yields callbacks that draw bars on a terminal and print notices, nothing if ``quiet``.

    ``reading`` names a pass over the files.
    """
    shown = _Bars(reading, quiet)
    try:
        yield Progress(shown.start, shown.read, shown.refreshing, shown.refreshed, shown.evaluating, shown.notice)
    finally:
        shown.close()
