"""ESPnet2: 12epoch.pth, a bare state dict; checkpoint.pth, with the metrics of all epochs (espnet2/train)."""

from ckpt_avg.checkpoint.training_record import Record
from ckpt_avg.formats.trainers.trainer import Contents, Sidecar, Trainer


def _reporter(contents: Contents, name: str, _record: Record) -> Record:
    """Returns the metrics of the epoch in the name, such as valid.acc."""
    stats = contents.get("reporter.stats")
    epoch = stats.get(int(name.partition("epoch")[0])) if isinstance(stats, dict) else None
    found = Record()
    for phase, values in epoch.items() if isinstance(epoch, dict) else ():
        if isinstance(values, dict):
            named = ((f"{phase}.{key}", value) for key, value in values.items() if "time" not in str(key))
            found = found.or_else(Record(metrics=contents.numbers(named)))
    return found


TRAINER = Trainer(
    name="ESPnet2",
    file_names=(r"(?P<epoch>\d+)epoch\.pth",),
    sidecars=(Sidecar("checkpoint.pth", r"\d{1,9}epoch\.pth", read_contents=_reporter),),
    aliases=("checkpoint",),  # what the training resumes from
)
