"""`check`: whether checkpoints can be averaged, from their headers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.formats.open import make_reading
from ckpt_avg.formats.torch_file import RUNNING_AVERAGE
from ckpt_avg.runs.compatibility import CompatibilityReport, compare
from ckpt_avg.runs.discover import Sources, discover
from ckpt_avg.runs.select import Selection, open_selected
from ckpt_avg.text import listing, plural, quote


def check(
    sources: Sources,
    *,
    last: int | None = None,
    every: int | None = None,
    from_step: int | None = None,
    to_step: int | None = None,
    best: int | None = None,
    metric: str | None = None,
    mode: str | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    at_lr_minima: bool = False,
    state_key: str | None = None,
    ema: bool = False,
    strip_prefix: str | None = None,
) -> CompatibilityReport:
    """Says whether checkpoints can be averaged, from their headers alone.

    Args:
        sources: checkpoint files, checkpoint folders and run folders.
        last, every, from_step, to_step, best, metric, mode, include, exclude, at_lr_minima: which of them, as for
            `average`.
        state_key, ema, strip_prefix: how to read each, as for `open_checkpoint`.

    Returns:
        The report; ``report.compatible`` is the answer.

    Raises:
        CkptAvgError: a checkpoint cannot be opened, or there is none.

    Example:
        >>> check(["fixtures/mnist_cnn"]).compatible
        True
    """
    selection = Selection(include, exclude, from_step, to_step, at_lr_minima, every, last, best, metric, mode)
    reading = make_reading(state_key, ema, strip_prefix)
    with ExitStack() as stack:
        notices: list[str] = []
        checkpoints, skipped = open_selected(
            discover(sources), selection, reading, stack, notices.append, copy_test="same step"
        )
        notice_what_is_read(checkpoints, notices.append)
        report = compare([checkpoint.spec for checkpoint in checkpoints])
        return replace(report, skipped=skipped, notices=tuple(notices))


def notice_what_is_read(
    checkpoints: Sequence[Checkpoint], notice: Callable[[str], None], *, copies: bool = True
) -> None:
    """Tells how the checkpoints were read, which are averages already, and which tensors are tied.

    Args:
        checkpoints: what will be read.
        notice: told what the user should know.
        copies: whether to say of a single checkpoint that it is copied, or an average already.
    """
    first = checkpoints[0].spec
    for spec in (checkpoint.spec for checkpoint in checkpoints):
        for note in spec.notes if spec.notes != first.notes or spec is first else ():
            notice(f"{spec.path}: {note}")
    if averaged := [spec for spec in (checkpoint.spec for checkpoint in checkpoints) if spec.averaged]:
        running = next((spec for spec in averaged if spec.averaged.startswith(RUNNING_AVERAGE)), None)
        if running and len(averaged) < len(checkpoints):
            raw = next(checkpoint.spec for checkpoint in checkpoints if not checkpoint.spec.averaged)
            raise IncompatibleError(
                f"{running.path}: {running.averaged} is all that it holds, while {raw.path} holds raw weights. Average "
                "either kind: choose with --include and --exclude, --ema or --state-key."
            )
        if copies or len(checkpoints) > 1:
            hold = "holds an average" if len(averaged) == 1 else "hold an average"
            notice(
                f"{len(averaged)} of {plural(len(checkpoints), 'checkpoint')} {hold} already "
                f"({averaged[0].path.name}: {averaged[0].averaged})"
            )
    if copies and len(checkpoints) == 1:
        notice(f"{first.path} is the only checkpoint, so its weights are copied")
    if tied := first.tied():
        notice(f"tied tensors are written under each name: {listing('='.join(map(quote, names)) for names in tied)}")
