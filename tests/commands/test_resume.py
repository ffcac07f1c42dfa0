"""`--resume FILE`: an interrupted sweep or soup that goes on gives exactly what an uninterrupted one gives."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands.user_modules import NET, App, InProcess, data, make, score, trained
from recorded import Recorded

from ckpt_avg import OutputError, UsageError, UserCodeError, soup, sweep
from ckpt_avg.commands.documents import soup_json, sweep_json

Run = Callable[..., str]


class Stopped(BaseException):
    """Ctrl-C, or a signal, in the user's function; no Exception."""


def evaluator(stop_at: int = -1, wrong: float = 0.0) -> Callable[[torch.nn.Module], dict[str, float]]:
    """The function of the user's: it stops at its n-th call, or counts its calls if it does not."""
    numbers = itertools.count()

    def measured(model: torch.nn.Module) -> dict[str, float]:
        if next(numbers) == stop_at:
            raise Stopped
        found = score(model)
        return {**found, "loss": found["loss"] + wrong + torch.rand(()).item()}

    measured.numbers = numbers  # type: ignore[attr-defined]
    return measured


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    """Four checkpoints."""
    folder = tmp_path / "a run"
    folder.mkdir()
    paths = [folder / f"step_{number}.pt" for number in range(1, 5)]
    for number, path in enumerate(paths, start=1):
        torch.save({"model": trained(number), "step": number}, path)
    return paths


@pytest.fixture
def swept(run: list[Path], tmp_path: Path) -> Run:
    """Sweeps, and returns the JSON document."""

    def call(**options: Any) -> str:
        given = {"model": make, "data": data, "minimize": "loss", "device": "cpu", "evaluate": evaluator(), **options}
        return json.dumps(sweep_json(sweep(run, **given), ["ckpt-avg"]))

    return call


@pytest.fixture
def made(run: list[Path], tmp_path: Path) -> Run:
    """Makes a soup, and returns the JSON document and the file."""

    def call(**options: Any) -> str:
        given = {"model": make, "data": data, "minimize": "loss", "device": "cpu", "evaluate": evaluator(), **options}
        out = tmp_path / "soup.safetensors"
        found = soup_json(soup(run, out, overwrite=True, **given), ["ckpt-avg"])
        return json.dumps(found) + out.read_bytes().hex()

    return call


def calls_of(function: Any) -> int:
    """How often the function was called."""
    return next(function.numbers)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("swept", {}),
        ("made", {}),
        pytest.param("swept", {"hold": 1, "eval_repeats": 2}, marks=pytest.mark.slow),
        pytest.param("made", {"hold": 1, "eval_repeats": 2}, marks=pytest.mark.slow),
        pytest.param("swept", {"weightings": "mean,ema:1", "hold": 1}, marks=pytest.mark.slow),
        pytest.param("swept", {"data": None, "bn": "keep"}, marks=pytest.mark.slow),
        pytest.param("made", {"data": None, "bn": "keep"}, marks=pytest.mark.slow),
    ],
)
def test_stopped_at_any_measurement_it_gives_what_one_run_gives(
    command: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Byte for byte: numbers, notices, passes, and the file of a soup."""
    call: Run = request.getfixturevalue(command)
    whole = evaluator()
    expected = call(evaluate=whole, **options)
    count = calls_of(whole)
    assert count > 7
    for stop_at in range(0, count, 1 if not options else 5):
        file = tmp_path / f"{stop_at}.json"
        with pytest.raises(Stopped):
            call(evaluate=evaluator(stop_at), resume=file, **options)
        assert call(resume=file, **options) == expected, stop_at


def test_what_the_file_has_is_not_measured_again(swept: Run, tmp_path: Path) -> None:
    """Except for the last checkpoint and the first window, by which the file is checked. Nor is it read again."""
    file = tmp_path / "sweep.json"
    expected = swept(resume=file)
    again, recorded = evaluator(), Recorded()
    assert swept(resume=file, evaluate=again, progress=recorded.progress) == expected
    assert calls_of(again) == 2
    assert len(recorded.passes()) == 1
    assert recorded.measured.count("the last 2") == 1, "it is shown all the same"


def test_it_goes_on_again_and_again(swept: Run, tmp_path: Path) -> None:
    """Each time one measurement further."""
    file, expected = tmp_path / "sweep.json", swept()
    for _ in range(6):
        with pytest.raises(Stopped):
            swept(resume=file, evaluate=evaluator(3))
    assert swept(resume=file) == expected


def test_the_file_is_complete_after_each_measurement(swept: Run, tmp_path: Path) -> None:
    """Whenever a run is killed, the file has all that was measured before."""
    file = tmp_path / "sweep.json"
    found: list[int] = []

    def watching(model: torch.nn.Module) -> float:
        found.append(len(json.loads(file.read_text())["measured"]) if file.exists() else 0)
        return score(model)["loss"]

    swept(resume=file, evaluate=watching, minimize="watching")
    assert found == list(range(9))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == ["a run"]


@pytest.mark.parametrize("options", [{"windows": "last"}, {"hold": 1}, {"weightings": "mean,ema:1"}, {"split": "test"}])
def test_options_that_change_no_number_may_differ(swept: Run, tmp_path: Path, options: dict[str, Any]) -> None:
    file = tmp_path / "sweep.json"
    swept(resume=file)
    assert swept(resume=file, **options) == swept(**options)


def test_a_failing_function_can_be_repaired(swept: Run, tmp_path: Path) -> None:
    """Its code may change, as long as it measures the same: the case for which people want to go on."""
    file = tmp_path / "sweep.json"
    calls = itertools.count()

    def repaired(model: torch.nn.Module) -> float:
        if next(calls) == 5:
            raise LookupError("no row 5")
        return score(model)["loss"]

    with pytest.raises(UserCodeError, match="no row 5"):
        swept(resume=file, evaluate=repaired, minimize="repaired")
    assert swept(resume=file, evaluate=repaired, minimize="repaired") == swept(evaluate=repaired, minimize="repaired")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def other_function(model: torch.nn.Module) -> dict[str, float]:
    return score(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, r"has --dtype float64 \(then keep\)\. Use the options of that run"),
        ({"bn_batches": 2}, r"--bn-batches 2 \(then none\)"),
        ({"eval_repeats": 2}, r"--eval-repeats 2 \(then 1\)"),
        ({"data": None, "bn": "keep"}, r"--data none \(then data\), --bn keep \(then auto\)"),
        ({"evaluate": other_function}, r"--eval other_function \(then evaluator\.<locals>\.measured\)"),
        ({"last": 3}, "other checkpoints: step_1.pt, .*; this one has step_2.pt, step_3.pt, step_4.pt"),
        ({"evaluate": evaluator(wrong=1e-6)}, "step_4.pt measures .* now, and .* in the file"),
    ],
    ids=str,
)
def test_the_file_of_another_run_is_refused(swept: Run, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """It says what differs, and leaves the file as it is."""
    file = tmp_path / "sweep.json"
    swept(resume=file)
    before = file.read_bytes()
    with pytest.raises(UsageError, match=message) as caught:
        swept(resume=file, **options)
    assert str(file) in str(caught.value)
    assert file.read_bytes() == before


def test_a_checkpoint_that_was_written_again_is_noticed(swept: Run, run: list[Path], tmp_path: Path) -> None:
    """Even one with the same size, header and name, as the next training run writes it."""
    file = tmp_path / "sweep.json"
    swept(resume=file)
    torch.save({"model": trained(9), "step": 2}, run[1])
    os.utime(run[1], (1, 1))
    with pytest.raises(UsageError, match=r"changed since it was written: step_2\.pt\. Choose another file"):
        swept(resume=file)


def test_data_that_were_changed_are_noticed(swept: Run, tmp_path: Path) -> None:
    """The first average is refreshed and measured again."""
    file = tmp_path / "sweep.json"
    shift = 0.0

    def batches() -> list[torch.Tensor]:
        return [batch + shift for batch in data()]

    swept(resume=file, data=batches)
    shift = 0.5
    with pytest.raises(UsageError, match=r"the last 1 measures .* now, and .* in the file\. The code, the data or"):
        swept(resume=file, data=batches)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b'{"ckpt_avg": "0.1.0"}', "exists already, and is not a file that --resume wrote|is not a file that resume"),
        (b"precious", "exists already"),
        (b"[]", "exists already"),
        (b'{"ckpt_avg_measured": "sweep"}', "is damaged. Choose another file"),
    ],
)
def test_another_file_is_never_replaced(swept: Run, tmp_path: Path, contents: bytes, message: str) -> None:
    file = tmp_path / "other.json"
    file.write_bytes(contents)
    with pytest.raises(OutputError, match=message):
        swept(resume=file)
    assert file.read_bytes() == contents


def test_an_empty_file_is_a_new_one(swept: Run, tmp_path: Path) -> None:
    """As `mktemp` makes it."""
    file = tmp_path / "new.json"
    file.touch()
    assert swept(resume=file) == swept()
    assert file.stat().st_size > 1000


@pytest.mark.parametrize("name", ["sweep.txt", "sweep", "a run/step_1.pt"])
def test_other_names_are_refused(swept: Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"expected a name that ends in \.json, for example sweep\.json"):
        swept(resume=tmp_path / name)


def test_a_loader_with_a_generator_of_its_own_is_refused(swept: Run, tmp_path: Path) -> None:
    """What it gives depends on how often it was used; a function that makes it does not."""
    dataset = torch.cat(data())

    def loader() -> Any:
        generator = torch.Generator().manual_seed(1)
        return torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=True, generator=generator)

    with pytest.raises(UsageError, match="has a generator of its own"):
        swept(resume=tmp_path / "one.json", data=loader())
    assert swept(resume=tmp_path / "two.json", data=loader) == swept(data=loader)


# ---------------------------------------------------------------------------------------------------------------------
# What the user sees


def test_an_interrupt_says_what_is_kept_and_how(swept: Run, tmp_path: Path) -> None:
    """The results so far are in the JSON document, too."""
    kept, lost = Recorded(), Recorded()
    with pytest.raises(Stopped):
        swept(evaluate=evaluator(3), resume=tmp_path / "sweep.json", progress=kept.progress)
    assert kept.notices[-1] == f"3 measurements in {tmp_path}/sweep.json: the same command goes on from there"
    with pytest.raises(Stopped) as caught:
        swept(evaluate=evaluator(3), progress=lost.progress)
    assert lost.notices[-1].startswith(
        "3 measurements lost, except for what is shown above: to keep them next time, add"
    )
    assert lost.measured == ["step_4.pt", "the last 1", "the last 2"]
    assert [each["name"] for each in vars(caught.value)["document"]["measured"]] == lost.measured


def test_a_full_disk_does_not_stop_the_sweep(swept: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OutputError("sweep.json: no space left on device.")

    monkeypatch.setattr("ckpt_avg.commands.resume.publish_bytes", refuse)
    recorded = Recorded()
    swept(resume=tmp_path / "sweep.json", progress=recorded.progress)
    assert recorded.notices[-1] == "sweep.json: no space left on device. What is measured from here on is not kept"


SLOW = f"""{NET}
import time
def slow(model):
    time.sleep(0.3)
    return score(model)["loss"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_leaves_a_file_to_go_on_from(
    run: list[Path], tmp_path: Path, in_process: InProcess, number: signal.Signals
) -> None:
    """The command, stopped while it measures: the same command prints exactly what one run prints."""
    app = App(tmp_path, SLOW)
    options = [run[0].parent, *app.options("slow"), "--minimize", "slow", "--json"]
    arguments = ["sweep", *options, "--resume", tmp_path / "sweep.json"]
    command = [sys.executable, "-m", "ckpt_avg", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("window 2 of 7, the last 2: slow "):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert re.search(r"[34] measurements in .*: the same command goes on from there$", err, re.MULTILINE)
        assert json.loads(out)["measured"][0]["name"] == "step_4.pt"
        assert process.returncode == 128 + number
    code, resumed, err = in_process(*arguments)
    assert code == 0
    assert "window 2 of 7, the last 2: " in err
    assert "known before" in err
    assert resumed == in_process("sweep", *options)[1]


def test_a_report_has_another_path(run: list[Path], tmp_path: Path, in_process: InProcess) -> None:
    app = App(tmp_path, NET)
    options = [run[0].parent, *app.options("score"), "--minimize", "loss", "--resume", tmp_path / "x.json"]
    code, _, err = in_process("sweep", *options, "--report", tmp_path / "x.json")
    assert (code, "is the path of --resume" in err) == (2, True)
