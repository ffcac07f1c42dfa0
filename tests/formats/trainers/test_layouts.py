"""Run folders as trainers leave them: the right weights, in the right order; what is none is refused or left out."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import torch
from layouts import ONE_FILE, WITH_EMA, Run, Saved, adam, net, ordered, save, state, throwaway, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ckpt_avg import CheckpointFormatError, CkptAvgError, open_checkpoint
from ckpt_avg.checkpoint.tensor_reads import stream

Command = Callable[..., tuple[int, str, str]]
State = Mapping[str, torch.Tensor]


def read(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Every tensor that the reader finds, copied."""
    found = {}
    with open_checkpoint(path, **options) as checkpoint:
        for name, tensor in checkpoint.spec.tensors.items():
            parts = [part.clone() for _, part in stream(checkpoint, tensor, 5)]
            flat = torch.cat(parts) if parts else torch.empty(0)
            found[name] = flat.view(tensor.shape)
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: State, expected: State) -> None:
    """The same names, dtypes, shapes and bits."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def mean(states: list[State]) -> dict[str, torch.Tensor]:
    """The mean in float64, rounded once; counters are the last one's."""
    result = {}
    for name, last in states[-1].items():
        if last.is_floating_point():
            total = torch.zeros(last.shape, dtype=torch.float64)
            for each in states:
                total += each[name].double()
            result[name] = (total / len(states)).to(last.dtype)
        else:
            result[name] = last
    return result


def refusal(path: Path, **options: Any) -> str:
    """The message of a refusal with exit code 3."""
    with pytest.raises(CheckpointFormatError) as caught:
        open_checkpoint(path, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert message.isprintable()
    assert len(message) < 2000
    return message


def check_saved(saved: Saved, kind: str | None, **options: Any) -> None:
    """A checkpoint is recognised, and its weights and record are the true ones."""
    assert_same(read(saved.path, **options), saved.raw)
    with open_checkpoint(saved.path, **options) as checkpoint:
        spec = checkpoint.spec
        assert spec.kind == kind
        assert spec.state_key == saved.state_key
        assert spec.record.step == saved.step
        assert spec.record.epoch == saved.epoch
        assert not spec.averaged


# --- one file per checkpoint -------------------------------------------------------------------------------


@pytest.fixture(params=ONE_FILE)
def trainer(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """A run of each trainer."""
    folder = tmp_path / "run"
    folder.mkdir()
    return ONE_FILE[request.param](folder)


def test_the_raw_weights_of_each_file_are_found(trainer: Run) -> None:
    """Another trainer's layout mistaken for this one, or EMA weights or moments for weights."""
    for saved in trainer.checkpoints:
        assert_same(read(saved.path), saved.raw)


def test_kind_key_step_and_epoch(trainer: Run) -> None:
    """A key of another trainer, or a step that is not the one in the file's own name."""
    for saved in trainer.checkpoints:
        with open_checkpoint(saved.path) as checkpoint:
            spec = checkpoint.spec
        assert spec.kind == trainer.kind
        assert (spec.record.step, spec.record.epoch) == (saved.step, saved.epoch), saved.path.name
        assert spec.state_key == saved.state_key
        assert bool(spec.averaged) == (trainer.kind == "Ultralytics")  # which saves nothing but its EMA


def test_learning_rate_and_metrics(trainer: Run) -> None:
    """--at-lr-minima and --best have nothing, or something else, to go by."""
    for saved in trainer.checkpoints:
        with open_checkpoint(saved.path) as checkpoint:
            record = checkpoint.spec.record
        assert record.learning_rate == saved.learning_rate
        assert {name: record.metrics.get(name) for name in saved.metrics} == dict(saved.metrics)


@pytest.mark.parametrize(
    "name", ["train_loss", "validation_loss", "val_accuracy", "mean_iou", "test_acc", "criterion_loss", "perplexity"]
)
def test_a_metric_at_the_top_of_a_file(tmp_path: Path, name: str) -> None:
    """Part of a word taken for the whole: ``n_`` in ``validation_loss``, ``iter`` in ``criterion``."""
    path = save({"model_state_dict": state(1), "epoch": 3, name: 0.25, "lr": 0.1}, tmp_path / "a.pt")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.record.metrics == {name: 0.25}


def folder_json(in_process: Command, folder: Path, *options: object) -> dict[str, Any]:
    code, output, errors = in_process("inspect", folder, "--json", *options)
    assert code == 0, errors
    shown: dict[str, Any] = json.loads(output)
    return shown


def names(entries: list[dict[str, Any]]) -> list[str]:
    return [Path(entry["path"]).name for entry in entries]


def test_a_run_folder_is_in_the_order_of_training(trainer: Run, in_process: Command) -> None:
    """A copy, a link or an earlier average counts as a checkpoint, or 10 comes before 9."""
    shown = folder_json(in_process, trainer.folder)
    assert names(shown["checkpoints"]) == [saved.path.name for saved in trainer.checkpoints]
    assert {Path(entry["path"]).name for entry in shown["skipped"]} >= trainer.others
    assert all(entry["reason"] for entry in shown["skipped"])


def test_a_run_folder_tells_kind_step_epoch_and_metrics(trainer: Run, in_process: Command) -> None:
    """What lies beside a bare state dict (a YAML file, a reporter, its name) goes unread."""
    shown = folder_json(in_process, trainer.folder)
    for entry, saved in zip(shown["checkpoints"], trainer.checkpoints, strict=True):
        assert entry["kind"] == trainer.kind
        assert (entry["step"], entry["epoch"]) == (saved.step, saved.epoch)
        assert {name: entry["metrics"].get(name) for name in saved.metrics} == pytest.approx(dict(saved.metrics))


def test_the_average_of_a_run_folder(trainer: Run, in_process: Command, tmp_path: Path) -> None:
    """A copy counted twice, or a tensor of another state dict, changes the mean."""
    code, _, errors = in_process("average", trainer.folder, "-o", tmp_path / "out.safetensors", "--bn", "keep")
    assert code == 0, errors
    assert_same(load_file(tmp_path / "out.safetensors"), mean([saved.raw for saved in trainer.checkpoints]))


def test_the_last_two_of_a_run_folder(trainer: Run, in_process: Command, tmp_path: Path) -> None:
    """--last counts files that are no checkpoints."""
    out = tmp_path / "out.safetensors"
    code, _, errors = in_process("average", trainer.folder, "-o", out, "--bn", "keep", "--last", 2)
    assert code == 0, errors
    assert_same(load_file(out), mean([saved.raw for saved in trainer.checkpoints[-2:]]))


@pytest.mark.parametrize("name", ONE_FILE)
def test_the_stream_of_torch_before_1_6(tmp_path: Path, name: str) -> None:
    """The same contents in the older format give the same weights and the same record."""
    run = ONE_FILE[name](tmp_path, stream=True)
    for saved in run.checkpoints:
        assert saved.path.read_bytes()[:2] == b"\x80\x02"
        assert_same(read(saved.path), saved.raw)
        with open_checkpoint(saved.path) as checkpoint:
            spec = checkpoint.spec
        assert (spec.kind, spec.state_key) == (run.kind, saved.state_key)
        assert (spec.record.step, spec.record.epoch) == (saved.step, saved.epoch)


@pytest.mark.parametrize("name", WITH_EMA)
def test_ema_takes_the_running_average(tmp_path: Path, name: str) -> None:
    """--ema gives the raw weights, or the other way round: two trainers swap them when they save."""
    for saved in WITH_EMA[name](tmp_path).checkpoints:
        assert saved.ema is not None
        assert_same(read(saved.path, ema=True), saved.ema)
        with open_checkpoint(saved.path) as raw, open_checkpoint(saved.path, ema=True) as ema:
            assert raw.spec.state_key != ema.spec.state_key
            assert any("--ema" in note for note in raw.spec.notes), raw.spec.notes
            assert any("EMA" in note for note in ema.spec.notes), ema.spec.notes


@pytest.mark.parametrize("name", WITH_EMA)
def test_the_average_of_ema_weights(tmp_path: Path, in_process: Command, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    made = WITH_EMA[name](run)
    out = tmp_path / "out.safetensors"
    code, _, errors = in_process("average", run, "-o", out, "--bn", "keep", "--ema")
    assert code == 0, errors
    assert_same(load_file(out), mean([saved.ema or {} for saved in made.checkpoints]))


@pytest.mark.parametrize("name", ["ESPnet2", "WeNet", "OpenNMT-py", "detectron2", "Composer", "tutorial"])
def test_ema_where_there_is_none_is_refused(tmp_path: Path, name: str) -> None:
    """--ema silently gives raw weights."""
    path = ONE_FILE[name](tmp_path).checkpoints[0].path
    assert "--ema" in refusal(path, ema=True)


# --- one trainer's own --------------------------------------------------------------------------------------


def best(in_process: Command, folder: Path, out: Path, *options: object) -> State:
    code, _, errors = in_process("average", folder, "-o", out, "--bn", "keep", *options)
    assert code == 0, errors
    return load_file(out)


def test_fairseq_best_by_validation_loss(tmp_path: Path, in_process: Command) -> None:
    (tmp_path / "run").mkdir()
    run = layouts.fairseq(tmp_path / "run")
    found = best(
        in_process, run.folder, tmp_path / "o.safetensors", "--best", 2, "--metric", "val_loss", "--mode", "min"
    )
    assert_same(found, mean([run.checkpoints[2].raw, run.checkpoints[3].raw]))


def test_timm_best_by_the_table_beside(tmp_path: Path, in_process: Command) -> None:
    """summary.csv has the metrics of each epoch, the files only the one that timm itself goes by."""
    (tmp_path / "run").mkdir()
    run = layouts.timm(tmp_path / "run")
    out = tmp_path / "o.safetensors"
    found = best(in_process, run.folder, out, "--best", 2, "--metric", "eval_top1", "--mode", "max")
    assert_same(found, mean([run.checkpoints[1].raw, run.checkpoints[2].raw]))


def test_wenet_best_by_the_loss_in_the_yaml_beside(tmp_path: Path, in_process: Command) -> None:
    """The metric is in a file of its own; the configuration in it has other numbers of the same names."""
    (tmp_path / "run").mkdir()
    run = layouts.wenet(tmp_path / "run")
    out = tmp_path / "o.safetensors"
    found = best(in_process, run.folder, out, "--best", 2, "--metric", "cv_loss", "--mode", "min")
    assert_same(found, mean([run.checkpoints[1].raw, run.checkpoints[2].raw]))


def test_wenet_metrics_are_losses_and_no_settings(tmp_path: Path) -> None:
    """``accum_grad`` and other settings in the same file offered as metrics."""
    saved = layouts.wenet(tmp_path).checkpoints[0]
    with open_checkpoint(saved.path) as checkpoint:
        assert set(checkpoint.spec.record.metrics) == {"cv_loss", "loss", "acc", "loss_ctc"}


def test_opennmt_with_safetensors(tmp_path: Path, in_process: Command) -> None:
    """The weights lie apart, and the .pt file of the same name holds everything else."""
    for step in (5000, 10000, 100000):
        rest = {"vocab": {"src": ["a"]}, "opt": None, "optim": {"training_step": step + 1, "optimizer": adam()}}
        save(rest, tmp_path / f"model_step_{step}.pt")
        save_file(state(step // 5000), tmp_path / f"model_step_{step}.safetensors")
    shown = folder_json(in_process, tmp_path)
    expected = [f"model_step_{step}.safetensors" for step in (5000, 10000, 100000)]
    assert names(shown["checkpoints"]) == expected
    assert [entry["step"] for entry in shown["checkpoints"]] == [5000, 10000, 100000]


def test_an_export_among_the_checkpoints_does_not_undo_their_order(tmp_path: Path, in_process: Command) -> None:
    """A file without a step, as icefall's export.py leaves one: --last then takes it, or others than the last."""
    run = layouts.icefall(tmp_path)
    save({"model": state(98)}, tmp_path / "pretrained.pt")
    layouts.torchscript(tmp_path / "jit_script.pt")
    shown = folder_json(in_process, tmp_path)
    trained = [saved.path.name for saved in run.checkpoints]
    assert [name for name in names(shown["checkpoints"]) if name in trained] == trained
    assert names(shown["checkpoints"])[-1] == trained[-1]


def test_wenet_yaml_runs_nothing(tmp_path: Path, in_process: Command) -> None:
    """A tag that names a function, as PyYAML's unsafe loader would call it."""
    (tmp_path / "run").mkdir()
    run = layouts.wenet(tmp_path / "run")
    evil = f"!!python/object/apply:os.system ['touch {tmp_path / 'touched'}']"
    path = run.checkpoints[0].path.with_suffix(".yaml")
    path.write_text(f"cv_loss: {evil}\nevil: {evil}\n" + path.read_text())
    (run.folder / "9.yaml").write_bytes(b"\xff\xfe\0: [\n" + b"[" * 100_000)
    code, _, errors = in_process("inspect", run.folder, "--json")
    assert code == 0, errors
    assert not (tmp_path / "touched").exists()


def test_ultralytics_best_by_fitness(tmp_path: Path, in_process: Command) -> None:
    (tmp_path / "run").mkdir()
    run = layouts.ultralytics(tmp_path / "run")
    out = tmp_path / "o.safetensors"
    found = best(in_process, run.folder, out, "--best", 2, "--metric", "fitness", "--mode", "max")
    assert_same(found, mean([run.checkpoints[1].raw, run.checkpoints[2].raw]))


def test_ultralytics_says_that_the_weights_are_ema(tmp_path: Path) -> None:
    """``model`` is None while it trains: only the EMA module is there, in float16."""
    saved = layouts.ultralytics(tmp_path).checkpoints[0]
    with open_checkpoint(saved.path) as checkpoint, open_checkpoint(saved.path, ema=True) as same:
        assert any("EMA" in note for note in checkpoint.spec.notes)
        assert checkpoint.spec.tensors == same.spec.tensors
        assert ("again.weight", "model.2.1.weight") in [tuple(sorted(group)) for group in checkpoint.spec.tied()]


@pytest.mark.parametrize("stream", [False, True], ids=["zip", "stream"])
def test_ultralytics_after_training(tmp_path: Path, stream: bool) -> None:
    """strip_optimizer moves the module to ``model``, and sets the epoch to -1, which is none."""
    for saved in layouts.ultralytics(tmp_path, stripped=True, stream=stream).checkpoints:
        assert_same(read(saved.path), saved.raw)
        with open_checkpoint(saved.path) as checkpoint:
            assert checkpoint.spec.kind == "Ultralytics"
            assert checkpoint.spec.state_key == "model"
            assert checkpoint.spec.record.epoch != -1


def test_a_pickled_module_has_the_names_of_its_state_dict(tmp_path: Path) -> None:
    """Non-persistent buffers, absent parameters and plain attributes are no part of a state dict."""
    model = layouts.yolo(3)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with throwaway("somewhere.models", Model=type("Model", (nn.Module,), {})) as module:
        model.__class__ = module.Model
        path = save(model, tmp_path / "whole.pt")
    assert_same(read(path), expected)
    assert "transient" not in expected


@pytest.mark.parametrize("by_epoch", [True, False], ids=["by epoch", "by iteration"])
@pytest.mark.parametrize("ema", [False, True], ids=["raw", "EMAHook"])
def test_mmengine(tmp_path: Path, in_process: Command, by_epoch: bool, ema: bool) -> None:
    run = layouts.mmengine(tmp_path, ema=ema, by_epoch=by_epoch)
    for saved in run.checkpoints:
        check_saved(saved, "mmengine")
    shown = folder_json(in_process, run.folder)
    assert names(shown["checkpoints"]) == [saved.path.name for saved in run.checkpoints]


def test_composer_with_its_ema(tmp_path: Path) -> None:
    """Its EMA algorithm saves the average as the model: taken as raw weights, unless it is said."""
    for saved in layouts.composer(tmp_path, ema=True).checkpoints:
        assert saved.ema is not None
        assert_same(read(saved.path, ema=True), saved.ema)
        with open_checkpoint(saved.path) as checkpoint:
            said = any("EMA" in note for note in checkpoint.spec.notes)
        assert_same(read(saved.path), saved.ema if said else saved.raw)


def test_a_second_state_dict_named_generator_is_no_part_of_the_model(tmp_path: Path) -> None:
    """A GAN's generator merged like OpenNMT-py's, or one of two networks taken at random."""
    path = save({"generator": state(1), "discriminator": state(2), "epoch": 3}, tmp_path / "gan.pt")
    message = refusal(path)
    assert "generator" in message
    assert "discriminator" in message
    assert "--state-key" in message
    assert_same(read(path, state_key="discriminator"), state(2))


@pytest.mark.guarantee("nested-state-dicts")
@pytest.mark.parametrize("keys", [("model", "state_dict"), ("net_g", "net_d"), ("encoder", "decoder")])
def test_several_state_dicts_are_listed_and_none_is_taken(tmp_path: Path, keys: tuple[str, str]) -> None:
    path = save({keys[0]: state(1), keys[1]: state(2), "step": 3}, tmp_path / "two.pt")
    message = refusal(path)
    assert all(key in message for key in keys)
    assert "--state-key" in message
    for number, key in enumerate(keys):
        assert_same(read(path, state_key=key), state(number + 1))


def test_moments_of_an_optimizer_are_no_candidates(tmp_path: Path) -> None:
    """A file without weights gives its optimizer's tensors as weights."""
    moments = {"exp_avg": dict(state(1)), "exp_avg_sq": dict(state(2))}
    path = save({"optimizer": moments, "epoch": 3}, tmp_path / "optimizer_only.pt")
    refusal(path)
    path = save({"weights_of_it": state(3), "optimizer": moments}, tmp_path / "both.pt")
    assert_same(read(path), state(3))


# --- arrays ------------------------------------------------------------------------------------------------

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "f32": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
    "f64": np.linspace(0, 1, 6, dtype=np.float64),
    "f16": np.linspace(0, 1, 6, dtype=np.float16),
    "i64": np.arange(-3, 3, dtype=np.int64),
    "u8": np.arange(250, 256, dtype=np.uint8),
    "bool": np.array([True, False]),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "fortran 3": np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
    "strided": np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
    "reversed": np.arange(6, dtype=np.float32)[::-1],
    "scalar": np.array(2.5, dtype=np.float32),
    "empty": np.zeros((0, 3), dtype=np.float32),
}


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("container", ["zip", "stream", "pickle"])
def test_numpy_arrays_are_read_at_every_protocol(tmp_path: Path, protocol: int, container: str) -> None:
    """An array's bytes read in the wrong order, or by importing numpy's functions."""
    contents = {"model": ARRAYS, "optimizer": {}, "iteration": 9}
    path = tmp_path / "model_0000009.pth"
    if container == "pickle":
        path = path.with_suffix(".pkl")
        path.write_bytes(pickle.dumps({"model": ARRAYS, "__author__": "Detectron2 Model Zoo"}, protocol))
    else:
        zipped = container == "zip"
        torch.save(contents, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_same(read(path), {name: torch.from_numpy(np.array(array, order="C")) for name, array in ARRAYS.items()})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.kind == "detectron2"
        assert checkpoint.spec.state_key == "model"


def test_detectron2_with_arrays(tmp_path: Path, in_process: Command) -> None:
    (tmp_path / "run").mkdir()
    run = layouts.detectron2(tmp_path / "run", arrays=True)
    for saved in run.checkpoints:
        check_saved(saved, "detectron2")
    assert_same(best(in_process, run.folder, tmp_path / "o.safetensors"), mean([each.raw for each in run.checkpoints]))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(4, dtype=">f4"),
        np.array(["a", "bc"]),
        np.array([{}, None], dtype=object),
        np.zeros(2, dtype=[("a", "<f4"), ("b", "<i4")]),
        np.array([1 + 2j], dtype=np.complex128),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.zeros(2, dtype=np.longdouble),
    ],
    ids=["big-endian", "text", "objects", "records", "complex128", "dates", "long double"],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_that_safetensors_cannot_hold_are_refused(tmp_path: Path, array: Any, protocol: int) -> None:
    """Their bytes taken for something else, or the array left out of the average."""
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": {"w": np.zeros(3), "odd": array}, "__author__": "x"}, protocol))
    assert "odd" in refusal(path)


def test_arrays_whose_bytes_do_not_fit_their_shape_are_refused(tmp_path: Path) -> None:
    """A shape that claims more than the pickle holds."""
    whole = pickle.dumps({"model": {"w": np.arange(6, dtype=np.float32)}, "__author__": "x"}, 3)
    assert whole.count(b"K\x06\x85") == 1
    path = tmp_path / "model_final.pkl"
    path.write_bytes(whole.replace(b"K\x06\x85", b"K\x07\x85"))
    refusal(path)


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """The model zoo of Caffe2: text and array bytes in the same kind of string."""
    raw = np.array([1.5, -2.0, 1e30], dtype=np.float32)

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"f4")
        + b"K\0K\1\x87R(K\3"
        + text(b"<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85" + text(b"b") + b"tR"
    array += b"(K\1K\3\x85" + dtype + b"\x89" + text(raw.tobytes()) + b"tb"
    body = text(b"model") + b"}" + text(b"w") + array + b"s" + text(b"__author__") + text(b"Caffe2")
    path = tmp_path / "R-50.pkl"
    path.write_bytes(b"\x80\x02}(" + body + b"u.")
    loaded = pickle.loads(path.read_bytes(), encoding="latin1")
    assert loaded["model"]["w"].tolist() == raw.tolist()
    assert_same(read(path), {"w": torch.from_numpy(raw)})


# --- names -------------------------------------------------------------------------------------------------


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


def test_a_prefix_that_only_some_names_carry_stays(tmp_path: Path) -> None:
    """A model with a submodule called ``module``."""
    weights = {"module.weight": torch.ones(2), "head.weight": torch.ones(3)}
    path = save(weights, tmp_path / "mixed.pt")
    assert_same(read(path), weights)
    with open_checkpoint(path) as checkpoint:
        assert not checkpoint.spec.prefix


def test_activation_checkpointing_in_the_middle_of_names(tmp_path: Path) -> None:
    """``_checkpoint_wrapped_module.`` lies inside the names of the layers that are wrapped."""
    inner = {"embed.weight": torch.rand(3), "layers.0._checkpoint_wrapped_module.mlp.weight": torch.rand(2, 2)}
    inner["layers.0._checkpoint_wrapped_module._fsdp_wrapped_module.mlp.bias"] = torch.rand(2)
    path = save({"model": inner}, tmp_path / "wrapped.pt")
    expected = {name.replace("_checkpoint_wrapped_module.", "").replace("_fsdp_wrapped_module.", "") for name in inner}
    assert set(read(path)) == expected


def test_names_that_would_become_one_keep_both_tensors(tmp_path: Path) -> None:
    """One of two tensors is lost when a wrapper's name is taken out."""
    weights = {"a._checkpoint_wrapped_module.weight": torch.rand(2), "a.weight": torch.rand(2)}
    path = save(weights, tmp_path / "clash.pt")
    try:
        assert len(read(path)) == 2
    except CheckpointFormatError as error:
        assert "a.weight" in str(error)


@pytest.mark.parametrize("key", [None, "model"])
@pytest.mark.parametrize("buffers", [False, True])
def test_an_averaged_model_is_known_as_an_average(tmp_path: Path, key: str | None, buffers: bool) -> None:
    """The counter is averaged as a weight, or the names don't load into the model."""
    average = AveragedModel(net(4), use_buffers=buffers)
    average.update_parameters(net(4))
    contents = average.state_dict()
    assert "n_averaged" in contents
    path = save(contents if key is None else {key: contents, "epoch": 1}, tmp_path / "swa.pt")
    assert_same(read(path), state(4))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.spec.prefix == "module."
        assert checkpoint.spec.averaged
        if key is None:
            assert checkpoint.spec.kind == "torch AveragedModel"


def test_an_average_among_the_inputs_is_said(tmp_path: Path, in_process: Command) -> None:
    paths = [save(net(1).state_dict(), tmp_path / "a.pt"), save(AveragedModel(net(2)).state_dict(), tmp_path / "b.pt")]
    out = tmp_path / "o.safetensors"
    code, _, errors = in_process("average", *paths, "-o", out, "--bn", "keep")
    assert code == 0, errors
    assert "b.pt" in errors
    assert "average" in errors
    assert_same(load_file(out), mean([state(1), state(2)]))


def test_a_weight_called_n_averaged_stays(tmp_path: Path) -> None:
    """A scalar of that name in a model that is no AveragedModel."""
    weights = {"n_averaged": torch.tensor(3), "conv.weight": torch.rand(2)}
    assert_same(read(save(weights, tmp_path / "own.pt")), weights)


def test_tied_tensors_under_a_prefix(tmp_path: Path) -> None:
    shared = torch.rand(3, 2)
    path = save({"module.embed.weight": shared, "module.head.weight": shared}, tmp_path / "tied.pt")
    with open_checkpoint(path) as checkpoint:
        assert [sorted(group) for group in checkpoint.spec.tied()] == [["embed.weight", "head.weight"]]


@pytest.mark.parametrize("prefix", ["model.", "model"])
def test_a_prefix_that_the_user_names(tmp_path: Path, prefix: str) -> None:
    """A LightningModule keeps the network in an attribute of its own."""
    path = save({"state_dict": ordered(state(1), "model.")}, tmp_path / "a.ckpt")
    assert_same(read(path, strip_prefix=prefix), state(1))
    assert_same(read(path), ordered(state(1), "model."))
    assert "--strip-prefix" in refusal(path, strip_prefix="backbone.")


def test_one_run_with_and_without_a_wrapper(tmp_path: Path, in_process: Command) -> None:
    """A run resumed without DataParallel: the names are the same once its prefix is gone."""
    paths = [save(ordered(state(1), "module."), tmp_path / "1.pt"), save(ordered(state(2)), tmp_path / "2.pt")]
    out = tmp_path / "o.safetensors"
    code, _, errors = in_process("average", *paths, "-o", out, "--bn", "keep")
    assert code == 0, errors
    assert_same(load_file(out), mean([state(1), state(2)]))


# --- folders per checkpoint --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_stages_1_and_2(tmp_path: Path, in_process: Command, stage: int) -> None:
    """The 16-bit module is read, and it is said that float32 masters lie elsewhere."""
    (tmp_path / "run").mkdir()
    run = layouts.deepspeed(tmp_path / "run", stage=stage)
    for saved in run.checkpoints:
        for path in (saved.path, saved.path / "mp_rank_00_model_states.pt"):
            assert_same(read(path), saved.raw)
            with open_checkpoint(path) as checkpoint:
                assert checkpoint.spec.kind == "DeepSpeed"
                assert checkpoint.spec.state_key == "module"
                assert checkpoint.spec.record.step == saved.step
                assert any("float32" in note or "zero_to_fp32" in note for note in checkpoint.spec.notes)
    shown = folder_json(in_process, run.folder)
    assert names(shown["checkpoints"]) == ["global_step90", "global_step100"]
    assert [entry["step"] for entry in shown["checkpoints"]] == [90, 100]
    assert_same(best(in_process, run.folder, tmp_path / "o.safetensors"), mean([each.raw for each in run.checkpoints]))


def test_deepspeed_stage_3_is_refused_with_the_command_that_converts_it(tmp_path: Path, in_process: Command) -> None:
    """Empty tensors, or one rank's part, taken as the weights."""
    run = layouts.deepspeed(tmp_path, stage=3)
    place = run.checkpoints[-1].path
    for path in (place, place / "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        assert "zero_to_fp32" in refusal(path)
    code, _, errors = in_process("average", tmp_path, "-o", tmp_path / "o.safetensors")
    assert code == 3, errors
    assert "zero_to_fp32" in errors


def test_deepspeed_optimizer_states_are_no_checkpoint(tmp_path: Path) -> None:
    run = layouts.deepspeed(tmp_path)
    refusal(run.checkpoints[0].path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")


def test_deepspeed_over_several_model_parallel_ranks_is_refused(tmp_path: Path) -> None:
    """Half of each matrix taken for the whole."""
    place = layouts.deepspeed(tmp_path).checkpoints[0].path
    shutil.copyfile(place / "mp_rank_00_model_states.pt", place / "mp_rank_01_model_states.pt")
    assert "2 ranks" in refusal(place)


@pytest.mark.parametrize(
    "ranks",
    [("mp_rank_00", "mp_rank_01"), ("mp_rank_00_000", "mp_rank_00_001"), ("mp_rank_00_000", "mp_rank_01_000")],
    ids=["tensor parallel", "pipeline parallel", "both names"],
)
def test_megatron_over_several_ranks_is_refused(tmp_path: Path, in_process: Command, ranks: tuple[str, ...]) -> None:
    """One rank's slices taken as the whole model."""
    run = layouts.megatron(tmp_path, ranks)
    message = refusal(run.checkpoints[0].path)
    assert "Megatron" in message
    assert "convert" in message
    code, _, errors = in_process("average", tmp_path, "-o", tmp_path / "o.safetensors")
    assert code == 3, errors
    assert "Megatron" in errors


def test_megatron_of_one_rank(tmp_path: Path) -> None:
    """Opened with its weights, or refused as Megatron's, but never misread."""
    saved = layouts.megatron(tmp_path).checkpoints[-1]
    for path in (saved.path, saved.path / "mp_rank_00" / "model_optim_rng.pt"):
        try:
            assert_same(read(path), saved.raw)
            with open_checkpoint(path) as checkpoint:
                assert "Megatron" in (checkpoint.spec.kind or "")
        except CheckpointFormatError as error:  # noqa: PERF203 (two paths)
            assert "Megatron" in str(error)


def test_megatron_with_nested_parts_is_never_half_read(tmp_path: Path) -> None:
    """The encoder alone taken for the whole model."""
    place = layouts.megatron(tmp_path, nested=True).checkpoints[0].path
    message = refusal(place / "mp_rank_00" / "model_optim_rng.pt")
    assert "encoder" in message or "Megatron" in message


# --- transformers and diffusers ----------------------------------------------------------------------------

FORMS = ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("form", FORMS)
def test_transformers_trainer(tmp_path: Path, in_process: Command, form: str) -> None:
    """Shards are one checkpoint; the optimizer beside them is none; steps are in order."""
    (tmp_path / "run").mkdir()
    run = layouts.hf_trainer(tmp_path / "run", form=form)
    for saved in run.checkpoints:
        check_saved(saved, "HF Trainer")
    shown = folder_json(in_process, run.folder)
    assert names(shown["checkpoints"]) == ["checkpoint-500", "checkpoint-1000", "checkpoint-1500"]
    assert [entry["step"] for entry in shown["checkpoints"]] == [500, 1000, 1500]
    assert [entry["metrics"]["eval_loss"] for entry in shown["checkpoints"]] == [2.5, 1.75, 2.0]
    assert_same(best(in_process, run.folder, tmp_path / "o.safetensors"), mean([each.raw for each in run.checkpoints]))
    found = best(
        in_process, run.folder, tmp_path / "b.safetensors", "--best", 2, "--metric", "eval_loss", "--mode", "min"
    )
    assert_same(found, mean([each.raw for each in run.checkpoints[1:]]))


def test_the_final_model_beside_the_checkpoints_is_none_of_them(tmp_path: Path, in_process: Command) -> None:
    """trainer.save_model() at the end puts the weights of the last or best checkpoint into the run folder itself."""
    run = layouts.hf_trainer(tmp_path)
    save_file(dict(run.checkpoints[-1].raw), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "trainer_state.json").write_text((run.checkpoints[-1].path / "trainer_state.json").read_text())
    save(None, tmp_path / "training_args.bin")
    shown = folder_json(in_process, tmp_path)
    assert names(shown["checkpoints"]) == ["checkpoint-500", "checkpoint-1000", "checkpoint-1500"]
    assert "model.safetensors" in names(shown["skipped"])


def test_transformers_with_deepspeed(tmp_path: Path, in_process: Command) -> None:
    """The gathered weights lie beside DeepSpeed's own folder; without them, stage 3 is refused."""
    run = layouts.hf_trainer(tmp_path)
    for saved in run.checkpoints:
        layouts.deepspeed(saved.path, stage=3)
        shutil.rmtree(saved.path / "global_step90")
        check_saved(saved, "HF Trainer")
    for saved in run.checkpoints:
        (saved.path / "model.safetensors").unlink()
        assert "zero_to_fp32" in refusal(saved.path)
    code, _, errors = in_process("average", tmp_path, "-o", tmp_path / "o.safetensors")
    assert code == 3, errors
    assert "zero_to_fp32" in errors


@pytest.mark.parametrize("form", FORMS)
def test_an_index_may_be_named_itself(tmp_path: Path, form: str) -> None:
    """The file that a user finds in the folder and names."""
    saved = layouts.hf_trainer(tmp_path, form=form).checkpoints[0]
    assert_same(read(saved.path / form), saved.raw)


def test_accelerate(tmp_path: Path, in_process: Command) -> None:
    run = layouts.accelerate(tmp_path)
    for saved in run.checkpoints:
        assert_same(read(saved.path), saved.raw)
    shown = folder_json(in_process, tmp_path)
    assert names(shown["checkpoints"]) == ["checkpoint_0", "checkpoint_1", "checkpoint_10"]
    assert {entry["kind"] for entry in shown["checkpoints"]} == {"Accelerate"}


def test_peft_adapters_open_with_a_warning(tmp_path: Path) -> None:
    """The mean of factors is not the factors of the mean: nothing says so."""
    weights = layouts.peft(tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert_same(read(path), weights)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.spec.kind == "PEFT adapter"
        assert any("adapter" in note or "LoRA" in note for note in checkpoint.spec.notes)


@pytest.mark.parametrize(
    ("stem", "suffix"),
    [("pytorch_model", "bin"), ("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin")],
)
def test_folders_of_other_writers(tmp_path: Path, stem: str, suffix: str) -> None:
    layouts.sharded(tmp_path, tokens(1), stem=stem, suffix=suffix, count=3)
    assert_same(read(tmp_path), tokens(1))


def test_weights_in_both_formats_are_one_checkpoint(tmp_path: Path) -> None:
    """The same weights twice in one folder: the safetensors file is taken."""
    save_file(tokens(1), tmp_path / "model.safetensors")
    save(tokens(2), tmp_path / "pytorch_model.bin")
    assert_same(read(tmp_path), tokens(1))


# --- indices that lie --------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A good folder of two shards, and its index."""
    folder = tmp_path / "model"
    folder.mkdir()
    return folder, layouts.sharded(folder, tokens(1))


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    """A half-downloaded model: the first missing file hides the others."""
    layouts.sharded(tmp_path, tokens(1), count=4)
    missing = layouts.shard_names("model", "safetensors", 4)[1:3]
    for file in missing:
        (tmp_path / file).unlink()
    message = refusal(tmp_path)
    assert all(file in message for file in missing)


OUTSIDE = ["../secret.safetensors", "{absolute}", "..\\secret.safetensors", "a/../../secret.safetensors", "..", ".", "",
           "./../secret.safetensors", "secret.safetensors\0", "C:\\secret.safetensors", "\\\\host\\s.safetensors",
           "file://{absolute}", "~/secret.safetensors", "-", "nul\n.safetensors"]  # fmt: skip


@pytest.mark.guarantee("no-file-outside")
@pytest.mark.parametrize("shard", OUTSIDE)
def test_an_index_reaches_no_file_outside_its_folder(
    shards: tuple[Path, dict[str, Any]], tmp_path: Path, shard: str
) -> None:
    """A downloaded index reads a file of the user's own."""
    folder, index = shards
    secret = tmp_path / "secret.safetensors"
    save_file({"lm_head.weight": torch.rand(6, 4)}, secret)
    index["weight_map"]["lm_head.weight"] = shard.format(absolute=secret)
    layouts.write_index(folder, index)
    message = refusal(folder)
    assert "index" in message


def broken(index: dict[str, Any], change: str) -> object:
    """The index with one thing wrong."""
    files = index["weight_map"]
    first, second = sorted(set(files.values()))
    return {
        "a tensor that its shard lacks": {"weight_map": {**files, "extra.weight": first}},
        "a tensor in the other shard": {"weight_map": {**files, "model.embed.weight": second}},
        "a tensor that the index leaves out": {
            "weight_map": {name: file for name, file in files.items() if name != "lm_head.weight"}
        },
        "a .bin shard in a safetensors index": {"weight_map": {**files, "lm_head.weight": "pytorch_model.bin"}},
        "an optimizer as a shard": {"weight_map": {**files, "exp_avg": "optimizer.pt"}},
        "the index itself": {"weight_map": {**files, "lm_head.weight": "model.safetensors.index.json"}},
        "no weight_map": {"metadata": {}},
        "an empty weight_map": {"weight_map": {}},
        "a list": [],
        "a weight_map that is a list": {"weight_map": [first]},
        "a number as file": {"weight_map": {**files, "lm_head.weight": 1}},
        "nothing as file": {"weight_map": {**files, "lm_head.weight": None}},
        "a list as file": {"weight_map": {**files, "lm_head.weight": [first]}},
        "no JSON": "weight_map: {}",
        "nothing": "",
        "cut off": json.dumps(index)[:-20],
        "deep": "[" * 100_000,
        "a huge number": '{"weight_map": ' + "9" * 100_000 + "}",
        "a lone surrogate": '{"weight_map": {"\\ud800": "' + first + '"}}',
    }[change]


@pytest.mark.parametrize("change", [
    "a tensor that its shard lacks", "a tensor in the other shard", "a tensor that the index leaves out",
    "a .bin shard in a safetensors index", "an optimizer as a shard", "the index itself", "no weight_map",
    "an empty weight_map", "a list", "a weight_map that is a list", "a number as file", "nothing as file",
    "a list as file", "no JSON", "nothing", "cut off", "deep", "a huge number", "a lone surrogate",
])  # fmt: skip
def test_an_index_that_does_not_fit_its_shards_is_refused(shards: tuple[Path, dict[str, Any]], change: str) -> None:
    """A tensor is silently left out of the average, or a traceback instead of a message."""
    folder, index = shards
    save(tokens(2), folder / "pytorch_model.bin")
    save(adam(), folder / "optimizer.pt")
    layouts.write_index(folder, broken(index, change))
    message = refusal(folder)
    assert str(folder) in message


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b'{"weight_map": {"\xff": "a"}}', b"\0" * 64])
def test_an_index_that_is_no_text_is_refused(shards: tuple[Path, dict[str, Any]], content: bytes) -> None:
    (shards[0] / "model.safetensors.index.json").write_bytes(content)
    refusal(shards[0])


def test_a_tensor_in_two_shards_is_refused(shards: tuple[Path, dict[str, Any]]) -> None:
    """Which of the two is averaged depends on the order of reading."""
    folder, index = shards
    second = index["weight_map"]["model.layers.0.weight"]
    both = {name: tensor for name, tensor in tokens(1).items() if index["weight_map"][name] == second}
    save_file({**both, "model.embed.weight": torch.rand(6, 4)}, folder / second)
    assert "model.embed.weight" in refusal(folder)


def test_a_shard_that_is_no_file_is_refused(shards: tuple[Path, dict[str, Any]]) -> None:
    folder, index = shards
    shard = folder / index["weight_map"]["lm_head.weight"]
    shard.unlink()
    shard.mkdir()
    assert shard.name in refusal(folder)


def test_shards_without_their_index_are_not_taken_for_whole(tmp_path: Path, in_process: Command) -> None:
    """Each shard counted as a checkpoint of a run."""
    layouts.sharded(tmp_path, tokens(1))
    (tmp_path / "model.safetensors.index.json").unlink()
    code, _, errors = in_process("average", tmp_path, "-o", tmp_path / "o.safetensors", "--bn", "keep")
    assert code in (3, 4), errors


def hub_cache(root: Path, files: Mapping[str, bytes]) -> Path:
    """The cache of huggingface_hub: a snapshot of links into a folder of blobs."""
    model = root / "models--org--name"
    snapshot = model / "snapshots" / ("0123abcd" * 5)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123abcd" * 5)
    for number, (name, content) in enumerate(files.items()):
        blob = f"{number:064x}"
        (model / "blobs" / blob).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot


@pytest.mark.parametrize("count", [1, 2])
def test_the_cache_of_the_hub_is_read(tmp_path: Path, count: int) -> None:
    """Its shards are links that leave the folder of the snapshot."""
    source = tmp_path / "source"
    source.mkdir()
    if count == 1:
        save_file(tokens(1), source / "model.safetensors")
    else:
        layouts.sharded(source, tokens(1))
    (source / "config.json").write_text("{}")
    snapshot = hub_cache(tmp_path, {path.name: path.read_bytes() for path in sorted(source.iterdir())})
    assert_same(read(snapshot), tokens(1))
    for path in snapshot.glob("model.safetensors*"):
        assert_same(read(path), tokens(1))


def test_shards_that_link_elsewhere_are_refused(shards: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A folder from anywhere brings a link to a file of the user's own."""
    folder, index = shards
    name = index["weight_map"]["lm_head.weight"]
    (tmp_path / "elsewhere").mkdir()
    (folder / name).rename(tmp_path / "elsewhere" / name)
    (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    assert name in refusal(folder)


@pytest.mark.guarantee("shard-links")
def test_links_inside_the_folder_are_followed(shards: tuple[Path, dict[str, Any]]) -> None:
    folder, index = shards
    name = index["weight_map"]["lm_head.weight"]
    (folder / name).rename(folder / "stored")
    (folder / name).symlink_to("stored")
    assert_same(read(folder), tokens(1))


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_links_in_a_circle_are_an_error_and_no_crash(tmp_path: Path, name: str, in_process: Command) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).symlink_to("other")
    (folder / "other").symlink_to(name)
    with pytest.raises(CkptAvgError) as caught:
        open_checkpoint(folder)
    assert caught.value.exit_code in (2, 3, 4)
    code, _, errors = in_process("average", folder, "-o", tmp_path / "o.safetensors")
    assert code in (2, 3, 4)
    assert "Traceback" not in errors


def test_a_shard_that_links_to_itself(shards: tuple[Path, dict[str, Any]]) -> None:
    folder, index = shards
    shard = folder / index["weight_map"]["lm_head.weight"]
    shard.unlink()
    shard.symlink_to(shard.name)
    assert shard.name in refusal(folder)


# --- what is refused, and the way out ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "says"),
    [
        (layouts.torchscript, "model.pt", ("TorchScript", "state_dict")),
        (layouts.torchscript, "model.jit", ("TorchScript", "state_dict")),
        (layouts.nemo, "model.nemo", ("nemo", "tar")),
        (layouts.lfs_pointer, "pytorch_model.bin", ("Git LFS", "git lfs pull")),
        (layouts.lfs_pointer, "model.safetensors", ("Git LFS", "git lfs pull")),
        (layouts.html_page, "model.safetensors", ("HTML", "ownload")),
        (layouts.html_page, "model.pth", ("HTML", "ownload")),
    ],
)
def test_what_is_no_checkpoint_is_named_with_the_way_out(
    tmp_path: Path, make: Callable[[Path], Path], name: str, says: tuple[str, str]
) -> None:
    message = refusal(make(tmp_path / name))
    assert all(word.lower() in message.lower() for word in says), message


@pytest.mark.parametrize("make", [layouts.lfs_pointer, layouts.html_page])
def test_a_shard_that_is_no_checkpoint_is_named(
    shards: tuple[Path, dict[str, Any]], make: Callable[[Path], Path]
) -> None:
    """A clone without git-lfs: the index is there, and the shards are pointers."""
    folder, index = shards
    name = index["weight_map"]["lm_head.weight"]
    make(folder / name)
    assert name in refusal(folder)


def test_a_zip_of_other_things_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    refusal(path)


def test_a_bare_pickle_of_an_object_is_refused(tmp_path: Path) -> None:
    with throwaway("sklearn.svm", SVC=type("SVC", (), {})) as module:
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(module.SVC()))
    refusal(tmp_path / "model.pkl")


def test_a_stream_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    """The last tensors read as zeros, or as what follows."""
    path = save(dict(ordered(state(1))), tmp_path / "old.pt", stream=True)
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 40, len(whole) // 2, 60, 30):
        path.write_bytes(whole[:length])
        refusal(path)
    path.write_bytes(whole + b"more")
    try:
        assert_same(read(path), state(1))
    except CheckpointFormatError as error:
        assert "bytes" in str(error)


def test_a_stream_with_an_endless_line_is_refused_in_bounded_time(tmp_path: Path) -> None:
    """A name without an end, gathered byte by byte: the time grows with the square of its length."""
    head = save({}, tmp_path / "head.pt", stream=True).read_bytes()[:20]
    path = tmp_path / "old.pt"
    times = []
    for length in (100_000, 800_000):
        path.write_bytes(head + b"\x80\x02c" + b"a" * length)
        begin = time.process_time()
        refusal(path)
        times.append(time.process_time() - begin)
    assert times[1] < 20 * max(times[0], 0.05)


def test_a_stream_with_views_and_tied_tensors(tmp_path: Path) -> None:
    """Views into one storage, strides and offsets, as the older format keeps them."""
    base = torch.arange(12.0)
    weights = OrderedDict(
        whole=base, part=base[3:7], matrix=base.view(3, 4).t(), tied=base, half=base.half(), empty=base[:0],
        scalar=base[5], flags=base > 3, counts=base.long(), parameter=nn.Parameter(base[:2]),
    )  # fmt: skip
    for protocol in (2, 3, 4):
        path = tmp_path / f"{protocol}.pt"
        torch.save(weights, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
        assert_same(read(path), {name: tensor.detach() for name, tensor in weights.items()})
        with open_checkpoint(path) as checkpoint:
            assert ["tied", "whole"] in [sorted(group) for group in checkpoint.spec.tied()]


def test_a_stream_in_memory_order_of_another_writer(tmp_path: Path) -> None:
    """The storages follow in the order of their keys, which need not be that of the names."""
    weights = {f"t{number}": torch.full((number + 1,), float(number)) for number in range(20)}
    buffer = io.BytesIO()
    torch.save(dict(reversed(weights.items())), buffer, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes(buffer.getvalue())
    assert_same(read(tmp_path / "old.pt"), weights)
