"""Wrong calls from Python, and wrong command lines: each gets its caller's words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ckpt_avg
from ckpt_avg.errors import CheckpointFormatError, CkptAvgError, IncompatibleError, UsageError, UserCodeError
from ckpt_avg.wording import in_python, worded

Run = Callable[..., tuple[int, str, str]]
MODEL = {"model": "make_model", "bn": "keep"}  # by their names in the training script
METRIC = {**MODEL, "evaluate": "evaluate"}
IMAGES = [torch.zeros(2, 1, 28, 28)]

# Keywords of `average` → how the message begins.
WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"last": "3"}, "last: got '3', a str. Give a whole number."),
    ({"last": True}, "last: got True, a bool. Give a whole number."),
    ({"last": 2.5}, "last: got 2.5, a float. Give a whole number."),
    ({"last": 0}, "last: 0 is out of range. Use 1 or more."),
    ({"last": 99}, "last=99: expected at least 99 checkpoints, got 12"),
    ({"best": 2}, "best=2 needs mode=…. Add mode='min' (for a loss) or mode='max' (for an accuracy)."),
    ({"mode": "min"}, "mode='min' needs best=…. Add best=N."),
    ({"log_step": "a"}, "log_step='a' needs log=…. Add log=FILE."),
    ({"best": 2, "mode": "low"}, "mode: 'low' is not one of min, max."),
    (
        {"best": 2, "mode": "max"},
        "best=2: the checkpoints record 'accuracy', 'loss'.",
    ),
    ({"best": 2, "mode": "max", "metric": "auc"}, "metric='auc': the checkpoints record"),
    ({"best": 2, "mode": "min", "log": "no.csv"}, "log='no.csv': no such file. Check the path."),
    ({"from_step": 9, "to_step": 3}, "from_step=9 is greater than to_step=3. Swap them."),
    ({"include": 5}, "include: got 5, an int. Give a text or texts."),
    ({"exclude": [3]}, "exclude: got [3], a list. Give a text or texts."),
    ({"include": "zzz"}, "nothing to average: include=… and exclude=… skip all 12 checkpoints"),
    ({"at_lr_minima": True}, "at_lr_minima: expected a learning rate that falls"),
    ({"keep_order": "yes"}, "keep_order: got 'yes', a str. Give True or False."),
    (
        {"dtype": torch.float16},
        "dtype: 'torch.float16' is not one of keep, float64, float32, bfloat16, float16.",
    ),
    ({"bn": True}, "bn: 'True' is not one of auto, refresh, keep."),
    ({"device": 0}, "device: got 0, an int. Give a text."),
    ({"memory": "1GB"}, "memory: got '1GB', a str. Give a whole number."),
    ({"threads": 0}, "threads: 0 is out of range. Use 1 to 1,024."),
    ({"weighting": "ema"}, "weighting='ema' needs half_life=…. Add for example half_life=1000"),
    ({"half_life": 3}, "half_life=3 needs weighting='ema'. Add it, or remove half_life=…."),
    ({"weighting": "power", "width": 5.0}, "width=5: no power has this width."),
    ({"weights": [0.5, 0.6]}, "weights: 2 weights with the sum 1.1, not 1. Add normalize=True to divide by it."),
    ({"weights": "a.json"}, "weights='a.json': cannot be read: No such file or directory."),
    ({"normalize": True}, "normalize=True needs weights=…. Add weights=… or remove normalize=True."),
    ({"weights": [1.0], "weighting": "linear"}, "weights=… and weighting='linear': both choose weights."),
    ({"bn": "auto"}, "running statistics of 4 BatchNorm layers"),
    ({"model": "make_model"}, "running statistics of 4 BatchNorm layers"),
    ({"model": 3, "data": []}, "the model: expected a torch.nn.Module or a function that returns one, got an int."),
    ({"model": "make_model", "data": 3}, "the data: expected an iterable of batches, got an int."),
    ({"model": "make_model", "data": []}, "BatchNorm refresh: the dataloader is empty."),
    ({"model": "make_model", "data": ["x"]}, "BatchNorm refresh: batch 1: got a str. Accepted batches:"),
    ({"model": "make_model", "data": iter(IMAGES), "evaluate": "evaluate"}, "data: got an iterator"),
    ({"model": "make_model", "data": IMAGES, "forward_batch": 5}, "forward_batch: got 5, an int. Give a function of"),
    ({"evaluate": "evaluate"}, "evaluate=… needs a model. Add model=…."),
    ({**MODEL, "evaluate": 3}, "evaluate: got an int. Name a function of the model."),
    (
        {**MODEL, "evaluate": lambda model: None},
        "the evaluate function <lambda>: expected it to return a number or a dict",
    ),
    ({"require": "accuracy>=last"}, "require=… needs a metric. Add evaluate=…."),
    ({**METRIC, "require": "x"}, "require='x': expected a metric, then >=, >, <= or <"),
    ({**METRIC, "require": "auc>=last"}, "require='auc>=last': the evaluate function returns no 'auc'."),
    ({**METRIC, "require": "accuracy>=2", "last": 2}, "out.safetensors: not published, because 1 of 1 requirement"),
    ({"eval_repeats": 2}, "eval_repeats=… needs a metric. Add evaluate=…."),
    ({"evaluate_all": True}, "evaluate_all=True needs a metric. Add evaluate=…."),
    ({"state_key": "net", **MODEL}, "epoch_9.pt: expected the key 'net', got a dict with the keys"),
    ({"state_key": 3}, "state_key: got 3, an int. Give a text."),
    ({"ema": True, **MODEL}, "epoch_9.pt: ema: expected EMA weights"),
    ({"ema": True, "state_key": "x"}, "ema=True and state_key='x': both choose the weights."),
    ({"strip_prefix": "zz", **MODEL}, "epoch_9.pt: strip_prefix='zz': expected names that begin with it"),
    ({"progress": 5}, "progress: got 5, an int."),
    ({"ranks": 3}, "ranks: got 3, an int. Give what join_ranks() gives."),
    ({"sources": 5}, "sources: got 5, an int. Give a path, or paths."),
    ({"sources": None}, "sources: got None. Give a path, or paths."),
    ({"sources": []}, "sources: got no path."),
    ({"sources": "nowhere"}, "nowhere: no such file or folder. Check the path."),
    ({"output": 5}, "output: got 5, an int."),
    ({"output": "s3://bucket/a.safetensors", **MODEL}, "s3://bucket/a.safetensors: is not on this machine."),
    ({"output": "a.safetensors", "max_shard_size": "1MB", **MODEL}, "a.safetensors: is one file, and max_shard_size=…"),
    ({"max_shard_size": "5 apples"}, "max_shard_size: '5 apples' is not a size."),
    ({"private": True}, "private: is about a repository of the Hub. Add push_to_hub=ORG/NAME."),
    ({"output": "out.ckpt", **MODEL}, "out.ckpt: .ckpt is the suffix of another format"),
]

OTHER_CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("sweep", {}, "maximize, minimize: got neither. Add one: maximize=METRIC for an accuracy, minimize=METRIC for"),
    ("sweep", {"maximize": "accuracy"}, "evaluate=… is missing. Add evaluate=… to measure each average."),
    (
        "sweep",
        {**METRIC, "maximize": "auc", "last": 2},
        "maximize='auc': the evaluate function returns no such",
    ),
    ("sweep", {**METRIC, "maximize": "accuracy", "windows": "all"}, "windows: 'all' is not one of last, first, both."),
    ("sweep", {**METRIC, "maximize": "accuracy", "weightings": "x"}, "weightings: 'x' is not one of mean"),
    ("sweep", {**METRIC, "maximize": "accuracy", "resume": "a.txt"}, "resume='a.txt': expected a name that ends in"),
    ("soup", {**METRIC, "maximize": "accuracy", "tolerance": "x"}, "tolerance: got 'x', a str. Give a number."),
    ("compare", {"last": 1}, "epoch_20.pt: is the only checkpoint."),
    ("compare", {"state_key": "zz"}, "epoch_9.pt: expected the key 'zz'"),
    ("check", {"last": "2"}, "last: got '2', a str. Give a whole number."),
    ("verify", {"path": 5}, "path: got 5, an int. Give a text or a path."),
    ("inspect", {"path": 5}, "path: got 5, an int."),
    ("inspect", {"log": "no.csv"}, "log='no.csv': no such file."),
    ("refresh_weights", {}, "model=… is missing. Add model=… to measure the statistics."),
    ("refresh_weights", {"model": "make_model", "data": []}, "mnist_cnn: contains 12 checkpoints. Name one"),
    ("open_checkpoint", {"path": 5}, "path: got an int. Give a text or a path."),
    ("open_checkpoint", {"state_key": "zz", "file": True}, "epoch_20.pt: expected the key 'zz'"),
    ("open_checkpoint", {"ema": True, "file": True}, "epoch_20.pt: ema: expected EMA weights"),
    ("refresh_batch_norm", {"model": 5, "batches": []}, "model: got an int. Give a torch.nn.Module."),
    ("refresh_batch_norm", {"batches": 5}, "the dataloader raised at batch 1: TypeError"),
    ("refresh_batch_norm", {"batches": [], "estimator": "x"}, "estimator: 'x' is not one of pooled, batch-mean."),
    ("refresh_batch_norm", {"batches": [], "max_batches": 0}, "max_batches: 0 is out of range. Use 1 or more."),
    ("refresh_batch_norm", {"batches": [], "device": "gpu"}, "device: 'gpu' cannot be used."),
]


@pytest.fixture
def refusal(run_folder: Path, train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes a wrong call and returns its message, without the folders in it."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, given: dict[str, Any]) -> str:
        known = {"make_model": train.make_model, "evaluate": train.evaluate}
        given = {key: known.get(value, value) if isinstance(value, str) else value for key, value in given.items()}
        source = run_folder / "epoch_20.pt" if given.pop("file", False) else run_folder
        first = {"verify": "path", "inspect": "path", "open_checkpoint": "path", "refresh_weights": "weights"}
        if name == "refresh_batch_norm":
            given.setdefault("model", train.make_model())
        else:
            given.setdefault(first.get(name, "sources"), source)
        if name in ("average", "soup", "refresh_weights"):
            given.setdefault("output", "out.safetensors")
        with pytest.raises(CkptAvgError) as caught:
            getattr(ckpt_avg, name)(**given)
        return str(caught.value).replace(f"{run_folder}/", "").replace(f"{run_folder.parent}/", "")

    return call


@pytest.mark.python_words
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "given", "message"), [("average", *each) for each in WRONG_OPTIONS] + OTHER_CALLS, ids=str
)
def test_a_wrong_call_is_refused_in_the_words_of_python(
    name: str, given: dict[str, Any], message: str, refusal: Callable[..., str]
) -> None:
    """Wrong types and values, and what is missing: the keyword to change is named as Python has it."""
    found = refusal(name, given)
    assert found.startswith(message)
    assert not re.search(r"--\w|(^|\s)-o\s|MODULE:|\bckpt-avg [a-z]+\b(?<!wrote)|the shell", found)


@pytest.mark.parametrize(
    "arguments",
    [
        ("average", "RUN", "-o", "OUT"),
        ("average", "RUN", "-o", "OUT", "--last", "99"),
        ("average", "RUN", "-o", "OUT", "--best", "2"),
        ("average", "RUN", "-o", "OUT", "--best", "2", "--mode", "max"),
        ("average", "RUN", "-o", "OUT", "--best", "2", "--mode", "max", "--metric", "val loss"),
        ("average", "RUN", "-o", "OUT", "--mode", "max"),
        ("average", "RUN", "-o", "OUT", "--log-step", "a"),
        ("average", "RUN", "-o", "OUT", "--dtype", "fp16"),
        ("average", "RUN", "-o", "OUT", "--weighting", "ema"),
        ("average", "RUN", "-o", "OUT", "--half-life", "3"),
        ("average", "RUN", "-o", "OUT", "--weights", "0.5,0.6"),
        ("average", "RUN", "-o", "OUT", "--state-key", "net", "--bn", "keep"),
        ("average", "RUN", "-o", "OUT", "--strip-prefix", "net", "--bn", "keep"),
        ("average", "RUN", "-o", "OUT", "--ema", "--bn", "keep"),
        ("average", "RUN", "-o", "OUT", "--ema", "--state-key", "net"),
        ("average", "RUN", "-o", "OUT", "--include", "zz"),
        ("average", "RUN", "-o", "out.ckpt", "--bn", "keep"),
        ("average", "RUN", "-o", "OUT", "--require", "x"),
        ("average", "RUN", "-o", "OUT", "--io", "no"),
        ("sweep", "RUN"),
        ("sweep", "RUN", "--maximize", "accuracy"),
        ("soup", "RUN", "-o", "OUT", "--minimize", "loss"),
        ("check", "RUN", "--last", "x"),
        ("refresh-bn", "RUN", "-o", "OUT"),
        ("inspect", "RUN", "--log", "nowhere.csv"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_refused_in_its_own_words(
    arguments: tuple[str, ...], in_process: Run, run_folder: Path, tmp_path: Path
) -> None:
    places = {"RUN": run_folder, "OUT": tmp_path / "out.safetensors"}
    code, _, err = in_process(*(places.get(each, each) for each in arguments))
    assert code in (2, 3, 4)
    assert not re.search(r"\b[a-z_]+=|…\.", err.replace(str(run_folder), "").replace("accuracy=", ""))


@pytest.mark.python_words
def test_what_the_user_wrote_is_never_reworded(tmp_path: Path, run_folder: Path, train: ModuleType) -> None:
    """Options of another program, names, and what the user's code raised, stay to the letter."""
    texts = ["convert.py --model-type GPT --save-dir OUT", "'--last 3' is a name", "a--last 3", "--lastly 3", "-last 3"]
    assert [worded(text) for text in texts] == texts

    def broken(model: torch.nn.Module) -> float:
        raise ValueError("call it with --model tiny and --last 3")

    with pytest.raises(UserCodeError, match=r"the evaluate function raised .*: call it with --model tiny and --last 3"):
        ckpt_avg.average(
            run_folder, tmp_path / "o.safetensors", model=train.make_model, bn="keep", evaluate=broken, last=2
        )


@pytest.mark.python_words
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Use --last 12, or name more.", "Use last=12, or name more."),
        ("add --bn keep.", "add bn='keep'."),
        ("--half-life 10%", "half_life='10%'"),
        ("--eval MODULE:FUNCTION.", "evaluate=…."),
        ("Add --weights W,W,... or", "Add weights=… or"),
        ("use --every or --include", "use every=… or include=…"),
        ("--require 'a>=last': no", "require='a>=last': no"),
        ("the --eval function", "the evaluate function"),
        ("without --ema, the raw", "without ema=True, the raw"),
        ("ckpt-avg sweep shows", "sweep() shows"),
        ("or use ckpt-avg refresh-bn.", "or use refresh_weights()."),
    ],
)
def test_options_in_python(text: str, expected: str) -> None:
    assert worded(text) == in_python(text) == expected


@pytest.mark.python_words
def test_notices_are_in_the_words_of_python(tmp_path: Path, run_folder: Path, train: ModuleType) -> None:
    sources = [run_folder / f"epoch_{epoch}.pt" for epoch in (20, 19)]
    seen: list[str] = []
    result = ckpt_avg.average(
        sources,
        tmp_path / "o.safetensors",
        bn="keep",
        dry_run=True,
        progress=ckpt_avg.Progress(notice=seen.append),
    )
    assert any("keep_order=True" in text for text in result.notices)
    assert seen == list(result.notices)


@pytest.mark.parametrize("error", [CheckpointFormatError, IncompatibleError, UsageError])
def test_errors_keep_their_words_when_they_are_pickled(error: type[CkptAvgError]) -> None:
    import pickle

    assert str(pickle.loads(pickle.dumps(error("last=3: no")))) == "last=3: no"
