"""What any script may write: keys and names that belong to no trainer, such as those of PyTorch's tutorials."""

from __future__ import annotations

import re

from ckpt_avg.checkpoint.training_record import Record, measure
from ckpt_avg.formats.trainers.trainer import Contents, Trainer

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
# Others, of files that are known as checkpoints only by their first bytes.
OTHER_SUFFIXES = (".pyth", ".tar", ".chkpt", ".ckp", ".t7", ".model", ".mdl", ".weights", ".pkl", ".pickle", ".torch")
UNFINISHED = re.compile(r".*\.(tmp|temp|part|partial|incomplete|crdownload|download|filepart)([-._]\w+)?")
# Suffixes of files that are not looked into, of which a folder may have very many.
NO_CHECKPOINTS = (
    ".json", ".jsonl", ".yaml", ".yml", ".txt", ".log", ".md", ".csv", ".tsv", ".py", ".sh", ".ini", ".toml", ".html",
    ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".wav", ".flac", ".mp3", ".mp4", ".npy", ".npz", ".gz", ".zst",
    ".distcp", ".nemo",
)  # fmt: skip
UNFINISHED_FOLDERS = "tmp-"  # what their names begin with

RAW_KEYS = (
    "state_dict", "model", "model_state_dict", "model_state", "module", "net", "network", "params", "weights",
    "state.model",
)  # fmt: skip
EMA_KEYS = (
    "state_dict_ema", "model_ema", "ema", "ema_state_dict", "ema_model", "model_ema_state_dict",
    "ema_model_state_dict", "params_ema", "averaged_model",
)  # fmt: skip
# Under keys with these words are no weights but moments of optimizers, states of generators, counters.
_TRAINING_STATE = re.compile(
    r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))"  # whole words: not upsampler, optimus
    r"(?i:optim(?:s|i[sz]ers?)?|(?:lr|loss|grad)?(?:sched(?:s|ulers?)?|scalers?)|rngs?|random|samplers?|callbacks?|loops"
    r"|averaging_state|train(?:er|ing)?_state|loss(?:es)?|criteri(?:on|a))(?![a-z])|_extra_state$"
)
RNG_STATE = re.compile(r"(?:[a-z]+_)?(?:rng|random)_states?(?:_[a-z0-9]+)*", re.IGNORECASE)
# Words in names of settings and counts, or of the best value so far, which another checkpoint may have.
_NO_METRIC = {"epoch", "step", "iter", "version", "time", "seed", "lr", "rate", "size", "num", "n", "best", "decay"}


def is_training_state(key: str, value: object) -> bool:
    """Whether an entry of a torch file belongs to the training and not to the model, by its key or as an optimizer."""
    return bool(_TRAINING_STATE.search(key)) or (isinstance(value, dict) and {"state", "param_groups"} <= value.keys())


def is_ema_key(key: str) -> bool:
    """Whether a key has the word EMA."""
    return "ema" in re.split(r"[_.]", key.lower())


def _numbers_at_the_top(contents: Contents) -> Record:
    """Returns the numbers next to the weights, such as `loss`. Integers are counts."""
    items = contents.root.items() if isinstance(contents.root, dict) else ()
    return Record(
        metrics=contents.numbers(
            (name, value)
            for name, value in items
            if isinstance(name, str)
            and not isinstance(value, int)
            and not _NO_METRIC & set(re.split(r"[^a-z]+", name.lower()))
        )
    )


def number_in(text: object) -> float | None:
    """Returns the number in a cell of a table."""
    try:
        return measure(float(text)) if isinstance(text, str) else None
    except ValueError:
        return None


ANY_SCRIPT = Trainer(
    name="",
    step=("global_step", "step", "steps", "iteration", "iter", "num_updates"),
    epoch=("epoch",),
    metrics=("metrics", "train_metrics", "val_metrics", "eval_metrics"),
    optimizer=("optimizer", "optimizer_state_dict", "optimizer_state", "optim"),
    scheduler=("lr_scheduler", "scheduler", "scheduler_state_dict", "lr_scheduler_state_dict"),
    record=_numbers_at_the_top,
    training_state=(
        "optim(izer)?s?(_states?)?",
        "(lr_)?scheduler",
        "(grad_)?scaler",
        "rng(_states?)?",
        "train(er|ing)?_state",
    ),
    skip={
        rf"init(ial)?({'|'.join(map(re.escape, SUFFIXES))})": "initial weights, by its name",
        r".*(\.(bak|backup|old|orig)\d*|~)": "a backup, by its name",
    },
)

# --- names of files and folders: step_500.pt, epoch=3-val_loss=0.12.ckpt, model_2k.pth ---

_VALUE = r"([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
EPOCH = re.compile(r"(?:epoch|(?<![a-z0-9])ep)[-_=]?(\d+)|(?<![\d.])(\d+)epoch", re.IGNORECASE)
STEP = re.compile(r"(?:step|iter|iteration|batch[-_=]|update)s?[-_=]?(\d+)", re.IGNORECASE)
METRIC = re.compile(rf"(?:^|[-_.]|(?<=\d))([A-Za-z][\w/@]*?)={_VALUE}(?=$|[-_.]|[A-Za-z])")
_MEASURES = (
    r"(?:loss|acc|accuracy|top[15]|f1|auc|auroc|iou|miou|map|dice|psnr|ssim|bleu|rouge|wer|cer|ppl|perplexity|r?mse|mae|"
    r"nll|error|score|reward|fid|recall|precision)"
)
MEASURE = re.compile(rf"[\w/@]*{_MEASURES}\d?", re.IGNORECASE)
# Without a sign of equality, a word for a measure and a decimal number: val_loss0.34, acc1_78.5, loss_-1.5e-03.
WORD_METRIC = re.compile(
    r"(?:^|[-_.]|(?<=\d))((?:[A-Za-z]+[-_/])*?(?:val|valid|train|test|eval|dev|best)?"
    rf"{_MEASURES}(?:\d(?=[-_:]))?)[-_:]?([-+]?(?:\d+\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+))(?=$|[-_.]|[A-Za-z])",
    re.IGNORECASE,
)
# Settings, which name an experiment: lr=0.1, batch_32, seed=1.
SETTING = re.compile(
    r"(?<![A-Za-z])(?:lr|learning_rate|wd|weight_decay|bs|batch(?:_?size)?|seed|dropout|hidden|dim|layers|heads|width|depth|"
    r"alpha|beta|gamma|momentum|warmup|temperature|epochs|(?:max|num|n|total)_\w+)[-_=]*\d",
    re.IGNORECASE,
)
# Keras: weights.05-0.34, model-12--1.2e-03.
KERAS = re.compile(r"(?:^|.*[A-Za-z][-_.])(?P<epoch>\d{1,6})[-_](?P<value>[-+]?\d+\.\d+(?:[eE][-+]?\d+)?)")
# What comes before the name of a metric: epoch_3_val_loss → val_loss, best_model_5_val_loss → val_loss.
BEFORE_METRIC = re.compile(
    r"^.*?(?:(?:epoch|step|iter)\D?|(?<!top)[-_.]|^)\d+[-_](?=[A-Za-z])|^(?:(?:best|model|checkpoint|ckpt|weights)[-_.])+"
)
# A number that no word explains is the step: at the end, after a sign or a word that comes before a step
# (checkpoint-500, 12, model_7, but no date or version); the same in thousands or millions; at the start of a file's
# name, since folders are numbered there by other things (2_Dense, 00012-stylegan).
LONE_NUMBERS = (
    re.compile(r"(?:^|(?<!\d)[-_=.]|checkpoint|ckpt|model|snapshot)(?P<step>\d+)(?P<unit>)$", re.IGNORECASE),
    re.compile(r"(?:checkpoint|ckpt|model|snapshot)[-_=.]?(?P<step>\d+)(?P<unit>[km])$", re.IGNORECASE),
)
CHECKPOINT_NUMBER = re.compile(r"(?<![a-z])(?:checkpoint|ckpt|snapshot)[-_=.]?\d+$", re.IGNORECASE)
LEADING_NUMBER = re.compile(r"^(?P<step>\d+)(?P<unit>)(?=[-_]\D)")
# Numbers of the parts of one checkpoint, such as those of ranks, which are never a step.
PART = re.compile(
    r"(?<![A-Za-z])(?:(?:local|global|node|data|model|tensor|pipeline|expert|[mtpdce]p)[-_]?)?"
    r"(?:rank|shard|part|[mtpd]p|gpu|worker|layer|expert)s?[-_.=]?(?P<number>\d+)",
    re.IGNORECASE,
)
# The same next to one of those: alone, ep is an epoch and cp a checkpoint.
PART_TOO = re.compile(r"(?<=[-_.])[ce]p[-_.=]?(?P<number>\d+)", re.IGNORECASE)
PART_OF = re.compile(r"(?<![A-Za-z0-9])(?P<number>\d+)[-_]?of[-_]?(?P<count>\d+)", re.IGNORECASE)
WORLD_SIZE = re.compile(r"world[-_]?size[-_.=]?(?P<count>\d+)", re.IGNORECASE)
# Words before the number of a training: checkpoints with different ones are not of one run.
SERIES = re.compile(
    r"(?<![A-Za-z])(?P<word>k?folds?|seed|split|cv|trial|run|exp|experiment|replica|member)[-_.=]?(?P<number>\d+)",
    re.IGNORECASE,
)
# Suffixes of second versions and of ranks, which say nothing about step and epoch.
VERSION = re.compile(r"([-_.]?version[-_.]?\d+)|(-v\d+)?$", re.IGNORECASE)
ALIASES = {"last", "latest", "best", "final"}
AVERAGE = re.compile(
    r"(^|[-_.])(ave|avg|average|averaged|swa)(?=$|[-_.\d])(?![-_.]?(pool|meter))|(^|[-_.])avg\d+$", re.IGNORECASE
)
