"""fairseq: checkpoint12.pt, checkpoint_12_5000.pt, checkpoint.best_loss_3.2150.pt (fairseq/checkpoint_utils.py)."""

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.formats.trainers.trainer import Contents, Layout, Trainer


def _progress(contents: Contents) -> Record:
    history = contents.get("optimizer_history")
    step = Contents(history[-1]).count("num_updates") if isinstance(history, list) and history else None
    epoch = contents.count("extra_state.train_iterator.epoch")
    if epoch and contents.get("extra_state.train_iterator.iterations_in_epoch") == 0:
        epoch -= 1  # at the end of an epoch the iterator is already at the start of the next
    return Record(step, epoch)


TRAINER = Trainer(
    name="fairseq",
    layouts=(Layout(("model", "extra_state"), raw="model", ema="extra_state.ema"),),
    record=_progress,
    metrics=("extra_state.val_loss",),
    optimizer=("last_optimizer_state",),
    file_names=(
        r"checkpoint_(?P<epoch>\d+)_(?P<step>\d+)\.pt",
        # A random digit follows the three decimals, so that equal scores have different names.
        r"checkpoint\.best_(?P<metric>.+)_(?P<value>-?\d+\.\d{3})\d?\.pt",
    ),
)
