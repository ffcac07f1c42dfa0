"""torchtune before its indexes: hf_model_0001_3.pt is the first part of epoch 3; epoch_3/ later."""

from ckpt_avg.formats.trainers.trainer import Trainer

TRAINER = Trainer(
    name="torchtune", part_files=(r"(hf|meta)_model_(?P<number>\d{4})_\d+\.pt",), training_state=("recipe_state",)
)
