"""What is measured before and after averaging, and whether it meets the requirements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ckpt_avg.commands.context import Context
from ckpt_avg.commands.prepare import Prepared
from ckpt_avg.commands.requests import AverageRequest
from ckpt_avg.text import distinct_names
from ckpt_avg.user_code.evaluate import Evaluation, evaluate_weights, refuse_other_metrics
from ckpt_avg.user_code.gate import Outcome, needs_all, outcomes, refuse_unknown_metrics
from ckpt_avg.user_code.model import weights_of


class Evaluations:
    """Measures checkpoints and their average with the user's function, on rank 0; without one it does nothing.

    Attributes:
        measured: in the order in which it was measured.
    """

    def __init__(self, request: AverageRequest, prepared: Prepared, context: Context) -> None:
        self.measured: list[Evaluation] = []
        self._request, self._prepared, self._context = request, prepared, context
        self._measures = request.evaluate is not None and context.ranks.is_first
        if request.evaluate is not None and request.dry_run:
            context.notice("a dry run measures nothing, so --eval and --require are not tried")

    def measure_checkpoints(self) -> None:
        """Measures the last checkpoint, or all of them, before the long work begins.

        Raises:
            UsageError: a requirement names a metric that the function does not return.
            UserCodeError: the user's function failed.
        """
        if not self._measures:
            return
        every = self._request.evaluate_all or needs_all(self._request.requirements)
        chosen = self._prepared.checkpoints[0 if every else -1 :]
        names = distinct_names([checkpoint.spec.path for checkpoint in chosen])
        for checkpoint, name in zip(chosen, names, strict=True):
            self._measure(name, weights_of(checkpoint), checkpoint.spec.path)
            refuse_unknown_metrics(self._request.requirements, self.measured[0])

    def measure_average(self, weights: Callable[[], Mapping[str, torch.Tensor]], *, refreshed: bool) -> None:
        """Measures the average as it would now be published.

        Raises:
            UserCodeError: the user's function failed.
        """
        if self._measures:
            self._measure(self._name_of_average(refreshed=refreshed), weights(), None)

    def share(self) -> None:
        """Gives what rank 0 has measured to the others, once rank 0 is done with all of its work."""
        mine = [[each.name, None if each.path is None else str(each.path), each.metrics] for each in self.measured]
        ranks = self._context.ranks
        measured = ranks.exchange("done", mine, lambda all_of_them: all_of_them[0])
        if not ranks.is_first:
            self.measured = [Evaluation(name, path and Path(path), metrics) for name, path, metrics in measured]

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Each requirement, compared with the last measurement of the average; empty before there is one."""
        if not self.measured or self.measured[-1].path is not None:
            return ()
        checkpoints = [each for each in self.measured if each.path is not None]
        return outcomes(self._request.requirements, self.measured[-1], checkpoints)

    def _name_of_average(self, *, refreshed: bool) -> str:
        several = len(self._prepared.checkpoints) > 1
        name = "average" if several else "these weights"
        if refreshed:
            return f"{name}, statistics refreshed"
        is_mean = several and self._prepared.statistics in ("refreshed", "mean")
        return f"{name}, statistics averaged" if is_mean else name

    def _measure(self, name: str, weights: Mapping[str, torch.Tensor], path: Path | None) -> None:
        function, model = self._request.evaluate, self._prepared.model
        if function is None or model is None:
            raise ValueError("nothing to measure with")
        self._context.ranks.check(at_once=True)  # the others wait, and take this for a sign of life
        self._context.progress.evaluating(name)
        device, notice = self._prepared.model_device, self._context.notice
        metrics = evaluate_weights(function, model, weights, name=name, device=device, notice=notice)
        if self.measured:
            refuse_other_metrics(self.measured[0].metrics, metrics, name)
        self.measured.append(Evaluation(name, path, metrics))
