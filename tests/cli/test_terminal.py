"""What fits a terminal, and what only a terminal gets: tables of 80 columns, colours; -q, -v and -V of all commands."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ckpt_avg
from ckpt_avg.cli.main import cli
from ckpt_avg.tables import columns_of

InProcess = Callable[..., tuple[int, str, str]]

APP = """
import torch

def make_model():
    return torch.nn.Linear(2, 1)

def many(model):
    value = float(model.weight.sum())
    return {f"validation/metric_{number:02}": value / (number + 7) for number in range(12)}

def one(model):
    return {"accuracy": float(model.weight.sum())}
"""
NAME = "日本語チェックポイント-with-a-long-name-that-goes-on-and-on-and-on-epoch={:02}.ckpt"
MODEL = ["--model", "terminal_app:make_model"]
RULES = "mean,linear,minus-sqrt,cosine,ema:20%,power:0.1,power:0.2"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a run of checkpoints with long names and many metrics, and a module."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "terminal_app.py").write_text(APP)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(1, 9):
        weights = {"weight": torch.randn(1, 2, generator=generator), "bias": torch.zeros(1)}
        metrics = {f"val_metric_{number}": 0.123456789 * epoch * number for number in range(1, 13)}
        torch.save({"model": weights, "epoch": epoch, **metrics}, tmp_path / "run" / NAME.format(epoch))
    (tmp_path / "run" / "optimizer.pt").write_bytes(b"x")
    return tmp_path


TABLES = {
    "inspect": ["inspect", "run", "--last", "4", "--every", "2"],
    "average": ["average", "run", *MODEL, "--eval", "terminal_app:many", "--eval-all", "--weighting", "minus-sqrt",
                "-o", "out.safetensors"],
    "metrics": ["sweep", "run", *MODEL, "--eval", "terminal_app:many", "--maximize", "validation/metric_07"],
    "rules": ["sweep", "run", *MODEL, "--eval", "terminal_app:one", "--maximize", "accuracy", "--weightings", RULES],
    "soup": ["soup", "run", *MODEL, "--eval", "terminal_app:many", "--maximize", "validation/metric_07",
             "-o", "out.safetensors"],
    "compare": ["compare", "run", "--tensors"],
    "check": ["check", "run", "-v"],
}  # fmt: skip


@pytest.mark.parametrize("arguments", TABLES.values(), ids=TABLES)
def test_tables_fit_80_columns_and_wide_shows_all(arguments: list[str], work: Path, in_process: InProcess) -> None:
    code, out, _ = in_process(*arguments)
    assert code == 0
    rows = [line for line in out.splitlines() if "  " in line]
    assert len(rows) > 1
    assert max(map(columns_of, rows)) <= 80
    assert "…" in "".join(rows)
    code, out, _ = in_process(*arguments, "--wide", *(["--overwrite"] if "-o" in arguments else []))
    assert code == 0
    assert max(columns_of(line) for line in out.splitlines() if "  " in line) > 80
    assert NAME.format(8) in out


def test_the_metric_that_counts_is_in_the_table(work: Path, in_process: InProcess) -> None:
    for case in ("metrics", "soup"):
        out = in_process(*TABLES[case])[1]
        assert "metric_07" in out.partition("not shown")[0]
        assert "metric_07" not in out.partition("not shown")[2].partition("Add --wide")[0]


def test_no_rule_of_a_sweep_is_left_out(work: Path, in_process: InProcess) -> None:
    """It may have taken hours: columns that do not fit follow below."""
    out = in_process(*TABLES["rules"])[1]
    assert "not shown" not in out
    for rule in RULES.split(","):
        assert f" {rule}" in out
    assert out.count("last 3 ") == 2


# ---------------------------------------------------------------------------------------------------------------------
# Colours

COLOUR = "\x1b["


def on_a_terminal(arguments: list[str], folder: Path, **environment: str) -> str:
    """What a terminal of 100 columns gets, on which both streams are."""
    master, terminal = pty.openpty()
    known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    with subprocess.Popen(
        [sys.executable, "-m", "ckpt_avg", *arguments],
        cwd=folder,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=known | {"TERM": "xterm"} | environment,
    ):
        os.close(terminal)
        seen = b""
        try:
            while part := os.read(master, 4096):
                seen += part
        except OSError:  # the last writer has closed
            os.close(master)
    return seen.decode()


@pytest.mark.slow
def test_colours_are_only_on_a_terminal_that_wants_them(work: Path) -> None:
    arguments = ["inspect", "nowhere"]
    assert "\x1b[31mError:\x1b[0m nowhere: " in on_a_terminal(arguments, work)
    for plain in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}):
        assert "\x1b[31m" not in on_a_terminal(arguments, work, **plain)
    assert "\x1b[31m" not in on_a_terminal([*arguments, "--color", "never"], work)
    assert COLOUR in on_a_terminal([*arguments, "--color=always"], work, NO_COLOR="1")


@pytest.mark.parametrize(
    ("environment", "options", "expected"),
    [
        ({}, [], False),
        ({"FORCE_COLOR": "1"}, [], True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, [], False),
        ({"FORCE_COLOR": "1"}, ["--color", "never"], False),
        ({}, ["--color", "always"], True),
        ({}, ["--color=always"], True),
        ({}, ["--color", "always", "--nonsense"], True),
    ],
)
def test_colours_without_a_terminal(
    environment: dict[str, str],
    options: list[str],
    expected: bool,
    work: Path,
    in_process: InProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _, out, err = in_process("inspect", "nowhere", *options)
    assert ((COLOUR in err), out) == (expected, "")
    assert err.replace("\x1b[31m", "").replace("\x1b[0m", "").startswith("Error: ")


def test_colours_add_to_words_and_replace_none(work: Path, in_process: InProcess) -> None:
    """Better and worse are words; what is written elsewhere, such as JSON, has no colours."""
    options = [*TABLES["average"], "--overwrite", "--require", "validation/metric_00>=-100"]
    plain, painted = in_process(*options), in_process(*options, "--color", "always")
    assert "\x1b[32mmet:\x1b[0m" in painted[1]
    assert "\x1b[33mNotice:\x1b[0m" in painted[2]
    assert painted[1].replace("\x1b[32m", "").replace("\x1b[0m", "") == plain[1]
    assert COLOUR not in in_process(*options, "--color", "always", "--json")[1]


def test_a_name_cannot_use_escape_sequences_in_colour(tmp_path: Path, in_process: InProcess) -> None:
    assert in_process("inspect", "a\x1b[2Jb", "--color", "always")[2].count("\x1b") == 2


# ---------------------------------------------------------------------------------------------------------------------
# -q, -v and -V

EVERY = {
    "average": ["average", "run", "-o", "out.safetensors", "--overwrite"],
    "refresh-bn": None,  # needs a model with BatchNorm
    "sweep": [*TABLES["rules"], "--last", "2"],
    "soup": [*TABLES["soup"], "--last", "2", "--overwrite"],
    "compare": ["compare", "run"],
    "check": ["check", "run"],
    "inspect": ["inspect", "run"],
    "verify": ["verify", "swa.safetensors", "--sources", "run"],
}


@pytest.mark.parametrize("name", [name for name, arguments in EVERY.items() if arguments])
def test_quiet_hides_notices_and_verbose_adds_details(name: str, work: Path, in_process: InProcess) -> None:
    """In every command alike; the result stays."""
    ckpt_avg.average("run", "swa.safetensors")
    noticed = [] if name == "verify" else ["--exclude", "nothing*"]
    plain, quiet, verbose = (in_process(*(EVERY[name] or []), *noticed, *more) for more in ([], ["-q"], ["-v"]))
    assert plain[0] == quiet[0] == verbose[0] == 0
    assert quiet[2] == ""
    assert quiet[1]
    if name not in ("verify", "inspect"):
        assert "Notice: --exclude 'nothing*': matches no checkpoint." in plain[2]
    assert len(verbose[1]) >= len(plain[1])
    detail = {"verify": "on-epoch=03.ckpt"}.get(name, "skipped: 'optimizer.pt': training state, by its name")
    assert detail in verbose[1]


@pytest.mark.parametrize("name", EVERY)
def test_version_of_every_command(name: str, in_process: InProcess) -> None:
    expected = in_process("--version")
    assert expected[0] == 0
    assert expected[1].startswith(f"ckpt-avg, version {ckpt_avg.__version__}, ")
    assert in_process("-V") == in_process(name, "-V") == in_process(name, "--version") == expected


def test_every_command_takes_the_options_of_all() -> None:
    assert {*EVERY, "help", "completion"} == set(cli.commands)
    for name in EVERY:
        options = {option for each in cli.commands[name].params for option in each.opts}
        assert options >= {"--json", "--wide", "--color", "-q", "--quiet", "-v", "--verbose", "-V", "--version"}
