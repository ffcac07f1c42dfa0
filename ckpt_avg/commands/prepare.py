"""From sources to all that averaging needs, checked from headers: discover → open → check → plan → build the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from ckpt_avg.batchnorm.policy import Statistics, choose_refresh, frozen_buffers, needs_refresh, source_of_statistics
from ckpt_avg.batchnorm.refresh_output import PreparedRefresh
from ckpt_avg.checkpoint.spec import Checkpoint, CheckpointSpec
from ckpt_avg.commands.check import notice_what_is_read
from ckpt_avg.files.input_file import IO
from ckpt_avg.formats.state_dict import Reading
from ckpt_avg.machine import gc_paused
from ckpt_avg.mean.equal_tensors import refuse_unequal
from ckpt_avg.mean.plan import Plan, make_plan
from ckpt_avg.runs.compatibility import refuse_differences
from ckpt_avg.runs.discover import Discovery
from ckpt_avg.runs.run_folder import Skipped
from ckpt_avg.runs.select import Selection, open_selected
from ckpt_avg.user_code.model import Batches, Model, Passes, build_model


@dataclass(frozen=True, slots=True)
class Rules:
    """How the output comes about.

    Attributes:
        dtype, non_float: as for `make_plan`.
        bn: ``auto``, ``refresh`` or ``keep``.
        model, data: the user's, for the refresh and the evaluation.
        evaluates: whether the model is needed for an evaluation.
        in_windows: whether parts of the checkpoints will be averaged, each of which has frozen layers of its own.
    """

    dtype: str
    non_float: str
    bn: str
    model: Model | None
    data: Batches | None
    evaluates: bool
    in_windows: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that averaging needs.

    Attributes:
        checkpoints: open, in order.
        skipped: what was left out of run folders.
        plan: every output tensor and its place.
        frozen: running statistics that are the same in every checkpoint; not looked for where each window has its own.
        model: built, if it is needed.
        refresh: the model and the batches, if statistics are to be measured.
        statistics: where the output's running statistics come from.
    """

    checkpoints: tuple[Checkpoint, ...]
    skipped: tuple[Skipped, ...]
    plan: Plan
    frozen: frozenset[str]
    model: torch.nn.Module | None
    refresh: PreparedRefresh | None
    statistics: Statistics

    @property
    def specs(self) -> list[CheckpointSpec]:
        """The checkpoints' specs, in order."""
        return [checkpoint.spec for checkpoint in self.checkpoints]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of all checkpoints, which agree in shapes and dtypes."""
        return len(self.checkpoints) * self.specs[0].nbytes


def prepare(
    discovery: Discovery,
    selection: Selection,
    reading: Reading,
    rules: Rules,
    stack: ExitStack,
    *,
    io: IO,
    notice: Callable[[str], None],
) -> Prepared:
    """Opens and checks everything, so that what can fail before hours of averaging fails here.

    Args:
        discovery: what the sources hold.
        selection: which of it to take.
        reading: how to read it.
        rules: how the output comes about.
        stack: closes the checkpoints in the end.
        io: how their tensors are read.
        notice: told what the user should know.

    Raises:
        CkptAvgError: of any kind but OutputError.
    """
    with gc_paused():
        checkpoints, skipped = open_selected(discovery, selection, reading, stack, notice)
        for file in (file for checkpoint in checkpoints for file in checkpoint.files):
            file.use_io(io)
        specs = [checkpoint.spec for checkpoint in checkpoints]
        refuse_differences(specs)
        plan = make_plan(specs, dtype=rules.dtype, non_float=rules.non_float)
        notice_what_is_read(checkpoints, notice, copies=rules.bn != "refresh")
    by_window = rules.in_windows and rules.data is not None
    frozen = frozenset() if by_window else frozen_buffers(checkpoints, plan)
    model, refresh = _user_code(plan, frozen, rules, notice)
    refuse_unequal(checkpoints, (tensor.name for tensor in plan.tensors if tensor.rule == "equal"))
    statistics = source_of_statistics(plan, frozen, refresh)
    return Prepared(checkpoints, skipped, plan, frozen, model, refresh, statistics)


def _user_code(
    plan: Plan, frozen: frozenset[str], rules: Rules, notice: Callable[[str], None]
) -> tuple[torch.nn.Module | None, PreparedRefresh | None]:
    has_model, has_data = rules.model is not None, rules.data is not None
    measures = needs_refresh(plan, frozen, bn=rules.bn, has_model=has_model, has_data=has_data, notice=notice)
    if rules.model is None or not (measures or rules.evaluates):
        return None, None
    model = build_model(rules.model, {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.tensors})
    if not measures or rules.data is None:
        return model, None
    return model, choose_refresh(plan, frozen, model, Passes(rules.data), notice)
