"""PEFT: adapter_model.safetensors with adapter_config.json, the factors of a change without the model."""

from ckpt_avg.formats.trainers.trainer import Trainer

TRAINER = Trainer(
    name="PEFT adapter",
    tensor_names=r"\.lora_[AB]\.",
    weight_files=("adapter_model.safetensors", "adapter_model.bin"),
    settings_file="adapter_config.json",
    settings=("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "alpha"),
)
