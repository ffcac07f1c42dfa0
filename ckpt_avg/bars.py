"""Progress bars and notices on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from ckpt_avg.api import Progress
from ckpt_avg.messages import safe_text


@contextlib.contextmanager
def bars(*, quiet: bool) -> Iterator[Progress]:
    """Yields callbacks that draw one bar for the averaging and one for the refresh.

    Bars appear on a terminal only; notices are printed in any case, unless ``quiet``.
    """
    disable = True if quiet else None  # None: tqdm draws on a terminal only
    open_bars: dict[str, tqdm[Any]] = {}

    def start(total: int) -> None:
        open_bars["averaging"] = tqdm(
            desc="averaging",
            total=total,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=disable,
            file=sys.stderr,
        )

    def read(nbytes: int) -> None:
        open_bars["averaging"].update(nbytes)

    def refreshed(batches: int, samples: int) -> None:
        if "refresh" not in open_bars:
            open_bars["averaging"].close()
            open_bars["refresh"] = tqdm(desc="BatchNorm refresh", unit=" batches", disable=disable, file=sys.stderr)
        open_bars["refresh"].set_postfix_str(f"{samples:,} samples", refresh=False)
        open_bars["refresh"].update(1)

    def notice(text: str) -> None:
        if not quiet:
            with contextlib.suppress(OSError):  # a stderr that takes no more must not stop the averaging
                tqdm.write(safe_text(f"Notice: {text}"), file=sys.stderr)

    try:
        yield Progress(start, read, refreshed, notice)
    finally:
        for bar in open_bars.values():
            bar.close()
