"""AllenNLP: model_state_e1_b100.th, with _w0 and so on for the ranks, and training_state_e1_b100.th."""

from ckpt_avg.formats.trainers.trainer import Trainer

TRAINER = Trainer(
    name="AllenNLP",
    file_names=(r"model_state_e(poch_)?(?P<epoch>\d+)(_b\d+)?\.th",),
    part_files=(r"model_state_e\d+_b\d+_w(?P<number>\d+)\.th",),
    training_state=("training_state_e(poch_)?.*",),
)
