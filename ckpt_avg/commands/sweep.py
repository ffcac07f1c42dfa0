"""Which window of checkpoints to average: the last k, and the first k, of a run, each measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt_avg.batchnorm.policy import check_bn
from ckpt_avg.batchnorm.refresh import check_options
from ckpt_avg.batchnorm.refresh_output import RefreshOptions
from ckpt_avg.commands.prepare import Rules, prepare
from ckpt_avg.commands.windows import SIDES, Side, Work, measure_windows, passes, windows_of
from ckpt_avg.errors import IncompatibleError, UsageError, UserCodeError
from ckpt_avg.files.input_file import check_io
from ckpt_avg.formats.open import make_reading
from ckpt_avg.machine import choose_threads
from ckpt_avg.mean.devices import choose_devices
from ckpt_avg.mean.plan import check_rules
from ckpt_avg.mean.stream import DEFAULT_MEMORY, check_memory
from ckpt_avg.progress import Progress
from ckpt_avg.runs.discover import Sources, discover
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.runs.select import Selection
from ckpt_avg.text import listing, quote
from ckpt_avg.user_code.batches import ForwardBatch
from ckpt_avg.user_code.evaluate import Evaluate, Evaluation, evaluate_weights, refuse_other_metrics
from ckpt_avg.user_code.model import Batches, Model, weights_of

DEFAULT_HOLD = 2 * 2**30  # bytes


@dataclass(frozen=True, slots=True)
class Measured:
    """One window of a sweep.

    Attributes:
        side: ``last`` or ``first``.
        checkpoints: what was averaged, in order.
        metrics: what the user's function measured of the average.
    """

    side: Side
    checkpoints: tuple[Path, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What `sweep` measured.

    Attributes:
        checkpoints: all that were selected, in order.
        skipped: files of run folders that were left out, with reasons.
        last: the last checkpoint as it is.
        windows: the averages, in the order in which they were measured.
        metric, mode: by which metric they are compared, and whether ``min`` or ``max`` is better.
        best: the best of the windows; of equals the one with the fewest checkpoints, the last ones first.
        refreshed: whether the statistics of each were measured anew.
        passes: how many times the checkpoints were read.
        notices: what the user should know.
    """

    checkpoints: tuple[Path, ...]
    skipped: tuple[Skipped, ...]
    last: Evaluation
    windows: tuple[Measured, ...]
    metric: str
    mode: str
    best: Measured
    refreshed: bool
    passes: int
    notices: tuple[str, ...]


def sweep(
    sources: Sources,
    *,
    evaluate: Evaluate,
    model: Model,
    maximize: str | None = None,
    minimize: str | None = None,
    windows: str = "both",
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
    device: str = "auto",
    dtype: str = "keep",
    threads: int | None = None,
    memory: int = DEFAULT_MEMORY,
    io: str = "auto",
    hold: int | None = None,
    non_float: str = "equal",
    allow_nonfinite: bool = False,
    data: Batches | None = None,
    forward_batch: ForwardBatch | None = None,
    bn: str = "auto",
    bn_batches: int | None = None,
    bn_estimator: str = "pooled",
    amp: str = "off",
    progress: Progress | None = None,
) -> SweepResult:
    """Measures the average of the last k checkpoints for each k, and of the first k, each with its own refresh.

    Every average is what `average` would write for these checkpoints, bit for bit. Nothing is written.

    Args:
        sources, last, every, from_step, to_step, best, metric, mode, include, exclude, at_lr_minima: which checkpoints,
            as for `average`; the windows are cut from these.
        state_key, ema, strip_prefix: how to read them.
        evaluate: called with the model in evaluation mode; it returns a number or a dict of them.
        maximize, minimize: the metric that says which average is best; one of the two.
        windows: ``last``, ``first`` or ``both``.
        hold: bytes of averages that may wait in memory at once; 2 GiB if not given. More memory means fewer passes over
            the checkpoints.
        model, data, forward_batch, bn, bn_batches, bn_estimator, amp: for the refresh, as for `average`.
        device, dtype, threads, memory, io, non_float, allow_nonfinite: for the mean, as for `average`.
        progress: callbacks.

    Returns:
        What was measured.

    Raises:
        CkptAvgError: as `average`, but for the output.

    Example:
        >>> import sys
        >>> sys.path.insert(0, "fixtures/mnist_cnn")
        >>> from train import evaluate, make_model
        >>> run = "fixtures/mnist_cnn"
        >>> result = sweep(run, evaluate=evaluate, model=make_model, bn="keep", last=3, minimize="loss")
        >>> [(window.side, len(window.checkpoints)) for window in result.windows]
        [('last', 1), ('last', 2), ('last', 3), ('first', 1), ('first', 2)]
    """
    progress = progress or Progress()
    notices: list[str] = []

    def notice(text: str) -> None:
        notices.append(text)
        progress.notice(text)

    check_rules(dtype, non_float)
    check_bn(bn)
    check_memory(memory)
    way = check_io(io)
    check_options(bn_estimator, amp, bn_batches)
    if windows not in SIDES:
        raise UsageError(f"--windows: expected one of {', '.join(SIDES)}, got {windows!r}.")
    target, highest = _target(maximize, minimize)
    if hold is not None and hold < 0:
        raise UsageError(f"--hold: expected 0 or more, got {hold:,}.")
    selection = Selection(include, exclude, from_step, to_step, at_lr_minima, every, last, best, metric, mode)
    reading = make_reading(state_key, ema, strip_prefix)
    mean_device, model_device = choose_devices(device)
    options = RefreshOptions(model_device, bn_estimator, bn_batches, amp, forward_batch)
    workers = choose_threads(threads)
    with ExitStack() as stack:
        rules = Rules(dtype, non_float, bn, model, data, evaluates=True, in_windows=True)
        ready = prepare(discover(sources), selection, reading, rules, stack, io=way, notice=notice)
        if ready.model is None or len(ready.checkpoints) < 2:
            raise IncompatibleError(
                f"{ready.specs[0].path}: nothing to compare: expected at least two checkpoints, got this one. Name "
                "more."
            )
        if ready.refresh is not None and ready.refresh.passes.is_single:
            raise UsageError(
                "the data: expected batches for several passes, got an iterator, which is used up after one. Pass a "
                "factory of it, or a DataLoader."
            )
        newest = ready.checkpoints[-1]
        progress.evaluating(newest.spec.name)
        as_it_is = evaluate_weights(
            evaluate, ready.model, weights_of(newest), name=newest.spec.name, device=options.device
        )
        if target not in as_it_is:
            raise UsageError(
                f"--{'maximize' if highest else 'minimize'} {target}: expected one of the metrics that the --eval "
                f"function returns ({listing(map(quote, as_it_is))})."
            )
        held = DEFAULT_HOLD if hold is None else hold
        once = replace(progress, notice=_once(notice))
        work = Work(evaluate, ready.model, options, mean_device, workers, memory, held, allow_nonfinite, once)
        chosen = windows_of(len(ready.checkpoints), windows)
        paths = tuple(spec.path for spec in ready.specs)
        measured = []
        for window, metrics in measure_windows(ready, chosen, work):
            refuse_other_metrics(as_it_is, metrics, f"the {window.side} {len(window.members)}")
            measured.append(Measured(window.side, paths[window.members.start : window.members.stop], metrics))
        return SweepResult(
            checkpoints=paths,
            skipped=ready.skipped,
            last=Evaluation(newest.spec.name, newest.spec.path, as_it_is),
            windows=tuple(measured),
            metric=target,
            mode="max" if highest else "min",
            best=_best(measured, target, highest),
            refreshed=ready.refresh is not None,
            passes=len(passes(ready, chosen, held)),
            notices=tuple(notices),
        )


def _target(maximize: str | None, minimize: str | None) -> tuple[str, bool]:
    if (maximize is None) == (minimize is None):
        raise UsageError(
            "expected one of --maximize METRIC (an accuracy, say) and --minimize METRIC (a loss), got "
            f"{'neither' if maximize is None else 'both'}."
        )
    return (maximize, True) if maximize is not None else (minimize or "", False)


def _best(windows: Sequence[Measured], metric: str, highest: bool) -> Measured:
    known = [window for window in windows if not math.isnan(window.metrics[metric])]
    if not known:
        raise UserCodeError(f"the --eval function: expected numbers for {quote(metric)}, got NaN for every average.")
    sign = -1.0 if highest else 1.0
    # Of equals, min returns the first.
    return min(known, key=lambda window: (sign * window.metrics[metric], len(window.checkpoints)))


def _once(notice: Callable[[str], None]) -> Callable[[str], None]:
    """Passes on each text the first time only: each window would say the same of its refresh."""
    seen: set[str] = set()

    def pass_on(text: str) -> None:
        if text not in seen:
            seen.add(text)
            notice(text)

    return pass_on
