"""Output folders of transformers models, against what its own `save_pretrained` writes, and huggingface_hub's rules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mean.plans import plan_of
from safetensors import safe_open

import ckpt_avg
from ckpt_avg.output.shards import split

transformers = pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.trainers

_LAYER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
_SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
# Models with tied weights: names of the class and of its configuration, and a tiny configuration.
TIED: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}),
    "bert": ("BertForMaskedLM", "BertConfig", _LAYER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _LAYER),
    "head first": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", _LAYER),
    "four names": ("T5ForConditionalGeneration", "T5Config", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}),
    "bart": ("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ),
    "untied": ("LlamaForCausalLM", "LlamaConfig", {**_LAYER, "num_key_value_heads": 2, "tie_word_embeddings": False}),
}


def model_of(name: str, seed: int = 0) -> Any:
    """A tiny model with random weights."""
    model, config, settings = TIED[name]
    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(vocab_size=64, **settings))


def run_of(folder: Path, name: str) -> Any:
    """Writes checkpoints as torch saves them, with tied weights; returns their mean as a model."""
    states = []
    for step in (1, 2):
        model = model_of(name, seed=step)
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(checkpoint)
        states.append(model.state_dict())
        torch.save(states[-1], checkpoint / "pytorch_model.bin")
    mean = model_of(name)
    first, second = states
    mean.load_state_dict({key: ((first[key].double() + second[key].double()) / 2).float() for key in first})
    return mean


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            names = file.keys()
            assert not found.keys() & set(names)
            found |= {key: file.get_tensor(key) for key in names}
    return found


@pytest.mark.parametrize("largest", [None, "3KB"])
@pytest.mark.parametrize("name", TIED)
def test_a_folder_has_what_save_pretrained_writes(tmp_path: Path, name: str, largest: str | None) -> None:
    """If it failed, tied weights would be stored twice, or under a name that older loaders do not look for."""
    mean = run_of(tmp_path / "run", name)
    mean.save_pretrained(tmp_path / "theirs")
    ckpt_avg.average(tmp_path / "run", f"{tmp_path}/ours/", max_shard_size=largest)
    ours, theirs = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert ckpt_avg.verify(tmp_path / "ours", sources=tmp_path / "run").checkpoints is not None
    loaded, report = type(mean).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    for key, tensor in mean.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    pointers = {key: tensor.data_ptr() for key, tensor in mean.state_dict().items()}
    for key, tensor in loaded.state_dict(keep_vars=True).items():
        same = [other for other, value in loaded.state_dict(keep_vars=True).items() if value is tensor]
        assert same == [other for other, pointer in pointers.items() if pointer == pointers[key]]


@pytest.mark.parametrize("largest", ["1KB", "3KB", "20KB", "1GB"])
def test_shards_are_those_of_huggingface_hub(tmp_path: Path, largest: str) -> None:
    run_of(tmp_path / "run", "gpt2")
    ckpt_avg.average(tmp_path / "run", tmp_path / "ours", max_shard_size=largest)
    found = {path.name: safe_open(path, "pt").keys() for path in (tmp_path / "ours").glob("*.safetensors")}
    expected = hub.split_torch_state_dict_into_shards(_in_order(tensors_in(tmp_path / "ours")), max_shard_size=largest)
    assert {name: sorted(keys) for name, keys in found.items()} == {
        name: sorted(keys) for name, keys in expected.filename_to_tensors.items()
    }
    index = tmp_path / "ours" / "model.safetensors.index.json"
    assert index.exists() == expected.is_sharded
    if expected.is_sharded:
        document = json.loads(index.read_text())
        assert document["weight_map"] == expected.tensor_to_filename
        assert document["metadata"]["total_size"] == expected.metadata["total_size"]
    model = model_of("gpt2")
    missing, unexpected = hub.load_torch_model(model, tmp_path / "ours", strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # which is tied in the model


def _in_order(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The order of the plan: by dtype, all the same here, then by name."""
    return dict(sorted(tensors.items()))


@pytest.mark.parametrize("seed", range(20))
def test_random_sizes_are_split_as_huggingface_hub_splits_them(seed: int) -> None:
    values = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 40, (30,), generator=values).tolist()  # it takes empty tensors for tied ones
    plan = plan_of({f"t{n:02}": ("F32", (size,)) for n, size in enumerate(sizes)})
    state = {tensor.name: torch.empty(tensor.shape) for tensor in plan.tensors}
    for largest in (1, 50, 100, 333, 10**6):
        expected = hub.split_torch_state_dict_into_shards(state, max_shard_size=largest)
        found = split(plan, "model.safetensors", largest)
        assert {shard.name: [each.name for each in shard.tensors] for shard in found} == expected.filename_to_tensors
