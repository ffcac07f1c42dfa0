"""Which files of a checkpoint are copied to the output folder: by name, from where, through which links."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ckpt_avg import CkptAvgError, average
from ckpt_avg.errors import ChangedWhileReadingError, CheckpointFormatError
from ckpt_avg.limits import LIMITS
from ckpt_avg.output.config_dtype import with_true_dtype
from ckpt_avg.output.side_file import SideFile
from ckpt_avg.output.side_file_names import CONFIGURATION, TEXT, kind_of
from ckpt_avg.output.weights_name import weights_name, without_variant

COPIED = {
    CONFIGURATION: [
        "config.json", "generation_config.json", "adapter_config.json", "quantization_config.json", "modules.json",
        "sentence_bert_config.json", "config_sentence_transformers.json", "scheduler_config.json", "model_index.json",
        "open_clip_config.json", "LICENSE", "LICENSE.txt", "NOTICE",
    ],
    TEXT: [
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
        "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "tokenizer.model.v3",
        "tekken.json", "qwen.tiktoken", "source.spm", "target.spm", "bpe.codes", "prophetnet.tokenizer",
        "entity_vocab.json", "normalizer.json", "preprocessor_config.json", "processor_config.json",
        "video_preprocessor_config.json", "chat_template.json", "chat_template.jinja", "tool_use.jinja", "tokens.txt",
    ],
    None: [
        "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "optimizer.pt", "scheduler.pt",
        "rng_state.pth", "training_args.bin", "trainer_state.json", "training_args.json", "all_results.json",
        "eval_results.json", "train_results.json", "ds_config.json", "deepspeed_config.json", "accelerate_config.yaml",
        "wandb_config.json", "events.out.tfevents.1", "log.txt", "requirements.txt", "README.md", "notes.md", "latest",
        "zero_to_fp32.py", "train.py", ".gitattributes", ".config.json", "token.json", "hf_token.txt", "secrets.json",
        "args.json", "tokenizer.pkl", "vocab.pt", "global_step100",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for kind, names in COPIED.items() for name in names])
def test_names_decide_what_is_copied(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def checkpoint(folder: Path, step: int, files: dict[str, Any]) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"w": torch.full((3,), float(step))}, path / "model.safetensors")
    write(path, files)
    return path


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, contents in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(contents if isinstance(contents, str) else json.dumps(contents))


def test_side_files_are_copied_byte_for_byte_from_the_last_checkpoint(tmp_path: Path) -> None:
    """In the order of the steps, not of the command line; what a trainer leaves besides stays behind."""
    odd = '{"model_type" :"bert",\r\n "é": 1e400 }\n\n'
    last = checkpoint(tmp_path, 20, {"config.json": odd, "vocab.txt": "x", "optimizer.pt": "", "README.md": "old"})
    first = checkpoint(tmp_path, 10, {"config.json": "{}", "vocab.txt": "y"})
    write(last, {"additional_chat_templates/tool_use.jinja": "{{ x }}", "global_step20/config.json": "{}"})
    result = average([last, first], f"{tmp_path}/release/")
    names = ("model.safetensors", "README.md", "additional_chat_templates/tool_use.jinja", "config.json", "vocab.txt")
    assert result.files == names
    for name in names[2:]:
        assert (result.output / name).read_bytes() == (last / name).read_bytes()
    with safe_open(str(result.output / "model.safetensors"), framework="pt") as file:
        recorded = json.loads(file.metadata()["ckpt_avg.files"])
    assert set(recorded) == set(names)
    assert recorded["config.json"] == hashlib.sha256(odd.encode()).hexdigest()
    assert recorded["README.md"] is None


def notices(tmp_path: Path, *sources: Path) -> list[str]:
    return [each for each in average(sources or [tmp_path], f"{tmp_path}/out/release/").notices if "sample" not in each]


def test_what_the_last_checkpoint_lacks_comes_from_the_run_folder(tmp_path: Path) -> None:
    """Each kind for itself: a tokenizer configuration is no configuration of the model."""
    for step in (1, 2):
        checkpoint(tmp_path / "run", step, {"tokenizer_config.json": {}, "vocab.txt": "x"})
    write(
        tmp_path / "run", {"config.json": {}, "generation_config.json": {}, "vocab.txt": "old", "aws_config.json": {}}
    )
    result = average(tmp_path / "run", f"{tmp_path}/release/")
    assert set(result.files) == {
        "model.safetensors", "README.md", "config.json", "generation_config.json", "tokenizer_config.json", "vocab.txt"
    }  # fmt: skip
    assert (result.output / "vocab.txt").read_text() == "x"
    (text,) = (each for each in result.notices if "run folder" in each)
    files = "'config.json', 'generation_config.json'"
    assert text.endswith(f"checkpoint-2: has no configuration, so that of its run folder is copied: {files}")


def test_files_next_to_plain_checkpoint_files_are_theirs(tmp_path: Path) -> None:
    for step in (1, 2):
        torch.save({"w": torch.full((3,), float(step))}, tmp_path / f"step_{step}.pt")
    write(tmp_path, {"config.json": {}, "vocab.txt": "x"})
    result = average(tmp_path, f"{tmp_path}/release/")
    assert set(result.files) == {"model.safetensors", "README.md", "config.json", "vocab.txt"}
    assert not [each for each in result.notices if "run folder" in each]


def test_without_a_configuration_a_notice_says_so(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, step, {}) for step in (1, 2)]
    assert f"{paths[1]}: neither it nor its run folder has a config.json" in notices(tmp_path, *paths)


def test_differences_are_notices_with_the_checkpoints_and_the_keys(tmp_path: Path) -> None:
    one = checkpoint(tmp_path, 1, {"config.json": {"a": 1, "b": [2]}, "vocab.txt": "x", "merges.txt": "old"})
    two = checkpoint(tmp_path, 2, {"config.json": {"a": 1, "b": [3], "c": 4}, "vocab.txt": "x"})
    last = checkpoint(tmp_path, 3, {"config.json": {"a": 1, "b": [2]}, "vocab.txt": "xy", "added_tokens.json": {}})
    found = notices(tmp_path, one, two, last)
    assert [each for each in found if ".json" in each or ".txt" in each] == [
        "added_tokens.json: is copied from the last checkpoint, and missing in checkpoint-1, checkpoint-2",
        "config.json: is copied from the last checkpoint, and differs in checkpoint-2: 'b', 'c'",
        "merges.txt: is not copied, because the last checkpoint lacks it: it is in checkpoint-1",
        "vocab.txt: is copied from the last checkpoint, and differs in checkpoint-1, checkpoint-2",
    ]


@pytest.mark.parametrize("damaged", ["{", "[" * 100_000, "[1]", "null", "\udcff", ""])
def test_a_configuration_that_is_no_object_is_copied_as_it_is(tmp_path: Path, damaged: str) -> None:
    """If it failed, a run would end, or the user would not learn why the folder does not load."""
    contents = damaged.encode(errors="surrogateescape")
    for step, text in ((1, b"{}"), (2, contents)):
        (checkpoint(tmp_path, step, {}) / "config.json").write_bytes(text)
    result = average(tmp_path, f"{tmp_path}/release/")
    assert (result.output / "config.json").read_bytes() == contents
    said = [each for each in result.notices if "is no JSON" in each]
    assert len(said) == (damaged not in ("[1]", "null"))
    assert all(str(tmp_path / "checkpoint-2" / "config.json") in each for each in said)


# -- Links and odd files --------------------------------------------------------------------------------------------


def test_a_link_within_the_run_is_followed_with_a_notice(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path / "run", step, {"config.json": {}}) for step in (1, 2)]
    write(tmp_path / "run", {"shared/vocab.txt": "x"})
    (paths[1] / "vocab.txt").symlink_to("../shared/vocab.txt")
    assert any(f"{paths[1]}/vocab.txt: is a link to" in each for each in notices(tmp_path, *paths))
    copied = tmp_path / "out" / "release" / "vocab.txt"
    assert copied.read_text() == "x"
    assert not copied.is_symlink()


def test_links_of_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    paths = []
    for step in (1, 2):
        path = checkpoint(repository / "snapshots", step, {})
        (repository / "blobs" / str(step)).write_text("{}")
        (path / "config.json").symlink_to(f"../../blobs/{step}")
        paths.append(path)
    assert not [each for each in notices(tmp_path, *paths) if "link" in each]


@pytest.mark.parametrize("target", ["secret", "nothing"])
def test_a_link_out_of_the_run_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_text("mine")
    paths = [checkpoint(tmp_path / "run", step, {"config.json": {}}) for step in (1, 2)]
    (paths[1] / "tokenizer.json").symlink_to(tmp_path / target)
    said = "is a link out of the run, to" if target == "secret" else "is a link that leads nowhere"
    with pytest.raises(CheckpointFormatError, match=said) as error:
        average(paths, f"{tmp_path}/release/")
    assert error.value.exit_code == 3
    assert not (tmp_path / "release").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_and_folders_with_such_names_are_not_opened(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, step, {"config.json": {}}) for step in (1, 2)]
    os.mkfifo(paths[1] / "vocab.txt")
    (paths[1] / "tokenizer.json").mkdir()
    result = average(paths, f"{tmp_path}/release/")
    assert result.files == ("model.safetensors", "README.md", "config.json")


def test_a_file_far_larger_than_any_side_file_is_refused(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, step, {"config.json": {}}) for step in (1, 2)]
    with (paths[1] / "tokenizer.json").open("wb") as file:
        file.truncate(LIMITS.side_file + 1)
    with pytest.raises(CheckpointFormatError, match=r"tokenizer\.json: expected at most 268,435,456 bytes"):
        average(paths, f"{tmp_path}/release/")


@pytest.mark.parametrize("text", ["yx", "x" * 5_000_000])
def test_a_side_file_that_changes_during_the_run_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("x" * 2_000_000)
    file = SideFile.of("vocab.txt", path)
    path.write_text(text)
    with pytest.raises(ChangedWhileReadingError, match="was changed during the run"):
        list(file.pieces())


# -- Code -----------------------------------------------------------------------------------------------------------


def test_code_that_the_configuration_names_is_copied_with_what_it_imports(tmp_path: Path) -> None:
    files = {
        "config.json": {"auto_map": {"AutoConfig": "configuration_x.X", "AutoModel": "org/repo--modeling_y.Y"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}},
        "configuration_x.py": "from .parts import a\nfrom . import b, c as d\nimport os\n",
        "tokenization_x.py": "", "parts.py": "from .deep import e", "deep.py": "", "b.py": "", "train.py": "",
        "modeling_y.py": "",
    }  # fmt: skip
    for step in (1, 2):
        checkpoint(tmp_path, step, files)
    result = average(tmp_path, f"{tmp_path}/release/")
    assert {name for name in result.files if name.endswith(".py")} == {
        "configuration_x.py", "tokenization_x.py", "parts.py", "deep.py", "b.py"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["../../secret.X", "a/b.X", "/etc/passwd.X", "..X", "a.b.X"])
def test_code_is_only_what_is_next_to_the_configuration(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.py").write_text("")
    for step in (1, 2):
        checkpoint(tmp_path / "run", step, {"config.json": {"auto_map": {"AutoModel": name}}})
    result = average(tmp_path / "run", f"{tmp_path}/release/")
    assert not [each for each in result.files if each.endswith(".py")]


def test_named_code_that_is_missing_is_a_notice(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, step, {"config.json": {"auto_map": {"AutoModel": "modeling.X"}}}) for step in (1, 2)]
    assert f"{paths[1]}: config.json names modeling.py, which is not there" in notices(tmp_path, *paths)


# -- The dtype in the configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{ "torch_dtype" : "float32",\n"x":1}', '{ "torch_dtype" : "bfloat16",\n"x":1}'),
        ('{"dtype": "torch.float16"}', '{"dtype": "torch.bfloat16"}'),
        ('{"text_config": {"dtype": "float16"}, "dtype": "float32"}', None),
        ('{"quantization_config": {"dtype": "float16"}, "layers": [{"dtype": "float32"}]}', ...),
        ('{"note": "\\"dtype\\": \\"float32\\"", "a": {"dtype": "float32"}}', ...),
        ('{"dtype": "bfloat16"}', ...),
        ('{"dtype": "auto", "torch_dtype": null}', ...),
        ('{"dtype": "float32"', ...),
        ('["dtype", "float32"]', ...),
    ],
)
def test_only_the_dtype_of_a_model_is_rewritten(before: str, after: Any) -> None:
    """At the top, and in the configurations of a composite model; no other byte changes."""
    expected = before if after is ... else after or '{"text_config": {"dtype": "bfloat16"}, "dtype": "bfloat16"}'
    found, what = with_true_dtype(before.encode(), Counter({"bfloat16": 100}))
    assert found.decode() == expected
    assert bool(what) == (expected != before)


def test_a_dtype_that_is_in_the_output_stays(tmp_path: Path) -> None:
    """A model in bfloat16 with some weights in float32, as trainers keep norms."""
    assert with_true_dtype(b'{"dtype": "float32"}', Counter({"bfloat16": 100, "float32": 4}))[1] == ""
    text = with_true_dtype(b'{"dtype": "float16"}', Counter({"bfloat16": 100, "float32": 4}))[1]
    assert text == "names bfloat16, the dtype of the output, instead of float16"


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_the_notice_names_the_file(tmp_path: Path, dtype: Any) -> None:
    for step in (1, 2):
        checkpoint(tmp_path, step, {"config.json": {"torch_dtype": "float32"}})
    result = average(tmp_path, f"{tmp_path}/release/", dtype=dtype)
    config = json.loads((result.output / "config.json").read_text())
    assert config == {"torch_dtype": "float32" if dtype == "keep" else "bfloat16"}
    assert ("config.json: names bfloat16" in str(result.notices)) == (dtype == "bfloat16")


# -- The name of the weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "dtypes", "expected"),
    [
        ("model.safetensors", ["float32"], "model.safetensors"),
        ("pytorch_model.bin", ["float32"], "model.safetensors"),
        ("pytorch_model-00001-of-00002.bin", ["float32"], "model.safetensors"),
        ("adapter_model.bin", ["float32"], "adapter_model.safetensors"),
        ("diffusion_pytorch_model.bin", ["float32"], "diffusion_pytorch_model.safetensors"),
        ("model.fp16.safetensors", ["float16"], "model.fp16.safetensors"),
        ("model.fp16.safetensors", ["float32"], "model.safetensors"),
        ("model.fp16.safetensors", ["float16", "float32"], "model.safetensors"),
        ("diffusion_pytorch_model.non_ema.safetensors", ["float32"], "diffusion_pytorch_model.non_ema.safetensors"),
        ("epoch_3.pt", ["float32"], "model.safetensors"),
    ],
)
def test_the_weights_have_the_name_that_the_loader_expects(source: str, dtypes: list[str], expected: str) -> None:
    assert weights_name(source, {}, dtypes) == expected


def test_without_a_known_name_the_configuration_tells_the_loader(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": {"_class_name": "UNet2DModel"}, "adapter_config.json": {}})
    config, adapter = tmp_path / "config.json", tmp_path / "adapter_config.json"
    assert weights_name("1.pt", {"config.json": config}, []) == "diffusion_pytorch_model.safetensors"
    assert weights_name("1.pt", {"adapter_config.json": adapter}, []) == "adapter_model.safetensors"
    assert (
        without_variant("unet/diffusion_pytorch_model.fp16.safetensors") == "unet/diffusion_pytorch_model.safetensors"
    )


def test_an_unreadable_side_file_stops_the_run_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [checkpoint(tmp_path, step, {"config.json": {}}) for step in (1, 2)]

    def refuse(name: str, path: Path) -> SideFile:
        raise CheckpointFormatError(f"{path}: Permission denied")

    monkeypatch.setattr(SideFile, "of", refuse)
    with pytest.raises(CkptAvgError, match="Permission denied"):
        average(paths, f"{tmp_path}/out/release/")
    assert not (tmp_path / "out").exists()
