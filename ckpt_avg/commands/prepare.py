"""From sources to all that averaging needs, checked from headers: open → check → plan → import → build the model."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ckpt_avg.batchnorm.policy import (
    Statistics,
    choose_refresh,
    frozen_buffers,
    needs_refresh,
    refuse_negative_variances,
    source_of_statistics,
)
from ckpt_avg.checkpoint.spec import Checkpoint, CheckpointSpec
from ckpt_avg.commands.check import notice_what_is_read
from ckpt_avg.commands.context import Context
from ckpt_avg.commands.requests import MeanRequest
from ckpt_avg.commands.weighting import weighting_of
from ckpt_avg.distributed.launch import launch_of
from ckpt_avg.engine import engine_for
from ckpt_avg.errors import UsageError
from ckpt_avg.machine import choose_threads, gc_paused
from ckpt_avg.mean.block_sizes import most_workers
from ckpt_avg.mean.devices import choose_mean_device, choose_model_device
from ckpt_avg.mean.equal_tensors import refuse_unequal
from ckpt_avg.mean.loading import loading
from ckpt_avg.mean.plan import Plan
from ckpt_avg.mean.samples import far_off_by_sample
from ckpt_avg.mean.value_kinds import plan_of
from ckpt_avg.mean.weighting import Weights
from ckpt_avg.progress import Phase
from ckpt_avg.runs.compatibility import refuse_differences
from ckpt_avg.runs.discover import Discovery
from ckpt_avg.runs.select import Selected, open_selected
from ckpt_avg.text import argument, listing, quote, type_of
from ckpt_avg.user_code.load import Reference

if TYPE_CHECKING:
    import torch

    from ckpt_avg.batchnorm.refresh_output import PreparedRefresh

_Request = TypeVar("_Request", bound=MeanRequest)


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that averaging needs."""

    selected: Selected  # open
    weighting: Weights | None  # None if all checkpoints count the same
    plan: Plan
    frozen: frozenset[str]  # running statistics that are the same in every checkpoint; empty if each window has its own
    model: torch.nn.Module | None  # if it is needed
    refresh: PreparedRefresh | None  # if statistics are to be measured
    statistics: Statistics
    mean_device: str
    model_device: str  # if there is a model
    threads: int  # that sum on this rank

    @property
    def last(self) -> Checkpoint:
        """The checkpoint of the latest step."""
        return self.checkpoints[-1]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints in the order of their steps, the last one last."""
        return self.selected.checkpoints

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weights of the checkpoints, in their order; None if all are equal."""
        return None if self.weighting is None else self.weighting.values

    @property
    def specs(self) -> list[CheckpointSpec]:
        """The checkpoints' specs, in order."""
        return [checkpoint.spec for checkpoint in self.checkpoints]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of all checkpoints."""
        return len(self.checkpoints) * self.plan.source_nbytes


def prepare(
    discovery: Discovery, request: _Request, context: Context, *, by_window: bool = False
) -> tuple[_Request, Prepared]:
    """Opens and checks everything, so that what can fail before hours of averaging fails here.

    With ``by_window``, parts of the checkpoints will be averaged, each with frozen layers of its own.

    Returns:
        The request, with the user's code in place of references to it, and what averaging needs.
    """
    _refuse_uncallable(each for each in request.functions if not isinstance(each, Reference))
    notice = context.notice
    launch = launch_of() if context.ranks.size > 1 else None
    mean_device = choose_mean_device(request.device, launch)
    if engine_for(mean_device) == "torch":
        importlib.import_module("ckpt_avg.mean.torch_engine")  # before the inputs take the files that may be open
    if request.io == "mmap" and engine_for(mean_device) == "torch":
        notice("--io mmap: only the native engine maps files, and torch is used here, so files are read with pread")
    most = most_workers(mean_device, request.memory)
    threads = choose_threads(request.threads, launch.local_size if launch else 1, most)
    with gc_paused():
        selected = open_selected(discovery, request, request, context.files, context.progress)
        checkpoints = selected.checkpoints
        _refuse_code(request, checkpoints[-1])
        for file in (file for checkpoint in checkpoints for file in checkpoint.files):
            file.use_io(request.io)
        weighting = weighting_of(request, selected, range(len(checkpoints)), notice)
        specs = [checkpoint.spec for checkpoint in checkpoints]
        refuse_differences(specs, dtype=request.dtype)
        plan = plan_of(checkpoints, dtype=request.dtype, non_float=request.non_float)
        notice_what_is_read(
            checkpoints, notice, copies=request.bn != "refresh", kinds=plan.kinds, ties=not request.models
        )
        for index, what in far_off_by_sample(checkpoints, plan):
            notice(f"{specs[index].path}: by a sample, {what}. ckpt-avg compare measures all weights")
    frozen = frozenset() if by_window and request.data is not None else frozen_buffers(checkpoints, plan, request.bn)
    has_model, has_data = request.model is not None, request.data is not None
    measures = needs_refresh(plan, frozen, bn=request.bn, has_model=has_model, has_data=has_data, notice=notice)
    model, refresh = None, None
    with _loading(request, context, checkpoints, plan):
        request = _with_code(request, context)
        model_device = mean_device if request.model is None else choose_model_device(request.device, launch)
        if request.model is not None and (measures or request.functions):
            from ckpt_avg.user_code.model import build_model, notice_other_names

            tensors = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.tensors}
            model = build_model(request.model, tensors, stripped=request.strip_prefix)
            notice_other_names(model, tensors, notice)
    if model is not None and measures and request.data is not None:
        from ckpt_avg.user_code.model import Passes

        passes = Passes(request.data)
        refresh = choose_refresh(plan, frozen, model, passes, notice)
        refreshes = request.eval_repeats * (2 if len(checkpoints) > 1 else 1) if request.functions else 1
        if passes.is_single and refreshes > 1:
            raise UsageError(
                "--data: got an iterator, which is used up after one pass, and --eval needs one for each refresh. "
                "Name a function that returns one, or a DataLoader."
            )
    refuse_unequal(checkpoints, plan)
    statistics = source_of_statistics(plan, frozen, refresh)
    if weighting is not None:
        refuse_negative_variances(plan, weighting.values, frozen, refresh)
    prepared = Prepared(
        selected, weighting, plan, frozen, model, refresh, statistics, mean_device, model_device, threads
    )
    return request, prepared


def _refuse_uncallable(functions: Iterable[object]) -> None:
    for function in functions:
        if not callable(function):
            raise UsageError(f"--eval: got {type_of(function)}. Name a function of the model.")


def _references(request: MeanRequest) -> list[Reference]:
    code: list[object] = [request.model, request.data, *request.functions]
    return [each for each in code if isinstance(each, Reference)]


def _loading(
    request: MeanRequest, context: Context, checkpoints: Sequence[Checkpoint], plan: Plan
) -> contextlib.AbstractContextManager[None]:
    """Lets the system load the checkpoints while the user's code is imported, if they will be read."""
    is_dry = getattr(request, "dry_run", False)
    if is_dry or context.ranks.size > 1 or not _references(request):  # a rank reads only its share
        return contextlib.nullcontext()
    return loading(checkpoints, plan, readers=request.readers)


def _with_code(request: _Request, context: Context) -> _Request:
    """Imports the user's modules that the command line names; returns the request with what the references name."""
    references = _references(request)
    if not references:
        return request
    context.phase(Phase(f"importing {', '.join(dict.fromkeys(each.module for each in references))}"))
    model: object = request.model
    code: dict[str, Any] = {
        name: value.load() for name in ("model", "data") if isinstance(value := getattr(request, name), Reference)
    }
    code["evaluate"] = [each.load() if isinstance(each, Reference) else each for each in request.functions]
    _refuse_uncallable(code["evaluate"])
    if isinstance(model, Reference):
        code["forward_batch"] = model.beside("forward_batch")
    return replace(request, **code)


def _refuse_code(request: MeanRequest, checkpoint: Checkpoint) -> None:
    """Raises UsageError for a user's model or data if the checkpoints have several models."""
    given = {"--model": request.model, "--data": request.data}
    flag = next((flag for flag, value in given.items() if value is not None), None)
    if checkpoint.models and flag is not None:
        names = listing(quote(name) for name in checkpoint.models if name)
        one = checkpoint.spec.path / next(filter(None, checkpoint.models))
        raise UsageError(
            f"{flag}: is for one model, and the checkpoints have several: {names}. Name one of each checkpoint, for "
            f"example {argument(one)}, or omit {flag}."
        )
