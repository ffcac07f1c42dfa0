"""kohya's scripts: NAME-000003.safetensors, finally NAME.safetensors, whose metadata has the step and the epoch."""

from collections.abc import Mapping

from ckpt_avg.checkpoint.training_record import Record, count, number_in
from ckpt_avg.formats.trainers.trainer import Trainer


def _metadata(metadata: Mapping[str, object]) -> Record:
    return Record(count(number_in(metadata.get("ss_steps"))), count(number_in(metadata.get("ss_epoch"))))


TRAINER = Trainer(name="kohya", record_metadata=_metadata)
