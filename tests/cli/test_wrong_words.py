"""Sensible but wrong command lines: each message says where, what is wrong and what to write instead."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ckpt_avg
from ckpt_avg.cli.main import cli
from ckpt_avg.errors import UsageError

InProcess = Callable[..., tuple[int, str, str]]

APP = """
import torch

def make_model():
    return torch.nn.Linear(2, 1)

def evaluate(model):
    return {"accuracy": 0.5, "f1": 0.25}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a run, a module with a model, and a log."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "7").mkdir(parents=True)
    for epoch in (8, 9, 10):
        weights = {"weight": torch.full((1, 2), float(epoch)), "bias": torch.zeros(1)}
        contents = {"model": weights, "epoch": epoch, "val_loss": 1 / epoch, "val_acc": epoch / 20}
        torch.save(contents, tmp_path / "runs" / "7" / f"epoch_{epoch}.pt")
    (tmp_path / "wrong_words_app.py").write_text(APP)
    (tmp_path / "src" / "models").mkdir(parents=True)
    (tmp_path / "src" / "training.py").write_text(APP)
    (tmp_path / "src" / "models" / "__init__.py").write_text(APP)
    (tmp_path / "metrics.csv").write_text("epoch,score\n8,1\n9,2\n10,3\n")
    return tmp_path


MODEL = "--model wrong_words_app:make_model"
OUT = "-o out.safetensors"

# (command line, exit code, all that the message must contain)
LINES = [
    # a path, an option or another word in place of the command
    ("runs/7", 2, "runs/7: is a path, not a command. Write the command first:\n  ckpt-avg inspect runs/7\n"
     "  ckpt-avg average runs/7 -o swa.safetensors"),
    ("runs/7 --last 2 -o x.safetensors", 2, "  ckpt-avg average runs/7 --last 2 -o x.safetensors"),
    ("epoch_9.pt", 2, "epoch_9.pt: is a path, not a command."),
    ("--last 2 runs/7", 2, "--last: no command before it. Write the command first:\n  ckpt-avg inspect --last"),
    ("-v average runs/7", 2, "-v: no such option. Write: ckpt-avg average -v runs/7"),
    ("merge runs/7", 2, "merge: no such command. Did you mean 'average'?"),
    ("version", 2, "version: no such command. Did you mean '--version'?"),
    ("inspekt runs/7", 2, "inspekt: no such command. Did you mean 'inspect'?"),
    ("help averge", 2, "averge: no such command. Did you mean 'average'?"),
    # options of other tools, of other commands, and misspelt ones
    ("average --inputs runs/7", 2, "--inputs: no such option. Write: ckpt-avg average runs/7"),
    ("average --checkpoints runs/7 --last 2", 2, "Write: ckpt-avg average runs/7 --last 2"),
    ("average --in=runs/7", 2, "Write: ckpt-avg average runs/7"),
    ("average runs/7 --num-epoch-checkpoints 2", 2, "--num-epoch-checkpoints: no such option. Write --last N."),
    (f"average runs/7 -n 2 {OUT}", 2, "-n: no such option. Write --last N."),
    (f"average runs/7 --avg 2 {OUT}", 2, "--avg: no such option. Write --last N."),
    (f"average runs/7 --best-k 2 {OUT}", 2, "Write --best N --metric NAME --mode min|max."),
    ("average runs/7 --epochs 8-9", 2, "--epochs: no such option. Write --from-step S --to-step S."),
    ("average runs/7 --output-dir release", 2, "--output-dir: no such option. Write -o FOLDER/."),
    (f"average runs/7 -last 2 {OUT}", 2, "Write two dashes: --last."),
    (f"average runs/7 --from_step 9 {OUT}", 2, "--from_step: no such option. Did you mean '--from-step'?"),
    (f"average runs/7 --lst 2 {OUT}", 2, "--lst: no such option. Did you mean '--last'?"),
    ("check runs/7 --bn keep", 2, "--bn: no such option. These commands have it: average, sweep, soup."),
    (f"average runs/7 --bf16 {OUT}", 2, "--bf16: no such option. Write --dtype bfloat16."),
    ("average runs/7", 2, "--output: missing. Add -o swa.safetensors."),
    # values
    (f"average runs/7 --device gpu {OUT}", 2, "--device: 'gpu' cannot be used. Use auto, cpu, cuda or cuda:N. Did you"),
    (f"average runs/7 --dtype fp16 {OUT}", 2, "Did you mean 'float16'?"),
    (f"average runs/7 --weighting lineal {OUT}", 2, "Did you mean 'linear'?"),
    (f"average runs/7 --last two {OUT}", 2, "--last: 'two' is not a whole number. Write for example 8."),
    (f"average runs/7 --best 2 --metric Val_Acc --mode max {OUT}", 4, "Did you mean 'val_acc'?"),
    (f"average runs/7 --state-key modle {OUT}", 3, "Did you mean 'model'?"),
    (f"average runs/7 --include epoch_1O.pt {OUT}", 4, "Did you mean 'epoch_10.pt'?"),
    (f"average runs/7 --best 1 --mode max --log metric.csv {OUT}", 2, "no such file. Did you mean 'metrics.csv'?"),
    (f"average runs/7 --best 1 --mode max --log metrics.csv --log-step epochs {OUT}", 4, "Did you mean 'epoch'?"),
    # the user's functions
    (f"average runs/7 --model wrong_words_ap:make_model --eval wrong_words_app:evaluate {OUT}", 2,
     "Did you mean 'wrong_words_app'?"),
    (f"average runs/7 --model wrong_words_app:make_modle {OUT}", 2, "Did you mean 'make_model'?"),
    (f"average runs/7 --model wrong_words_app.make_model {OUT}", 2, "Did you mean wrong_words_app:make_model?"),
    (f"average runs/7 --model src/train.py:make_model {OUT}", 2, "Write --app-dir src --model train:make_model."),
    (f"average runs/7 {MODEL} --app-dir rusn {OUT}", 2, "--app-dir rusn: no such file or folder. Did you mean 'runs'?"),
    (f"average runs/7 {MODEL} --eval wrong_words_app:something_else {OUT}", 2, "It has make_model, evaluate."),
    (f"average runs/7 {MODEL} --eval wrong_words_app:evaluate --require acuracy>=last {OUT}", 2, "'accuracy'?"),
    (f"sweep runs/7 {MODEL} --eval wrong_words_app:evaluate --maximize F1_", 2, "Did you mean 'f1'?"),
    (f"average runs/7 --model training:make_model --eval training:evaluate {OUT}", 2, "Add --app-dir src."),
    (f"average runs/7 --model models.net:make_model {OUT}", 2, "Add --app-dir src."),
    # paths
    (f"average runs/7/epoch_1O.pt {OUT}", 2, "Did you mean 'runs/7/epoch_10.pt'?"),
    ("verify other.safetensors", 2, "other.safetensors: no such file or folder. Check the path."),
    ("inspect run/7", 2, "run/7: no such file or folder. Did you mean 'runs/7'?"),
    ("inspect runs/7/*.ckpt", 2, "A pattern that matches nothing stays as it is"),
    ("inspect ~/runs/7", 2, "The shell did not expand it"),
    ("average runs/7 -o s3://bucket/out.safetensors", 2, "Write a file here, and copy it: -o swa.safetensors"),
    ("completion tcsh", 2, "tcsh: is not one of bash, zsh, fish."),
]  # fmt: skip


@pytest.mark.parametrize(("line", "code", "says"), LINES, ids=[line for line, _, _ in LINES])
def test_a_wrong_line_tells_what_to_write(line: str, code: int, says: str, work: Path, in_process: InProcess) -> None:
    before = sorted(path.name for path in work.iterdir() if path.name != "__pycache__")
    found, out, err = in_process(*shlex.split(line))
    assert (found, out) == (code, "")
    assert says in err
    assert err.count("Error: ") == 1
    assert "Traceback" not in err
    assert sorted(path.name for path in work.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("source", "command"),
    [
        ("s3://bucket/runs/7", "aws s3 sync s3://bucket/runs/7 7"),
        ("s3://bucket/runs/7/last.ckpt", "aws s3 cp s3://bucket/runs/7/last.ckpt ."),
        ("gs://bucket/run", "gcloud storage rsync --recursive gs://bucket/run run"),
        ("hf://org/name", "hf download org/name --local-dir name"),
        ("https://huggingface.co/org/name/tree/main", "hf download org/name --local-dir name"),
        ("https://example.org/step 1.pt", "curl -LO 'https://example.org/step 1.pt'"),
        ("me@host:runs/7", "scp -r me@host:runs/7 ."),
        ("org/name", "hf download org/name --local-dir name"),
        ("az://container/run", "Copy it to this machine first, and name the copy."),
        ("file:///data/run", "Write its path: /data/run"),
    ],
)
def test_a_remote_source_tells_how_to_copy_it(source: str, command: str, work: Path, in_process: InProcess) -> None:
    """The same in all commands, and in Python, also as a `Path`, which has lost a slash."""
    for line in (["average", source, "-o", "out.safetensors"], ["inspect", source], ["check", "runs/7", source]):
        code, out, err = in_process(*line)
        assert (code, out) == (2, "")
        assert err.startswith(f"Error: {source}: ")
        assert err.rstrip().endswith(command)
    for given in (source, Path(source)):
        with pytest.raises(UsageError) as caught:
            ckpt_avg.average(given, "out.safetensors")
        assert str(caught.value).endswith(command)


@pytest.mark.parametrize("name", ["org/name", "bucket:run"])
def test_a_folder_with_such_a_name_is_a_folder(name: str, work: Path, in_process: InProcess) -> None:
    (work / name).parent.mkdir(exist_ok=True)
    (work / "runs" / "7").rename(work / name)
    assert in_process("check", name)[0] == 0


def test_the_words_of_the_user_are_escaped(work: Path, in_process: InProcess) -> None:
    """A word must not forge a line, nor reach the terminal as an escape sequence."""
    for line in (["run\nError: x/7"], ["average", "--x\ny", "runs/7"], ["\x1b[31m/"], ["inspect", "s3://a\nb/c"]):
        code, out, err = in_process(*line)
        assert (code, out) == (2, "")
        assert "\x1b" not in err
        assert sum(each.startswith("Error: ") for each in err.splitlines()) == 1


def test_the_commands_to_paste_work(work: Path, in_process: InProcess) -> None:
    """What `ckpt-avg FOLDER` shows runs as it is, also beside an earlier output, and with blanks in the name."""
    (work / "runs" / "7").rename(work / "my run")
    for folder in ("my run", work / "my run"):
        _, _, err = in_process(folder)
        lines = [line.strip() for line in err.splitlines() if line.startswith("  ckpt-avg ")]
        assert len(lines) == 2
        assert [in_process(*shlex.split(line)[1:])[0] for line in lines] == [0, 0]


def test_help_of_a_command(in_process: InProcess) -> None:
    assert in_process("help") == in_process("--help")
    for name in cli.commands:
        assert in_process("help", name) == in_process(name, "--help")


def test_no_words_show_the_help(in_process: InProcess) -> None:
    code, out, err = in_process()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: ckpt-avg")
    assert "ckpt-avg help COMMAND" in err


def test_a_pattern_that_matches_nothing_is_noticed(work: Path, in_process: InProcess) -> None:
    """A typing error in --exclude would average one checkpoint more in silence."""
    code, _, err = in_process("average", "runs/7", "--exclude", "epoch_1O*", "-o", "out.safetensors")
    assert code == 0
    assert err == "Notice: --exclude 'epoch_1O*': matches no checkpoint. Did you mean 'epoch_10.pt'?\n"
    assert in_process("average", "runs/7", "--exclude", "*_10*", "--overwrite", "-o", "out.safetensors")[2] == ""


def test_a_folder_without_its_slash_is_noticed(work: Path, in_process: InProcess) -> None:
    """If it failed, who wants a folder that a library loads would get a file without suffix, and not learn how."""
    code, _, err = in_process("average", "runs/7", "-o", "release")
    assert code == 0
    assert err.endswith("For a folder that from_pretrained loads, use -o release/\n")
