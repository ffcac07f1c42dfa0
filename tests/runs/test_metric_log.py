"""--best by a log that the user names: what each trainer writes, which row counts, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs.test_select import TEN, candidate, numbers
from system.faults.refusals import Command, refusal

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError, CkptAvgError, IncompatibleError, UsageError
from ckpt_avg.files.input_file import InputFile
from ckpt_avg.limits import LIMITS, Limits
from ckpt_avg.runs import log_rows
from ckpt_avg.runs.candidate import Candidate
from ckpt_avg.runs.metric_log import read_log
from ckpt_avg.runs.select import select
from ckpt_avg.runs.selection import LogOptions, Selection

STEPS = [candidate(f"step_{step}.pt", step=step, epoch=step // 100) for step in (100, 200, 300, 400)]
EPOCHS = [candidate(f"epoch_{epoch}.pt", epoch=epoch) for epoch in range(4)]


class Log:
    """A log, and what the selection makes of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notices: list[str] = []

    def write(self, *lines: str, end: str = "\n") -> Log:
        self.path.write_bytes("".join(line + end for line in lines).encode())
        return self

    def best(
        self, candidates: Sequence[Candidate] = STEPS, metric: str | None = "val_loss", number: int = 1, **options: Any
    ) -> list[int]:
        """The steps or epochs of the best, without the notice of their values."""
        self.notices.clear()
        selection = Selection(log=self.path, best=number, metric=metric, **{"mode": "min", **options})
        log = read_log(candidates, selection, self.notices.append)
        return numbers(select(candidates, selection, self.notices.append, log))

    def refusal(self, kind: type[CkptAvgError], *arguments: Any, **options: Any) -> str:
        with pytest.raises(kind) as caught:
            self.best(*arguments, **options)
        assert type(caught.value) is kind
        return str(caught.value)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "metrics.csv")


# --- what trainers write -----------------------------------------------------------------------------------

TRAINER_STATE = {
    "best_metric": None,
    "epoch": 4.0,
    "global_step": 400,
    "log_history": [
        {"epoch": 1.0, "learning_rate": 5e-05, "loss": 0.9, "step": 100},
        {"epoch": 1.0, "eval_loss": 0.8, "eval_runtime": 1.5, "step": 100},
        {"epoch": 2.0, "eval_loss": 0.4, "step": 200},
        {"epoch": 3.0, "eval_loss": 0.5, "step": 300},
        {"epoch": 4.0, "eval_loss": 0.6, "step": 400},
        {"epoch": 4.0, "step": 400, "train_loss": 0.3, "total_flos": 1e18},
    ],
    "stateful_callbacks": {"TrainerControl": {"args": {"should_save": True}}},
}

# CSVLogger: training and validation in different rows; steps from 0, epochs from 0.
LIGHTNING = [
    "epoch,step,train_loss,val_loss", "0,49,0.9,", "0,99,,0.8", "1,149,0.5,", "1,199,,0.4", "2,299,,0.5", "3,399,,0.6"
]  # fmt: skip

FORMATS: dict[str, tuple[Sequence[Candidate], dict[str, Any], list[str]]] = {
    "Lightning by epochs": (
        EPOCHS,
        {"metric": "val_loss", "log_step": "epoch"},
        LIGHTNING,
    ),
    "Lightning by steps": (
        STEPS,
        {"metric": "val_loss", "log_step": "step+1"},
        LIGHTNING,
    ),
    "timm": (
        EPOCHS,
        {"metric": "eval_top1", "log_step": "epoch", "mode": "max"},
        ["epoch,train_loss,eval_loss,eval_top1,lr", "0,2.1,1.9,40.5,0.1", "1,1.1,0.9,70.5,0.1", "2,1.2,1.0,65.0,0.05",
         "3,0.9,1.1,66.1,0.01"],
    ),
    "Ultralytics, older, padded": (
        EPOCHS,
        {"metric": "metrics/mAP50-95(B)", "log_step": "epoch", "mode": "max"},
        ["                  epoch,         train/box_loss,    metrics/mAP50-95(B)",
         "                      0,                 1.2344,                0.10342",
         "                      1,                 1.0344,                0.50342",
         "                      2,                    nan,                0.30342",
         "                      3,                 0.9344,                0.40342"],
    ),
    "Ultralytics, epochs from 1": (
        EPOCHS,
        {"metric": "metrics/mAP50-95(B)", "log_step": "epoch-1", "mode": "max"},
        ["epoch,time,train/box_loss,metrics/mAP50-95(B)", "1,10.2,1.2,0.1", "2,20.1,1.0,0.5", "3,30.4,0.9,0.3",
         "4,40.2,0.9,0.4"],
    ),
    "TensorBoard": (
        STEPS,
        {"metric": "Value", "log_step": "Step"},
        ["Wall time,Step,Value", "1654943296.2150984,100,0.8", "1654943313.7791796,200,0.4000000059604645",
         "1654943332.386608,300,0.5", "1654943350.320845,400,0.6"],
    ),
    "Weights & Biases, a chart": (
        STEPS,
        {"metric": "glad-sun-3 - val_loss", "log_step": "trainer/global_step"},
        ['"trainer/global_step","glad-sun-3 - val_loss","glad-sun-3 - val_loss__MIN","glad-sun-3 - val_loss__MAX"',
         '"100","0.8","0.8","0.8"', '"200","0.4","0.4","0.4"', '"300","0.5","0.5","0.5"', '"400","0.6","0.6","0.6"'],
    ),
    "Keras's CSVLogger": (
        EPOCHS,
        {"metric": "val_loss", "log_step": "epoch"},
        ["epoch,accuracy,loss,val_accuracy,val_loss", "0,0.5,1.1,0.5,0.8", "1,0.6,0.9,0.6,0.4", "2,0.6,0.8,NA,0.5",
         "3,0.7,0.7,0.6,0.6"],
    ),
    "pandas, with its index": (
        STEPS,
        {"metric": "val_loss"},
        [",step,val_loss", "0,100,0.8", "1,200,0.4", "2,300,0.5", "3,400,0.6"],
    ),
    "tabs": (STEPS, {"metric": "val_loss"}, ["step\tval_loss", "100\t0.8", "200\t0.4", "300\t0.5", "400\t0.6"]),
    "semicolons": (STEPS, {"metric": "val_loss"}, ["step;val_loss", "100;0.8", "200;0.4", "300;0.5", "400;0.6"]),
    "transformers": (STEPS, {"metric": "eval_loss"}, [json.dumps(TRAINER_STATE, indent=2)]),
    "transformers in one line": (STEPS, {"metric": "eval_loss"}, [json.dumps(TRAINER_STATE)]),
    "transformers, the log alone": (STEPS, {"metric": "eval_loss"}, [json.dumps(TRAINER_STATE["log_history"])]),
    # A validation has no iteration, and its step is the epoch.
    "mmengine": (
        STEPS,
        {"metric": "coco/bbox_mAP", "log_step": "epoch=step", "mode": "max"},
        [json.dumps({"lr": 0.1, "loss": 0.5, "epoch": each, "iter": 100 * each, "memory": 1, "step": 100 * each}) + "\n"
         + json.dumps({"coco/bbox_mAP": value, "data_time": 0.1, "time": 0.2, "step": each})
         for each, value in enumerate((0.1, 0.5, 0.3, 0.4), 1)],
    ),
    "mmcv": (
        STEPS,
        {"metric": "bbox_mAP", "log_step": "epoch", "mode": "max"},
        [json.dumps({"env_info": "sys.platform: linux\nPython: 3.8", "seed": None})]
        + [json.dumps({"mode": "val", "epoch": each, "iter": 5000, "lr": 0.1, "bbox_mAP": value})
           for each, value in enumerate((0.1, 0.5, 0.3, 0.4), 1)],
    ),
    "numbers as text, as fairseq writes them": (
        EPOCHS,
        {"metric": "valid_loss", "log_step": "epoch"},
        [json.dumps({"epoch": each, "valid_loss": str(value), "valid_num_updates": str(100 * each)})
         for each, value in enumerate((8.1, 4.25, 5.0, 6.0))],
    ),
    "nested": (
        STEPS,
        {"metric": "val.loss", "log_step": "progress.step"},
        [json.dumps({"progress": {"step": step}, "val": {"loss": value, "by_class": [1, 2]}})
         for step, value in ((100, 0.8), (200, 0.4), (300, 0.5), (400, 0.6))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("form", ["plain", "Windows", "BOM"])
def test_what_trainers_write(log: Log, name: str, form: str) -> None:
    """The second checkpoint is the best in each."""
    candidates, options, lines = FORMATS[name]
    log.write(*lines, end="\r\n" if form == "Windows" else "\n")
    if form == "BOM":
        log.path.write_bytes(b"\xef\xbb\xbf" + log.path.read_bytes())
    assert log.best(candidates, **options) == numbers(candidates[1:2])
    assert log.notices == []
    assert log.best(candidates, number=4, **options) == numbers(candidates)


def test_a_run_without_steps_is_matched_by_epochs_with_a_notice(log: Log) -> None:
    log.write("x,val_loss", "0,0.8", "1,0.4", "2,0.5", "3,0.6")
    assert log.best(EPOCHS, log_step="x") == [1]
    assert log.notices == ["--log-step x: the checkpoints record no steps, so these are epochs"]


def test_numbers_in_names_that_no_word_explains_count_with_a_notice(log: Log) -> None:
    """They may be steps or epochs: the user has said what the log counts."""
    lone = [candidate(f"model_{each}.pt", step=each, is_lone_number=True) for each in (1, 2, 3)]
    log.write("epoch,val_loss", "1,0.8", "2,0.4", "3,0.5")
    assert log.best(lone, log_step="epoch") == [2]
    names = "model_1.pt, model_2.pt, model_3.pt"
    assert log.notices == [f"--log-step epoch: the numbers in the names of {names} are taken for epochs"]
    timm = [candidate(f"checkpoint_{each}.tar", step=each, epoch=each, is_lone_number=True) for each in (1, 2, 3)]
    assert log.best(timm, log_step="epoch") == [2]
    assert log.notices == []  # the epochs are recorded


@pytest.mark.parametrize(
    ("column", "unit"),
    [("epoch", "epoch"), ("trainer/epoch", "epoch"), ("Epochs", "epoch"), ("current_epoch", "epoch"), ("step", "step"),
     ("step_in_epoch", "step"), ("reepoch", "step"), ("epoch=step", "epoch"), ("step=epoch", "step")],
)  # fmt: skip
def test_the_name_of_a_column_tells_whether_it_counts_epochs(log: Log, column: str, unit: str) -> None:
    log.write(f"{column.rpartition('=')[2]},val_loss")
    log.path.write_text(log.path.read_text() + "1,0.5\n100,0.6\n")
    found = read_log(STEPS, LogOptions(log=log.path, log_step=column), lambda _: None)
    assert found.metrics_of(STEPS[0].record) == {"val_loss": 0.5 if unit == "epoch" else 0.6}


# --- which row counts --------------------------------------------------------------------------------------


@pytest.mark.guarantee("metric-log")
def test_no_other_row_stands_in(log: Log) -> None:
    """The next row is as near as can be, and better; still it is of other weights."""
    log.write("step,val_loss", "100,0.8", "201,0.1", "300,0.5", "399,0.2")
    assert log.best() == [300]
    assert log.notices == ["skipped, because metrics.csv has no 'val_loss' at steps 200, 400: step_200.pt, step_400.pt"]
    message = log.refusal(IncompatibleError, number=3)
    assert message.startswith("--best 3: expected at least 3 checkpoints, got 2 (step_100.pt, step_300.pt).")


def test_checkpoints_without_a_step_are_told(log: Log) -> None:
    some = [*STEPS, candidate("final.pt", epoch=9)]
    log.write("step,val_loss", "100,0.8", "200,0.4", "300,0.5", "400,0.6")
    assert log.best(some) == [200]
    assert log.notices == ["skipped, because no step is recorded in final.pt"]
    named = [candidate(f"{name}.pt") for name in ("good", "bad")]
    message = "--log-step {}: no {} is recorded in {}. {}."
    for candidates, log_step, unit, names, advice in (
        (named, "step", "epoch", "good.pt, bad.pt", "Use --last or --include instead"),
        (EPOCHS[:2], "step=step", "step", "epoch_0.pt, epoch_1.pt", "Name the column of the epochs"),
        (TEN[:2], "epoch=step", "epoch", "step_1.pt, step_2.pt", "Name the column of the steps"),
    ):
        found = log.refusal(IncompatibleError, candidates, log_step=log_step)
        assert found == message.format(log_step, unit, names, advice)


def test_of_several_values_the_last_counts_and_that_is_said(log: Log) -> None:
    """A resumed run logs some steps again; a repeated value is none of another kind."""
    log.write(
        "step,val_loss",
        "100,0.8",
        "200,0.1",
        "200,0.7",
        "200,",
        "200,0.70",
        "300,0.5",
        "300,0.50",
        "400,0.6",
        "200,0.9",
    )
    assert log.best() == [300]
    assert log.notices == [
        "metrics.csv: several values of 'val_loss' at step 200: the last counts, for example 0.9 in line 10, not 0.70 "
        "in line 6"
    ]
    log.write("step,val_loss", "100,0.8", "200,0.1", "200,0.7", "200,0.7")
    assert log.best() == [200]
    assert "for example 0.7 in line 5, not 0.1 in line 3" in log.notices[1]


def test_only_what_the_log_says_is_ranked(log: Log) -> None:
    """What checkpoints record under the same name may be measured otherwise."""
    recorded = [candidate(f"step_{step}.pt", step=step, metrics={"val_loss": 0.01 * step}) for step in (100, 200)]
    log.write("step,val_loss", "200,0.4", "100,0.8")
    assert log.best(recorded) == [200]
    log.write("step,val_loss", "200,0.4")
    assert log.best(recorded) == [200]


def test_the_other_rules_come_first(log: Log) -> None:
    log.write("step,val_loss", "100,0.1", "200,0.4", "300,nan", "400,0.6")
    assert log.best(to_step=200, last=1) == [200]
    assert log.notices == []


def test_a_header_may_be_repeated_and_change(log: Log) -> None:
    log.write("step,val_loss", "100,0.8", "step,lr,val_loss", "200,0.1,0.4", "300,0.1,0.5", "400,0.1,0.6")
    assert log.best() == [200]
    assert log.notices == []


def test_of_two_columns_with_one_name_the_first_counts(log: Log) -> None:
    log.write("step,val_loss,val_loss", "100,0.8,1", "200,0.4,2", "300,0.5,0", "400,0.6,4")
    assert log.best() == [200]
    assert log.notices == ["metrics.csv: several columns are called 'val_loss': the first of them counts"]


def test_a_column_may_have_the_sign_of_a_sum_in_its_name(log: Log) -> None:
    log.write("step+1,step,val_loss", "100,99,0.8", "200,0,0.4", "300,0,0.5", "400,0,0.6")
    assert log.best(log_step="step+1") == [200]


# --- a log that counts otherwise ---------------------------------------------------------------------------


@pytest.mark.guarantee("metric-log")
@pytest.mark.parametrize(
    ("shift", "higher", "use"),
    [(-1, "1 lower", "step+1"), (1, "1 higher", "step-1"), (1000, "1,000 higher", "step-1000")],
)
def test_steps_that_are_all_off_by_one_number_are_told(log: Log, shift: int, higher: str, use: str) -> None:
    rows = [f"{step + shift},{value}" for step, value in ((100, 0.8), (200, 0.4), (300, 0.5), (400, 0.6))]
    log.write("step,val_loss", *rows)
    assert log.refusal(IncompatibleError) == (
        f"--log-step step: metrics.csv has no 'val_loss' at steps 100, 200, 300, 400, only at {100 + shift} to "
        f"{400 + shift}. With --log-step {use} every checkpoint has a row: use it if the log counts {higher}."
    )
    assert log.best(log_step=use) == [200]


def test_epochs_that_overlap_but_one_are_told(log: Log) -> None:
    """Epochs from 1 in the log, from 0 in the checkpoints: all but the first would be ranked by another's value."""
    log.write("epoch,val_loss", "1,0.8", "2,0.4", "3,0.5", "4,0.6")
    assert log.refusal(IncompatibleError, EPOCHS, log_step="epoch") == (
        "--log-step epoch: metrics.csv has no 'val_loss' at epoch 0, only at 1 to 4. With --log-step epoch-1 every "
        "checkpoint has a row: use it if the log counts 1 higher. Otherwise add --exclude epoch_0.pt."
    )
    assert log.best(EPOCHS[1:], log_step="epoch") == [2]
    assert log.best(EPOCHS, log_step="epoch-1") == [1]


@pytest.mark.parametrize(
    ("rows", "log_step", "use"),
    [(range(1, 5), "step", "epoch=step"), (range(100, 500, 100), "epoch=step", "step=step")],
)
def test_epochs_in_place_of_steps_are_told(log: Log, rows: Sequence[int], log_step: str, use: str) -> None:
    log.write("step,val_loss", *(f"{each},{value}" for each, value in zip(rows, (0.8, 0.4, 0.5, 0.6), strict=True)))
    assert log.refusal(IncompatibleError, log_step=log_step).endswith(
        f". The {use[:5].rstrip('=')}s of the checkpoints are there: use --log-step {use}."
    )
    assert log.best(log_step=use) == [200]


def test_a_step_that_happens_to_be_an_epoch_of_the_log_is_not_trusted(log: Log) -> None:
    """As with mmengine and few iterations in an epoch: the row of epoch 3 is not about step 3, the end of epoch 1."""
    short = [candidate(f"epoch_{epoch}.pth", step=3 * epoch, epoch=epoch) for epoch in (1, 2, 3, 4)]
    log.write("step,acc", "1,0.1", "2,0.5", "3,0.3", "4,0.4")
    assert log.refusal(IncompatibleError, short, "acc").endswith(
        " The epochs of the checkpoints are there: use --log-step epoch=step. Otherwise add --exclude epoch_2.pth "
        "--exclude epoch_3.pth --exclude epoch_4.pth."
    )
    assert log.best(short, "acc", mode="max", log_step="epoch=step") == [2]


def test_the_log_of_another_run(log: Log) -> None:
    log.write("step,val_loss", "7,0.8", "19,0.4")
    assert log.refusal(IncompatibleError) == (
        "--log-step step: metrics.csv has no 'val_loss' at steps 100, 200, 300, 400, only at 7 to 19. Name another "
        "column with --log-step, or the log of this run."
    )


def test_steps_that_start_again_in_each_epoch_are_refused(log: Log) -> None:
    """One step of the log would be that of several checkpoints."""
    again = [candidate(f"e{epoch}_{step}.pt", epoch=epoch, step=step) for epoch in (1, 2) for step in (50, 100)]
    log.write("step,val_loss", "50,0.8", "100,0.4")
    assert log.refusal(IncompatibleError, again).endswith(
        "Name the column of the epochs, for example --log-step epoch."
    )


def test_two_checkpoints_of_one_epoch_are_refused(log: Log) -> None:
    """A row of that epoch measured one of them, or neither."""
    halves = [candidate(f"step_{step}.pt", step=step, epoch=step // 200) for step in (100, 200, 300)]
    log.write("epoch,val_loss", "0,0.8", "1,0.4")
    assert log.refusal(IncompatibleError, halves, log_step="epoch") == (
        "--log-step epoch: step_200.pt and step_300.pt have the same epoch, 1, so a row does not tell which of them it "
        "is about. Name a column that does, or add --exclude step_300.pt."
    )


# --- columns and values that are not there -----------------------------------------------------------------

VAL = ["step,train_loss,val_loss", "100,0.9,0.8", "200,0.5,0.4"]


@pytest.mark.guarantee("metric-log")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_step": "Step"}, "--log-step Step: metrics.csv has 'step', 'train_loss', 'val_loss'. Did you mean "
                               "'step'?"),
        ({"log_step": "iter"}, "--log-step iter: metrics.csv has 'step', 'train_loss', 'val_loss'. Name the column of "
                               "the steps or epochs."),
        ({"log_step": ""}, "--log-step '': metrics.csv has 'step', 'train_loss', 'val_loss'. Name the column of the "
                           "steps or epochs."),
        ({"metric": "val_los"}, "--metric val_los: metrics.csv has 'train_loss', 'val_loss'. Did you mean 'val_loss'?"),
        ({"metric": "f1"}, "--metric f1: metrics.csv has 'train_loss', 'val_loss'. Use one of these."),
        ({"metric": None}, "--log: metrics.csv has 'train_loss', 'val_loss'. Choose one of them with --metric."),
    ],
)  # fmt: skip
def test_a_column_that_is_not_there(log: Log, options: dict[str, Any], message: str) -> None:
    assert log.write(*VAL).refusal(IncompatibleError, **options) == message


def test_the_only_metric_needs_no_name(log: Log) -> None:
    """What tells the time or the rate is none."""
    log.write("step,epoch,val_loss,train/lr,wall time", "100,1,0.8,0.1,3", "200,2,0.4,0.1,4")
    assert log.best(metric=None) == [200]


@pytest.mark.guarantee("metric-log")
@pytest.mark.parametrize("bad", ["nan", "NaN", "inf", "-inf", "1e999", "tensor(0.3)", "0,3", "0_3", "12%", "False"])
@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_value_that_is_no_finite_number_is_refused_with_its_place(log: Log, bad: str, form: str) -> None:
    """Neither good nor bad: whether the checkpoint is averaged is the user's decision."""
    if form == "csv":
        log.write("step,val_loss", "100,0.8", f'200,"{bad}"', "300,0.5")
    else:
        raw = {"nan": "NaN", "NaN": "NaN", "inf": "Infinity", "-inf": "-Infinity", "False": "false"}.get(bad)
        log.write('{"step": 100, "val_loss": 0.8}', f'{{"step": 200, "val_loss": {raw or json.dumps(bad)}}}',
                  '{"step": 300, "val_loss": 0.5}')  # fmt: skip
    message = log.refusal(IncompatibleError)
    assert message.startswith(f"{log.path}: expected finite numbers as 'val_loss', got ")
    assert f" in line {3 if form == 'csv' else 2} for step_200.pt. " in message
    assert message.endswith("To rank the others, add --exclude step_200.pt.")
    rest = [each for each in STEPS if each.path.name != "step_200.pt"]
    assert log.best(rest) == [300]


def test_a_column_without_any_number_has_nobody_to_rank(log: Log) -> None:
    log.write("step,acc", "100,90%", "200,91%", "300,92%")
    assert log.refusal(IncompatibleError, metric="acc").endswith(
        "92% in line 4 for step_300.pt. Name another column with --metric, or write numbers."
    )


def test_a_later_number_replaces_nan(log: Log) -> None:
    """The run was resumed before the spike."""
    log.write("step,val_loss", "100,0.8", "200,nan", "200,0.4")
    assert log.best() == [200]
    assert (
        "several values of 'val_loss' at step 200: the last counts, for example 0.4 in line 4, not nan in line 3"
        in (log.notices[1])
    )


# --- files that are no logs, or not whole ------------------------------------------------------------------


@pytest.mark.guarantee("metric-log")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a header or JSON objects, got an empty file."),
        (b"\n\r\n  \n", "expected a header or JSON objects, got an empty file."),
        (b"PK\x03\x04\x00\x00", "line 1 is not text."),
        (b"step,loss\n100,0.8\n\0\0\0\0", "line 3 is not text."),
        ("step,loss\n100,0.8\n".encode("utf-16"), "is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8 "),
        ("step,Präzision\n100,0.8\n".encode("latin-1"), "line 1 is not UTF-8."),
        (b'{"step": 1, \nloss\n', "has only lines that are no JSON objects."),
        (b"[1, 2\n", "has only lines that are no JSON objects."),
        (b"step,loss\n1,2,3\n4,5,6\n", "has only lines without the 2 cells of the header."),
        (b'step,loss\n1,"' + b"a" * 200_000 + b"\n", "line 2 is no CSV: field larger than field limit (131072)."),
    ],
)
def test_what_is_no_log(log: Log, content: bytes, message: str) -> None:
    log.path.write_bytes(content)
    found = log.refusal(CheckpointFormatError)
    assert found.startswith(f"{log.path}: {message}")
    assert found.endswith((". Name a log in CSV or JSON lines.", " metrics.csv.", "'metrics.csv'."))


@pytest.mark.parametrize(
    "line",
    ['{"a": ' * 3000 + "1" + "}" * 3000, '{"step": ' + "9" * 5000 + "}", '{"step": 1e400, "val_loss": 3}', "[]", "3"],
)
def test_a_hostile_line_is_skipped(log: Log, line: str) -> None:
    log.write('{"step": 100, "val_loss": 0.8}', line, '{"step": 200, "val_loss": 0.4}')
    assert log.best() == [200]


def test_lines_of_two_writers_are_skipped_and_told(log: Log) -> None:
    """A run was killed within a line, and resumed on it."""
    log.write("step,val_loss", "100,0.8", "200,0.4300,0.5", "400,0.6,7", "400,0.6")
    assert log.best() == [400]
    assert log.notices[0] == "metrics.csv: skipped 2 lines without the 2 cells of the header, the first is line 3"
    log.write('{"step": 100, "val_loss": 0.8}', '{"step": 200, "v{"step": 300}', '{"step": 400, "val_loss": 0.6}')
    assert log.best() == [400]
    assert log.notices[0] == "metrics.csv: skipped 1 line that are no JSON objects, the first is line 2"


@pytest.mark.guarantee("metric-log")
def test_a_log_that_is_still_written_is_read_up_to_its_last_whole_value(log: Log) -> None:
    """0.0341 cut to 0.03 would be the best."""
    log.write("step,val_loss,lr", "100,0.8,0.1", "200,0.4,0.1", "300,0.03", end="\n")
    log.path.write_bytes(log.path.read_bytes()[:-1])
    assert log.best() == [200]
    assert log.notices[0] == "metrics.csv: line 4 has no line break, so its last value may be cut and is not used"
    log.path.write_bytes(log.path.read_bytes() + b"41,0.")
    assert log.best() == [300]  # another value is behind it
    log.write('{"step": 100, "val_loss": 0.8}', '{"step": 200, "val_loss": 0.4}', '{"step": 300, "val_loss": 0.0')
    log.path.write_bytes(log.path.read_bytes()[:-1])
    assert log.best() == [200]
    assert log.notices[0] == "metrics.csv: line 3 is incomplete and is not used"
    log.path.write_bytes(log.path.read_bytes() + b"3}")
    assert log.best() == [300]


def test_long_logs_are_read_in_pieces(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends a piece: a byte of a letter, of a line break, of a number."""
    text = "Schrittß,step,val_loss\r\n" + "".join(f"ü,{step},{1000 - step}\r\n" for step in range(401))
    log.path.write_bytes(text.encode())
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(log_rows, "_CHUNK", size)
        assert log.best() == [400]
        assert log.notices == []


@pytest.mark.parametrize("size", [1, 2**20])
def test_a_line_without_end_is_not_held(log: Log, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(log_rows, "LIMITS", Limits(log_line=1000))
    monkeypatch.setattr(log_rows, "_CHUNK", size)
    log.path.write_bytes(b"x" * 5000)
    reads, read = [], InputFile.read
    monkeypatch.setattr(InputFile, "read", lambda *arguments: reads.append(arguments) or read(*arguments))
    assert "line 1 is longer than 1,000 bytes" in log.refusal(CheckpointFormatError)
    assert len(reads) <= 1001


def test_a_json_document_is_bounded(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    log.write(json.dumps(TRAINER_STATE, indent=1))
    monkeypatch.setattr(log_rows, "LIMITS", Limits(log_document=100))
    assert "has only lines that are no JSON objects" in log.refusal(CheckpointFormatError, metric="eval_loss")
    assert LIMITS.log_document >= 2**24


PARTS = ["step", "val_loss", "100", "200", "0.5", "nan", "", '"', "{", "}", "[", ":", ",", "\t", "\r", "é", " "]
LINES = st.lists(st.lists(st.sampled_from(PARTS), max_size=8).map("".join), max_size=8)


@given(LINES.map("\n".join).map(str.encode) | st.binary(max_size=200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_log_contains_it_is_read_or_refused_in_words(log: Log, content: bytes) -> None:
    """A traceback would be a bug of ours."""
    log.path.write_bytes(content)
    with contextlib.suppress(CheckpointFormatError, IncompatibleError):
        assert log.best() in ([100], [200], [300], [400])


def test_a_header_without_rows(log: Log) -> None:
    assert log.write("step,val_loss").refusal(IncompatibleError) == (
        f"{log.path}: has no rows. Wait until the trainer has logged one, or name another log."
    )


# --- as a command -------------------------------------------------------------------------------------------


@pytest.fixture
def epochs_log(tmp_path: Path) -> Path:
    """The last of the fixture run is the worst."""
    path = tmp_path / "results.csv"
    path.write_text("epoch,score\n" + "".join(f"{epoch},{epoch / 100}\n" for epoch in range(9, 21)))
    return path


def test_the_metadata_name_the_log_and_its_values(
    in_process: Command, run_folder: Path, epochs_log: Path, tmp_path: Path
) -> None:
    """Without its folder, so that the same run makes the same file anywhere."""
    contents = set()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        moved = epochs_log.rename(tmp_path / folder / "results.csv")
        code, _, err = in_process(
            "average", run_folder, "--best", 2, "--mode", "min", "--log", moved, "--log-step", "epoch",
            "--bn", "keep", "-o", tmp_path / folder / "out.safetensors",
        )  # fmt: skip
        assert code == 0, err
        assert "Notice: by 'score' in results.csv: epoch_9.pt 0.09, epoch_10.pt 0.1\n" in err
        contents.add((tmp_path / folder / "out.safetensors").read_bytes())
        epochs_log = moved
    (content,) = contents
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    assert json.loads(metadata["ckpt_avg.log"]) == {"name": "results.csv", "step": "epoch", "metric": "score"}
    assert [each["logged"] for each in json.loads(metadata["ckpt_avg.sources"])] == [0.09, 0.1]
    assert in_process("verify", tmp_path / "b" / "out.safetensors", "--sources", run_folder)[0] == 0


def test_inspect_and_a_dry_run_show_the_metrics_of_the_log(
    in_process: Command, run_folder: Path, epochs_log: Path, tmp_path: Path
) -> None:
    options = ("--log", epochs_log, "--log-step", "epoch")
    code, out, err = in_process("inspect", run_folder, *options)
    assert (code, err) == (0, "")
    assert "epoch_20.pt  20     0.2    0.99      0.0454638" in out
    assert "metrics: 'accuracy', 'loss', 'score'" in out
    code, out, err = in_process("inspect", run_folder / "epoch_20.pt", *options, "--json")
    assert json.loads(out)["metrics"]["score"] == 0.2
    dry = ("--dry-run", "--bn", "keep", "-o", tmp_path / "out.safetensors")
    code, out, err = in_process("average", run_folder, "--best", 1, "--mode", "max", *options, *dry)
    assert (code, "by 'score' in results.csv: epoch_20.pt 0.2" in err) == (0, True)
    code, out, err = in_process("check", run_folder, "--best", 3, "--mode", "max", *options, "--json")
    assert [Path(each).name for each in json.loads(out)["checkpoints"]] == [f"epoch_{each}.pt" for each in (18, 19, 20)]


def test_inspect_shows_no_metric_of_a_checkpoint_as_that_of_the_log(
    in_process: Command, run_folder: Path, tmp_path: Path
) -> None:
    """The log counts one lower, and both have a loss."""
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss\n" + "".join(f"{epoch},{epoch / 8}\n" for epoch in range(8, 20)))
    code, out, _ = in_process("inspect", run_folder, "--log", path, "--log-step", "epoch")
    assert code == 0
    assert "epoch_9.pt   9      1.125  0.987\n" in out
    assert "epoch_20.pt  20     -      0.99\n" in out
    assert "note: --log-step epoch: metrics.csv has no metrics of epoch_20.pt\n" in out


@pytest.mark.guarantee("metric-log")
@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", 3),
        (b"epoch,score\n" + b"\n".join(b"%d,nan" % epoch for epoch in range(9, 21)) + b"\n", 4),
        (b"epoch,score\n1,0.5\n2,0.4\n", 4),
        (b"iteration,score\n1,0.5\n", 4),
        (b"epoch,loss\n9,0.5\n", 4),
        (None, 2),
    ],
)
def test_a_log_that_is_refused_leaves_the_output_alone(
    in_process: Command, run_folder: Path, tmp_path: Path, content: bytes | None, code: int
) -> None:
    """One line on stderr, the exit code of its kind, and no output or the old one."""
    path = tmp_path / "metrics.csv"
    if content is not None:
        path.write_bytes(content)
    options = ("--best", 2, "--metric", "score", "--mode", "min", "--log", path, "--log-step", "epoch", "--bn", "keep")
    assert "metrics.csv" in refusal(in_process, run_folder, *options, folder=tmp_path, code=code)


def fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "no such file. Check the path."),
        (Path.mkdir, "expected a file, got a folder. Name a log in CSV or JSON lines."),
        (fifo, "expected a file, got a device, pipe or socket. Name a log in CSV or JSON lines."),
        (lambda path: path.symlink_to("/dev/zero"), "expected a file, got a device, pipe or socket."),
        (lambda path: path.symlink_to(path.name), "cannot be accessed: "),
        (lambda path: path.parent.joinpath("x").symlink_to("nowhere"), "no such file."),
    ],
)
def test_what_is_no_file_is_refused_without_waiting(
    tmp_path: Path, make: Callable[[Path], None] | None, message: str
) -> None:
    path = tmp_path / "metrics.csv"
    if make is not None:
        make(path)
    for each in (path, path / "below") if make is None else (path,):
        with pytest.raises(UsageError) as caught:
            read_log(STEPS, LogOptions(log=each), lambda _: None)
        assert str(caught.value).startswith("--log ")
        assert message in str(caught.value)


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000])
def test_a_path_that_no_file_can_have(path: str) -> None:
    with pytest.raises(UsageError, match=r"^--log "):
        read_log(STEPS, LogOptions(log=path), lambda _: None)


def test_a_column_without_a_log() -> None:
    with pytest.raises(UsageError) as caught:
        LogOptions(log_step="epoch")
    assert str(caught.value) == "--log-step epoch needs --log. Add --log FILE."


def test_a_record_without_a_step_has_no_metrics(log: Log) -> None:
    log.write("step,val_loss", "100,0.8")
    found = read_log(STEPS, LogOptions(log=log.path), lambda _: None)
    assert found.metrics_of(Record()) == {}
    assert found.metrics_of(STEPS[0].record) == {"val_loss": 0.8}
