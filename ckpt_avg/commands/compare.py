"""`compare`: how far checkpoints are from their mean and from each other, and which are far off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckpt_avg.checkpoint.spec import Checkpoint
from ckpt_avg.commands.check import notice_what_is_read
from ckpt_avg.commands.context import Context, reading
from ckpt_avg.commands.distances import ComparedCheckpoint, ComparedTensor, Distances
from ckpt_avg.commands.findings import Finding, find_far_off
from ckpt_avg.commands.requests import CompareRequest, takes
from ckpt_avg.errors import IncompatibleError
from ckpt_avg.machine import choose_threads, gc_paused
from ckpt_avg.mean.buffers import STATISTICS
from ckpt_avg.mean.far_off import LEAST_WEIGHTS
from ckpt_avg.mean.geometry import Matrix
from ckpt_avg.mean.gram import measure
from ckpt_avg.mean.plan import OutputTensor, Plan
from ckpt_avg.mean.value_kinds import plan_of
from ckpt_avg.progress import Phase
from ckpt_avg.results import Result, Rows, counted, notices_counted, number, paths_counted
from ckpt_avg.runs.compatibility import refuse_differences
from ckpt_avg.runs.discover import discover
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.runs.select import open_selected
from ckpt_avg.text import plural

_RUNNING = (STATISTICS.name, "other running statistics", "codebooks")  # kinds of averaged tensors that are no weights


@dataclass(frozen=True, slots=True, repr=False)
class CompareResult(Result):
    """How far checkpoints are from their mean and from each other.

    Distances and cosines are those of all averaged weights; running statistics are apart. Checkpoints with NaN or Inf
    are left out of the mean, and have NaN in the matrices.

    Attributes:
        checkpoints: in the order of their steps.
        skipped: files of run folders that were skipped, with reasons.
        elements: how many weights there are.
        norm: of the mean.
        distances: between each two.
        cosines: of each two, seen from zero.
        centred_cosines: of each two, seen from the mean.
        shares: the parts of the sum of squared distances from the mean that the two main directions explain.
        straightness: the distance from the first to the last, divided by the length of the path through all.
        tensors: every compared tensor, those that move most in relation to their norm first.
        not_compared: how many tensors are not averaged, such as integers, and so not compared.
        findings: what is far off.
        notices: what the user should know.
    """

    checkpoints: tuple[ComparedCheckpoint, ...]
    skipped: tuple[Skipped, ...]
    elements: int
    norm: float
    distances: Matrix
    cosines: Matrix
    centred_cosines: Matrix
    shares: tuple[float, float]
    straightness: float
    tensors: tuple[ComparedTensor, ...]
    not_compared: int
    findings: tuple[Finding, ...]
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, as ``ckpt-avg compare --json`` prints them."""
        from ckpt_avg.commands.documents import compare_json

        return compare_json(self)

    def _title(self) -> str:
        found = plural(len(self.findings), "finding") if self.findings else "nothing is far off"
        return f"{plural(len(self.checkpoints), 'checkpoint')}, {found}"

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "checkpoints", paths_counted([each.path for each in self.checkpoints])
        yield "findings", counted(self.findings, (each._title() for each in self.findings))
        far = max(self.checkpoints, key=lambda each: each.relative, default=None)
        yield "norm", f"{self.norm:.6g}, of {self.elements:,} weights"
        yield "distances", "" if far is None else f"the farthest from the mean is {far._title()}"
        yield "straightness", f"{self.straightness:.3g}"
        yield "tensors", counted(self.tensors, (each._title() for each in self.tensors[:1]))
        yield "skipped", paths_counted([each.path for each in self.skipped])
        yield "notices", notices_counted(self.notices)

    def _tables(self) -> Iterator[Rows]:
        header = ("name", "step", "epoch", "from the mean, of its norm", "from the one before")
        rows = [
            (each.path.name, *map(number, (each.step, each.epoch, each.relative, each.to_previous)))
            for each in self.checkpoints
        ]
        yield Rows("checkpoints", header, rows)


@takes(CompareRequest)
def compare(request: CompareRequest) -> CompareResult:
    """Measures how far checkpoints are from their mean and from each other, in one pass, and names what is far off.

    Args:
        The fields of `CompareRequest`.

    Raises:
        CkptAvgError: a checkpoint cannot be read, they don't fit together, or fewer than two can be compared.

    Example:
        >>> compare(["fixtures/mnist_cnn"], last=4).findings
        ()
    """
    with Context(progress=request.callbacks) as context:
        context.phase(Phase("opening checkpoints"))
        with gc_paused():
            found = discover(request.sources, request.include)
            selected = open_selected(found, request, request, context.files, context.progress)
            checkpoints = selected.checkpoints
            selected.refuse_single()
            refuse_differences([checkpoint.spec for checkpoint in checkpoints], dtype="float64")
            whole = plan_of(checkpoints, dtype="keep", non_float="last")
            plan, groups = _compared(checkpoints, whole)
            notice_what_is_read(checkpoints, context.notice, kinds=whole.kinds)
        context.phases_left = 1
        context.phase(reading("comparing", len(checkpoints), plan.source_nbytes))
        sums = measure(
            checkpoints,
            plan,
            groups,
            threads=choose_threads(request.threads),
            readers=request.readers,
            progress=context.progress.advance,
        )
        measured = Distances(checkpoints, plan, groups, sums)
        elements = sum(each.numel for each in plan.tensors if groups[each.name] != "statistics")
        if elements < LEAST_WEIGHTS:
            context.notice(f"fewer than {LEAST_WEIGHTS} weights: too few to tell by distances what is far off")
        return CompareResult(
            checkpoints=measured.checkpoints(),
            skipped=selected.skipped,
            elements=elements,
            norm=measured.weights.norm,
            distances=measured.spread(measured.weights.distances),
            cosines=measured.spread(measured.weights.cosines),
            centred_cosines=measured.spread(measured.weights.centred_cosines),
            shares=measured.weights.shares,
            straightness=measured.straightness(),
            tensors=measured.tensors(),
            not_compared=len(whole.tensors) - len(plan.tensors),
            findings=find_far_off(measured, by_distance=elements >= LEAST_WEIGHTS),
            notices=tuple(context.notices),
        )


def _compared(checkpoints: Sequence[Checkpoint], plan: Plan) -> tuple[Plan, dict[str, str]]:
    """Returns the tensors that are averaged, tied ones once, and the group of each: matrices, vectors, statistics."""
    repeated = {name for names in checkpoints[0].spec.tied() for name in names[1:]}
    tensors = [each for each in plan.tensors if each.rule == "mean" and each.name not in repeated]

    def group(tensor: OutputTensor) -> str:
        kind = plan.kinds.get(tensor.name)
        if kind is not None and kind.name in _RUNNING:
            return "statistics"
        return "matrices" if sum(extent > 1 for extent in tensor.shape) > 1 else "vectors"

    groups = {each.name: group(each) for each in tensors}
    if not any(each != "statistics" for each in groups.values()):
        raise IncompatibleError(
            f"{checkpoints[0].spec.path}: has no weights that are averaged, so nothing can be compared. Choose the "
            "weights with --state-key."
        )
    return replace(plan, tensors=tuple(tensors)), groups
