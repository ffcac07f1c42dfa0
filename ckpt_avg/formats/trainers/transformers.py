"""transformers' Trainer: checkpoint-500/ with model.safetensors and trainer_state.json; names that diffusers shares."""

import json

from ckpt_avg.checkpoint.training_record import Record, count, measure
from ckpt_avg.formats.trainers.trainer import Contents, Folder, Sidecar, Trainer, WeightFiles
from ckpt_avg.text import quote

_NO_METRICS = {"step", "epoch", "learning_rate"}
_SPEED = ("_runtime", "_per_second")


def _trainer_state(text: str, _name: str, _record: Record) -> Record:
    try:
        state = Contents(json.loads(text))
    except (ValueError, RecursionError):
        return Record()
    step, epoch, log = state.count("global_step"), state.number("epoch"), state.get("log_history")
    rates: list[tuple[int, float]] = []
    metrics: dict[str, float] = {}
    for entry in log if isinstance(log, list) else ():
        at = count(entry.get("step")) if isinstance(entry, dict) else None
        if at is None:
            continue
        if (rate := measure(entry.get("learning_rate"))) is not None:
            rates.append((at, rate))
        if at == step:
            metrics |= state.numbers(
                item for item in entry.items() if item[0] not in _NO_METRICS and not item[0].endswith(_SPEED)
            )
    whole = None if epoch is None else count(float(int(epoch)))
    return Record(step, whole, metrics, rates[-1][1] if rates else None, tuple(rates))


def _weights(folder: Folder) -> WeightFiles | None:
    """Finds a shard without its index."""
    shards = folder.matching(r"(model|pytorch_model|diffusion_pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
    if not shards:
        return None
    path = folder.path / shards[0]
    if len(shards) == 1 and "-00001-of-00001." in path.name:
        return WeightFiles(path)
    problem = (
        f"incomplete: there is no shard index (*.index.json) next to {quote(path.name)}, which is saved last. "
        "Copy it again or exclude it."
    )
    return WeightFiles(path, problem=problem, incomplete=True)


TRAINER = Trainer(
    name="HF Trainer",
    folder_files=(r"trainer_state\.json",),
    weight_files=(
        "model.safetensors",
        "pytorch_model.bin",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bin",
    ),
    weights=_weights,
    written_last="trainer_state.json",
    sidecars=(Sidecar("trainer_state.json", "(model|pytorch_model|adapter_model).*", _trainer_state),),
    training_state=("optimizer", "scheduler", "rng_state", "training_args"),
)
