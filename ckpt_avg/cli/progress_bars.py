"""Progress bars and notices on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from ckpt_avg.progress import Progress
from ckpt_avg.text import one_line, safe_text


@contextlib.contextmanager
def bars(*, quiet: bool, reading: str = "averaging") -> Iterator[Progress]:
    """Yields callbacks that draw one bar for each pass over the files, called ``reading``, each refresh and evaluation.

    Bars appear on a terminal only; notices are printed in any case, unless ``quiet``.
    """
    disable = True if quiet else None  # None: tqdm draws on a terminal only
    open_bars: dict[str, tqdm[Any]] = {}

    def start(total: int) -> None:
        close()
        open_bars["averaging"] = tqdm(
            desc=reading,
            total=total,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=disable,
            file=sys.stderr,
        )

    def read(nbytes: int) -> None:
        open_bars["averaging"].update(nbytes)

    def refreshing(batches: int | None) -> None:
        close()
        open_bars["refresh"] = tqdm(
            desc="BatchNorm refresh", total=batches, unit=" batches", disable=disable, file=sys.stderr
        )

    def refreshed(batches: int, samples: int) -> None:
        bar = open_bars["refresh"]
        rate = samples / max(bar.format_dict["elapsed"], 1e-9)
        bar.set_postfix_str(f"{samples:,} samples, {rate:,.0f}/s", refresh=False)
        bar.update(batches - bar.n)  # other ranks run those in between

    def evaluating(name: str) -> None:
        close()
        open_bars["evaluating"] = tqdm(
            desc=safe_text(f"evaluating {name}"), bar_format="{desc} … {elapsed}", disable=disable, file=sys.stderr
        )
        open_bars["evaluating"].refresh()

    def close() -> None:
        for bar in open_bars.values():
            bar.close()
        open_bars.clear()

    def notice(text: str) -> None:
        if not quiet:
            with contextlib.suppress(OSError):  # a stderr that takes no more must not stop the averaging
                tqdm.write(safe_text(f"Notice: {one_line(text)}"), file=sys.stderr)

    try:
        yield Progress(start, read, refreshing, refreshed, evaluating, notice)
    finally:
        close()
