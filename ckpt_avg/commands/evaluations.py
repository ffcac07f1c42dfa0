"""What is measured before and after averaging, and whether it meets the requirements."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.checkpoint.tensor_reads import torch_dtype
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.prepare import Prepared
from ckpt_avg.commands.requests import AverageRequest, MeanRequest
from ckpt_avg.progress import Phase
from ckpt_avg.text import distinct_names, plural
from ckpt_avg.user_code.comparison import Comparison, Evaluation, compare, mean_of
from ckpt_avg.user_code.gate import Outcome, needs_all, outcomes, refuse_unknown_metrics

if TYPE_CHECKING:
    import torch

    from ckpt_avg.batchnorm.refresh import BatchNormReport

_CHUNK = 2**20  # elements that are rounded at a time


def led_by(first: Sequence[str], metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Returns metrics, those that decide something first."""
    return {name: metrics[name] for name in [*first, *metrics] if name in metrics}


class Meter:
    """Measures weights with the user's functions, on rank 0. All ranks take part in refreshes."""

    def __init__(self, request: MeanRequest, prepared: Prepared, context: Context) -> None:
        self._request, self._prepared, self._context = request, prepared, context
        self._expected: Mapping[str, float] | None = None
        self._varies = False

    def refresh(
        self, weights: Mapping[str, torch.Tensor], frozen: Collection[str], seed: int = 0
    ) -> tuple[BatchNormReport, dict[str, torch.Tensor]]:
        """Measures the statistics of weights, except the frozen ones; returns the report and the new tensors."""
        import torch

        from ckpt_avg.batchnorm.refresh_output import refresh_output

        prepared, context = self._prepared, self._context
        if prepared.refresh is None:
            raise ValueError("nothing to refresh")
        return refresh_output(
            prepared.refresh,
            prepared.plan,
            weights,
            frozen=frozen,
            options=self._request,
            device=torch.device(prepared.model_device),
            progress=context.progress,
            ranks=context.ranks,
            seed=seed,
        )

    def measure(
        self,
        name: str,
        path: Path | None,
        weights: Mapping[str, torch.Tensor],
        *,
        frozen: Collection[str] | None = None,
        is_refreshed: bool = False,
    ) -> Evaluation:
        """Measures weights, once for each repeat.

        With ``frozen``, their statistics are refreshed before each repeat, unless they already are for the first.
        """
        found: dict[str, list[float]] = {}
        for seed in range(self._request.eval_repeats):
            values = weights
            if frozen is not None and (seed or not is_refreshed):
                values = {**weights, **self.refresh(weights, frozen, seed)[1]}
            for metrics in self._evaluate(values, name, seed):
                for metric, value in metrics.items():
                    found.setdefault(metric, []).append(value)
        metrics = {metric: mean_of(values) for metric, values in found.items()}
        samples = {metric: tuple(values) for metric, values in found.items() if len(values) > 1}
        return self.compare_with_earlier(Evaluation(name, path, metrics, frozen is not None, samples))

    def compare_with_earlier(self, evaluation: Evaluation) -> Evaluation:
        """Returns what was measured. Raises UserCodeError if it has other metrics than what was measured before."""
        self._varies |= any(len(set(values)) > 1 for values in evaluation.samples.values())
        if self._context.ranks.is_first:
            if self._expected is not None:
                from ckpt_avg.user_code.evaluate import refuse_other_metrics

                refuse_other_metrics(self._expected, evaluation.metrics, evaluation.name)
            self._expected = evaluation.metrics
        return evaluation

    def measure_refreshed(self, checkpoint: Checkpoint, name: str, frozen: Collection[str]) -> Evaluation:
        """Measures what `average` would write of this checkpoint alone, its statistics refreshed."""
        import torch

        from ckpt_avg.mean.arithmetic import round_to
        from ckpt_avg.user_code.model import weights_of

        weights = weights_of(checkpoint)
        for tensor in self._prepared.plan.tensors:
            values, dtype = weights[tensor.name], torch_dtype(tensor.dtype)
            if values.dtype != dtype:
                weights[tensor.name] = torch.empty(values.shape, dtype=dtype)
                parts = zip(values.reshape(-1).split(_CHUNK), weights[tensor.name].view(-1).split(_CHUNK), strict=True)
                for part, rounded in parts:
                    rounded.copy_(round_to(part.double(), dtype))
        return self.measure(f"{name}, statistics refreshed", checkpoint.spec.path, weights, frozen=frozen)

    def _repeat(self, step: str, seed: int) -> str:
        repeats = self._request.eval_repeats
        return f"{step}, repeat {seed + 1} of {repeats}" if repeats > 1 else step

    def notice_chance(self) -> None:
        """Tells the user if the repeats say nothing of chance."""
        if self._request.eval_repeats > 1 and self._expected is not None and not self._varies:
            self._context.notice(
                "all repeats gave the same numbers: no random number of the loader or the --eval function changes them"
            )

    def _evaluate(self, weights: Mapping[str, torch.Tensor], name: str, seed: int) -> list[dict[str, float]]:
        prepared, context = self._prepared, self._context
        if not context.ranks.is_first:
            return []
        if prepared.model is None:
            raise ValueError("nothing to measure with")
        import torch

        from ckpt_avg.user_code.evaluate import evaluate_weights

        context.ranks.check(at_once=True)  # the others wait, and take this for a sign of life
        context.progress.step(Phase(self._repeat("measuring", seed)))
        return [
            evaluate_weights(
                function,
                prepared.model,
                weights,
                name=name,
                device=torch.device(prepared.model_device),
                notice=context.notice,
                seed=seed,
            )
            for function in self._request.functions
        ]


class Evaluations(Meter):
    """What `average` measures: checkpoints and their average. Without a function it does nothing.

    ``before`` is what was measured of checkpoints before, in their order, the last one last: the average is compared
    with these, and none is measured again. Some may not be in the average. ``directions`` says for which
    metrics higher is better, or lower; of others the requirements and the names do.
    """

    def __init__(
        self,
        request: AverageRequest,
        prepared: Prepared,
        context: Context,
        before: Sequence[Evaluation] = (),
        directions: Mapping[str, bool] | None = None,
    ) -> None:
        super().__init__(request, prepared, context)
        self._measured: list[Evaluation] = []
        self._before = before
        self._requirements = request.requirements
        self._directions = directions or {}
        self._is_on = bool(request.functions)
        self._several = len(prepared.checkpoints) > 1 or bool(before)
        every = request.evaluate_all or needs_all(request.requirements)
        compared = () if before else prepared.checkpoints if every else (prepared.last,)
        names = distinct_names([each.spec.path for each in compared])
        self._compared = list(zip(compared, names, strict=True))
        self._last_path = before[-1].path if before else prepared.last.spec.path
        self._refreshes = self._is_on and self._several and prepared.refresh is not None and not before
        if self._is_on and request.dry_run:
            context.notice("a dry run measures nothing, so --eval and --require are not tried")
        elif self._refreshes and (every or request.eval_repeats > 1):
            count = (len(compared) + 1) * request.eval_repeats
            context.notice(
                f"{plural(len(compared), 'checkpoint')} will be measured with refreshed statistics, as the average is: "
                f"{count:,} refreshes in all"
            )

    def measure_saved(self) -> None:
        """Measures the last checkpoint, or all of them, before the long work begins.

        Raises UsageError if a requirement names a metric that the functions do not return.
        """
        if not self._is_on:
            return
        from ckpt_avg.user_code.model import weights_of

        self._measured += map(self.compare_with_earlier, self._before)
        self._announce(self._saved)
        for checkpoint, name in self._saved:
            self._add(self.measure(name, checkpoint.spec.path, weights_of(checkpoint)))
            if self._context.ranks.is_first:
                refuse_unknown_metrics(self._requirements, self._measured[0])

    def measure_average(self, weights: Callable[[], Mapping[str, torch.Tensor]], *, is_refreshed: bool) -> None:
        """Measures the average as it would now be published."""
        if not self._is_on or not (is_refreshed or self._measures_unrefreshed):
            return
        name = "average" if self._several else "these weights"
        if is_refreshed:
            name += ", statistics refreshed"
        elif self._several and self._prepared.statistics in ("refreshed", "mean"):
            name += ", statistics averaged"
        frozen = self._prepared.frozen if is_refreshed else None
        self._context.phase(Phase(f"measuring {name}"))
        self._add(self.measure(name, None, weights(), frozen=frozen, is_refreshed=is_refreshed))

    def measure_refreshed_checkpoints(self) -> None:
        """Measures what the average is compared with, if its statistics were refreshed."""
        if self._refreshes:
            frozen = self._prepared.frozen
            self._announce(self._compared, ", refreshed")
            for checkpoint, name in self._compared:
                self._add(self.measure_refreshed(checkpoint, name, frozen))

    def _add(self, evaluation: Evaluation) -> None:
        self._measured.append(evaluation)
        required = [each.metric for each in self._requirements]
        self._context.progress.measured(evaluation.name, led_by(required, evaluation.metrics))

    @property
    def phases(self) -> int:
        """How many phases there are."""
        is_refreshed = self._prepared.refresh is not None
        return bool(self._saved) + self._measures_unrefreshed + is_refreshed + self._refreshes if self._is_on else 0

    @property
    def _saved(self) -> list[tuple[Checkpoint, str]]:
        """The checkpoints that are measured as they were saved."""
        return [each for each in self._compared if not self._refreshes or each[0] is self._prepared.last]

    @property
    def _measures_unrefreshed(self) -> bool:
        """Whether the average is measured before its refresh, if there is one; a single checkpoint has been by then."""
        return self._prepared.refresh is None or (len(self._prepared.checkpoints) > 1 and not self._before)

    def _announce(self, checkpoints: Sequence[tuple[Checkpoint, str]], how: str = "") -> None:
        if len(checkpoints) == 1:
            self._context.phase(Phase(f"measuring {checkpoints[0][1]}{how}"))
        elif checkpoints:
            count = len(checkpoints)
            self._context.phase(Phase(f"measuring {count} checkpoints{how}", count, "checkpoints"))

    def share(self) -> None:
        """Gives what rank 0 has measured to the others, once rank 0 is done with all of its work."""
        mine = [
            [each.name, each.path and str(each.path), each.metrics, each.refreshed, each.samples]
            for each in self._measured
        ]
        ranks = self._context.ranks
        measured = ranks.exchange("done", mine, lambda all_of_them: all_of_them[0])
        if not ranks.is_first:
            self._measured = [
                Evaluation(name, path and Path(path), metrics, refreshed, {key: tuple(v) for key, v in samples.items()})
                for name, path, metrics, refreshed, samples in measured
            ]

    @property
    def measured(self) -> tuple[Evaluation, ...]:
        """Checkpoints as they were saved, checkpoints with refreshed statistics, then the average before and after."""
        return tuple(sorted(self._measured, key=lambda each: (each.path is None, each.refreshed)))

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Each requirement, compared with the last measurement of the average; empty before there is one."""
        saved, refreshed, average = self._kinds()
        return outcomes(self._requirements, average, refreshed or saved, self._last(saved)) if average else ()

    @property
    def comparison(self) -> Comparison | None:
        """What averaging and the refresh changed; None if nothing was measured."""
        saved, refreshed, average = self._kinds()
        if average is None:
            return None
        required = {each.metric: each.operator.startswith(">") for each in self._requirements}
        directions = {**required, **self._directions}
        before = self._last(saved)
        if not self._several:
            return Comparison((), compare(before, average, directions) if average.refreshed else ())
        if not refreshed:
            return Comparison(compare(before, average, directions), ())
        last = self._last(refreshed)
        return Comparison(compare(last, average, directions), compare(before, last, directions))

    def _kinds(self) -> tuple[list[Evaluation], list[Evaluation], Evaluation | None]:
        """Returns checkpoints as saved, checkpoints that were refreshed, and the last measurement of the average."""
        checkpoints = [each for each in self._measured if each.path is not None]
        averages = [each for each in self.measured if each.path is None]
        saved, refreshed = ([each for each in checkpoints if each.refreshed is kind] for kind in (False, True))
        return saved, refreshed, averages[-1] if averages else None

    def _last(self, evaluations: list[Evaluation]) -> Evaluation:
        return next(each for each in evaluations if each.path == self._last_path)
