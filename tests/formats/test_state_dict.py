"""Which part of a torch file is the state dict, and how a user is asked to choose."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import formats.reading
import pytest
from formats.reading import assert_same, read
from layouts import save, state

from ckpt_avg.checkpoint.spec import DTYPES
from ckpt_avg.errors import CheckpointFormatError, NoWeightsError
from ckpt_avg.formats.pickles.stand_ins import Foreign, PlainDict, StorageRef, StoredTensor, UnreadableTensor
from ckpt_avg.formats.reading import Reading
from ckpt_avg.formats.state_dict import find_state_dict
from ckpt_avg.formats.torch_file import plain_values
from ckpt_avg.formats.trainers.any_script import RAW_KEYS
from ckpt_avg.limits import LIMITS

PATH = Path("run/epoch_3.pt")
F32 = DTYPES["F32"]
W = StoredTensor(StorageRef("0", F32, 2), F32, 0, (2,), (1,))
B = StoredTensor(StorageRef("1", F32, 2), F32, 0, (2,), (1,))
RNG = StoredTensor(StorageRef("2", DTYPES["U8"], 5056), DTYPES["U8"], 0, (5056,), (1,))
SCALAR = StoredTensor(StorageRef("3", F32, 1), F32, 0, (), ())
SPARSE = UnreadableTensor("a sparse tensor", "Save tensor.to_dense()")


class Module(Foreign):
    """Stands for a pickled module, as the reader makes it."""

    __slots__ = ()
    module, qualname = "models", "Net"


def refusal(root: object, key: str | None = None, *, kind: type[CheckpointFormatError] = CheckpointFormatError) -> str:
    with pytest.raises(kind) as caught:
        find_state_dict(root, PATH, Reading(state_key=key))
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert message.startswith("run/epoch_3.pt: ")
    assert message.isprintable()
    return message


@pytest.mark.guarantee("nested-state-dicts")
@pytest.mark.parametrize(
    ("root", "key", "names"),
    [
        ({"w": W}, None, ["w"]),
        (PlainDict([("w", W), ("b", B)]), None, ["w", "b"]),
        *(({key: {"w": W}}, key, ["w"]) for key in ("state_dict", "model", "model_state_dict")),
        *(
            ({"epoch": 1, key: PlainDict([("w", W)]), "optimizer": {"state": {}}}, key, ["w"])
            for key in ("state_dict", "model", "model_state_dict")
        ),
        # a usual key wins over other entries, tensors included
        ({"model": {"w": W}, "ema": {"w": B}}, "model", ["w"]),
        ({"model": {"w": W}, "mean": B}, "model", ["w"]),
        ({"state_dict": {"w": W}, "optimizer": {"state": {0: {"exp_avg": B}}}}, "state_dict", ["w"]),
        # but only where it holds tensors
        ({"model": "resnet50", "net": {"w": W}}, "net", ["w"]),
        ({"model": {}, "net": {"w": W}}, "net", ["w"]),
        ({"state_dict": {"epoch": 3}, "model": {"w": W}}, "model", ["w"]),
        # the only one, wherever it is
        ({"a": {"b": {"c": {"w": W}}}}, "a.b.c", ["w"]),
        ({"net": {"w": W}, "optimizer": {"state": {0: {"exp_avg": B}}}}, "net", ["w"]),
        (
            {"weights_of_it": {"w": W}, "optimizer": {"exp_avg": {"w": B}, "exp_avg_sq": {"w": B}}},
            "weights_of_it",
            ["w"],
        ),
        # training state next to tensors
        ({"w": W, "optimizer": {"state": {0: {"exp_avg": B}}, "exp_avg": {"w": B}}, "rng_state": RNG}, None, ["w"]),
        (
            {"w": W, "opt": {"state": {"w": {"exp_avg": B}}, "param_groups": []}, "train_state": {"step": B}},
            None,
            ["w"],
        ),
        ({"w": W, "cuda_rng_state": [RNG], "random_states_0": {"torch": RNG}, "gradScaler": {"scale": B}}, None, ["w"]),
        ({"w": W, "rng": RNG, "metrics": {"loss": SCALAR}}, None, ["w"]),
        # numbers are not weights, unless there is nothing else
        ({"encoder": {"w": W}, "log": {"loss": SCALAR}}, "encoder", ["w"]),
        ({"step": SCALAR, "net": {"w": W}}, "net", ["w"]),
        ({"x": {"a": SCALAR}}, "x", ["a"]),
        # items of a list
        ([{"w": W}, {"state": {0: {"exp_avg": B}}, "param_groups": []}, 3], "0", ["w"]),
        # whole words only
        *(({key: {"w": W}}, key, ["w"]) for key in ("upsampler", "optimus", "rescaler", "randomized_net", "prng_free")),
        ({"upsampler.w": W, "optimus.w": B, "random": W}, None, ["upsampler.w", "optimus.w", "random"]),
        ({"w": W, "rng_state": B}, None, ["w", "rng_state"]),
        # names like the usual keys may be those of tensors
        ({"model": W, "state_dict": B}, None, ["model", "state_dict"]),
    ],
)
def test_the_state_dict_is_found_without_a_key(root: object, key: str | None, names: list[str]) -> None:
    found = find_state_dict(root, PATH, Reading())
    assert found.key == key
    assert list(found.tensors) == names
    only = f"the weights are under {key!r}, the only dict of named tensors"
    assert (only in found.notes) == (key is not None and key not in RAW_KEYS)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model", "w1"),
        ("model.ema", "w2"),
        ("ema.module", "w3"),
        ("ema", "w4"),
        ("a.b.c", "w5"),
        ("a.b", "w6"),
        ("a..b", "w7"),
    ],
)
def test_a_key_names_one_dict(key: str, expected: str) -> None:
    """Dots part the levels; a key that itself holds dots goes before levels, the longest first."""
    root = {
        "model": {"w1": W},
        "model.ema": {"w2": W},
        "ema.module": {"w3": W},
        "ema": {"w4": W},
        "a": {"b": {"c": {"w5": W}}},
        "a.b": {"w6": W},
        "a..b": {"w7": W},
    }
    if key == "a.b.c":
        root.pop("a.b")
    found = find_state_dict(root, PATH, Reading(state_key=key))
    assert (found.key, list(found.tensors)) == (key, [expected])


def test_a_key_overrules_the_usual_choice() -> None:
    root = {"model": {"w": W}, "ema": {"w": B, "decay": 0.9}}
    found = find_state_dict(root, PATH, Reading(state_key="ema"))
    assert found.tensors == {"w": B}
    assert found.others == ("decay",)


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("x", "Choose one with --state-key."),
        *((key, "Did you mean 'model'?") for key in ("model.x", "model.w.x", ".model")),
        ("epoch.x", "Did you mean 'epoch'?"),
    ],
)
def test_a_key_that_names_nothing(key: str, advice: str) -> None:
    message = refusal({"model": {"w": W}, "epoch": 3}, key)
    assert f"the key {key!r}, got a dict with the keys 'model', 'epoch'. {advice}" in message


def test_an_empty_key_names_the_file_itself() -> None:
    assert "Choose one part with --state-key model." in refusal({"model": {"w": W}}, "")


@pytest.mark.parametrize(
    ("value", "what"), [(3, "int"), (W, "StoredTensor"), ([W], "list"), (None, "NoneType"), ("x", "str")]
)
def test_a_key_that_names_no_state_dict(value: object, what: str) -> None:
    message = refusal({"model": {"w": W}, "part": value}, "part")
    assert "key 'part': expected a state dict, got" in message
    assert ("tensor" if what == "StoredTensor" else what) in message


@pytest.mark.parametrize("key", ["ema", "params_ema", "my_ema", "netG-ema", "modelEma", "extra_state.ema", "model_avg"])
def test_ema_weights_alone_are_known_as_such(key: str) -> None:
    """In a file without a known layout: raw weights are not there to compare with."""
    first, _, second = key.partition(".")
    found = find_state_dict({first: {second: {"w": W}} if second else {"w": W}, "epoch": 1}, PATH, Reading())
    assert (found.key, found.ema, found.notes) == (key, True, (f"there are only EMA weights, under '{key}'",))


@pytest.mark.parametrize(
    ("nets", "listed"),
    [
        ({"g": {"g.w": W}, "d": {"d.w": W}, "g_ema": {"g.w": B}}, "'g', 'd', 'g_ema'"),
        ({"netD": {"d.w": W}, "params_ema": {"g.w": B}}, "'netD', 'params_ema'"),
    ],
)
def test_an_ema_of_one_of_several_networks_is_not_the_default(nets: dict[str, Any], listed: str) -> None:
    """With --ema it is clear which network is meant."""
    first, *_, ema = nets
    message = refusal(nets)
    assert f"got several: {listed}. Choose one with --state-key, for example --state-key {first}." in message
    found = find_state_dict(nets, PATH, Reading(ema=True))
    assert (found.key, found.ema) == (ema, True)
    assert found.notes[0] == f"read the EMA weights, under '{ema}'"


@pytest.mark.parametrize("prefix", ["", "module."])
def test_raw_weights_under_any_key_are_preferred_to_their_ema(prefix: str) -> None:
    found = find_state_dict({"g": {"w": W}, "g_ema": {f"{prefix}w": B}}, PATH, Reading())
    assert (found.key, found.ema) == ("g", False)
    assert found.notes == ("read the raw weights under 'g'; with --ema, the EMA weights under 'g_ema'",)


@pytest.mark.parametrize("outside", ["", "engine."])
def test_averages_of_lit_ema_take_the_names_of_the_weights(outside: str) -> None:
    """Their names have no dots, and what is not averaged stays as it is."""
    weights = {"model.diffusion_model.in.0.w": W, "model.diffusion_model.out.w": W, "first_stage.w": W}
    averages = {"model_ema.diffusion_modelin0w": B, "model_ema.diffusion_modeloutw": B}
    counters = {"model_ema.decay": B, "model_ema.num_updates": B}
    state = {outside + name: tensor for name, tensor in {**weights, **averages, **counters}.items()}
    raw = find_state_dict({"state_dict": state, "epoch": 1}, PATH, Reading())
    assert (raw.tensors, raw.ema) == (state, False)
    assert raw.notes == ("EMA weights are under 'state_dict' as well, as model_ema.* (--ema reads them)",)
    found = find_state_dict({"state_dict": state, "epoch": 1}, PATH, Reading(ema=True))
    assert found.ema
    assert found.tensors == {outside + name: B if name.startswith("model.") else W for name in weights}
    with pytest.raises(CheckpointFormatError, match="expected EMA weights"):
        find_state_dict({"state_dict": {**state, f"{outside}model_ema.other": B}}, PATH, Reading(ema=True))


@pytest.mark.parametrize("key", [None, "model"])
def test_parts_of_a_model_under_a_usual_key_are_one_model(key: str | None) -> None:
    """Choosing one of them would leave out the others."""
    root = {
        "model": {"vision": {"w": W}, "llm": {"layers": {"w": B}, "head": {"w": W}}, "optimizer": {"w": B}},
        "epoch": 1,
    }
    found = find_state_dict(root, PATH, Reading(state_key=key))
    assert (found.key, found.tensors) == ("model", {"vision.w": W, "llm.layers.w": B, "llm.head.w": W})
    note = "the parts 'vision', 'llm' are read as one model, with their keys in front of the names"
    assert (found.notes, found.others) == ((note,), ("optimizer",))


def test_modules_may_be_parts() -> None:
    inner = around(state={"_parameters": {"w": W}, "_buffers": {}, "_modules": {}})
    found = find_state_dict({"model": {"a": inner, "b": {"w": B}, "scale": {"x": SCALAR}}}, PATH, Reading())
    assert found.tensors == {"a.w": W, "b.w": B, "scale.x": SCALAR}
    broken = around(state={"_parameters": {3: W}, "_buffers": {}, "_modules": {}})
    assert "got several: 'model.a', 'model.b'" in refusal({"model": {"a": broken, "b": {"w": B}}})


def test_one_part_under_two_keys_has_both_names() -> None:
    shared = {"w": W}
    found = find_state_dict({"model": {"encoder": shared, "decoder": shared, "head": {"b": B}}}, PATH, Reading())
    assert list(found.tensors) == ["encoder.w", "decoder.w", "head.b"]


def test_parts_whose_names_would_be_equal_are_listed() -> None:
    message = refusal({"model": {"a": {"b": {"w": W}}, "a.b": {"w": B}}})
    assert "expected one state dict, got several: 'model.a.b', 'model.a.b'" in message


@pytest.mark.usefixtures("in_time")
def test_parts_that_expand_without_end_are_refused() -> None:
    part: dict[str, Any] = {"w": W, "v": W}
    for _ in range(3):
        part = {str(number): part for number in range(100)}
    part["0"]["again"] = part
    assert "expected" in refusal({"model": {"x": part, "y": {"w": W}}})


@pytest.mark.parametrize(
    ("root", "raw", "ema"),
    [
        ({"w": W, "ema": {"w": B}}, None, "ema"),
        ({"w": W, "optimizer": {"w": B}, "ema": {"shadow": {"w": B}, "decay": 0.9}}, None, "ema.shadow"),
        ({"state_dict": {"w": W}, "ema": {"params": {"w": B}, "decay": 0.9}}, "state_dict", "ema.params"),
        ({"model": {"w": W}, "ema": {"state": {"model": {"w": B}}}}, "model", "ema.state.model"),
        ({"cfg": {}, "state_dicts": {"model": {"w": W}, "ema_model": {"w": B}, "optimizer": {"w": B}}},
         "state_dicts.model", "state_dicts.ema_model"),
        ({"model": {"ema": {"w": B}, "raw": {"w": W}}}, "model.raw", "model.ema"),
        ({"state_dict": {"w": W}, "pytorch-lightning_version": "2.0", "ema": {"params": {"w": B}}}, "state_dict",
         "ema.params"),
    ],
)  # fmt: skip
def test_an_ema_is_found_next_to_root_tensors_and_one_level_down(
    root: dict[str, Any], raw: str | None, ema: str
) -> None:
    found = find_state_dict(root, PATH, Reading())
    assert (found.key, found.ema, found.tensors) == (raw, False, {"w": W})
    assert any(note.endswith(f"with --ema, the EMA weights under '{ema}'") for note in found.notes)
    found = find_state_dict(root, PATH, Reading(ema=True))
    assert (found.key, found.ema, found.tensors) == (ema, True, {"w": B})


def test_an_ema_without_names_is_refused_as_such() -> None:
    root = {"model": {"w": W}, "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": [B]}}
    assert find_state_dict(root, PATH, Reading()).key == "model"
    with pytest.raises(CheckpointFormatError, match="the EMA under 'ema' has no names, only the order of a model's"):
        find_state_dict(root, PATH, Reading(ema=True))


def test_buffers_of_a_loss_are_not_offered() -> None:
    message = refusal({"student": {"w": W}, "teacher": {"w": W}, "dino_loss": {"center": B}, "criterion": {"w": B}})
    assert "got several: 'student', 'teacher'. Choose" in message


def test_other_weights_in_the_file_are_listed() -> None:
    found = find_state_dict({"model": {"w": W}, "best_state": {"model": {"w": B}}}, PATH, Reading())
    assert found.tensors == {"w": W}
    assert found.notes == ("there are other state dicts: 'best_state' (choose one with --state-key)",)


def test_numbered_ema_modules_keep_their_numbers() -> None:
    """As imagen-pytorch saves the EMAs of its networks."""
    ema = {"0.initted": True, "0.ema_model.w": B, "1.initted": True, "1.ema_model.w": W}
    found = find_state_dict({"model": {"unets.0.w": W}, "ema": ema}, PATH, Reading(ema=True))
    assert (found.key, found.tensors) == ("ema.ema_model", {"0.w": B, "1.w": W})


ONLINE, EMA = {"online_model.w": W, "online_model.b": W}, {"ema_model.w": B, "ema_model.b": B}
MODULE = {"initted": SCALAR, "step": SCALAR}


@pytest.mark.parametrize(
    ("root", "raw", "ema"),
    [
        ({**MODULE, **ONLINE, **EMA}, "online_model", "ema_model"),
        ({**MODULE, **EMA}, "ema_model", "ema_model"),
        ({"ema": {**MODULE, **ONLINE, **EMA}, "opt": {}}, "ema.online_model", "ema.ema_model"),
        ({"ema": {**MODULE, **EMA}}, "ema.ema_model", "ema.ema_model"),
        ({"ema_model_state_dict": {**MODULE, **EMA}},) + ("ema_model_state_dict.ema_model",) * 2,
        ({"model": {"w": W, "b": W}, "ema": {**MODULE, **ONLINE, **EMA}, "step": 7}, "model", "ema.ema_model"),
        ({"model": {"w": W, "b": W}, "ema": {**MODULE, **EMA}, "opt": {"exp_avg": {"w": B}}}, "model", "ema.ema_model"),
    ],
)
def test_an_ema_module_has_two_models(root: dict[str, Any], raw: str, ema: str) -> None:
    """As ema-pytorch saves it: averaged as one model it would hold two, with a step that is a weight."""
    for options, key in ((Reading(), raw), (Reading(ema=True), ema)):
        found = find_state_dict(copy.deepcopy(root), PATH, options)
        assert (found.key, list(found.tensors), found.ema) == (key, ["w", "b"], key == ema)
        assert all(tensor == (B if key == ema else W) for tensor in found.tensors.values())
        assert (found.trainer is None) == ("ema_model_state_dict" in root)
        assert found.trainer is None or found.trainer.name == "ema-pytorch"
        assert not any("other state dicts: 'ema'" in note for note in found.notes)


@pytest.mark.guarantee("nested-state-dicts")
def test_nested_candidates_are_listed() -> None:
    message = refusal({"generator": {"w": W}, "nets": {"critic": {"w": W}}, "epoch": 3})
    assert "expected one state dict, got several: 'generator', 'nets.critic'." in message
    assert "Choose one with --state-key, for example --state-key generator." in message


@pytest.mark.guarantee("nested-state-dicts")
@pytest.mark.parametrize(
    "keys", [("state_dict", "model"), ("net_g", "net_d"), ("encoder", "decoder"), ("generator", "discriminator")]
)
def test_several_state_dicts_are_listed_and_each_can_be_chosen(tmp_path: Path, keys: tuple[str, str]) -> None:
    """Not one of them at random, and not both as one, as for OpenNMT-py's model and generator."""
    path = save({keys[0]: state(1), keys[1]: state(2), "step": 3}, tmp_path / "two.pt")
    message = formats.reading.refusal(path)
    assert f"got several: '{keys[0]}', '{keys[1]}'" in message
    assert "--state-key" in message
    for number, key in enumerate(keys):
        assert_same(read(path, state_key=key), state(number + 1))


def test_many_candidates_are_cut() -> None:
    message = refusal({f"net{number}": {"w": W} for number in range(50)})
    assert "'net19', … and 30 more" in message
    assert "net20" not in message


def test_a_state_dict_with_a_dict_of_tensors_inside_is_ambiguous() -> None:
    message = refusal({"model": {"w": W, "ema": {"w": B}}})
    assert "key 'model': expected names and tensors, got another dict of tensors under 'ema'" in message
    assert "--state-key model.ema" in message


@pytest.mark.parametrize("key", ["model", None])
def test_a_tensor_without_plain_elements_is_named(key: str | None) -> None:
    message = refusal({"model": {"w": W, "layer.x": SPARSE}} if key else {"w": W, "layer.x": SPARSE})
    assert "tensor 'layer.x': expected a plain tensor, got a sparse tensor" in message
    assert "tensor.to_dense()" in message


@pytest.mark.parametrize("key", [None, "model"])
def test_a_pickled_module(key: str | None) -> None:
    message = refusal(Module() if key is None else {"model": Module()}, key)
    assert "expected a state dict, got a pickled object of class 'models.Net'" in message
    assert "save model.state_dict() instead" in message


@pytest.mark.parametrize(
    ("root", "what"),
    [
        ({}, "an empty dict"),
        ({"epoch": 3}, "a dict with the keys 'epoch', which contains no named tensors"),
        ({"optimizer": {"exp_avg": {"w": W}}, "epoch": 3}, "a dict with the keys 'optimizer', 'epoch'"),
        ({"state": {"w": {"exp_avg": W}}, "param_groups": [{"lr": 0.1}]}, "the state of an optimizer. Save model"),
        ({"python": (3, (1, 2)), "numpy": "MT19937", "cpu": RNG, "cuda": [RNG]}, "the states of random generators"),
        (W, "a single tensor without a name"),
        (SPARSE, "a single tensor without a name"),
        ([W], "type list"),
        (3, "type int"),
        (None, "type NoneType"),
        ({0: W, 1: B}, "a dict with the keys 0, 1"),
        ({f"k{number}": 0 for number in range(30)}, "'k19', … and 10 more"),
    ],
)
def test_files_without_a_state_dict_are_refused(root: object, what: str) -> None:
    """With an error of its own, so that a run folder can skip them if other files have weights."""
    message = refusal(root, kind=NoWeightsError)
    assert "expected a state dict, got" in message
    assert what in message


def test_tensors_under_numbers_are_refused() -> None:
    assert "expected tensor names, got the key 0" in refusal({"w": W, 0: B})


def test_entries_without_tensors_are_listed_by_name() -> None:
    """Entries without a tensor are listed, whatever their keys."""
    found = find_state_dict({"w": W, "_extra_state": None, "n": 3, 7: "x", "d": {}}, PATH, Reading())
    assert list(found.tensors) == ["w"]
    assert found.others == ("_extra_state", "n", "7", "d")


def test_the_depth_of_the_search_is_bounded() -> None:
    def nested(depth: int) -> dict[str, Any]:
        return {"w": W} if depth == 0 else {"k": nested(depth - 1)}

    key = ".".join("k" * LIMITS.nesting)
    assert find_state_dict(nested(LIMITS.nesting), PATH, Reading()).key == key
    refusal(nested(LIMITS.nesting + 1))
    assert find_state_dict(nested(LIMITS.nesting + 1), PATH, Reading(state_key=f"{key}.k")).key == f"{key}.k"


def test_a_dict_that_holds_itself() -> None:
    root: dict[str, Any] = {"epoch": 1}
    root["self"] = root
    assert "expected a state dict" in refusal(root)


@pytest.mark.parametrize("name", ["\x1b[31m", "a\nb", "x" * 10_000])
def test_names_are_shown_escaped_and_cut(name: str) -> None:
    """Also where a message proposes an option."""
    for root in (
        {name: {"w": W}, "other": {"w": W}},
        {"model": {"w": W, name: {"w": B}}},
        {"w": W, name: SPARSE},
        {name: 3},
    ):
        assert len(refusal(root)) < 1000


def test_plain_values() -> None:
    """Numbers, texts and flags at the top are what the file says of itself; nothing else is."""
    root = {"epoch": 3, "lr": 0.5, "done": True, "name": "x", "best": None, "model": {"w": W}, "l": [1], 4: 5, "w": W}
    assert plain_values(root) == {"epoch": 3, "lr": 0.5, "done": True, "name": "x", "best": None}
    assert plain_values([1]) == {}
    assert plain_values(None) == {}


class Around(Foreign):
    """Stands for an object that is no module, but may hold tensors."""

    __slots__ = ()
    module, qualname = "somewhere", "Thing"


def around(*arguments: object, state: object = None) -> Around:
    made = Around(*arguments)
    assert isinstance(made, Around)
    made.state = state
    return made


HIDING: dict[str, object] = {
    "a list": [W],
    "a tuple": ("x", W),
    "a list in a list": [[3, [W]]],
    "a dict in a list": [{"w": W}],
    "an object around it": around(W),
    "an object with it in its state": around(state={"value": W}),
    "an object in an object": around([around(state=(None, {"value": [W]}))]),
    "an unreadable tensor in a list": [SPARSE],
    "a module": around(state={"_parameters": {"w": W}, "_buffers": {}, "_modules": {}}),
}


@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("key", [None, "model"])
def test_tensors_hidden_in_an_entry_are_refused(hiding: str, key: str | None) -> None:
    """Otherwise the average would lack weights."""
    state = {"w": W, "experts": HIDING[hiding]}
    message = refusal(state if key is None else {key: state})
    what = "a sparse tensor" if "unreadable" in hiding else "tensors"
    advice = "Save tensor.to_dense()." if "unreadable" in hiding else "whose values are plain tensors."
    assert f"'experts': expected a plain tensor, got {what} inside a " in message
    assert message.endswith(advice)


@pytest.mark.parametrize(
    ("name", "state"),
    [("opt_state", {"m": W}), ("muon_states", {"m": W}), ("adam", {0: {"exp_avg": W, "exp_avg_sq": W}}),
     ("momentum", {"momentum_buffer": W})],
)  # fmt: skip
def test_the_state_of_an_optimizer_under_other_names_is_no_choice(name: str, state: dict[Any, Any]) -> None:
    """--state-key would average its moments."""
    assert set(find_state_dict({"w": W, name: state}, PATH, Reading()).tensors) == {"w"}


@pytest.mark.parametrize("name", ["optimizer.state.w.exp_avg", "chained_0.optimizer.state.exp_avg.w"])
def test_tensors_of_an_optimizer_under_flat_names_are_skipped(name: str) -> None:
    found = find_state_dict({"w": W, name: W, "optimizer.rnn.weight": W}, PATH, Reading())
    assert (set(found.tensors), found.others) == ({"w", "optimizer.rnn.weight"}, (name,))


@pytest.mark.parametrize(
    "name", ["_extra_state", "layer.1._extra_state", "optimizer", "optimizer_state_dict", "optimizers", "lr_scheduler",
             "rng_state"],
)  # fmt: skip
@pytest.mark.parametrize("hiding", HIDING)
def test_training_state_may_hold_tensors(name: str, hiding: str) -> None:
    """Moments, states of generators and extra states of modules are not weights."""
    found = find_state_dict({"model": {"w": W, name: HIDING[hiding]}}, PATH, Reading())
    assert (list(found.tensors), found.others) == (["w"], (name,))


@pytest.mark.parametrize("item", [[1, 2], ("a", None), around("x", state={"n": 3}), around(), [], [[[]]], {"a": [1]}])
def test_entries_that_hide_no_tensors_are_skipped(item: object) -> None:
    found = find_state_dict({"w": W, "config": item}, PATH, Reading())
    assert (list(found.tensors), found.others) == (["w"], ("config",))


@pytest.mark.usefixtures("in_time")
def test_looking_for_hidden_tensors_ends() -> None:
    """An entry inside itself, and one that a few bytes of pickle make endless."""
    itself: list[Any] = []
    itself.append(itself)
    shared: object = around()
    for _ in range(60):
        shared = around(shared, shared, state=[shared, shared])
    state = {f"x{number}": item for number, item in enumerate((itself, shared) * 50)}
    assert list(find_state_dict({"w": W, **state}, PATH, Reading()).tensors) == ["w"]
