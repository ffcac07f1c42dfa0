"""Lets the system load the inputs while something else takes the time, such as the import of torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import spans
from ckpt_avg.files.read_ahead import ReadAhead
from ckpt_avg.mean.blocks import cut_into_blocks
from ckpt_avg.mean.plan import Plan

_MOST = 2 * 2**30  # bytes: what fast storage delivers in that time
# An import leaves the interpreter to another thread only every 5 ms (sys.getswitchinterval): few requests, large ones.
_REQUEST = 16 * 2**20  # bytes
_REQUESTS = 1024
_READERS = 2  # at most


@contextlib.contextmanager
def loading(checkpoints: Sequence[Checkpoint], plan: Plan, *, readers: int) -> Iterator[None]:
    """Meanwhile lets the system load what the mean reads first, as far as it gets. A hint: it reports no error.

    Without ``readers`` nothing is loaded.
    """
    with ReadAhead(min(readers, _READERS), _REQUEST) as ahead:
        left = _MOST
        for _, blocks in zip(range(_REQUESTS // len(checkpoints)), cut_into_blocks(plan, _REQUEST // 4), strict=False):
            for block in blocks:
                ahead.ask(spans(checkpoint, block.stored_in(checkpoint)) for checkpoint in checkpoints)
                left -= block.numel * block.source_dtype.itemsize * len(checkpoints)
            if left <= 0:
                break
        yield
