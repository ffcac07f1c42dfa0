"""What is measured before and after averaging, and the gate that the average must pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ckpt_avg.batchnorm.policy import Statistics
from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.distributed.ranks import Ranks
from ckpt_avg.errors import UsageError
from ckpt_avg.progress import Progress
from ckpt_avg.text import told_apart
from ckpt_avg.user_code.evaluate import Evaluate, Evaluation, evaluate_weights, refuse_other_metrics
from ckpt_avg.user_code.gate import Outcome, needs_all, outcomes, parse_requirement, refuse_unknown_metrics
from ckpt_avg.user_code.model import weights_of


def name_of_average(statistics: Statistics, count: int, *, refreshed: bool) -> str:
    """Returns what to call the average of so many checkpoints.

    Args:
        statistics: where its running statistics come from in the end.
        count: how many checkpoints it is of.
        refreshed: whether the refresh is done.
    """
    name = "average" if count > 1 else "these weights"
    if refreshed:
        return f"{name}, statistics refreshed"
    return f"{name}, statistics averaged" if statistics in ("refreshed", "mean") and count > 1 else name


class Assessment:
    """Measures checkpoints and their average with the user's function; without one it does nothing.

    Args:
        function: the user's function.
        measure_all: measure every checkpoint, rather than the last alone.
        require: the requirements, as they were worded.
        has_model: whether there is a model.
        measures: whether this process is the one that measures.

    Raises:
        UsageError: a requirement is malformed, or the model or the function is missing.
    """

    def __init__(
        self,
        function: Evaluate | None,
        *,
        measure_all: bool,
        require: str | Sequence[str],
        has_model: bool,
        measures: bool = True,
    ) -> None:
        self.requirements = [parse_requirement(text) for text in ([require] if isinstance(require, str) else require)]
        self.is_wanted = function is not None
        self.evaluations: list[Evaluation] = []
        self._function = function
        self._measures = measures and function is not None
        self._measures_all = measure_all or needs_all(self.requirements)
        if function is not None and not callable(function):
            raise UsageError(f"--eval: expected a function of the model, got a {type(function).__name__}.")
        if function is None:
            for option, given in (("--require", self.requirements), ("--eval-all", measure_all)):
                if given:
                    raise UsageError(
                        f"{option}: nothing is measured that it could be about. Add --eval MODULE:FUNCTION."
                    )
        elif not has_model:
            raise UsageError("--eval: expected the model that is to be measured. Add --model MODULE:FACTORY.")

    def use(self, model: torch.nn.Module | None, device: torch.device, progress: Progress) -> None:
        """Says which model takes the weights, and where."""
        self._model, self._device, self._progress = model, device, progress

    def leave_out(self) -> None:
        """Says that nothing is measured in a dry run."""
        if self.is_wanted:
            self._progress.notice("a dry run measures nothing, so --eval and --require are not tried")

    def measure_checkpoints(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Measures the last checkpoint, or all of them, before the long work begins.

        Raises:
            UsageError: a requirement names a metric that there is not.
            UserCodeError: the user's function failed.
        """
        if not self._measures:
            return
        measured = checkpoints if self._measures_all else checkpoints[-1:]
        names = told_apart([checkpoint.spec.path for checkpoint in measured])
        for checkpoint, name in zip(measured, names, strict=True):
            self._measure(name, weights_of(checkpoint), checkpoint.spec.path)
            refuse_unknown_metrics(self.requirements, self.evaluations[0])

    def measure_average(self, name: str, weights: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Measures the average as it would now be published.

        Raises:
            UserCodeError: the user's function failed.
        """
        if self._measures:
            self._measure(name, weights(), None)

    def share(self, ranks: Ranks) -> None:
        """Gives what rank 0 has measured to the others, once rank 0 is done with all of its work."""
        mine = [[each.name, None if each.path is None else str(each.path), each.metrics] for each in self.evaluations]
        measured = ranks.exchange("done", mine, lambda all_of_them: all_of_them[0])
        if not ranks.is_first:
            self.evaluations = [Evaluation(name, path and Path(path), metrics) for name, path, metrics in measured]

    def _measure(self, name: str, weights: Mapping[str, torch.Tensor], path: Path | None) -> None:
        if self._function is None or self._model is None:
            raise ValueError("nothing to measure with")
        self._progress.evaluating(name)
        metrics = evaluate_weights(
            self._function, self._model, weights, name=name, device=self._device, notice=self._progress.notice
        )
        if self.evaluations:
            refuse_other_metrics(self.evaluations[0].metrics, metrics, name)
        self.evaluations.append(Evaluation(name, path, metrics))

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Each requirement, held against the last measurement of the average; empty before there is one."""
        if not self.evaluations or self.evaluations[-1].path is not None:
            return ()
        checkpoints = [each for each in self.evaluations if each.path is not None]
        return outcomes(self.requirements, self.evaluations[-1], checkpoints)
