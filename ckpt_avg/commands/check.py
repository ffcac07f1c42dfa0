"""`check`: whether checkpoints can be averaged, from their headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.commands.requests import CheckRequest, takes
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.formats.torch_file import RUNNING_AVERAGE
from ckpt_avg.mean.buffers import BufferKind, kinds_of, notices
from ckpt_avg.progress import Phase
from ckpt_avg.runs.compatibility import CompatibilityReport, compare
from ckpt_avg.runs.discover import discover
from ckpt_avg.runs.select import open_selected
from ckpt_avg.text import listing, quote
from ckpt_avg.wording import worded_all


@takes(CheckRequest)
def check(request: CheckRequest) -> CompatibilityReport:
    """Compares checkpoints by their headers alone. The report's ``compatible`` says whether they can be averaged.

    Args:
        The fields of `CheckRequest`.

    Raises:
        CkptAvgError: a checkpoint cannot be opened, or there is none.

    Example:
        >>> check(["fixtures/mnist_cnn"]).compatible
        True
    """
    texts: list[str] = []
    progress = replace(request.callbacks, notice=texts.append)
    progress.phase(Phase("opening checkpoints", left=0))
    with ExitStack() as stack:
        selected = open_selected(
            discover(request.sources, request.include), request, request, stack, progress, compare_in_full=False
        )
        notice_what_is_read(selected.checkpoints, texts.append)
        report = compare([checkpoint.spec for checkpoint in selected.checkpoints])
        return replace(report, skipped=selected.skipped, notices=worded_all(texts))


def notice_what_is_read(
    checkpoints: Sequence[Checkpoint],
    notice: Callable[[str], None],
    *,
    copies: bool = True,
    kinds: Mapping[str, BufferKind] | None = None,
    ties: bool = True,
) -> None:
    """Tells how the checkpoints are read, which are averages already (``copies``: also of a single one), which tensors
    are tied (``ties``).

    ``kinds`` of the tensors, if they are known, says which are no plain weights.

    Raises IncompatibleError if some contain raw weights, others only a running average.
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
                f"{running.path}: has only {running.averaged}, while {raw.path} has raw weights. Average one kind: "
                "select it with --include or --exclude, --ema or --state-key."
            )
        if copies or len(checkpoints) > 1:
            more = len(averaged) - 1
            others = f", as {'is' if more == 1 else 'are'} {more:,} of the others" if more else ""
            notice(f"{averaged[0].path.name} is already an average ({averaged[0].averaged}){others}")
    if copies and len(checkpoints) == 1:
        notice(f"{first.path} is the only checkpoint: its weights are copied")
    if ties:
        notice_tied(first.tied(), notice)
    if len(checkpoints) > 1:
        for text in notices(kinds_of(first.tensors) if kinds is None else kinds):
            notice(text)


def notice_tied(groups: Sequence[Sequence[str]], notice: Callable[[str], None]) -> None:
    """Tells that the output will have tied tensors under each name."""
    if groups:
        names = listing(listing(map(quote, each), separator="=") for each in groups)
        notice(f"tied weights are written under each of their names: {names}")
