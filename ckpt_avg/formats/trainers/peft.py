"""PEFT: adapter_model.safetensors with adapter_config.json, the factors of a change without the model."""

from ckpt_avg.formats.trainers.trainer import Trainer

TRAINER = Trainer(
    name="PEFT adapter",
    tensor_names=r"\.lora_[AB]\.",
    weight_files=("adapter_model.safetensors", "adapter_model.bin"),
    note="these are LoRA factors: the mean of the products is not the product of the means, so the average of adapters "
    "is only near the average of the models. To average the models, merge each adapter first (merge_and_unload)",
)
