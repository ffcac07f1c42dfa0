"""Do the checkpoints fit together? Every difference at once, from headers alone."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_avg.commands.check import check
from ckpt_avg.errors import CkptAvgError
from ckpt_avg.runs.compatibility import CompatibilityReport

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


def test_one_checkpoint_fits_itself(tmp_path: Path) -> None:
    report = check(write(tmp_path, {"w": torch.ones(1)}))
    assert report.compatible
    assert str(report) == "1 checkpoint of 1 tensor each: names, shapes and dtypes agree"


@pytest.mark.guarantee("tensor-order")
def test_the_order_and_the_values_do_not_matter(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "1.pt")
    torch.save({"b": torch.ones(3), "w": torch.zeros(2)}, tmp_path / "2.pt")
    assert check([tmp_path]).compatible


def test_the_format_and_the_strides_do_not_matter(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(3, 2).t()}}, tmp_path / "1.pt")
    write(tmp_path, {"w": torch.ones(2, 3)})
    assert check([tmp_path]).compatible


@pytest.mark.guarantee("differences")
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
    assert text.endswith("Average checkpoints of one architecture and one run; skip others with --exclude.")


@pytest.mark.guarantee("differences")
def test_shapes_of_one_size_differ(tmp_path: Path) -> None:
    """(1,) would broadcast into (N,), and () into anything, if shapes were not compared."""
    shapes = [(4,), (1,), (), (2, 2), (4, 1), (0,)]
    for first, second in itertools.permutations(shapes, 2):
        report = check(write(tmp_path, {"w": torch.ones(first)}, {"w": torch.ones(second)}))
        assert [(item.aspect, item.expected, item.found) for item in report.differences] == [
            ("shape", str(list(first)), str(list(second)))
        ]


PLAIN: Tensors = {"a.weight": torch.ones(2), "b": torch.ones(1)}


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


@pytest.mark.guarantee("prefixes")
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_forward_module.module."])
def test_a_wrapped_model_fits_the_bare_one(tmp_path: Path, prefix: str) -> None:
    """A run of which a part was trained on several devices, or compiled, is one run."""
    for contents in ((PLAIN, under(prefix, PLAIN)), (under(prefix, PLAIN), PLAIN)):
        report = check(write(tmp_path, *contents))
        assert report.compatible
        assert report.tensors == 2


@pytest.mark.guarantee("prefixes")
@pytest.mark.parametrize("prefix", ["model.", "net.", "encoder.model."])
def test_a_prefix_of_some_checkpoints_is_advised_to_be_stripped(tmp_path: Path, prefix: str) -> None:
    """And the advice leads out of it."""
    for contents in (
        (PLAIN, under(prefix, PLAIN)),
        (under(prefix, PLAIN), PLAIN),
        (PLAIN, PLAIN, under(prefix, PLAIN)),
    ):
        paths = write(tmp_path, *contents)
        text = str(check(paths))
        assert "4 differences" in text
        assert text.endswith(
            f"Some names begin with '{prefix}', others don't: add --strip-prefix {prefix.removesuffix('.')}."
        )
        assert check(paths, strip_prefix=prefix).compatible


def test_a_prefix_that_no_checkpoint_carries_is_refused(tmp_path: Path) -> None:
    """A misspelt prefix must not pass as stripped, not even if a part of it was."""
    for tensors in (PLAIN, under("module.", PLAIN)):
        for prefix in ("mdel.", "e", "le.", "odule"):
            with pytest.raises(CkptAvgError, match="--strip-prefix"):
                check(write(tmp_path, tensors, tensors), strip_prefix=prefix)


def test_another_architecture_behind_a_prefix_gets_no_advice_on_prefixes(tmp_path: Path) -> None:
    for prefix in ("module.", "model."):
        text = str(check(write(tmp_path, {"a": torch.ones(2)}, {f"{prefix}b": torch.ones(2)})))
        assert "2 differences" in text
        assert "prefix" not in text
    (difference,) = check(write(tmp_path, {"a": torch.ones(2)}, {"module.a": torch.ones(3)})).differences
    assert (difference.tensor, difference.aspect) == ("a", "shape")


def test_prefixes_that_differ_are_not_advised(tmp_path: Path) -> None:
    """No one option could strip both."""
    text = str(check(write(tmp_path, PLAIN, under("model.", PLAIN), under("net.", PLAIN))))
    assert "strip-prefix" not in text


def test_differently_tied_tensors_are_differences(tmp_path: Path) -> None:
    """The mean of tied tensors is tied again only where every checkpoint ties them."""
    shared = torch.ones(2, 2)
    apart = {"a": torch.ones(2, 2), "b": torch.ones(2, 2), "c": torch.ones(2, 2)}
    torch.save({"a": shared, "b": shared, "c": torch.ones(2, 2)}, tmp_path / "step_1.pt")
    torch.save(apart, tmp_path / "step_2.pt")
    torch.save({"a": shared, "b": torch.ones(2, 2), "c": shared}, tmp_path / "step_3.pt")
    torch.save({"a": shared, "b": shared, "c": torch.zeros(2, 2)}, tmp_path / "step_4.pt")
    paths = [tmp_path / f"step_{number}.pt" for number in (1, 2, 3, 4)]
    assert check([paths[0], paths[3]]).compatible
    report = check(paths)
    assert sorted(found(report)) == sorted(
        [
            ("a", "tied", "tied to 'b'", "tied to none", ["step_2.pt"]),
            ("b", "tied", "tied to 'a'", "tied to none", ["step_2.pt", "step_3.pt"]),
            ("a", "tied", "tied to 'b'", "tied to 'c'", ["step_3.pt"]),
            ("c", "tied", "tied to none", "tied to 'a'", ["step_3.pt"]),
        ]
    )
    assert str(report).endswith("Average checkpoints that tie the same weights; skip others with --exclude.")


def test_views_that_share_a_storage_without_being_equal_are_not_tied(tmp_path: Path) -> None:
    for number in (1, 2):
        whole = torch.arange(8.0)
        torch.save({"a": whole[:4], "b": whole[4:]}, tmp_path / f"step_{number}.pt")
    torch.save({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "step_3.pt")
    assert check(tmp_path).compatible


@pytest.mark.guarantee("differences")
def test_dtypes_alone_have_their_own_advice(tmp_path: Path) -> None:
    paths = write(tmp_path, {"w": torch.ones(2)}, {"w": torch.ones(2).bfloat16()})
    text = str(check(paths))
    assert "tensor 'w': dtype: expected F32, got BF16" in text
    assert text.endswith("Add --dtype float32, or another dtype for the output, to average them.")


def test_the_text_is_cut_but_the_report_is_complete(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("same", [True, False])
def test_one_tensor_under_many_names_takes_linear_memory_and_short_messages(tmp_path: Path, same: bool) -> None:
    """A tuple of all names for each name would take gigabytes for a file of 350 KB."""
    names = [f"layers.{number}.weight" for number in range(4_000)]
    shared = torch.rand(4)
    states = [dict.fromkeys(names, shared), dict.fromkeys(names, shared) | ({} if same else {names[7]: torch.rand(4)})]
    for step, state in enumerate(states):
        torch.save(state, tmp_path / f"step_{step}.pt")
    tracemalloc.start()
    report = check([tmp_path / "step_0.pt", tmp_path / "step_1.pt"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * 2**20
    assert report.compatible == same
    assert max(map(len, (str(report), *report.notices))) < 10_000
