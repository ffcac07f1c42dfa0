"""The command: what it prints and where, its exit codes, and the shape of the package."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import itertools
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from recorded import on_screen
from safetensors.torch import load_file, save_file

import ckpt_avg as package
from ckpt_avg import errors
from ckpt_avg.cli.exits import run
from ckpt_avg.cli.main import average_command

InProcess = Callable[..., tuple[int, str, str]]
Command = Callable[..., "subprocess.CompletedProcess[str]"]

SOURCE = Path(package.__file__).parent
_numbers = itertools.count()


def load_json(text: str) -> Any:
    """Parses stdout, which must be exactly one document, without NaN and Infinity, which are not JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(autouse=True)
def imports_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --app-dir puts on the path is gone after each test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two small checkpoints without BatchNorm."""
    paths = [tmp_path / "step_1.safetensors", tmp_path / "step_2.safetensors"]
    for number, path in enumerate(paths):
        save_file({"w": torch.arange(6.0).view(2, 3) + number}, path)
    return paths


@pytest.fixture
def misfits(tmp_path: Path) -> list[Path]:
    """Two checkpoints that don't fit together."""
    paths = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    save_file({"w": torch.zeros(3)}, paths[0])
    save_file({"w": torch.zeros(4)}, paths[1])
    return paths


MODEL = """
import os, signal, sys, time
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

def data():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 4, generator=generator) for size in (5, 4, 3)]

def data_that_fails():
    yield data()[0]
    raise LookupError("row 17 is bad")

def slow_data():
    yield data()[0]
    time.sleep(30)

def slow(model):
    time.sleep(30)

def data_that_exits():
    yield data()[0]
    sys.exit(0)

def exit_at_once():
    sys.exit(0)

def data_that_is_killed():
    yield data()[0]
    os.kill(os.getpid(), getattr(signal, os.environ["TEST_SIGNAL"]))
    time.sleep(20)

"""


@pytest.fixture
def app(tmp_path: Path) -> str:
    """A module with a model and several kinds of data, in the folder `app`, under a name of its own."""
    (tmp_path / "app").mkdir()
    name = f"user_app_{os.getpid()}_{next(_numbers)}"
    (tmp_path / "app" / f"{name}.py").write_text(MODEL)
    return name


@pytest.fixture
def normed(tmp_path: Path) -> Path:
    """A run of two checkpoints of the module's model."""
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    for seed in range(2):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        with torch.no_grad():
            model(torch.randn(8, 4))
        torch.save(model.state_dict(), run_folder / f"step_{seed}.pt")
    return run_folder


def refresh_options(tmp_path: Path, app: str, data: str = "data") -> list[object]:
    return ["--model", f"{app}:make", "--data", f"{app}:{data}", "--app-dir", tmp_path / "app", "--device", "cpu"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The whole path through the command


def test_average_of_the_real_run_with_a_refresh(
    in_process: InProcess, run_folder: Path, tmp_path: Path, train: Any
) -> None:
    output = tmp_path / "swa.safetensors"
    code, out, err = in_process(
        *("average", run_folder, "--last", 3, "--output", output, "--app-dir", run_folder, "--bn-batches", 2),
        *("--model", "train:make_model", "--data", "train:train_loader", "--device", "cpu"),
    )
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "averaged 3 checkpoints: epoch_18.pt, epoch_19.pt, epoch_20.pt"
    assert "float64 sums on cpu" in lines[1]
    assert lines[2] == "BatchNorm statistics of 4 layers recomputed over 256 samples in 2 batches"
    assert lines[3].startswith(f"wrote {output} (")
    assert "averaging" not in err
    model = train.make_model()
    model.load_state_dict(load_file(output), strict=True)
    states = [torch.load(run_folder / f"epoch_{epoch}.pt", weights_only=False)["model"] for epoch in (18, 19, 20)]
    name = "features.conv2.weight"
    exact = (states[0][name].double() + states[1][name].double() + states[2][name].double()) / 3
    assert torch.equal(model.get_parameter(name).detach(), exact.float())


def test_average_as_json(in_process: InProcess, normed: Path, tmp_path: Path, app: str) -> None:
    output = tmp_path / "swa.safetensors"
    code, out, _ = in_process("average", normed, "-o", output, "--json", *refresh_options(tmp_path, app))
    assert code == 0
    result = load_json(out)
    assert result["written"] is True
    assert result["output"] == str(output)
    assert result["checkpoints"] == [str(normed / "step_0.pt"), str(normed / "step_1.pt")]
    assert result["bytes"] == output.stat().st_size
    assert result["tensors"] == 7
    assert result["batch_norm"] == {
        "statistics": "refreshed",
        "layers": ["1"],
        "frozen": [],
        "untracked": [],
        "batches": 3,
        "samples": 12,
        "estimator": "pooled",
        "amp": "off",
    }
    assert result["evaluations"] == result["requirements"] == []
    assert result["notices"] == []
    arguments = ["average", normed, "-o", output, "--json", "--dry-run", "--overwrite", *refresh_options(tmp_path, app)]
    assert load_json(in_process(*arguments)[1])["bytes"] == result["bytes"], "a dry run foretells the size"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_writes_nothing(in_process: InProcess, normed: Path, tmp_path: Path, app: str, as_json: bool) -> None:
    output = tmp_path / "out" / "swa.safetensors"
    output.parent.mkdir()
    arguments = ["average", normed, "-o", output, "--dry-run", *refresh_options(tmp_path, app)]
    code, out, _ = in_process(*arguments, *(["--json"] if as_json else []))
    assert code == 0
    assert files(output.parent) == []
    if as_json:
        assert load_json(out)["written"] is False
        assert load_json(out)["batch_norm"]["statistics"] == "refreshed"
    else:
        assert "would average 2 checkpoints" in out
        assert "would be recomputed" in out
        assert f"would write {output}" in out


def test_check_of_the_real_run(in_process: InProcess, run_folder: Path) -> None:
    code, out, err = in_process("check", run_folder)
    assert (code, err) == (0, "")
    assert out == "12 checkpoints of 26 tensors each: names, shapes and dtypes agree\n"
    code, out, _ = in_process("check", run_folder, "--last", 2, "--json")
    assert code == 0
    assert load_json(out) == {
        "compatible": True,
        "checkpoints": [str(run_folder / "epoch_19.pt"), str(run_folder / "epoch_20.pt")],
        "tensors": 26,
        "differences": [],
        "advice": "",
        "skipped": [],
        "notices": [],
    }


@pytest.mark.guarantee("differences")
def test_check_of_misfits_fails(in_process: InProcess, misfits: list[Path]) -> None:
    """A script that asks `check` first must be stopped by its exit code."""
    code, out, err = in_process("check", *misfits)
    assert (code, out) == (4, "")
    assert "tensor 'w': shape: expected [3], got [4] in" in err
    assert str(misfits[1]) in err
    code, out, _ = in_process("check", *misfits, "--json")
    assert code == 4
    report = load_json(out)
    assert report["compatible"] is False
    difference = {"tensor": "w", "aspect": "shape", "expected": "[3]", "found": "[4]", "checkpoints": [str(misfits[1])]}
    assert report["differences"] == [difference]
    assert report["advice"]


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes, each with one JSON document


def corrupt(path: Path) -> Path:
    path.write_bytes(b"\xff" * 64)
    return path


# (what goes wrong, exit code, kind, what the message says)
FAILURES: list[tuple[str, int, str, str]] = [
    ("no command option", 2, "NoSuchOption", "--nonsense"),
    ("no output", 2, "MissingParameter", "output"),
    ("no number", 2, "BadParameter", "--last"),
    ("no size", 2, "BadParameter", "Write for example 256MiB"),
    ("no source", 2, "UsageError", "no such file or folder. Check the path."),
    ("no such choice", 2, "UsageError", "--dtype: 'int4' is not one of keep, float64"),
    ("no reference", 2, "UsageError", "expected MODULE:NAME"),
    ("no data", 2, "UsageError", "--data MODULE:FACTORY"),
    ("corrupt", 3, "CheckpointFormatError", "bad.safetensors"),
    ("misfits", 4, "IncompatibleError", "shape: expected [3], got [4]"),
    ("empty folder", 4, "IncompatibleError", "expected checkpoint files"),
    ("NaN", 4, "NonFiniteError", "NaN"),
    ("exists", 5, "OutputError", "exists already"),
    ("bad row", 7, "UserCodeError", "the dataloader raised at batch 2: LookupError: row 17 is bad"),
]


@pytest.mark.guarantee("differences", "existing-output", "nonfinite")
@pytest.mark.parametrize(("failure", "expected", "kind", "says"), FAILURES, ids=[item[0] for item in FAILURES])
def test_each_failure_has_its_code_and_one_document(
    in_process: InProcess,
    tmp_path: Path,
    pair: list[Path],
    misfits: list[Path],
    normed: Path,
    app: str,
    failure: str,
    expected: int,
    kind: str,
    says: str,
) -> None:
    out_folder = tmp_path / "out"
    out_folder.mkdir()
    output: list[object] = ["-o", out_folder / "swa.safetensors"]
    (tmp_path / "empty").mkdir()
    nan = tmp_path / "nan.safetensors"
    save_file({"w": torch.tensor([[1.0, 2, 3], [4, float("nan"), 6]])}, nan)
    if failure == "exists":
        (out_folder / "swa.safetensors").write_bytes(b"the old one")
    arguments: list[object] = {
        "no command option": [*pair, *output, "--nonsense"],
        "no output": [*pair],
        "no number": [*pair, *output, "--last", "few"],
        "no size": [*pair, *output, "--memory", "much"],
        "no source": [tmp_path / "nowhere", *output],
        "no such choice": [*pair, *output, "--dtype", "int4"],
        "no reference": [*pair, *output, "--model", "train"],
        "no data": [normed, *output, "--model", f"{app}:make", "--app-dir", tmp_path / "app"],
        "corrupt": [corrupt(tmp_path / "bad.safetensors"), pair[0], *output],
        "misfits": [*misfits, *output],
        "empty folder": [tmp_path / "empty", *output],
        "NaN": [pair[0], nan, *output],
        "exists": [*pair, *output],
        "bad row": [normed, *output, *refresh_options(tmp_path, app, "data_that_fails")],
    }[failure]
    before = files(out_folder)

    code, out, err = in_process("average", *arguments, "--json")

    document = load_json(out)
    assert code == expected
    assert list(document) == ["error"]
    assert document["error"]["exit_code"] == expected
    assert document["error"]["kind"] == kind
    assert says in document["error"]["message"]
    assert "Error: " in err
    assert says in err
    assert ("Traceback" in err) == (failure == "bad row")
    assert files(out_folder) == before
    assert failure != "exists" or (out_folder / "swa.safetensors").read_bytes() == b"the old one"


def test_an_error_in_the_users_code_keeps_its_traceback(
    in_process: InProcess, normed: Path, tmp_path: Path, app: str
) -> None:
    """Their own line is what users need to see to mend it; the last line is ours."""
    code, out, err = in_process(
        "average", normed, "-o", tmp_path / "swa.safetensors", *refresh_options(tmp_path, app, "data_that_fails")
    )
    assert (code, out) == (7, "")
    assert f"{app}.py" in err
    assert "data_that_fails" in err
    assert err.splitlines()[-1].startswith("Error: the dataloader raised at batch 2: LookupError")


@pytest.mark.parametrize("data", ["data_that_exits", "exit_at_once"])
def test_user_code_that_exits_is_no_success(
    in_process: InProcess, normed: Path, tmp_path: Path, app: str, data: str
) -> None:
    """sys.exit(0) in a loader or a factory must not end in exit code 0 without an output."""
    code, _, err = in_process(
        "average", normed, "-o", tmp_path / "swa.safetensors", *refresh_options(tmp_path, app, data)
    )
    assert code == 7
    assert "SystemExit" in err
    assert not (tmp_path / "swa.safetensors").exists()


@pytest.mark.guarantee("out-of-memory")
def test_out_of_memory_has_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def greedy() -> None:
        raise MemoryError

    @click.command()
    def greedy_on_the_device() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    for command in (greedy, greedy_on_the_device):
        assert run(command, []) == errors.ResourceError.exit_code == 6
        message = capsys.readouterr().err
        assert "out of memory" in message
        assert "--memory" in message
        assert "Traceback" not in message


def test_without_torch_it_says_what_to_install(tmp_path: Path, run_folder: Path) -> None:
    """As after pip install --no-deps, and only where torch is needed."""
    code = "import sys; sys.modules['torch'] = None; from ckpt_avg.__main__ import main; main()"
    command = [sys.executable, "-c", code, "average", str(run_folder), "--bn", "keep", "-o", "out.safetensors"]
    environment = os.environ | {"CKPT_AVG_ENGINE": "torch"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "Error: torch is not installed, and is needed here. Install it: pip install torch.\n"


@pytest.mark.parametrize("error", [ZeroDivisionError("ours"), ModuleNotFoundError("ours"), RuntimeError("ours")])
def test_a_bug_of_ours_keeps_its_traceback(error: Exception) -> None:
    @click.command()
    def broken() -> None:
        raise error

    with pytest.raises(type(error), match="ours"):
        run(broken, [])


def unhandled(number: int, frame: object) -> None:
    raise AssertionError(f"signal {number} was not handled")


@pytest.mark.guarantee("signals")
@pytest.mark.parametrize(("name", "expected"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)], ids=str)
def test_a_signal_during_the_refresh_has_its_code(
    in_process: InProcess,
    normed: Path,
    tmp_path: Path,
    app: str,
    name: str,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TEST_SIGNAL", name)
    output = tmp_path / "out" / "swa.safetensors"
    output.parent.mkdir()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, unhandled) for number in numbers]
    try:
        code, out, err = in_process(
            "average", normed, "-o", output, "--json", *refresh_options(tmp_path, app, "data_that_is_killed")
        )
        handlers = [signal.getsignal(number) for number in numbers]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert code == expected
    assert load_json(out)["error"]["exit_code"] == expected
    assert "the output path is unchanged" in err
    assert "Traceback" not in err
    assert files(output.parent) == []
    assert handlers == [unhandled] * 3


@pytest.mark.guarantee("signals")
@pytest.mark.parametrize("error", [RuntimeError("worker killed"), errors.UserCodeError("worker killed")], ids=repr)
def test_an_error_while_a_signal_stops_the_command_is_no_bug(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch raises an error for loader workers that Ctrl-C has ended, at any moment."""

    @click.command
    @click.option("-o")
    def interrupted(o: str | None) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise error

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, a shell ignores it
    try:
        assert [run(interrupted, []), run(interrupted, ["-o", "x"])] == [130, 130]
    finally:
        signal.signal(signal.SIGINT, before)
    without, with_output = capsys.readouterr().err.splitlines()
    assert without == "Error: interrupted"  # such as sweep: it has no output path to speak of
    assert with_output.startswith("Error: interrupted: the output path is unchanged")


# ---------------------------------------------------------------------------------------------------------------------
# Streams: stdout, stderr, terminals


def test_notices_go_to_stderr_and_quiet_silences_them(in_process: InProcess, normed: Path, tmp_path: Path) -> None:
    code, out, err = in_process("average", normed, "-o", tmp_path / "one.safetensors", "--bn", "keep")
    assert code == 0
    assert err.startswith("Notice: ")
    assert "Notice" not in out
    code, out, err = in_process("average", normed, "-o", tmp_path / "two.safetensors", "--bn", "keep", "-q")
    assert code == 0
    assert err == ""
    assert "wrote" in out


def on_a_terminal(
    arguments: list[object], folder: Path, *, stop_at: str = "", number: int = signal.SIGINT
) -> tuple[int, str, str]:
    """Runs the command with stderr on a pseudo-terminal: (exit code, stdout, what the terminal got).

    With ``stop_at`` it gets a signal as soon as the terminal got this text.
    """
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "ckpt_avg", *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: the last writer has closed
        while part := os.read(master, 4096):
            seen += part
            if stop_at and stop_at in seen.decode(errors="ignore"):
                process.send_signal(number)
                stop_at = ""
    os.close(master)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, seen.decode()


@pytest.mark.slow
def test_phases_appear_on_a_terminal(normed: Path, tmp_path: Path, app: str) -> None:
    arguments = ["average", normed, "-o", "swa.safetensors", "--json", *refresh_options(tmp_path, app)]
    code, out, terminal = on_a_terminal(arguments, tmp_path)
    assert code == 0
    assert load_json(out)["written"] is True
    phases = re.findall(r"\[(\d)/(.)\] (\w+)[^\r]*: [^\r]* s\b[^\r]*\r\n", terminal)
    assert phases == [  # how many there are is known once the checkpoints are open
        ("1", "…", "opening"),
        ("2", "5", "importing"),
        ("3", "5", "averaging"),
        ("4", "5", "refreshing"),
        ("5", "5", "completing"),
    ]


@pytest.mark.slow
@pytest.mark.guarantee("signals")
@pytest.mark.parametrize(
    ("options", "title", "number", "message"),
    [
        (["--model", "slow:make", "--data", "slow:data"], "importing slow", signal.SIGINT, "interrupted"),
        (["--model", "{app}:make", "--data", "{app}:slow_data"], "refreshing BatchNorm", signal.SIGINT, "interrupted"),
        (
            ["--model", "{app}:make", "--eval", "{app}:slow", "--bn", "keep"],
            "measuring step_1.pt",
            signal.SIGTERM,
            "terminated",
        ),
    ],
    ids=["import", "refresh", "evaluation"],
)
def test_an_interrupt_leaves_whole_lines(
    normed: Path, tmp_path: Path, app: str, options: list[str], title: str, number: int, message: str
) -> None:
    """The phase says where it was stopped, and the message has a line of its own."""
    (tmp_path / "app" / "slow.py").write_text("import time\ntime.sleep(30)\n")
    words = [option.format(app=app) for option in options]
    arguments = ["average", normed, "-o", "swa.safetensors", "--app-dir", tmp_path / "app", *words]
    code, _, terminal = on_a_terminal(arguments, tmp_path, stop_at=f"{title}: ", number=number)
    assert code == 128 + number, terminal
    *_, phase, error, end = on_screen(terminal.replace("\r\n", "\n"))
    assert re.fullmatch(rf"\[\d/.\] {re.escape(title)}: stopped after .* s(, \d+ %)?", phase)
    assert re.match(rf"\x1b\[31mError:\x1b\[0m {message}: ", error)
    assert end == ""


def test_checkpoints_are_checked_before_the_users_code_is_imported(
    tmp_path: Path, in_process: InProcess, misfits: list[Path], app: str
) -> None:
    """To import torch takes seconds. If it failed, these would pass before the user hears that nothing fits."""
    code, _, err = in_process("average", *misfits, "-o", tmp_path / "swa.safetensors", *refresh_options(tmp_path, app))
    assert (code, app in sys.modules) == (4, False)
    assert "other.safetensors" in err


@pytest.mark.slow
def test_quiet_draws_nothing_on_a_terminal(normed: Path, tmp_path: Path, app: str) -> None:
    arguments = ["average", normed, "-o", "swa.safetensors", "-q", *refresh_options(tmp_path, app)]
    code, out, terminal = on_a_terminal(arguments, tmp_path)
    assert code == 0
    assert terminal == ""
    assert "wrote swa.safetensors" in out


@pytest.mark.guarantee("closed-streams")
def test_a_short_run_leaves_a_log_empty(in_process: InProcess, normed: Path, tmp_path: Path, app: str) -> None:
    code, out, err = in_process("average", normed, "-o", tmp_path / "swa.safetensors", *refresh_options(tmp_path, app))
    assert code == 0
    assert err == ""
    assert "\r" not in out


def with_reader_gone(arguments: list[object], folder: Path, stream: str) -> tuple[int, str]:
    """Runs the command with stdout (or stderr) a pipe that nobody reads: (exit code, the other stream)."""
    reader, writer = os.pipe()
    os.close(reader)
    other = "stderr" if stream == "stdout" else "stdout"
    streams: dict[str, Any] = {stream: writer, other: subprocess.PIPE}
    command = [sys.executable, "-m", "ckpt_avg", *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, timeout=120, check=False, text=True, **streams)
    os.close(writer)
    return result.returncode, result.stderr if stream == "stdout" else result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["inspect", "step_1.safetensors"], 0),
        (["inspect", "step_1.safetensors", "--json"], 0),
        (["--help"], 0),
        (["check", "step_1.safetensors", "one.safetensors", "--json"], 4),
        (["inspect", "nowhere", "--json"], 2),
    ],
)
def test_a_reader_that_has_gone_changes_neither_code_nor_calm(
    tmp_path: Path, pair: list[Path], misfits: list[Path], arguments: list[object], expected: int
) -> None:
    """As in `ckpt-avg inspect … | head -0`."""
    code, err = with_reader_gone(arguments, tmp_path, "stdout")
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert code == expected


@pytest.mark.guarantee("closed-streams")
@pytest.mark.slow
def test_an_average_whose_reader_has_gone_is_published(tmp_path: Path, pair: list[Path]) -> None:
    code, err = with_reader_gone(["average", *pair, "-o", "swa.safetensors"], tmp_path, "stdout")
    assert err == ""
    assert code == 0
    assert torch.equal(load_file(tmp_path / "swa.safetensors")["w"], torch.arange(6.0).view(2, 3) + 0.5)


@pytest.mark.slow
def test_a_lost_notice_does_not_stop_the_averaging(tmp_path: Path, pair: list[Path]) -> None:
    """Hours of work must not end because nobody reads stderr any more."""
    code, out = with_reader_gone(["average", pair[0], "-o", "swa.safetensors", "--json"], tmp_path, "stderr")
    assert (tmp_path / "swa.safetensors").exists() == (code == 0)
    assert code == 0
    assert load_json(out)["written"] is True


@pytest.mark.guarantee("closed-streams")
@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "step_1.safetensors"]])
def test_a_closed_stdout_gives_no_traceback(
    tmp_path: Path, pair: list[Path], ckpt_avg: Command, arguments: list[str]
) -> None:
    result = ckpt_avg(*arguments, preexec_fn=lambda: os.close(1))
    assert result.stderr == ""
    assert result.returncode == 0


@pytest.mark.slow
def test_a_closed_stderr_keeps_stdout_clean(tmp_path: Path, pair: list[Path], ckpt_avg: Command) -> None:
    """With stderr closed, Python's own fallback would print notices into the JSON document."""
    result = ckpt_avg("average", pair[0], "-o", "swa.safetensors", "--json", preexec_fn=lambda: os.close(2))
    assert result.returncode == 0
    document = load_json(result.stdout)
    assert document["written"] is True
    assert len(document["notices"]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Surroundings


C_LOCALE = {"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.guarantee("odd-paths")
@pytest.mark.slow
def test_the_c_locale_changes_nothing(tmp_path: Path, ckpt_avg: Command) -> None:
    folder = tmp_path / "Läufe ✓"
    folder.mkdir()
    for number in range(2):
        save_file({"größe": torch.full((2,), float(number))}, folder / f"schritt_{number}.safetensors")
    outputs = []
    for environment in (C_LOCALE, {"LC_ALL": "C.UTF-8"}):
        output = tmp_path / f"schnitt_{len(outputs)}.safetensors"
        result = ckpt_avg("average", folder, "-o", output, env=os.environ | environment)
        assert "Traceback" not in result.stderr
        assert result.returncode == 0, result.stderr
        assert "averaged 2 checkpoints" in result.stdout
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1]
    result = ckpt_avg("inspect", folder / "schritt_0.safetensors", env=os.environ | C_LOCALE)
    assert (result.returncode, result.stderr) == (0, "")
    assert "F32" in result.stdout


@pytest.mark.guarantee("odd-paths")
@pytest.mark.parametrize(
    "name", ["with space", "quote's", "ünïcode ✓", "line\nbreak", "-dash", "%s{0}", os.fsdecode(b"byte\xff")]
)
def test_odd_paths_work_all_the_way(in_process: InProcess, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for number in range(2):
        with (folder / f"{name}_{number}.pt").open("wb") as file:
            torch.save({"w": torch.full((2,), float(number))}, file)
    output = folder / f"{name} mean.safetensors"
    code, out, _ = in_process("average", "--json", "-o", output, "--", folder)
    assert code == 0
    assert load_json(out)["output"] == str(output)
    assert torch.equal(load_file_at(output)["w"], torch.tensor([0.5, 0.5]))
    for command in (["inspect", "--", folder], ["inspect", "--json", "--", output], ["check", "--", folder]):
        code, out, err = in_process(*command)
        assert (code, err) == (0, "")
        assert out


def load_file_at(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(path.read_bytes())


def test_errors_name_odd_paths_without_a_traceback(in_process: InProcess, tmp_path: Path) -> None:
    missing = tmp_path / os.fsdecode(b"byte\xff")
    code, out, err = in_process("inspect", missing, "--json")
    assert code == 2
    assert load_json(out)["error"]["kind"] == "UsageError"
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.guarantee("python-O")
def test_checks_hold_under_python_o(tmp_path: Path, misfits: list[Path]) -> None:
    command = [sys.executable, "-O", "-m", "ckpt_avg", "average", *map(str, misfits), "-o", "swa.safetensors"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 4
    assert "shape: expected [3], got [4]" in result.stderr
    assert not (tmp_path / "swa.safetensors").exists()


@pytest.mark.guarantee("python-O")
def test_no_check_is_an_assert() -> None:
    """`python -O` drops assert statements."""
    for path in SOURCE.rglob("*.py"):
        asserts = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not asserts, f"{path}: line {asserts}"


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1048576", 2**20),
        ("1048576B", 2**20),
        ("64K", 64 * 2**10),
        ("256M", 256 * 2**20),
        ("256MiB", 256 * 2**20),
        ("256mib", 256 * 2**20),
        ("256 MiB", 256 * 2**20),
        (" 2G ", 2 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("0.5GiB", 2**29),
        ("200MB", 200_000_000),
        ("2GB", 2_000_000_000),
        ("3KB", 3_000),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    context = average_command.make_context("average", ["x", "-o", "y", "--memory", text])
    assert context.params["memory"] == expected


@pytest.mark.parametrize("text", ["", "much", "MiB", "-5MiB", "5XB", "1.2.3", "1e9", "5 Mi B", "9" * 400])
def test_other_sizes_are_refused(in_process: InProcess, text: str) -> None:
    code, _, err = in_process("average", "x", "-o", "y", f"--memory={text}")
    assert code == 2
    assert "Write for example 256MiB" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["avrage"], "avrage: no such command. Did you mean 'average'? See ckpt-avg --help."),
        (["average", "-o", "x"], "SOURCE...: missing. See ckpt-avg average --help."),
        (["average", "run"], "--output: missing. Add -o swa.safetensors."),
        (["inspect"], "PATH...: missing. See ckpt-avg inspect --help."),
        (["check", "a", "--last"], "--last: its value is missing. See ckpt-avg check --help."),
        (["check", "a", "--json=1"], "--json: takes no value. See ckpt-avg check --help."),
        (["check", "a", "--lst", "3"], "--lst: no such option. Did you mean '--last'?"),
        (["check", "a", "--bn", "keep"], "--bn: no such option. These commands have it: average, sweep, soup."),
        (
            ["sweep", "a", "--require", "a>1"],
            "--require: no such option. These commands have it: average, refresh-bn, soup.",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_messages_on_words_that_are_missing_or_wrong(
    in_process: InProcess, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the form of all our messages: where, what is wrong, what to do."""
    monkeypatch.chdir(tmp_path)  # a name that is free there is proposed
    assert in_process(*arguments) == (2, "", f"Error: {message}\n")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["average", "--help"], ["check", "-h"], ["inspect", "--help"]]
)
def test_help_is_on_stdout(in_process: InProcess, arguments: list[str]) -> None:
    code, out, err = in_process(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ckpt-avg")


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_the_version_names_the_engine(in_process: InProcess, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setattr("ckpt_avg.engine._kernel", object() if engine == "native" else None)
    assert in_process("--version")[:2] == (0, f"ckpt-avg, version {package.__version__}, {engine} engine\n")


# ---------------------------------------------------------------------------------------------------------------------
# Quick answers: no torch where none is needed


def modules_after(code: str, *arguments: object) -> set[str]:
    """The modules that a process has when it ends."""
    program = f"import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\n{code}"
    result = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=True
    )
    return set(result.stderr.split())


@pytest.mark.parametrize("command", [["--help"], ["average", "--help"], ["--version"], ["inspect"], ["check"]])
def test_torch_is_not_imported_for(command: list[object], run_folder: Path) -> None:
    source = [run_folder] if command[0] in ("inspect", "check") else []
    modules = modules_after("from ckpt_avg.cli.main import main\nmain()", *command, *source)
    assert "ckpt_avg.cli.main" in modules
    assert "torch" not in modules
    assert "numpy" not in modules


def test_what_the_users_code_prints_is_no_result(
    tmp_path: Path, in_process: Callable[..., tuple[int, str, str]], run_folder: Path
) -> None:
    """Stdout must hold one document, whatever the user's module prints."""
    (tmp_path / "noisy.py").write_text(
        f"import sys\nsys.path.insert(0, {str(run_folder)!r})\nfrom train import make_model\n"
        "import torch\nprint('loading data...')\n"
        "def batches():\n    print('making batches')\n    return [torch.randn(8, 1, 28, 28)]\n"
    )
    output = tmp_path / "o.safetensors"
    options = ["--model", "noisy:make_model", "--data", "noisy:batches", "--app-dir", tmp_path, "--json"]
    code, out, err = in_process("average", run_folder, "--last", 2, "-o", output, *options)
    assert code == 0, err
    assert json.loads(out)["batch_norm"]["batches"] == 1
    assert "loading data..." in err
    assert "making batches" in err


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_stdout_is_an_error_and_the_output_is_kept(tmp_path: Path, pair: list[Path]) -> None:
    output = tmp_path / "o.safetensors"
    command = [sys.executable, "-m", "ckpt_avg", "average", *map(str, pair), "-o", str(output)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 5
    assert "Error: stdout: cannot be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert output.exists()


# ---------------------------------------------------------------------------------------------------------------------
# What --overwrite may replace


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run: two checkpoint files, a checkpoint folder, an alias, an incomplete file, and a final sharded model."""
    folder = tmp_path / "run"
    (folder / "checkpoint-3").mkdir(parents=True)
    for step in (1, 2):
        save_file({"w": torch.full((3,), float(step))}, folder / f"step_{step}.safetensors")
    save_file({"w": torch.full((3,), 3.0)}, folder / "checkpoint-3" / "model.safetensors")
    (folder / "checkpoint-3" / "trainer_state.json").write_text("{}")
    save_file({"w": torch.full((3,), 4.0)}, folder / "last.safetensors")
    (folder / "step_4.safetensors.tmp").write_bytes(b"cut off")
    shards = {"w": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in shards.items():
        save_file({name: torch.full((3,), 9.0)}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return folder


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    "output",
    ["step_1.safetensors", "step_2.safetensors", "last.safetensors", "step_4.safetensors.tmp",
     "checkpoint-3/model.safetensors", "checkpoint-3/trainer_state.json", "model-00001-of-00002.safetensors",
     "../link.safetensors", "../hard.safetensors", "../linked/model.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize(
    "selection",
    [(), ("--exclude", "step_1*", "--exclude", "checkpoint*"), ("--last", "1"), ("--include", "step_2*")],
    ids=["all", "excluded", "last", "included"],
)
def test_overwrite_replaces_no_file_of_any_checkpoint(
    in_process: InProcess, trained: Path, tmp_path: Path, output: str, selection: tuple[str, ...], dry_run: bool
) -> None:
    """Whether it is used, excluded or skipped; also what a checkpoint folder links to, as in the hub's cache."""
    (tmp_path / "link.safetensors").symlink_to(trained / "step_1.safetensors")
    (tmp_path / "hard.safetensors").hardlink_to(trained / "step_1.safetensors")
    (trained / "checkpoint-3").rename(tmp_path / "linked")
    (trained / "checkpoint-3").mkdir()
    for path in (tmp_path / "linked").iterdir():
        (trained / "checkpoint-3" / path.name).symlink_to(path)
    before = contents_of(tmp_path)
    options = ("--dry-run",) if dry_run else ()
    code, out, err = in_process("average", trained, "--output", trained / output, "--overwrite", *selection, *options)
    assert (code, out) == (2, "")
    assert "of the checkpoints" in err
    assert err.rstrip().endswith("Choose another path.")
    assert contents_of(tmp_path) == before


@pytest.mark.parametrize("name", ["average.safetensors", "mean.safetensors", "step_9.safetensors"])
def test_overwrite_replaces_an_earlier_average_in_the_run_folder(
    in_process: InProcess, trained: Path, name: str
) -> None:
    """Whether its name says what it is or not, also next to a stray shard; without --overwrite it stays."""
    (trained / "model.safetensors.index.json").unlink()
    (trained / "model-00002-of-00002.safetensors").unlink()
    output = trained / name
    assert in_process("average", trained, "--last", 2, "--output", output)[0] == 0
    first = output.read_bytes()
    assert in_process("average", trained, "--output", output)[0] == 5
    assert output.read_bytes() == first
    assert in_process("average", trained, "--output", output, "--overwrite")[0] == 0
    assert load_file(output)["w"].tolist() == [2.0] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Names of files on a terminal

HOSTILE = "\x1b[31m\r\n\tstep"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run whose folder and files have control characters in their names."""
    folder = tmp_path / "\x1b[2J\rrun"
    folder.mkdir()
    for step in (1, 2):
        save_file({"w": torch.full((3,), float(step))}, folder / f"{HOSTILE}_{step}.safetensors")
    save_file({"w": torch.full((3,), 2.0)}, folder / f"{HOSTILE}_2_copy.safetensors")
    (folder / f"{HOSTILE}_3.safetensors.tmp").write_bytes(b"x")
    save_file({"w": torch.full((3,), 2.0)}, folder / f"ema_{HOSTILE}.safetensors")
    return folder


def assert_plain(out: str, err: str) -> None:
    assert "\\r\\n\\tstep" in out + err, "the name is there"
    assert not set("\x1b\r\t") & set(out + err)
    assert not any(line.startswith("\\tstep") for line in (out + err).splitlines()), "a line break in a name"
    assert "Traceback" not in err


@pytest.mark.parametrize("options", [(), ("--json",), ("--verbose",), ("--dry-run",)], ids="".join)
def test_results_show_names_escaped(in_process: InProcess, hostile: Path, options: tuple[str, ...]) -> None:
    """A name from a stranger's archive must not clear the screen or write over a line."""
    output = hostile / f"{HOSTILE}_mean.weights"
    code, out, err = in_process("average", hostile, "--output", output, *options)
    assert code == 0
    assert_plain(out, err)
    if "--dry-run" not in options:
        code, out, err = in_process("check", hostile / f"{HOSTILE}_1.safetensors", output, *options)
        assert code == 0
        assert_plain(out, err)


def broken(hostile: Path) -> None:
    (hostile / f"{HOSTILE}_2.safetensors").write_bytes(b"junk")


def misfit(hostile: Path) -> None:
    save_file({"w": torch.zeros(4)}, hostile / f"{HOSTILE}_2.safetensors")


def not_finite(hostile: Path) -> None:
    save_file({"w": torch.full((3,), float("nan"))}, hostile / f"{HOSTILE}_2.safetensors")


def doubled(hostile: Path) -> None:
    save_file({"w": torch.full((3,), 7.0)}, hostile / f"b{HOSTILE}_1.safetensors")
    save_file({"w": torch.full((3,), 8.0)}, hostile / f"b{HOSTILE}_2.safetensors")


def integers(hostile: Path) -> None:
    for step in (1, 2):
        save_file({"w": torch.ones(3), "n": torch.tensor(step)}, hostile / f"{HOSTILE}_{step}.safetensors")


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", ["average", "check"])
@pytest.mark.parametrize("spoil", [broken, misfit, not_finite, doubled, integers])
def test_errors_show_names_escaped(
    in_process: InProcess, hostile: Path, tmp_path: Path, spoil: Callable[[Path], None], command: str, as_json: bool
) -> None:
    """Each error that names a checkpoint: unreadable, of another shape, NaN, several series, integers that differ."""
    (hostile / f"{HOSTILE}_2_copy.safetensors").unlink()
    spoil(hostile)
    options: list[object] = ["--json"] if as_json else []
    if command == "average":
        options += ["--output", tmp_path / "out.safetensors"]
    code, out, err = in_process(command, hostile, *options)
    if command == "average" or spoil in (broken, misfit, doubled):
        assert code in (3, 4)
        assert_plain(out, err)
    assert not set("\x1b\r\t") & set(out + err)


@pytest.mark.parametrize("command", ["average", "check", "inspect"])
def test_errors_about_paths_show_them_escaped(in_process: InProcess, hostile: Path, command: str) -> None:
    """Of sources that are not there or twice there, of selections without any, and of outputs."""
    (first,) = hostile.glob("*_1.safetensors")
    output: list[object] = ["--output", hostile.parent / "out.safetensors"] if command == "average" else []
    (hostile / "empty").mkdir()
    sources: list[list[object]] = [[hostile / f"{HOSTILE}_9.pt"]]
    if command != "inspect":
        sources += [[first, first], [hostile, "--include", "x*"], [hostile, "--last", 9], [hostile, first]]
    for source in sources:
        code, out, err = in_process(command, *source, *output)
        assert code in (2, 4)
        assert_plain(out, err)
    if command == "average":
        for target in (first, first / "x.safetensors", hostile / f"{HOSTILE}.pt", hostile / f"{HOSTILE}.tmp"):
            if target.suffix == ".tmp":
                (target / target.name).mkdir(parents=True)
            code, out, err = in_process("average", hostile, "--output", target)
            assert code == (5 if target.suffix == ".tmp" else 2)
            assert_plain(out, err)
