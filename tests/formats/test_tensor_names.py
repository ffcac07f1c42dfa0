"""Tensor names without wrappers' prefixes, so that the average loads into the bare model; tables of equal headers."""

from __future__ import annotations

import gc
import warnings
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from formats.reading import Command, assert_same, averaged, mean, read
from formats.test_sharded import write
from hypothesis import given
from hypothesis import strategies as st
from layouts import net, ordered, save, state
from safetensors.torch import load_file, save_file
from torch import nn

import ckpt_avg
from ckpt_avg import open_checkpoint
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats import safetensors_header
from ckpt_avg.formats.tensor_names import PREFIXES, Names, strip_prefixes
from ckpt_avg.runs.compatibility import compare

MIDDLE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Parts that begin like a wrapper or contain one. Stripping them would rename weights.
PARTS = ("weight", "bias", "0", "module", "modules", "my_orig_mod", "_orig", "fc", "_fsdp_wrapped", "steps")


def strip(names: list[str], prefix: str | None = None, scalars: tuple[str, ...] = ()) -> Names:
    return strip_prefixes(names, scalars, prefix, "here")


def dotted() -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)


def names_of_a_model() -> st.SearchStrategy[list[str]]:
    """Names, one of them without a wrapper's prefix, so that the only common prefix is the test's."""
    return st.lists(dotted(), min_size=1, max_size=6, unique=True).map(lambda names: ["bare", *names])


@given(names_of_a_model(), st.lists(st.sampled_from(PREFIXES), max_size=4))
def test_prefixes_are_stripped_in_any_order_and_number(names: list[str], wrappers: list[str]) -> None:
    """And nothing else does: one layer too many would rename weights, one too few would not load."""
    front = "".join(wrappers)
    stripped = strip([front + name for name in names])
    assert dict(stripped.renamed) == {front + name: name for name in names}
    assert stripped.prefix == front
    assert stripped.counters == ()
    assert stripped.notes == ((f"{front!r} stripped from every name",) if front else ())


@given(names_of_a_model(), st.sampled_from(["module.", "_orig_mod.", "_forward_module."]))
def test_a_prefix_that_one_name_lacks_is_kept(names: list[str], prefix: str) -> None:
    """It then belongs to the model: a module that is called ``module``."""
    kept = ["bare", *(prefix + name for name in names)]
    assert strip(kept).prefix == ""
    assert list(strip(kept).renamed.values()) == kept


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_name_is_never_stripped_to_nothing(prefix: str) -> None:
    """A tensor without a name could not be written."""
    names = [f"{prefix}w", prefix]
    stripped = strip(names)
    assert "" not in stripped.renamed.values()
    assert stripped.prefix == ""


def test_no_names_at_all() -> None:
    assert strip([]) == Names({})


# --- wrappers in the middle of names -----------------------------------------------------------------------


@given(st.lists(dotted(), min_size=1, max_size=5, unique=True), st.data())
def test_wrappers_of_inner_modules_are_removed_from_the_middle(names: list[str], data: st.DataObject) -> None:
    """Activation checkpointing and FSDP wrap single layers."""
    wrapped = {}
    for name in names:
        parts = name.split(".")
        spots = data.draw(st.lists(st.integers(0, len(parts) - 1), max_size=3))
        for spot in sorted(spots, reverse=True):
            parts.insert(spot, data.draw(st.sampled_from(MIDDLE)).removesuffix("."))
        wrapped[".".join(parts)] = name
    front = "bare."  # so that no prefix is common to all
    assert dict(strip([front + name for name in wrapped]).renamed) == {front + k: front + v for k, v in wrapped.items()}


def test_real_activation_checkpointing_gives_the_names_of_the_bare_model() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    bare = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    names = list(bare.state_dict())
    bare[1][0] = checkpoint_wrapper(bare[1][0])
    # The wrapper's own hook gives clean names; what it holds inside are the names that other writers save.
    inner = [name for name, _ in bare.named_parameters()]
    raw = ["1._checkpoint_wrapped_module.0.weight", "1.0._checkpoint_wrapped_module._checkpoint_wrapped_module.bias"]
    assert set(strip(inner).renamed.values()) == set(names)
    assert list(strip(raw).renamed.values()) == ["1.0.weight", "1.0.bias"]


def test_names_that_would_become_equal_are_kept() -> None:
    """Two tensors are never merged, nor one of them lost."""
    names = ["a._fsdp_wrapped_module.w", "a.w", "b._fsdp_wrapped_module.w"]
    assert list(strip(names).renamed.values()) == names


def test_removed_wrapper_names_are_counted_in_a_note() -> None:
    stripped = strip(["a._fsdp_wrapped_module.w", "b.w", "c._checkpoint_wrapped_module.w"])
    assert stripped.notes == ("wrapper names removed from the middle of 2 names",)
    assert stripped.prefix == ""


# --- counters of averaging models --------------------------------------------------------------------------


@pytest.mark.parametrize("counter", ["n_averaged", "steps"])
def test_the_counter_of_an_averaging_model_is_skipped(counter: str) -> None:
    """It would keep ``module.`` from being common to all names, and is no weight."""
    stripped = strip([counter, "module.w", "module.b"], scalars=(counter, "module.b"))
    assert dict(stripped.renamed) == {"module.w": "w", "module.b": "b"}
    assert stripped.counters == (counter,)


def test_a_real_averaged_model() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(nn.DataParallel(nn.Linear(2, 2)))
    state = averaged.state_dict()
    stripped = strip(list(state), scalars=tuple(name for name, value in state.items() if value.ndim == 0))
    assert list(stripped.renamed.values()) == ["weight", "bias"]
    assert stripped.counters == ("n_averaged",)


@pytest.mark.parametrize(
    ("names", "scalars"),
    [
        (["n_averaged", "w"], ("n_averaged",)),
        (["n_averaged", "module.w", "w"], ("n_averaged",)),
        (["n_averaged", "module.w"], ()),
        (["n_averaged"], ("n_averaged",)),
        (["module.n_averaged", "module.w"], ("module.n_averaged",)),
    ],
    ids=["bare names", "not all wrapped", "no scalar", "alone", "inside the module"],
)
def test_a_weight_of_that_name_is_kept(names: list[str], scalars: tuple[str, ...]) -> None:
    """It is a counter only next to ``module.*``; elsewhere skipping it would lose a tensor."""
    stripped = strip(names, scalars=scalars)
    assert len(stripped.renamed) == len(names)
    assert stripped.counters == ()


# --- a prefix that the user names --------------------------------------------------------------------------


@given(names_of_a_model(), st.sampled_from(["model.", "net.encoder.", "x."]), st.booleans())
def test_a_given_prefix_is_stripped(names: list[str], prefix: str, dot: bool) -> None:
    """With or without its dot, inside wrappers and around them."""
    for front in (prefix, f"module.{prefix}", f"{prefix}_orig_mod.", f"module.{prefix}module."):
        stripped = strip([front + name for name in names], prefix if dot else prefix[:-1])
        assert list(stripped.renamed.values()) == names
        assert stripped.prefix == front


def test_a_given_prefix_of_some_names_is_stripped_with_a_note() -> None:
    stripped = strip(["model.a", "model.b.w", "head.w"], "model.")
    assert list(stripped.renamed.values()) == ["a", "b.w", "head.w"]
    assert stripped.prefix == ""
    assert stripped.notes == ("'model.' stripped from 2 of 3 names",)


def test_a_given_prefix_matches_whole_parts_of_names() -> None:
    """``--strip-prefix mod`` must not make ``ule.w`` of ``module.w`` or ``el.w`` of ``model.w``."""
    stripped = strip(["mod.w", "model.w"], "mod")
    assert list(stripped.renamed.values()) == ["w", "model.w"]


def test_a_given_prefix_never_strips_a_whole_name() -> None:
    assert "" not in strip(["model.", "model.w"], "model.").renamed.values()


def test_a_given_prefix_may_be_one_that_is_always_stripped() -> None:
    stripped = strip(["module.w", "module.b"], "module.")
    assert list(stripped.renamed.values()) == ["w", "b"]
    assert stripped.prefix == "module."


def test_two_tensors_of_one_name_are_refused() -> None:
    """One of them would silently overwrite the other."""
    with pytest.raises(CheckpointFormatError) as caught:
        strip(["model.w", "w", "b"], "model.")
    assert str(caught.value).startswith("here: without the prefix two tensors would have the same name: 'w'.")


@pytest.mark.usefixtures("in_time")
def test_many_tensors_of_one_name_are_refused_at_once() -> None:
    """A hostile file with as many names as are allowed must not take hours to be refused."""
    names = [f"w{number}" for number in range(20_000)]
    with pytest.raises(CheckpointFormatError, match=r"have the same name: 'w0', 'w1', .* and 19,980 more"):
        strip([*names, *(f"model.{name}" for name in names)], "model.")


# --- in checkpoints ---


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.", "_forward_module.",
     "_forward_module.module._orig_mod."],
)  # fmt: skip
@pytest.mark.parametrize("key", [None, "state_dict"])
def test_wrappers_are_stripped_in_files(tmp_path: Path, prefix: str, key: str | None) -> None:
    weights = ordered(state(1), prefix)
    path = save(weights if key is None else {key: weights}, tmp_path / "wrapped.pt")
    assert_same(read(path), state(1))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.prefix == prefix
        assert any(prefix in note for note in checkpoint.spec.notes)


@pytest.mark.slow
def test_real_data_parallel_and_compiled_models(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it imports what compiles
        wrapped = torch.compile(nn.DataParallel(net(3)))
    path = save(wrapped.state_dict(), tmp_path / "ddp.pt")
    assert next(iter(torch.load(path))).startswith("_orig_mod.module.")
    assert_same(read(path), state(3))


def test_tied_tensors_under_a_prefix(tmp_path: Path) -> None:
    shared = torch.rand(3, 2)
    path = save({"module.embed.weight": shared, "module.head.weight": shared}, tmp_path / "tied.pt")
    with open_checkpoint(path) as checkpoint:
        assert [sorted(group) for group in checkpoint.spec.tied()] == [["embed.weight", "head.weight"]]


def test_one_run_with_and_without_a_wrapper(tmp_path: Path, in_process: Command) -> None:
    """A run resumed without DataParallel: the names are the same once its prefix is gone."""
    paths = [save(ordered(state(1), "module."), tmp_path / "1.pt"), save(ordered(state(2)), tmp_path / "2.pt")]
    assert_same(averaged(in_process, *paths), mean([state(1), state(2)]))


# --- tables of equal headers, which are parsed once ---


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"module.a": torch.full((3, 2), value), "module.b": torch.full((5,), -value)}


def test_equal_headers_share_their_table_and_no_values(tmp_path: Path) -> None:
    paths = [tmp_path / f"step_{step}.safetensors" for step in (1, 2, 4)]
    for path, value in zip(paths, (1.0, 2.0, 6.0), strict=True):
        save_file(weights(value), path, metadata={"format": "pt"})
    with open_checkpoint(paths[0]) as first, open_checkpoint(paths[1]) as second:
        assert first.spec.tensors is second.spec.tensors
        assert (first.spec.path, second.spec.path) == (paths[0], paths[1])
        assert (first.spec.record.step, second.spec.record.step) == (1, 2)
        assert first.spec.prefix == second.spec.prefix == "module."
    ckpt_avg.average(paths, tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), {"a": torch.full((3, 2), 3.0), "b": torch.full((5,), -3.0)})


def test_a_header_is_parsed_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for number, path in enumerate(paths):
        save_file(weights(number), path)
    with mock.patch.object(safetensors_header, "parse_header", wraps=safetensors_header.parse_header) as parse:
        assert ckpt_avg.check(paths).compatible
    assert parse.call_count == 1


def test_different_headers_share_no_table(tmp_path: Path) -> None:
    plain, marked, longer = (tmp_path / f"{name}.safetensors" for name in ("plain", "marked", "longer"))
    save_file(weights(1), plain, metadata={"format": "pt"})
    save_file(weights(1), marked, metadata={"format": "pt", "ckpt_avg.method": "mean"})
    save_file({**weights(1), "module.b": torch.ones(6)}, longer, metadata={"format": "pt"})
    with open_checkpoint(plain) as a, open_checkpoint(marked) as b, open_checkpoint(longer) as c:
        assert not a.spec.averaged
        assert b.spec.averaged
        assert "ckpt_avg.method" not in a.spec.metadata
        assert not compare([a.spec, c.spec]).compatible
    save_file({"enc.a": torch.ones(2), "enc.b": torch.ones(2)}, plain)
    with open_checkpoint(plain) as a, open_checkpoint(plain, strip_prefix="enc") as b:
        assert list(a.spec.tensors) == ["enc.a", "enc.b"]
        assert list(b.spec.tensors) == ["a", "b"]


@pytest.mark.parametrize("change", [-1, 1])
def test_the_same_header_in_a_file_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    whole, damaged = tmp_path / "whole.safetensors", tmp_path / "damaged.safetensors"
    save_file(weights(1), whole)
    content = whole.read_bytes()
    damaged.write_bytes(content[:change] if change < 0 else content + b"\0")
    with open_checkpoint(whole), pytest.raises(CheckpointFormatError, match="damaged"):
        open_checkpoint(damaged)


def test_a_damaged_file_is_refused_each_time_with_its_own_name(tmp_path: Path) -> None:
    save_file(weights(1), tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes().replace(b"[3,2]", b"[3,3]")
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointFormatError, match=f"/{name}: tensor"):
            open_checkpoint(tmp_path / name)


def test_tables_are_freed_with_their_checkpoints(tmp_path: Path) -> None:
    save_file(weights(1), tmp_path / "a.safetensors")
    folder = write(tmp_path / "sharded", {"a": torch.ones(2)}, {"b": torch.ones(3)}).parent
    for path in (tmp_path / "a.safetensors", folder):
        with open_checkpoint(path) as checkpoint:
            table = weakref.ref(checkpoint.spec.tensors)
            assert table() is not None
        del checkpoint
        gc.collect()
        assert table() is None


def test_sharded_checkpoints_share_a_table(tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in (10, 20)]
    for folder, value in zip(folders, (1.0, 4.0), strict=True):
        write(folder, {"a": torch.full((2,), value)}, {"b": torch.full((3,), -value)})
    with open_checkpoint(folders[0]) as first, open_checkpoint(folders[1]) as second:
        assert first.spec.tensors is second.spec.tensors
        assert {tensor.file for tensor in first.spec.tensors.values()} == {0, 1}
    ckpt_avg.average(folders, tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), {"a": torch.full((2,), 2.5), "b": torch.full((3,), -2.5)})


def test_shards_that_swapped_their_files_do_not_share(tmp_path: Path) -> None:
    first, second = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    write(first, {"a": torch.ones(2)}, {"b": torch.ones(3)})
    write(second, {"b": torch.full((3,), 5.0)}, {"a": torch.full((2,), 3.0)})
    ckpt_avg.average([first, second], tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), {"a": torch.full((2,), 2.0), "b": torch.full((3,), 3.0)})


def test_a_wrong_index_is_refused_while_a_right_one_is_open(tmp_path: Path) -> None:
    honest, lying = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    for folder in (honest, lying):
        index = write(folder, {"a": torch.ones(2)}, {"b": torch.ones(3)})
    index.write_text(index.read_text().replace('"b"', '"c"'))
    with open_checkpoint(honest), pytest.raises(CheckpointFormatError, match="checkpoint-2"):
        open_checkpoint(lying)
