"""OpenNMT-py: model_step_5000.pt, whose last layer is apart from the model (onmt/models/model_saver.py)."""

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.formats.trainers.trainer import Contents, Layout, Trainer


def _step(contents: Contents) -> Record:
    coming = contents.count("optim.training_step")  # the step that comes next
    return Record(coming - 1 if coming else None)


TRAINER = Trainer(
    name="OpenNMT-py",
    layouts=(Layout(("model", "generator", "opt"), raw="model", beside={"generator": "generator."}),),
    record=_step,
    optimizer=("optim.optimizer",),
)
