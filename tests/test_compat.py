"""Do the checkpoints fit together? Every difference at once, from headers alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_avg.compat import CompatibilityReport, check, compare
from ckpt_avg.errors import CheckpointFormatError, CkptAvgError, IncompatibleError, UsageError
from ckpt_avg.readers import open_checkpoint

Tensors = dict[str, torch.Tensor]


def write(folder: Path, *contents: Tensors) -> list[Path]:
    paths = []
    for number, tensors in enumerate(contents):
        paths.append(folder / f"step_{number}.safetensors")
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, paths[-1])
    return paths


def found(report: CompatibilityReport) -> list[tuple[str, str, str, str, list[str]]]:
    return [
        (item.tensor, item.aspect, item.expected, item.found, [Path(path).name for path in item.checkpoints])
        for item in report.differences
    ]


A: Tensors = {"w": torch.ones(2, 3), "b": torch.ones(2), "n": torch.tensor(1)}


def test_the_real_run_fits_together(run_folder: Path) -> None:
    report = check([run_folder])
    assert report.compatible
    assert len(report.checkpoints) == 12
    assert str(report) == f"12 checkpoints of {report.tensors} tensors each: names, shapes and dtypes agree"


def test_one_checkpoint_fits_itself(tmp_path: Path) -> None:
    report = check(write(tmp_path, {"w": torch.ones(1)}))
    assert report.compatible
    assert str(report) == "1 checkpoint of 1 tensor each: names, shapes and dtypes agree"


def test_the_order_and_the_values_do_not_matter(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "1.pt")
    torch.save({"b": torch.ones(3), "w": torch.zeros(2)}, tmp_path / "2.pt")
    assert check([tmp_path]).compatible


def test_the_format_and_the_strides_do_not_matter(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(3, 2).t()}}, tmp_path / "1.pt")
    write(tmp_path, {"w": torch.ones(2, 3)})
    assert check([tmp_path]).compatible


def test_every_difference_is_in_one_report(tmp_path: Path) -> None:
    paths = write(
        tmp_path,
        A,
        {"w": torch.ones(3, 2), "b": torch.ones(2).half(), "n": torch.tensor(1)},
        {"w": torch.ones(2, 3), "n": torch.ones(1, dtype=torch.int32), "extra": torch.ones(4)},
        A,
        {"w": torch.ones(3, 2), "b": torch.ones(2), "n": torch.tensor(2)},
    )
    report = check(paths)
    assert not report.compatible
    assert sorted(found(report)) == sorted(
        [
            ("w", "shape", "[2, 3]", "[3, 2]", ["step_1.safetensors", "step_4.safetensors"]),
            ("b", "dtype", "F32", "F16", ["step_1.safetensors"]),
            ("b", "missing", "F32 [2]", "no such tensor", ["step_2.safetensors"]),
            ("n", "shape", "[]", "[1]", ["step_2.safetensors"]),
            ("n", "dtype", "I64", "I32", ["step_2.safetensors"]),
            ("extra", "unexpected", "no such tensor", "F32 [4]", ["step_2.safetensors"]),
        ]
    )
    text = str(report)
    assert text.startswith(f"the checkpoints don't fit together: 6 differences from {paths[0]}\n")
    assert f"  tensor 'w': shape: expected [2, 3], got [3, 2] in {paths[1]}, {paths[4]}\n" in text
    assert text.count("\n  tensor ") == 6
    assert text.endswith("Average checkpoints of one architecture and one run; leave others out with --exclude.")


def test_shapes_of_one_size_differ(tmp_path: Path) -> None:
    """(1,) would broadcast into (N,), and () into anything, if shapes were not compared."""
    shapes = [(4,), (1,), (), (2, 2), (4, 1), (0,)]
    for first, second in itertools.permutations(shapes, 2):
        report = check(write(tmp_path, {"w": torch.ones(first)}, {"w": torch.ones(second)}))
        assert [(item.aspect, item.expected, item.found) for item in report.differences] == [
            ("shape", str(list(first)), str(list(second)))
        ]


def test_a_wrapped_model_is_recognised(tmp_path: Path) -> None:
    plain = {"a.weight": torch.ones(2), "b": torch.ones(1)}
    wrapped = {f"module.{name}": value for name, value in plain.items()}
    for contents in ((plain, wrapped), (wrapped, plain)):
        text = str(check(write(tmp_path, *contents)))
        assert "4 differences" in text
        assert text.endswith(
            "Some were saved from a wrapped model (prefix 'module.'): save them alike, without the wrapper."
        )


def test_a_wrapped_model_of_another_kind_is_not_mistaken(tmp_path: Path) -> None:
    paths = write(tmp_path, {"a": torch.ones(2)}, {"module.b": torch.ones(2)})
    assert "prefix" not in str(check(paths))
    paths = write(tmp_path, {"a": torch.ones(2)}, {"module.a": torch.ones(3)})
    assert len(check(paths).differences) == 2


def test_dtypes_alone_have_their_own_advice(tmp_path: Path) -> None:
    paths = write(tmp_path, {"w": torch.ones(2)}, {"w": torch.ones(2).bfloat16()})
    text = str(check(paths))
    assert "tensor 'w': dtype: expected F32, got BF16" in text
    assert text.endswith("Save all of them in one dtype; --dtype sets the dtype of the output alone.")


def test_the_text_is_cut_but_the_report_is_whole(tmp_path: Path) -> None:
    paths = write(tmp_path, {f"w{number}": torch.ones(1) for number in range(332)}, {"other": torch.ones(1)})
    report = check(paths)
    assert len(report.differences) == 333
    text = str(report)
    assert "333 differences" in text
    assert text.count("\n  tensor ") == 20
    assert "\n… and 313 more\n" in text


def test_many_checkpoints_with_one_difference_are_one_line(tmp_path: Path) -> None:
    report = check(write(tmp_path, {"w": torch.ones(2)}, *[{"w": torch.ones(3)}] * 30))
    (difference,) = report.differences
    assert len(difference.checkpoints) == 30
    assert str(difference).endswith("step_20.safetensors, … and 10 more")


@pytest.mark.parametrize("name", ["\x1b[31m", "a\nb", "x" * 3000])
def test_names_are_shown_escaped_and_cut(tmp_path: Path, name: str) -> None:
    text = str(check(write(tmp_path, {name: torch.ones(1)}, {"w": torch.ones(1)})))
    assert text.replace("\n", "").isprintable()
    assert len(text.splitlines()) == 4
    assert len(text) < 1500


def test_compare_takes_specs(tmp_path: Path) -> None:
    specs = []
    for path in write(tmp_path, A, A):
        with open_checkpoint(path) as checkpoint:
            specs.append(checkpoint.spec)
    report = compare(specs)
    assert report.compatible
    assert report.tensors == 3
    assert [Path(path).name for path in report.checkpoints] == ["step_0.safetensors", "step_1.safetensors"]


def test_check_selects_as_average_does(tmp_path: Path) -> None:
    write(tmp_path, {"old": torch.ones(1)}, A, {"odd": torch.ones(1)}, A)
    assert not check([tmp_path]).compatible
    for options in ({"every": 2, "last": 2}, {"include": ["step_[13]*"]}, {"exclude": ["step_[02].*"]}):
        report = check([tmp_path], **options)  # type: ignore[arg-type]
        assert report.compatible
        assert len(report.checkpoints) == 2


def test_check_passes_the_state_key_on(tmp_path: Path) -> None:
    for number in (1, 2):
        torch.save({"a": {"w": torch.ones(number)}, "b": {"w": torch.ones(2)}}, tmp_path / f"{number}.pt")
    assert check([tmp_path], state_key="b").compatible
    assert not check([tmp_path], state_key="a").compatible


@pytest.mark.parametrize(
    ("options", "kind", "code"),
    [
        ({"last": 9}, IncompatibleError, 4),
        ({"last": 0}, UsageError, 2),
        ({"include": ["nothing"]}, IncompatibleError, 4),
        ({"state_key": "model"}, CheckpointFormatError, 3),
    ],
)
def test_what_cannot_be_checked(
    tmp_path: Path, options: dict[str, object], kind: type[CkptAvgError], code: int
) -> None:
    write(tmp_path, A, A)
    with pytest.raises(kind) as caught:
        check([tmp_path], **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == code
