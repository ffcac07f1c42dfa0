"""Python's search for cyclic garbage, put off while many small objects are made that hold no cycles.

Tables of headers are hundreds of thousands of objects, and each full collection walks all of them: with 100,000 tensors
that took a third of the time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Switches the cyclic collector off inside, and on again behind if it was on."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
