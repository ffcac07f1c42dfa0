"""Wrappers' prefixes come off where all names carry them, so that the average loads into the bare model."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from formats.reading import Command, assert_same, averaged, mean, read
from hypothesis import given
from hypothesis import strategies as st
from layouts import net, ordered, save, state
from torch import nn

from ckpt_avg import open_checkpoint
from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.tensor_names import PREFIXES, Names, strip_prefixes

MIDDLE = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Parts that begin like a wrapper, or hold one: taking these for wrappers would rename weights.
PARTS = ("weight", "bias", "0", "module", "modules", "my_orig_mod", "_orig", "fc", "_fsdp_wrapped", "steps")


def strip(names: list[str], prefix: str | None = None, scalars: tuple[str, ...] = ()) -> Names:
    return strip_prefixes(names, scalars, prefix, "here")


def dotted() -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map(".".join)


def names_of_a_model() -> st.SearchStrategy[list[str]]:
    """Names of which one carries no wrapper's prefix, so that all that is put in front comes from the test."""
    return st.lists(dotted(), min_size=1, max_size=6, unique=True).map(lambda names: ["bare", *names])


@given(names_of_a_model(), st.lists(st.sampled_from(PREFIXES), max_size=4))
def test_wrappers_in_any_order_and_number_come_off(names: list[str], wrappers: list[str]) -> None:
    """And nothing else does: one layer too many would rename weights, one too few would not load."""
    front = "".join(wrappers)
    stripped = strip([front + name for name in names])
    assert dict(stripped.renamed) == {front + name: name for name in names}
    assert stripped.prefix == front
    assert stripped.counters == ()
    assert stripped.notes == ((f"{front!r} stripped from every name",) if front else ())


@given(names_of_a_model(), st.sampled_from(["module.", "_orig_mod.", "_forward_module."]))
def test_a_prefix_that_one_name_lacks_stays(names: list[str], prefix: str) -> None:
    """It belongs to the model then: a module that is called ``module``."""
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
def test_wrappers_of_inner_modules_come_out_of_the_middle(names: list[str], data: st.DataObject) -> None:
    """Activation checkpointing and FSDP wrap single layers; others stay as they are."""
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


def test_names_that_would_become_one_stay_apart() -> None:
    """Two tensors are never merged, nor one of them lost."""
    names = ["a._fsdp_wrapped_module.w", "a.w", "b._fsdp_wrapped_module.w"]
    assert list(strip(names).renamed.values()) == names


def test_what_was_taken_out_is_said() -> None:
    stripped = strip(["a._fsdp_wrapped_module.w", "b.w", "c._checkpoint_wrapped_module.w"])
    assert stripped.notes == ("wrapper names removed from the middle of 2 names",)
    assert stripped.prefix == ""


# --- counters of averaging models --------------------------------------------------------------------------


@pytest.mark.parametrize("counter", ["n_averaged", "steps"])
def test_the_counter_of_an_averaging_model_is_set_aside(counter: str) -> None:
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
    """Only beside ``module.*`` is it a counter; anywhere else leaving it out would lose a tensor."""
    stripped = strip(names, scalars=scalars)
    assert len(stripped.renamed) == len(names)
    assert stripped.counters == ()


# --- a prefix that the user names --------------------------------------------------------------------------


@given(names_of_a_model(), st.sampled_from(["model.", "net.encoder.", "x."]), st.booleans())
def test_a_named_prefix_comes_off_where_it_is(names: list[str], prefix: str, dot: bool) -> None:
    """With or without its dot, under wrappers and over them."""
    for front in (prefix, f"module.{prefix}", f"{prefix}_orig_mod.", f"module.{prefix}module."):
        stripped = strip([front + name for name in names], prefix if dot else prefix[:-1])
        assert list(stripped.renamed.values()) == names
        assert stripped.prefix == front


def test_a_named_prefix_that_only_some_carry_comes_off_these_and_is_said() -> None:
    stripped = strip(["model.a", "model.b.w", "head.w"], "model.")
    assert list(stripped.renamed.values()) == ["a", "b.w", "head.w"]
    assert stripped.prefix == ""
    assert stripped.notes == ("'model.' stripped from 2 of 3 names",)


def test_a_named_prefix_is_whole_parts() -> None:
    """``--strip-prefix mod`` must not make ``ule.w`` of ``module.w`` or ``el.w`` of ``model.w``."""
    stripped = strip(["mod.w", "model.w"], "mod")
    assert list(stripped.renamed.values()) == ["w", "model.w"]


def test_a_named_prefix_is_never_a_whole_name() -> None:
    assert "" not in strip(["model.", "model.w"], "model.").renamed.values()


def test_a_named_wrapper_that_came_off_by_itself_is_no_error() -> None:
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
def test_wrappers_are_taken_off_every_name(tmp_path: Path, prefix: str, key: str | None) -> None:
    weights = ordered(state(1), prefix)
    path = save(weights if key is None else {key: weights}, tmp_path / "wrapped.pt")
    assert_same(read(path), state(1))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.prefix == prefix
        assert any(prefix in note for note in checkpoint.spec.notes)


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
