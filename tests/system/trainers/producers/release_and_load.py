"""Saves three checkpoints with a library, averages them into a folder, and loads that with the library's own loader.

Called with the name of a kind, and an empty folder. Fails if a loaded tensor is not the mean of the checkpoints in
float64, rounded once, or if what the folder needs besides the weights was lost.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ckpt_avg import AverageResult, average

STEPS = (100, 200, 300)
State = Mapping[str, torch.Tensor]


def same_as_mean(loaded: State, states: Sequence[State]) -> None:
    """Compares loaded tensors with the mean of those that were saved."""
    assert set(loaded) == set(states[0])
    for name, tensor in loaded.items():
        saved = [state[name] for state in states]
        if not saved[0].is_floating_point():
            assert torch.equal(tensor, saved[-1]), name
            continue
        mean = torch.stack([each.double() for each in saved]).mean(0)
        expected = (torch.stack([each.double() for each in saved]).sum(0) / len(saved)).to(tensor.dtype)
        assert torch.equal(tensor, expected), f"{name}: {(tensor.double() - mean).abs().max()}"


def state_of(module: torch.nn.Module) -> State:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def save(folder: Path, write: Callable[[Path, int], State]) -> list[State]:
    return [write(folder / f"checkpoint-{step}", step) for step in STEPS]


def tokenizer(folder: Path) -> Any:
    from transformers import BertTokenizerFast

    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]))
    return BertTokenizerFast(str(folder / "vocab.txt"))


def small_llama(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=[1, 2], pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def llama(folder: Path, release: str, **options: Any) -> AverageResult:
    """With a tokenizer, a chat template and two end-of-sequence tokens, which generation needs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    words = tokenizer(folder)
    words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

    def write(path: Path, step: int) -> State:
        model = small_llama(step)
        model.generation_config = GenerationConfig(eos_token_id=[1, 2], do_sample=True, temperature=0.6)
        model.save_pretrained(path)
        words.save_pretrained(path)
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        torch.save({"state": {}}, path / "optimizer.pt")
        return state_of(model)

    states = save(folder, write)
    result = average([folder / f"checkpoint-{step}" for step in STEPS], release, **options)
    loaded = AutoModelForCausalLM.from_pretrained(release, dtype="auto")
    dtype = getattr(torch, options.get("dtype", "float32"))
    assert loaded.dtype is dtype
    same_as_mean(state_of(loaded), states)
    assert loaded.generation_config.eos_token_id == [1, 2]
    assert loaded.generation_config.temperature == 0.6
    again = AutoTokenizer.from_pretrained(release)
    assert again("a b c")["input_ids"] == words("a b c")["input_ids"]
    assert again.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
    names = set(result.files)
    assert not {"optimizer.pt", "trainer_state.json"} & names, names
    return result


def llama_bfloat16(folder: Path, release: str) -> AverageResult:
    """The configuration names the dtype of the output, so that ``dtype="auto"`` loads what was written."""
    return llama(folder, release, dtype="bfloat16")


def llama_shards(folder: Path, release: str) -> AverageResult:
    """The same in shards."""
    result = llama(folder, release, max_shard_size=2000)
    assert sum(name.endswith(".safetensors") for name in result.files) > 1
    return result


def bert_of_a_run(folder: Path, release: str) -> AverageResult:
    """The tokenizer and the configuration are in the run folder alone."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    words = tokenizer(folder)
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    words.save_pretrained(folder)
    config.save_pretrained(folder)

    def write(path: Path, step: int) -> State:
        torch.manual_seed(step)
        model = BertForSequenceClassification(config)
        path.mkdir()
        torch.save(model.state_dict(), path / "pytorch_model.bin")
        return state_of(model)

    states = save(folder, write)
    result = average(folder, release)
    same_as_mean(state_of(BertForSequenceClassification.from_pretrained(release)), states)
    assert AutoTokenizer.from_pretrained(release)("a")["input_ids"] == words("a")["input_ids"]
    assert any("those of" in notice for notice in result.notices), result.notices
    return result


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from .parts import double

class TinyConfig(PretrainedConfig):
    model_type = "tiny-of-ours"

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(3, 2)
        self.post_init()
    def forward(self, x):
        return double(self.layer(x))
"""


def custom_code(folder: Path, release: str) -> AverageResult:
    """The model's class is in files next to the weights, of which one imports the other."""
    from safetensors.torch import save_file
    from transformers import AutoModel

    def write(path: Path, step: int) -> State:
        torch.manual_seed(step)
        path.mkdir()
        state = {"layer.weight": torch.randn(2, 3), "layer.bias": torch.randn(2)}
        save_file(state, path / "model.safetensors", {"format": "pt"})
        (path / "modeling_tiny.py").write_text(CODE)
        (path / "parts.py").write_text("def double(x):\n    return 2 * x\n")
        (path / "train.py").write_text("raise SystemExit('not part of the model')\n")
        names = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
        (path / "config.json").write_text(json.dumps({"model_type": "tiny-of-ours", "auto_map": names}))
        return state

    states = save(folder, write)
    result = average(folder, release)
    loaded = AutoModel.from_pretrained(release, trust_remote_code=True)
    same_as_mean(state_of(loaded), states)
    assert torch.equal(loaded(torch.ones(3)), 2 * loaded.layer(torch.ones(3)))
    assert {name for name in result.files if name.endswith(".py")} == {"modeling_tiny.py", "parts.py"}
    return result


def peft_adapter(folder: Path, release: str) -> AverageResult:
    """An adapter, whose folder has the configuration of PEFT."""
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

    def write(path: Path, step: int) -> State:
        model = get_peft_model(small_llama(0), LoraConfig(r=2, target_modules=["q_proj"]))
        torch.manual_seed(step)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(path)
        return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}

    states = save(folder, write)
    result = average(folder, release)
    same_as_mean(get_peft_model_state_dict(PeftModel.from_pretrained(small_llama(0), release)), states)
    assert result.files[0] == "adapter_model.safetensors"
    return result


def small_unet(seed: int) -> Any:
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def unet(folder: Path, release: str) -> AverageResult:
    """A model of diffusers, whose file has another name."""
    from diffusers import UNet2DModel

    def write(path: Path, step: int) -> State:
        model = small_unet(step)
        model.save_pretrained(path)
        return state_of(model)

    states = save(folder, write)
    result = average(folder, release)
    same_as_mean(state_of(UNet2DModel.from_pretrained(release)), states)
    return result


def variant(folder: Path, release: str) -> AverageResult:
    """Checkpoints in float16 that are called so load as they did."""
    from diffusers import UNet2DModel

    def write(path: Path, step: int) -> State:
        model = small_unet(step).half()
        model.save_pretrained(path, variant="fp16")
        return state_of(model)

    states = save(folder, write)
    result = average(folder, release)
    loaded = UNet2DModel.from_pretrained(release, variant="fp16", torch_dtype=torch.float16)
    same_as_mean(state_of(loaded), states)
    return result


def pipeline(folder: Path, release: str) -> AverageResult:
    """A pipeline of two networks, one of which is the same in all checkpoints, a tokenizer and a scheduler."""
    from diffusers import DDIMScheduler, LDMPipeline, VQModel

    def write(path: Path, step: int) -> State:
        torch.manual_seed(0)
        vqvae = VQModel(
            block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
            latent_channels=1, norm_num_groups=2, num_vq_embeddings=4, in_channels=1, out_channels=1,
        )  # fmt: skip
        pipe = LDMPipeline(vqvae=vqvae, unet=small_unet(step), scheduler=DDIMScheduler())
        pipe.save_pretrained(path)
        return parts_of(pipe)

    def parts_of(pipe: Any) -> State:
        return {
            f"{part}.{name}": each for part in ("vqvae", "unet") for name, each in state_of(getattr(pipe, part)).items()
        }

    states = save(folder, write)
    result = average(folder, release)
    loaded = LDMPipeline.from_pretrained(release)
    same_as_mean(parts_of(loaded), states)
    assert loaded(num_inference_steps=1, output_type="np").images.shape[-1] == 1
    return result


def sentence(folder: Path, release: str) -> AverageResult:
    """A transformer, a pooling and a dense layer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Pooling, Transformer
    from transformers import BertConfig, BertModel

    def write(path: Path, step: int) -> State:
        torch.manual_seed(step)
        start = folder / "start"
        config = BertConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
        BertModel(config).save_pretrained(start)
        tokenizer(folder).save_pretrained(start)
        words = Transformer(str(start))
        model = SentenceTransformer(modules=[words, Pooling(8), Dense(8, 4)], device="cpu")
        model.save(str(path))
        return state_of(model)

    states = save(folder, write)
    result = average([folder / f"checkpoint-{step}" for step in STEPS], release)
    loaded = SentenceTransformer(release, device="cpu")
    same_as_mean(state_of(loaded), states)
    assert loaded.encode("a b").shape == (4,)
    return result


if __name__ == "__main__":
    kind, place = sys.argv[1], Path(sys.argv[2])
    made = globals()[kind](place, str(place / "release") + "/")
    assert sorted(made.files) == sorted(
        path.relative_to(made.output).as_posix() for path in made.output.rglob("*") if path.is_file()
    )
    print(json.dumps({"files": made.files, "notices": made.notices}))
