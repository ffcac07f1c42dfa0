"""Lightning: files of ModelCheckpoint, and folders of the FSDP and ModelParallel strategies."""

import csv

from ckpt_avg.checkpoint.training_record import Record, number_in
from ckpt_avg.formats.trainers.trainer import Contents, Layout, Sidecar, Trainer


def _monitored(contents: Contents) -> Record:
    """Returns the score of this checkpoint that each ModelCheckpoint callback keeps."""
    callbacks = contents.get("callbacks")
    states = [
        state
        for name, state in (callbacks.items() if isinstance(callbacks, dict) else ())
        if isinstance(name, str) and name.startswith("ModelCheckpoint") and isinstance(state, dict)
    ]
    return Record(metrics=contents.numbers((state.get("monitor"), state.get("current_score")) for state in states))


def _logged(text: str, _name: str, record: Record) -> Record:
    """Reads what CSVLogger wrote at the step of a checkpoint, which it counts from 0."""
    found = Record()
    try:
        for row in csv.DictReader(text.splitlines()):
            contents = Contents(row, number_in)
            if record.step is not None and contents.count("step") == record.step - 1:
                items = ((name, value) for name, value in row.items() if name not in ("step", "epoch"))
                found = Record(metrics=contents.numbers(items)).or_else(found)
    except csv.Error:
        return Record()
    return found


TRAINER = Trainer(
    name="Lightning",
    layouts=(
        # The callback WeightAveraging swaps them: it saves the average where Lightning looks for the model.
        Layout(("pytorch-lightning_version", "current_model_state"), raw="current_model_state", ema="state_dict"),
        Layout(("pytorch-lightning_version", "state_dict"), raw="state_dict"),
    ),
    step=("global_step",),
    epoch=("epoch",),
    optimizer=("optimizer_states",),
    scheduler=("lr_schedulers",),
    record=_monitored,
    aliases=("on_exception",),
    folder_files=(r"meta\.pt", r"\.metadata"),
    sidecars=(Sidecar("meta.pt"), Sidecar("../metrics.csv", r".*\.ckpt", _logged)),
)
