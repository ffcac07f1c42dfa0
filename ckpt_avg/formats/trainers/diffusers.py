"""diffusers: a pipeline, model_index.json and a folder for each model, such as unet/ and text_encoder/."""

from ckpt_avg.formats.trainers.trainer import Trainer

TRAINER = Trainer(name="diffusers pipeline", folder_files=(r"model_index\.json",), models_file="model_index.json")
