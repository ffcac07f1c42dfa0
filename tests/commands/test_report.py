"""The report document: its schema, what it adds to the JSON result, and what happens if the comparison fails."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands.json_schema import problems
from safetensors.torch import save_file

import ckpt_avg
from ckpt_avg.commands.report import SCHEMA_VERSION, without_secrets
from ckpt_avg.output.paths import HTML_MARK

Run = Callable[..., tuple[int, str, str]]

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())
REFRESH = ("--model", "train:make_model", "--data", "train:train_loader", "--bn-batches", "2")
EVAL = ("--eval", "train:evaluate")


@pytest.fixture
def report(run_folder: Path, tmp_path: Path, in_process: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command with --report; returns the report, after it was checked against the schema."""
    monkeypatch.chdir(tmp_path)

    def call(command: str, *words: object, code: int = 0) -> Any:
        app = () if command == "compare" else ("--app-dir", run_folder)
        found, out, err = in_process(command, *words, *app, "--report", "report.json", "--json", "-q")
        assert found == code, err
        document = json.loads(Path("report.json").read_text())
        assert list(problems(document, SCHEMA, SCHEMA)) == []
        assert next(iter(document)) == "ckpt_avg"
        assert document["schema_version"] == SCHEMA_VERSION
        assert json.loads(out).items() <= document.items()
        assert document["command_line"][:2] == ["ckpt-avg", command]
        return document

    return call


def test_the_report_of_an_average(report: Callable[..., Any], run_folder: Path) -> None:
    """If it failed, a script would not find a number where the documentation says that it is."""
    words = [run_folder, "--last", "3", "-o", "swa.safetensors", *REFRESH, *EVAL, "--sha256"]
    document = report("average", *words, "--require", "loss<=last+1")
    assert [each["path"] for each in document["sources"]] == document["checkpoints"]
    for source in document["sources"]:
        record = torch.load(source["path"], weights_only=False)  # of this repository
        assert (source["epoch"], source["metrics"]["loss"]) == (record["epoch"], record["loss"])
        assert source["weight"] == 1 / 3
        assert source["learning_rate"] == record["lr"]
        assert list(source["sha256"]) == [source["name"]]
    assert len(document["run"]) == 12
    assert [each["epoch"] for each in document["run"] if each["selected"]] == [18, 19, 20]
    compared = ckpt_avg.compare(document["checkpoints"])
    assert [each["to_mean"] for each in document["compared"]["checkpoints"]] == [
        each.to_mean for each in compared.checkpoints
    ]
    assert document["compare_failure"] is None
    assert [each["layer"] for each in document["batch_norm_changes"]] == [
        "features.bn1", "features.bn2", "features.bn3", "classifier.bn"
    ]  # fmt: skip
    assert document["provenance"]["method"] == "mean"
    assert document["provenance"]["batch_norm"]["batches"] == 2


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("average", ["RUN", "-o", "a.safetensors", "--bn", "keep", "--weighting", "ema", "--half-life", "9%"]),
        ("average", ["RUN", "--last", "2", "-o", "a.safetensors", "--bn", "keep", "--dry-run"]),
        ("average", ["RUN/epoch_20.pt", "-o", "a.safetensors", "--card"]),
        ("average", ["RUN", "--last", "2", "-o", "release/", "--bn", "keep"]),
        ("refresh-bn", ["RUN/epoch_20.pt", "-o", "a.safetensors", *REFRESH, *EVAL]),
        ("soup", ["RUN", "--last", "2", "-o", "a.safetensors", *REFRESH, *EVAL, "--minimize", "loss", "--split", "v"]),
        ("sweep", ["RUN", "--last", "2", *REFRESH, *EVAL, "--minimize", "loss"]),
        ("compare", ["RUN", "--last", "4"]),
    ],
)  # fmt: skip
def test_every_report_fits_the_schema(
    report: Callable[..., Any], run_folder: Path, command: str, words: list[str], in_process: Run
) -> None:
    """If it failed, a reader that checks reports would refuse one; a page could not be made of it."""
    given = [word.replace("RUN", str(run_folder)) for word in words]
    assert report(command, *given)["kind"] == command
    app = [] if command == "compare" else ["--app-dir", str(run_folder)]
    code, _, err = in_process(command, *given, *app, "--report", "page.html", "--overwrite", "-q")
    assert code == 0, err
    assert Path("page.html").read_bytes().startswith(HTML_MARK)


def test_the_schema_finds_what_is_wrong(report: Callable[..., Any], run_folder: Path) -> None:
    """If it failed, the schema would accept anything."""
    document = report("average", run_folder, "--last", "2", "-o", "a.safetensors", "--bn", "keep")
    for change in (
        lambda each: each.pop("sources"),
        lambda each: each.update(written="yes"),
        lambda each: each.update(schema_version=2),
        lambda each: each["sources"][0].update(weight=None),
        lambda each: each["compared"].update(norms=1),
        lambda each: each["compared"]["checkpoints"][0].update(plane=[1.0]),
    ):
        wrong = copy.deepcopy(document)
        change(wrong)
        assert list(problems(wrong, SCHEMA, SCHEMA))


def test_an_unmet_requirement_leaves_a_report_that_the_next_run_replaces(
    report: Callable[..., Any], run_folder: Path, in_process: Run
) -> None:
    """If it failed, CI could not show why it refused a release, or would fail for the report of the last time."""
    words = [run_folder, "--last", "2", "-o", "a.safetensors", "--bn", "keep", REFRESH[0], REFRESH[1], *EVAL]
    document = report("average", *words, "--require", "loss<=0", code=9)
    assert document["error"]["exit_code"] == 9
    assert document["compared"] is not None
    app = ["--app-dir", run_folder, "--report", "page.html", "--report", "report.json"]
    code, _, _ = in_process("average", *words, *app, "--require", "loss<=0")
    assert code == 9
    failed = Path("page.html").read_text()
    assert "Not published" in failed
    assert not Path("a.safetensors").exists()
    code, _, err = in_process("average", *words, *app, "--require", "loss<=9")
    assert code == 0, err
    assert "Not published" not in Path("page.html").read_text()
    assert json.loads(Path("report.json").read_text())["written"] is True


def test_a_comparison_that_fails_loses_neither_output_nor_result(
    report: Callable[..., Any], run_folder: Path, in_process: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it failed, a disk that breaks after hours of work would cost the work."""

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ckpt_avg, "compare", broken)
    words = [run_folder, "--last", "2", "--bn", "keep", "-o"]
    document = report("average", *words, "a.safetensors")
    assert document["compared"] is None
    assert "Input/output error" in document["compare_failure"]
    assert Path("a.safetensors").exists()
    code, out, err = in_process("average", *words, "b.safetensors", "--report", "page.html")
    assert code == 0
    assert "wrote b.safetensors" in out
    assert "Notice: the report has no distances: OSError" in err
    assert "could not be measured" in Path("page.html").read_text()


@pytest.mark.parametrize("as_json", [False, True])
def test_a_signal_during_the_comparison_loses_neither_output_nor_result(
    run_folder: Path, tmp_path: Path, in_process: Run, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """If it failed, Ctrl-C in the last seconds would hide that the output is published."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ckpt_avg, "compare", interrupted)
    monkeypatch.chdir(tmp_path)
    words = [run_folder, "--last", "2", "--bn", "keep", "-o", "a.safetensors", "--report", "report.json"]
    code, out, _ = in_process("average", *words, *["--json"] * as_json)
    assert code == 130
    assert ckpt_avg.verify("a.safetensors")
    assert json.loads(Path("report.json").read_text())["compare_failure"] == "interrupted"
    if as_json:
        document = json.loads(out)
        assert (document["written"], document["error"]["exit_code"]) == (True, 130)
    else:
        assert "wrote a.safetensors" in out


def test_no_comparison_of_one_checkpoint_or_for_a_dry_run(
    report: Callable[..., Any], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it failed, a dry run would read all checkpoints."""
    monkeypatch.setattr(ckpt_avg, "compare", lambda *_, **__: pytest.fail("compared"))
    for words in ([run_folder, "--bn", "keep", "--dry-run"], [run_folder / "epoch_20.pt"]):
        document = report("average", *words, "-o", "a.safetensors")
        assert (document["compared"], document["compare_failure"]) == (None, None)


def test_the_comparison_reads_what_was_averaged(report: Callable[..., Any], tmp_path: Path) -> None:
    """If it failed, the distances would be those of other weights in the same files."""
    for step in (1, 2, 3):
        weights = {"w": torch.full((40, 40), float(step))}
        torch.save({"raw": weights, "ema": {"w": weights["w"] * 10 + step**2}}, tmp_path / f"step_{step}.pt")
    names = [f"step_{step}.pt" for step in (1, 2, 3)]
    document = report("average", *names, "-o", "a.safetensors", "--state-key", "ema", "--bn", "keep")
    direct = ckpt_avg.compare(names, state_key="ema")
    assert document["compared"]["norm"] == direct.norm


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--token", "abc", "-o", "x"], ["--token", "***", "-o", "x"]),
        (["--api-key=abc"], ["--api-key=***"]),
        (["hf_abcdefghijklmnopqrstuv"], ["***"]),
        (["https://me:pass@host/x.pt"], ["https://***@host/x.pt"]),
        (["--model", "train:make_model", "token.pt"], ["--model", "train:make_model", "token.pt"]),
        (["--split", "validation", "sk-learn.pt"], ["--split", "validation", "sk-learn.pt"]),
    ],
)  # fmt: skip
def test_secrets_are_not_in_the_command_line(words: list[str], shown: list[str]) -> None:
    """If it failed, a report in a public pull request would have a token in it, or lack a name."""
    assert without_secrets(words) == shown


def test_the_report_has_no_token(report: Callable[..., Any], run_folder: Path) -> None:
    """If it failed, the words would be hidden nowhere."""
    token = "hf_abcdefghijklmnopqrstuv"
    document = report("average", run_folder, "-o", "a.safetensors", "--bn", "keep", "--split", token, "--dry-run")
    assert token not in document["command_line"]


def test_folders_of_several_models_are_compared_as_one_checkpoint(report: Callable[..., Any], tmp_path: Path) -> None:
    """If it failed, the report of a pipeline's average would have no distances."""
    for step in (1, 2, 3):
        for model in ("unet", "vae"):
            folder = tmp_path / f"checkpoint-{step}" / model
            folder.mkdir(parents=True)
            (folder / "config.json").write_text('{"_class_name": "X", "_diffusers_version": "0.30"}')
            save_file({"w": torch.randn(20, 20)}, folder / "diffusion_pytorch_model.safetensors")
        (tmp_path / f"checkpoint-{step}" / "model_index.json").write_text('{"_class_name": "P"}')
    document = report("average", *(f"checkpoint-{step}" for step in (1, 2, 3)), "-o", "release/")
    assert document["compare_failure"] is None
    assert {each["name"] for each in document["compared"]["tensors"]} == {"unet.w", "vae.w"}


def test_a_report_in_the_output_folder_is_refused(run_folder: Path, tmp_path: Path, in_process: Run) -> None:
    """If it failed, --overwrite would find a file that is no part of a release, and refuse the folder."""
    path = tmp_path / "release" / "report.html"
    words = ["average", run_folder, "--last", "2", "--bn", "keep", "-o", f"{tmp_path}/release/", "--report", path]
    code, _, err = in_process(*words)
    assert (code, "is in the output folder" in err) == (2, True)
    assert not (tmp_path / "release").exists()


def test_one_path_given_twice_is_refused(run_folder: Path, tmp_path: Path, in_process: Run) -> None:
    """If it failed, one of two reports would replace the other."""
    for second in ("a.json", "./a.json"):
        words = [
            "average",
            run_folder,
            "--bn",
            "keep",
            "-o",
            tmp_path / "a.safetensors",
            "--report",
            tmp_path / "a.json",
        ]
        code, _, err = in_process(*words, "--report", f"{tmp_path}/{second}")
        assert (code, "is the path of --report" in err) == (2, True)


@pytest.mark.parametrize("name", ["page.html", "page.json"])
def test_a_report_that_cannot_be_written_is_found_before_the_work(
    run_folder: Path, tmp_path: Path, in_process: Run, name: str
) -> None:
    """If it failed, hours of work would end without the report that they were for."""
    (tmp_path / "file").write_text("")
    (tmp_path / name).write_text("theirs")
    for path, code in ((tmp_path / "file" / name, 2), (tmp_path / name, 5)):
        output = tmp_path / "a.safetensors"
        words = ["average", run_folder, "--bn", "keep", "-o", output, "--overwrite", "--report", path]
        found, _, err = in_process(*words)
        assert (found, output.exists()) == (code, False)
        assert str(path) in err
    assert (tmp_path / name).read_text() == "theirs"


def test_the_card_of_a_file_and_of_a_folder(
    run_folder: Path, tmp_path: Path, in_process: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it failed, --card would print something else than what the folder has, or hide a gate."""
    monkeypatch.chdir(tmp_path)
    words = [run_folder, "--last", "2", "--bn", "keep", "-q", "--card"]
    code, out, err = in_process("average", *words, "-o", "swa.safetensors")
    assert (code, err) == (0, "")
    assert out.startswith("---\nbase_model_relation: merge\n")
    assert "# swa\n" in out
    code, out, _ = in_process("average", *words, "-o", "release/")
    assert out.rstrip("\n") == Path("release/README.md").read_text().rstrip("\n")
    app = ["--app-dir", run_folder, "--model", "train:make_model", *EVAL, "--require", "loss<=0", "--overwrite"]
    code, out, _ = in_process("average", *words, "-o", "swa.safetensors", *app)
    assert code == 9
    assert "NOT MET" in out
