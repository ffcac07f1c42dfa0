"""PEFT: adapter_model.safetensors with adapter_config.json, the factors of a change without the model."""

from ckpt_avg.formats.trainers.trainer import Trainer

TRAINER = Trainer(
    name="PEFT adapter",
    tensor_names=r"\.lora_[AB]\.",
    weight_files=("adapter_model.safetensors", "adapter_model.bin"),
    note="these are LoRA factors: the product of their means only approximates the mean of their products, so this is "
    "not exactly the average of the models. For that, merge each adapter into its model first (merge_and_unload)",
)
