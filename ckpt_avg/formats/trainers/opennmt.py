"""OpenNMT-py: model_step_5000.pt, whose last layer is apart from the model (onmt/models/model_saver.py)."""

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.formats.trainers.trainer import Contents, Layout, Trainer


def _step(contents: Contents) -> Record:
    following = contents.count("optim.training_step")
    return Record(following - 1 if following else None)


TRAINER = Trainer(
    name="OpenNMT-py",
    layouts=(Layout(("model", "generator", "opt"), raw="model", also={"generator": "generator."}),),
    record=_step,
    optimizer=("optim.optimizer",),
)
