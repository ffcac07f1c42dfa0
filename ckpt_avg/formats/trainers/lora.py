"""Low-rank adapters of any library (PEFT, loralib, kohya's scripts, diffusers, LyCORIS): factors of a change."""

from ckpt_avg.formats.trainers.trainer import Trainer

TRAINER = Trainer(
    name="LoRA adapter",
    tensor_names=r"(?:^|[._])(?:lora_(?:[ABab]|embedding_[AB]|down|up|mid|E)|lora\d*\.(?:down|up|[AB])|lora_linear_layer|"
    r"hada_[wt]\d|lokr_[wt]\d|vera_lambda_[bd]|oft_\w+|boft_\w+)(?:[._]|$)",
    note="these are factors of a low-rank adapter (LoRA): the product of their means only approximates the mean of "
    "their products, so this is not exactly the average of the models. For that, merge each adapter into its model "
    "first (merge_and_unload)",
)
