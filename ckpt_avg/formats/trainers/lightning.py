"""Lightning: files of ModelCheckpoint, and folders of the FSDP and ModelParallel strategies."""

from ckpt_avg.checkpoint.training_record import Record
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
    sidecars=(Sidecar("meta.pt"),),
)
