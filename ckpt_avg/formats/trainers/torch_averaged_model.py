"""torch.optim.swa_utils.AveragedModel: the names of a wrapped model (module.…) and the scalar n_averaged."""

from ckpt_avg.formats.trainers.trainer import Trainer

TRAINER = Trainer(name="torch AveragedModel", counter="n_averaged")
