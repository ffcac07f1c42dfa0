"""What `ckpt-avg compare` prints: a table of 80 columns, cosines, and what is far off; and the picture."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ckpt_avg import ComparedCheckpoint, ComparedTensor, CompareResult, Finding, compare
from ckpt_avg.cli.compare_text import comparison_text

Run = Callable[..., tuple[int, str, str]]
NAN = math.nan


def compared(*names: str, steps: bool = True) -> CompareResult:
    """Checkpoints with such names, each 1 farther from the mean than the one before; the last is far off."""
    count = len(names)
    checkpoints = tuple(
        ComparedCheckpoint(
            Path("run") / name,
            100 * index if steps else None,
            None,
            norm=10.0,
            to_mean=1.0 + index,
            relative=0.1 + index / 10,
            to_previous=0.5 if index else NAN,
            plane=(float(index), 0.5 * index),
            statistics_to_mean=None,
            nonfinite=0,
        )
        for index, name in enumerate(names)
    )
    matrix = tuple(tuple(1.0 if i == j else 0.25 for j in range(count)) for i in range(count))
    text = f"{names[-1]}: apart from the others, and this is said in so many words that they do not fit in one line."
    return CompareResult(
        checkpoints=checkpoints,
        skipped=(),
        elements=1234,
        norm=9.5,
        distances=matrix,
        cosines=matrix,
        centred_cosines=matrix,
        shares=(0.75, 0.125),
        straightness=0.5,
        tensors=(ComparedTensor("layer.weight", (2, 3), "weights", 2.0, tuple(range(count)), 0.25),),
        not_compared=1,
        findings=(Finding("jump", (checkpoints[-1].path,), text),),
        notices=(),
    )


def test_an_epoch_is_no_step() -> None:
    """Of a checkpoint that records only an epoch, among others that record steps."""
    result = compared("a.pt", "b.pt", "c.pt")
    first, second, third = result.checkpoints
    result = replace(result, checkpoints=(first, replace(second, step=None, epoch=7), third))
    assert [line.split()[1] for line in comparison_text(result).splitlines()[1:5]] == ["step", "0", "-", "200"]


def test_the_text_of_three_checkpoints() -> None:
    assert comparison_text(compared("a.pt", "b.pt", "c.pt"), tensors=True).splitlines() == [
        "3 checkpoints, 1,234 weights in 1 tensor; norm of the mean 9.5",
        "checkpoint  step  norm  to mean  relative  to previous",
        "a.pt        0     10    1        10 %      -",
        "b.pt        100   10    2        20 %      0.5",
        "c.pt        200   10    3        30 %      0.5          far off",
        "",
        "first to last: 0.50 of the path (straight 1, random walk 0.71, one point 0.50)",
        "two main directions: 75 % and 12.5 % of the squared distances",
        "cosines of the checkpoints:",
        "     0    100  200",
        "0    1",
        "100  .25  1",
        "200  .25  .25  1",
        "",
        "tensor        shape  norm  relative  farthest",
        "layer.weight  2×3    2     25 %      100 %     by step 200",
        "",
        "far off:",
        "- c.pt: apart from the others, and this is said in so many words that they do",
        "  not fit in one line.",
    ]


def test_without_steps_the_rows_are_numbered() -> None:
    lines = comparison_text(compared("a.pt", "b.pt", steps=False)).splitlines()
    assert lines[1:3] == ["checkpoint  norm  to mean  relative  to previous", "a.pt        10    1        10 %      -"]
    assert "2  .25  1" in lines


@pytest.mark.parametrize("names", [("x" * 90 + "1.pt", "x" * 90 + "2.pt"), [f"step_{i}.pt" for i in range(12)]])
def test_lines_have_at_most_80_columns(names: list[str]) -> None:
    """Long names lose their middle, and twelve columns of cosines fit."""
    result = compared(*names)
    result = replace(result, tensors=(replace(result.tensors[0], name="layers." * 20, shape=(2048, 1024, 3, 3)),))
    text = comparison_text(result, tensors=True)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" in text


def test_of_many_checkpoints_the_cosines_are_in_the_document() -> None:
    assert "cosines of the checkpoints: --json has them" in comparison_text(compared(*map(str, range(13))))


def test_a_name_cannot_forge_a_line() -> None:
    assert "\nfar off: no" not in comparison_text(compared("a.pt", "b\nfar off: no.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints of which the third is another run's."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20, 30, generator=generator)
    folder = tmp_path / "run"
    folder.mkdir()
    for step in range(1, 5):
        noise = torch.randn(20, 30, generator=generator)
        save_file({"w": noise if step == 3 else base + 0.1 * noise}, folder / f"step_{step}.safetensors")
    return folder


def test_the_command_names_what_is_far_off_and_exits_with_0(run: Path, in_process: Run) -> None:
    """It informs; the user decides."""
    code, out, err = in_process("compare", run)
    assert (code, err) == (0, "")
    assert re.search(r"^step_3\.safetensors .* far off$", out, re.MULTILINE)
    assert "step_3.safetensors: nothing in common with the others" in out
    code, out, _ = in_process("compare", run, "--exclude", "step_3*")
    assert (code, out.splitlines()[-1]) == (0, "nothing is far off")


def test_the_document(run: Path, tmp_path: Path, in_process: Run) -> None:
    """With null in place of NaN, and the same in a report."""
    bad = run / "step_5.safetensors"
    save_file({"w": torch.full((20, 30), NAN)}, bad)
    report = tmp_path / "report.json"
    code, out, _ = in_process("compare", run, "--json", "--report", report)
    document = json.loads(out)
    assert code == 0
    assert document.items() <= json.loads(report.read_text()).items()
    result = compare(run)
    assert set(document) == {*CompareResult.__slots__, "ckpt_avg"}
    assert document["checkpoints"][0] == {
        **{name: getattr(result.checkpoints[0], name) for name in ComparedCheckpoint.__slots__},
        "path": str(run / "step_1.safetensors"),
        "to_previous": None,
        "plane": list(result.checkpoints[0].plane),
    }
    assert [each["to_mean"] is None for each in document["checkpoints"]] == [False] * 4 + [True]
    assert [each["kind"] for each in document["findings"]] == ["nonfinite", "unrelated"]
    assert document["cosines"][4] == [None] * 5
    assert document["tensors"][0]["to_mean"][4] is None


def test_notices_and_errors(run: Path, in_process: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = in_process("compare", run / "step_1.safetensors")
    assert code == 4
    assert err.startswith("Error: ") and "is the only checkpoint" in err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    code, _, err = in_process("compare", run)
    assert (code, "Start it without torchrun" in err) == (2, True)


# ---------------------------------------------------------------------------------------------------------------------
# The picture


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[CompareResult], Any]:
    """Draws, and returns the axes instead of the picture."""
    figure = pytest.importorskip("matplotlib.figure")
    from ckpt_avg.cli.compare_plot import draw_comparison

    def draw(result: CompareResult) -> Any:
        figures: list[Any] = []
        monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: figures.append(self))
        draw_comparison(result, ".png")
        (axes,) = figures[0].axes
        return axes

    return draw


def test_the_path_the_averages_and_what_is_far_off(drawn: Callable[[CompareResult], Any]) -> None:
    axes = drawn(compared("a.pt", "b.pt", "c.pt"))
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}
    assert lines == {
        "checkpoints, by step": [(0, 0), (1, 0.5), (2, 1)],
        "average of the last k": [(1.5, 0.75), (1, 0.5)],
        "average of all": [(1, 0.5)],
        "far off": [(2, 1)],
    }
    assert sorted(text.get_text() for text in axes.texts) == ["0", "100", "200"]
    assert axes.get_aspect() == 1  # distances look as long as they are
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == list(lines)


def test_a_checkpoint_with_nan_is_not_drawn_and_many_are_not_all_labelled(
    drawn: Callable[[CompareResult], Any],
) -> None:
    result = compared(*(f"{index}.pt" for index in range(60)))
    checkpoints = list(result.checkpoints)
    checkpoints[5] = replace(checkpoints[5], plane=(NAN, NAN), nonfinite=3)
    axes = drawn(replace(result, checkpoints=tuple(checkpoints)))
    assert len(axes.get_lines()[0].get_xdata()) == 59
    assert 15 < len(axes.texts) < 25
    assert "5900" in {text.get_text() for text in axes.texts}


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_command_draws_the_same_bytes_each_time(suffix: str, run: Path, tmp_path: Path, in_process: Run) -> None:
    pytest.importorskip("matplotlib")
    pictures = [tmp_path / f"{number}.{suffix}" for number in (1, 2)]
    for picture in pictures:
        assert in_process("compare", run, "--plot", picture)[0] == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert in_process("compare", run, "--plot", pictures[0])[0] == 5  # it exists
    assert in_process("compare", run, "--plot", tmp_path / "a.gif")[0] == 2
