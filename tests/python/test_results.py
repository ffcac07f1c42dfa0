"""Results as people and programs see them: a short `repr`, HTML for notebooks, plain values."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckpt_avg
from ckpt_avg.batchnorm.pools import LayerStatistics
from ckpt_avg.results import Result
from ckpt_avg.wording import for_command_line

EVIL = "<script>alert('1')</script>&\n\x1b[31m"


@pytest.fixture(scope="module")
def results(run_folder: Path, train: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One result of each kind, of the real run, with notices in the words of the command line."""
    with for_command_line():
        return _results(run_folder, train, tmp_path_factory.mktemp("results"))


def _results(run_folder: Path, train: ModuleType, folder: Path) -> dict[str, Any]:
    batches = [torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    options: dict[str, Any] = {
        "model": train.make_model,
        "data": batches,
        "evaluate": lambda model: {"accuracy": float(model.features.bn1.running_mean.mean()), EVIL: 0.5},
    }
    average = ckpt_avg.average(
        run_folder, folder / "a.safetensors", last=3, weighting="ema", half_life="50%", require="accuracy<9", **options
    )
    for step, width in ((1, 2), (2, 3)):
        save_file({f"{EVIL}{number}": torch.ones(width) for number in range(30)}, folder / f"step_{step}.safetensors")
    opened = ckpt_avg.open_checkpoint(run_folder / "epoch_20.pt")
    opened.close()
    return {
        "average": average,
        "batch norm": average.batch_norm,
        "comparison": average.comparison,
        "evaluation": average.evaluations[-1],
        "dry run": ckpt_avg.average(run_folder, folder / "b.safetensors", bn="keep", dry_run=True),
        "sweep": ckpt_avg.sweep(run_folder, last=3, maximize="accuracy", **options),
        "soup": ckpt_avg.soup(run_folder, folder / "s.safetensors", last=3, maximize="accuracy", **options),
        "compare": ckpt_avg.compare(run_folder),
        "verify": ckpt_avg.verify(average.output, sources=run_folder),
        "inspect run": ckpt_avg.inspect(run_folder, last=2),
        "inspect file": ckpt_avg.inspect(run_folder / "epoch_20.pt"),
        "inspect nothing": ckpt_avg.inspect(train.__file__ and Path(train.__file__).parent.parent.parent / "docs"),
        "check": ckpt_avg.check(run_folder),
        "check differences": ckpt_avg.check(sorted(folder.glob("step_*"))),
        "checkpoint": opened,
        "spec": opened.spec,
    }


KINDS = [
    *("average", "batch norm", "comparison", "evaluation", "dry run", "sweep", "soup", "compare", "verify"),
    *("inspect run", "inspect file", "inspect nothing", "check", "check differences", "checkpoint", "spec"),
]
kinds = pytest.mark.parametrize("kind", KINDS)


def test_every_public_result_is_shown_as_one() -> None:
    """A dataclass with lists of paths would fill a notebook with thousands of characters."""
    short = {"Checkpoint", "DType", "Outcome", "Part", "Phase", "Progress", "Requirement", "TensorSpec"}
    public = {name for name in ckpt_avg.__all__ if hasattr(getattr(ckpt_avg, name), "__dataclass_fields__")}
    assert {name for name in public if not issubclass(getattr(ckpt_avg, name), Result)} <= short


@kinds
def test_the_repr_is_a_short_summary_that_names_attributes(kind: str, results: dict[str, Any]) -> None:
    result = results[kind]
    lines = repr(result).splitlines()
    assert lines[0].startswith(type(result).__name__)
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 88
    assert repr(result).isprintable() or all(map(str.isprintable, lines))
    shown = {line.split()[0] for line in lines[1:]}
    assert all(hasattr(result, name) for name in shown - {"selected", "metrics", "record", "tensors"})


class _Reader(HTMLParser):
    """Notes the tags, and refuses what is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {f"{name}={value}" for name, value in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@kinds
def test_the_html_is_small_and_escaped_and_needs_nothing_else(kind: str, results: dict[str, Any]) -> None:
    """No script, picture, style sheet or colour of its own, so it suits light and dark notebooks."""
    shown = results[kind]._repr_html_()
    reader = _Reader()
    reader.feed(shown)
    assert not reader.open
    assert reader.tags <= {"div", "p", "b", "table", "tr", "th", "td"}
    assert reader.attributes <= {"style=text-align: left; vertical-align: top"}
    assert len(shown) < 10_000
    assert type(results[kind]).__name__ in reader.text


@kinds
def test_plain_values_are_strict_json(kind: str, results: dict[str, Any]) -> None:
    found = results[kind].to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("compare", ("compare", "RUN")),
        ("inspect run", ("inspect", "RUN", "--last", "2")),
        ("inspect file", ("inspect", "RUN/epoch_20.pt")),
        ("check", ("check", "RUN")),
        ("dry run", ("average", "RUN", "-o", "OUT", "--bn", "keep", "--dry-run")),
    ],
)
def test_plain_values_are_the_document_of_the_command(
    kind: str,
    command: tuple[str, ...],
    results: dict[str, Any],
    run_folder: Path,
    in_process: Callable[..., tuple[int, str, str]],
) -> None:
    """Whoever reads one can read the other."""
    output = str(results["dry run"].output)
    arguments = [each.replace("RUN", str(run_folder)).replace("OUT", output) for each in command]
    code, out, _ = in_process(*arguments, "--json")
    assert code == 0
    assert json.loads(out) == results[kind].to_dict()


@kinds
def test_results_can_be_pickled_and_compared(kind: str, results: dict[str, Any]) -> None:
    """For caches and processes. Open files, and the NaN of a comparison, are equal only to themselves."""
    result = results[kind]
    if kind == "checkpoint":
        return
    copy = pickle.loads(pickle.dumps(result))
    assert repr(copy) == repr(result)
    assert copy.to_dict() == result.to_dict()
    assert kind == "compare" or copy == result


def test_statistics_are_compared_by_their_values() -> None:
    one = LayerStatistics(4, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), 1, 2)
    assert one == LayerStatistics(4, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), 1, 2)
    assert one != LayerStatistics(4, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), 1, 2)
    assert one.to_dict()["mean"] == [1.0, 2.0]


def test_a_long_table_is_cut() -> None:
    class Long(Result):
        __slots__ = ()

        def _title(self) -> str:
            return "x" * 500

        def _facts(self) -> Any:
            yield from ((f"field{number}", "y" * 1000) for number in range(50))

    assert len(repr(Long()).splitlines()) == 10
    assert len(Long()._repr_html_()) < 30_000
