"""The discovered checkpoints, opened: in order of the run, each once, with what they record."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckpt_avg import average
from ckpt_avg.checkpoint.spec import METHOD_KEY
from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.errors import CheckpointFormatError, IncompatibleError, NoWeightsError, UsageError
from ckpt_avg.formats.reading import Reading
from ckpt_avg.runs.candidate import Candidate
from ckpt_avg.runs.candidates import Candidates, open_candidates
from ckpt_avg.runs.copies import find_copies
from ckpt_avg.runs.discover import OWN_AVERAGE, discover
from ckpt_avg.runs.order import position, unit_of
from ckpt_avg.runs.select import open_selected
from ckpt_avg.runs.selection import Selection


def weights(seed: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), float(seed)), "b": torch.full((1,), float(seed) / 2)}


def put(path: Path, seed: float, **recorded: Any) -> Path:
    torch.save({"model": weights(seed), **recorded} if recorded else weights(seed), path)
    return path


def look(*sources: Path, options: dict[str, Any] | None = None) -> Candidates:
    """Opens the candidates and closes what was opened."""
    with ExitStack() as stack:
        return open_candidates(discover(sources), Reading(), stack, **(options or {}))


def names(found: Candidates) -> list[str]:
    return [each.path.name for each in found.ordered]


def reasons(found: Candidates) -> dict[str, str]:
    made = {item.path.name: item.reason for item in found.skipped}
    assert len(made) == len(found.skipped), "each once"
    return made


# --- order -------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("natural-order")
@pytest.mark.parametrize(
    ("recorded", "expected", "unit"),
    [
        # What the checkpoints record goes before what their names look like.
        ({"c": {"step": 5}, "a": {"step": 100}, "b": {"step": 20}}, ["c", "b", "a"], "step"),
        # Without steps in all of them, epochs decide.
        ({"c": {"epoch": 5}, "a": {"epoch": 100}, "d": {"epoch": 6, "step": 1}}, ["c", "d", "a"], "epoch"),
        # Without either the natural order of the names decides, and within one step.
        ({"x10b": {}, "x9b": {}, "xa": {}}, ["x9b", "x10b", "xa"], None),
        ({"b10": {"step": 3}, "b9": {"step": 3}}, ["b9", "b10"], "step"),
        # By the step alone, checkpoints of different epochs would alternate if steps start again in each.
        ({"a": {"epoch": 2, "step": 100}, "b": {"epoch": 1, "step": 900}, "c": {"epoch": 2, "step": 50},
          "d": {"epoch": 1, "step": 100}}, ["d", "b", "c", "a"], "epoch"),
    ],
)  # fmt: skip
def test_the_order_of_a_run(
    tmp_path: Path, recorded: dict[str, dict[str, int]], expected: list[str], unit: str | None
) -> None:
    for seed, (name, values) in enumerate(recorded.items()):
        put(tmp_path / f"{name}.pt", seed, **values)
    found = look(tmp_path)
    assert [each.path.stem for each in found.ordered] == expected
    assert {each.path.stem: each.record.step for each in found.ordered} == {
        name: values.get("step") for name, values in recorded.items()
    }
    assert unit_of(each.record for each in found.ordered) == unit


def test_the_step_of_the_name_serves_where_the_file_records_none(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        save_file(weights(step), tmp_path / f"{'z' if step == 3 else 'a'}_step_{step}.safetensors")
    assert names(look(tmp_path)) == ["z_step_3.safetensors", "a_step_20.safetensors", "a_step_100.safetensors"]


def test_the_state_of_the_run_is_not_that_of_each_checkpoint(tmp_path: Path) -> None:
    """The Trainer writes its last state into the run folder, too; it would give every file the same step."""
    for step in (1, 2, 10):
        save_file(weights(step), tmp_path / f"step_{step}.safetensors")
    state = {"global_step": 10, "epoch": 1.0, "log_history": [{"step": 10, "eval_loss": 0.5}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    found = look(tmp_path)
    assert [each.record.step for each in found.ordered] == [1, 2, 10]
    assert dict(found.ordered[0].record.metrics) == {}


@pytest.mark.parametrize("keep_order", [False, True])
def test_checkpoints_of_several_sources_are_in_the_order_of_their_steps(tmp_path: Path, keep_order: bool) -> None:
    """A resumed run in two folders, and a file: the last is that of the latest step, wherever it is named."""
    for run, steps in (("a", (2, 10)), ("b", (3, 11))):
        (tmp_path / run).mkdir()
        for step in steps:
            put(tmp_path / run / f"{run}{step}.pt", step, step=step)
    by_hand = put(tmp_path / "first.pt", 0, step=9)
    found = look(by_hand, tmp_path / "b", tmp_path / "a", options={"selection": Selection(keep_order=keep_order)})
    assert names(found) == ["a2.pt", "b3.pt", "first.pt", "a10.pt", "b11.pt"]
    assert [each.path.name for each in found.given] == ["first.pt", "b3.pt", "b11.pt", "a2.pt", "a10.pt"]
    assert any("not as given" in note for note in found.notes) is not keep_order


def test_checkpoints_without_steps_keep_the_order_given(tmp_path: Path) -> None:
    paths = [put(tmp_path / f"{name}.pt", seed) for seed, name in enumerate(("b", "c", "a"))]
    found = look(*paths)
    assert (names(found), found.notes) == (["b.pt", "c.pt", "a.pt"], ())


def test_the_position_of_a_checkpoint_without_one_is_the_beginning() -> None:
    bare = Candidate(Path("x"), None, None, Record())
    assert (position(bare.record, "step"), position(bare.record, "epoch")) == (0, 0)


# --- copies ------------------------------------------------------------------------------------------------


@pytest.mark.guarantee("same-checkpoint-twice")
@pytest.mark.parametrize("copy", ["model_best.pth.tar", "last.pth", "epoch_2_copy.pt"])
def test_a_copy_counts_once_under_the_plainest_name(tmp_path: Path, copy: str) -> None:
    """torch.save writes the name of the file into the archive, so that no two copies are equal as files."""
    put(tmp_path / "epoch_1.pt", 1, epoch=1)
    put(tmp_path / "epoch_2.pt", 2, epoch=2)
    put(tmp_path / copy, 2, epoch=2)
    found = look(tmp_path)
    assert (tmp_path / copy).read_bytes() != (tmp_path / "epoch_2.pt").read_bytes()
    assert names(found) == ["epoch_1.pt", "epoch_2.pt"]
    alias = "an alias such as last or best, by its name"
    assert reasons(found) == {copy: "the same weights as epoch_2.pt" if "copy" in copy else alias}


def test_copies_of_safetensors_and_of_both_formats(tmp_path: Path) -> None:
    save_file(weights(1), tmp_path / "a.safetensors")
    save_file(weights(1), tmp_path / "aa.safetensors", metadata={"format": "pt"})
    put(tmp_path / "aaa.pt", 1)
    put(tmp_path / "b.pt", 2)
    found = look(tmp_path)
    assert names(found) == ["a.safetensors", "b.pt"]
    assert reasons(found) == {
        "aa.safetensors": "the same weights as a.safetensors",
        "aaa.pt": "the same weights as a.safetensors",
    }


def test_what_a_copy_records_is_kept(tmp_path: Path) -> None:
    """The copy that a trainer keeps as its best may be the only one that has the metric."""
    put(tmp_path / "epoch_1.pt", 1)
    put(tmp_path / "epoch_1-best-acc=0.5.pt", 1, step=7, epoch=9)
    put(tmp_path / "epoch_2.pt", 2)
    found = look(tmp_path)
    assert names(found) == ["epoch_1.pt", "epoch_2.pt"]
    record = found.ordered[0].record
    assert (record.step, record.epoch, dict(record.metrics)) == (7, 1, {"acc": 0.5})


def test_a_weight_of_one_element_is_no_metric(tmp_path: Path) -> None:
    """Nor a step or an epoch: in a bare state dict every tensor is a weight."""
    for seed in (1, 2):
        torch.save(
            weights(seed) | {"temperature": torch.tensor(0.5), "step": torch.tensor(9)}, tmp_path / f"x{seed}.pt"
        )
        torch.save({"model": weights(seed + 10), "temperature": torch.tensor(0.5)}, tmp_path / f"y{seed}.pt")
    found = look(tmp_path)
    assert names(found) == ["x1.pt", "x2.pt", "y1.pt", "y2.pt"]
    assert [dict(each.record.metrics) for each in found.ordered] == [
        {},
        {},
        {"temperature": 0.5},
        {"temperature": 0.5},
    ]
    assert [each.record.step for each in found.ordered] == [None] * 4


def test_one_changed_element_is_no_copy(tmp_path: Path) -> None:
    put(tmp_path / "epoch_1.pt", 1)
    torch.save(weights(1) | {"b": torch.tensor([0.5000001])}, tmp_path / "epoch_2.pt")
    assert names(look(tmp_path)) == ["epoch_1.pt", "epoch_2.pt"]


def test_named_copies_are_both_used(tmp_path: Path) -> None:
    """Who names files knows them: only the same file twice is refused."""
    paths = [put(tmp_path / name, 1) for name in ("a.pt", "b.pt")]
    found = look(*paths)
    assert names(found) == ["a.pt", "b.pt"]
    assert found.skipped == ()


def test_a_folder_and_the_file_in_it_are_one_checkpoint(tmp_path: Path) -> None:
    """Named both, it would count double."""
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    save_file(weights(1), folder / "model.safetensors")
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(UsageError, match="listed twice"), ExitStack() as stack:
        open_selected(discover([folder, folder / "model.safetensors"]), Selection(), Reading(), stack)


def test_copies_in_different_runs_are_kept(tmp_path: Path) -> None:
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        put(tmp_path / run / "x.pt", 1)
        put(tmp_path / run / f"y{run}.pt", ord(run))
    assert names(look(tmp_path / "a", tmp_path / "b")) == ["x.pt", "ya.pt", "x.pt", "yb.pt"]


def test_an_alias_is_skipped_even_if_its_weights_differ(tmp_path: Path) -> None:
    """``last.pt`` of a step of its own would count the end of the run double."""
    for step in (1, 2):
        put(tmp_path / f"step_{step}.pt", step)
    put(tmp_path / "last.pt", 3)
    found = look(tmp_path)
    assert names(found) == ["step_1.pt", "step_2.pt"]
    assert reasons(found) == {"last.pt": "an alias such as last or best, by its name"}


def test_aliases_are_used_if_there_is_nothing_else(tmp_path: Path) -> None:
    put(tmp_path / "last.pt", 1)
    put(tmp_path / "best.pt", 2)
    assert set(names(look(tmp_path))) == {"last.pt", "best.pt"}
    put(tmp_path / "best.pt", 1)
    assert names(look(tmp_path)) == ["best.pt"]


# --- earlier averages and files without weights ------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean.safetensors", "release.pt", "A.BIN"])
def test_an_earlier_average_is_known_by_its_metadata_whatever_its_name(tmp_path: Path, name: str) -> None:
    """An output of ours in the run folder must not enter the next average, unless it is named."""
    for step in (1, 2):
        save_file(weights(step), tmp_path / f"step_{step}.safetensors", metadata={"format": "pt"})
    save_file(weights(1.5), tmp_path / name, metadata={"format": "pt", METHOD_KEY: "mean"})
    assert METHOD_KEY == "ckpt_avg.method"
    assert OWN_AVERAGE == "an earlier average made by ckpt-avg"
    found = look(tmp_path)
    assert names(found) == ["step_1.safetensors", "step_2.safetensors"]
    assert reasons(found) == {name: OWN_AVERAGE}
    (by_hand,) = look(tmp_path / name).ordered
    assert by_hand.opened().spec.averaged == "ckpt-avg made it"


def test_a_run_of_earlier_averages_only(tmp_path: Path) -> None:
    save_file(weights(1), tmp_path / "mean.safetensors", metadata={METHOD_KEY: "mean"})
    with pytest.raises(IncompatibleError) as caught:
        look(tmp_path)
    assert str(caught.value) == (
        f"nothing to average: all checkpoints are skipped ('mean.safetensors': {OWN_AVERAGE}). Name others."
    )


def test_files_without_weights_are_skipped_in_a_run(tmp_path: Path) -> None:
    put(tmp_path / "step_1.pt", 1)
    torch.save({"loss": [0.5]}, tmp_path / "history.pt")
    torch.save([torch.ones(1)], tmp_path / "samples.pt")
    found = look(tmp_path)
    assert names(found) == ["step_1.pt"]
    assert set(reasons(found)) == {"history.pt", "samples.pt"}
    assert reasons(found)["history.pt"].startswith("it contains no weights: ")


def test_a_named_file_without_weights_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "step_1.pt", 1)
    torch.save({"loss": [0.5]}, tmp_path / "history.pt")
    found = look(tmp_path / "step_1.pt", tmp_path / "history.pt")
    with pytest.raises(NoWeightsError):
        found.ordered[1].opened()
    (tmp_path / "step_1.pt").unlink()
    (only,) = look(tmp_path).ordered  # a run of such files
    with pytest.raises(NoWeightsError, match="which contains no named tensors"):
        only.opened()


# --- files that cannot be read -----------------------------------------------------------------------------


def test_an_unreadable_checkpoint_stays_a_candidate(tmp_path: Path) -> None:
    """At its place by its name, so that it is an error only if it is chosen, and never lost without a word."""
    for step in (1, 2, 3):
        put(tmp_path / f"step_{step}.pt", step)
    (tmp_path / "step_2.pt").write_bytes((tmp_path / "step_2.pt").read_bytes()[:-100])
    found = look(tmp_path)
    assert names(found) == ["step_1.pt", "step_2.pt", "step_3.pt"]
    assert found.ordered[1].record.step == 2
    with pytest.raises(CheckpointFormatError, match=r"step_2\.pt"):
        found.ordered[1].opened()
    with ExitStack() as stack:
        checkpoints = open_selected(discover([tmp_path]), Selection(last=1), Reading(), stack).checkpoints
        assert [each.spec.path.name for each in checkpoints] == ["step_3.pt"]
        with pytest.raises(CheckpointFormatError, match=r"step_2\.pt"):
            open_selected(discover([tmp_path]), Selection(last=2), Reading(), stack)


def test_an_excluded_checkpoint_is_not_opened(tmp_path: Path) -> None:
    put(tmp_path / "step_1.pt", 1)
    (tmp_path / "step_2.pt").write_bytes(b"junk")
    found = look(tmp_path, options={"selection": Selection(exclude="step_2.pt")})
    assert names(found) == ["step_1.pt"]


def test_no_name_is_wanted(tmp_path: Path) -> None:
    for step in range(25):
        (tmp_path / f"step_{step}.pt").write_bytes(b"x")
    with pytest.raises(IncompatibleError) as caught:
        look(tmp_path, options={"selection": Selection(exclude="*")})
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert message == (
        "nothing to average: --include and --exclude skip all 25 checkpoints (step_0.pt, step_1.pt, …, step_24.pt). "
        "Change the patterns, which match file names."
    )


# --- what stays open ---------------------------------------------------------------------------------------


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_only_what_is_chosen_stays_open(tmp_path: Path) -> None:
    for step in range(10):
        put(tmp_path / f"step_{step}.pt", step)
    put(tmp_path / "copy_of_the_ninth.pt", 9)
    before = open_descriptors()
    with ExitStack() as stack:
        checkpoints = open_selected(discover([tmp_path]), Selection(last=2), Reading(), stack).checkpoints
        assert len(checkpoints) == 2
        assert open_descriptors() == before + 2
    assert open_descriptors() == before


@pytest.mark.guarantee("many-checkpoints")
def test_a_run_of_more_checkpoints_than_files_may_be_open(tmp_path: Path) -> None:
    """Long runs have thousands: a soft limit is no reason to fail."""
    import resource

    for step in range(120):
        put(tmp_path / f"step_{step}.pt", step)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 60, hard))
    try:
        with ExitStack() as stack:
            checkpoints = open_selected(discover([tmp_path]), Selection(last=3), Reading(), stack).checkpoints
            assert [each.spec.path.name for each in checkpoints] == [f"step_{step}.pt" for step in (117, 118, 119)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_copies_among_open_candidates(tmp_path: Path) -> None:
    paths = [put(tmp_path / f"{index}.pt", seed) for index, seed in enumerate((1, 2, 1, 3, 2, 1))]
    with ExitStack() as stack:
        found = open_candidates(discover(paths), Reading(), stack)
        assert find_copies([each.opened() for each in found.ordered]) == {2: 0, 4: 1, 5: 0}


# --- several series in one folder --------------------------------------------------------------------------


def refusal(*sources: Path, options: dict[str, Any] | None = None) -> str:
    with pytest.raises(IncompatibleError) as caught:
        look(*sources, options=options)
    assert caught.value.exit_code == 4
    return str(caught.value)


def test_ema_files_next_to_raw_ones_are_skipped_and_can_be_selected(tmp_path: Path) -> None:
    """As guided-diffusion saves them: mixed, the mean would be of both kinds."""
    for step in (100, 200):
        put(tmp_path / f"model{step:06}.pt", step)
        put(tmp_path / f"ema_0.9999_{step:06}.pt", step + 0.5)
    found = look(tmp_path)
    assert names(found) == ["model000100.pt", "model000200.pt"]
    assert reasons(found) == dict.fromkeys(
        ("ema_0.9999_000100.pt", "ema_0.9999_000200.pt"), "EMA weights, by its name; --include selects them"
    )
    selected = average([tmp_path], tmp_path / "out.safetensors", include="ema*", dry_run=True)
    assert [path.name for path in selected.checkpoints] == ["ema_0.9999_000100.pt", "ema_0.9999_000200.pt"]


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [
        (("G_1.pt", "G_2.pt"), ("D_1.pt", "D_2.pt"), ("'D_*'", "'G_*'", "--include 'D_*'")),
        (
            ("fold0_epoch_1.pt", "fold0_epoch_2.pt"),
            ("fold1_epoch_1.pt", "fold1_epoch_2.pt"),
            ("'fold0_epoch_*'", "'fold1_epoch_*'", "--include 'fold0_epoch_*'"),
        ),
    ],
)
def test_two_series_through_the_same_steps_are_refused(
    tmp_path: Path, first: tuple[str, ...], second: tuple[str, ...], shown: tuple[str, ...]
) -> None:
    """Two networks of a GAN, two folds: their mean would be of nothing. Each can be chosen."""
    for seed, name in enumerate((*first, *second)):
        put(tmp_path / name, seed)
    message = refusal(tmp_path)
    assert "expected one series of checkpoints, got several" in message
    assert all(text in message for text in shown), message
    for series in (first, second):
        assert names(look(tmp_path, options={"selection": Selection(include=series)})) == list(series)


def test_two_checkpoints_of_one_step_are_used_with_a_note(tmp_path: Path) -> None:
    """One repeated step is not a second series."""
    for seed, name in enumerate(("a_step_1.pt", "a_step_2.pt", "b_step_2.pt")):
        put(tmp_path / name, seed)
    found = look(tmp_path)
    assert names(found) == ["a_step_1.pt", "a_step_2.pt", "b_step_2.pt"]
    assert found.notes == ("several checkpoints have the same step, and all are used: 'a_step_2.pt', 'b_step_2.pt'",)


def test_many_repeated_steps_are_one_note(tmp_path: Path) -> None:
    """Of two runs that are named together."""
    for seed, name in enumerate(("a/step_1.pt", "a/step_2.pt", "b/step_1.pt", "b/step_2.pt")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        put(tmp_path / name, seed)
    (note,) = [each for each in look(tmp_path / "a", tmp_path / "b").notes if "the same step" in each]
    assert note.endswith(": 'a/step_1.pt', 'b/step_1.pt'; 'a/step_2.pt', 'b/step_2.pt'")


def test_the_parts_of_a_tensor_parallel_model_are_refused(tmp_path: Path) -> None:
    for rank in (0, 1):
        put(tmp_path / f"consolidated.0{rank}.pth", rank)
    for sources in ([tmp_path], [tmp_path / "consolidated.00.pth"]):
        with pytest.raises(CheckpointFormatError, match="the file has a part of a checkpoint") as caught:
            average(sources, tmp_path / "out.safetensors", dry_run=True)
        assert caught.value.exit_code == 3
    (tmp_path / "consolidated.01.pth").unlink()
    assert average([tmp_path], tmp_path / "out.safetensors", dry_run=True).tensors == 2


def test_raw_weights_of_one_and_only_an_ema_of_another_are_refused(tmp_path: Path) -> None:
    """Both have the same names and shapes, so nothing else would tell."""
    torch.save({"model": weights(1), "epoch": 1}, tmp_path / "epoch_1.pt")
    torch.save({"ema": weights(2), "epoch": 2}, tmp_path / "epoch_2.pt")
    with pytest.raises(
        IncompatibleError, match=r"epoch_2\.pt: has only a running average .* while .*epoch_1\.pt has raw"
    ) as caught:
        average([tmp_path], tmp_path / "out.safetensors")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out.safetensors").exists()


# --- order within a step, or an epoch ----------------------------------------------------------------------


def test_the_second_file_of_one_step_follows_the_first(tmp_path: Path) -> None:
    """Lightning's ``-v1`` is the later one, though its name sorts before the suffix."""
    for seed, name in enumerate(("epoch=1-step=10-v1.ckpt", "epoch=1-step=10.ckpt", "epoch=0-step=5.ckpt")):
        put(tmp_path / name, seed)
    assert names(look(tmp_path)) == ["epoch=0-step=5.ckpt", "epoch=1-step=10.ckpt", "epoch=1-step=10-v1.ckpt"]


# --- what does not disturb a run ---------------------------------------------------------------------------


@pytest.mark.guarantee("half-written")
def test_an_unreadable_checkpoint_of_a_run_says_how_to_leave_it_out(tmp_path: Path) -> None:
    """Nothing can be excluded if only this one is named."""
    for step in (1, 2):
        put(tmp_path / f"step_{step}.pt", step)
    (tmp_path / "step_2.pt").write_bytes(b"junk")
    for source, advised in ((tmp_path, True), (tmp_path / "step_2.pt", False)):
        with pytest.raises(CheckpointFormatError) as caught:
            average([source], tmp_path / "out.safetensors")
        assert str(caught.value).endswith(" To average the others, add --exclude step_2.pt.") is advised
        assert ("--exclude" in str(caught.value)) is advised
    assert names(look(tmp_path, options={"selection": Selection(exclude="step_2.pt")})) == ["step_1.pt"]
    (tmp_path / "step_1.pt").write_bytes(b"junk")  # no others that could be averaged
    assert all("--exclude" not in str(each.error) for each in look(tmp_path).ordered)


@pytest.mark.parametrize("stray", [".metadata", "model-00001-of-00002.safetensors"])
def test_a_stray_part_of_another_checkpoint_does_not_disturb_a_run(tmp_path: Path, stray: str) -> None:
    """One such file must make neither a DCP folder of the run nor a third checkpoint of it."""
    for epoch in (1, 2):
        put(tmp_path / f"epoch_{epoch}.pt", epoch, epoch=epoch)
    if stray == ".metadata":
        (tmp_path / stray).write_bytes(b"junk")
    else:
        save_file(weights(9), tmp_path / stray)
    found = look(tmp_path)
    assert names(found) == ["epoch_1.pt", "epoch_2.pt"]
    if stray != ".metadata":
        assert any(f"'{stray}'" in reason or name == stray for name, reason in reasons(found).items())


def test_one_checkpoint_keeps_its_own_running_statistics(tmp_path: Path) -> None:
    """They belong to these very weights: neither a model nor data may be asked for."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    net(torch.rand(8, 2))
    torch.save(net.state_dict(), tmp_path / "epoch_1.pt")
    result = average([tmp_path], tmp_path / "out.safetensors")
    assert (result.statistics, result.batch_norm) == ("copied", None)
    written = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(written[name], value) for name, value in net.state_dict().items())
    torch.save({name: value * 2 for name, value in net.state_dict().items()}, tmp_path / "epoch_2.pt")
    with pytest.raises(UsageError, match="Add --model"):
        average([tmp_path], tmp_path / "other.safetensors", non_float="last")
