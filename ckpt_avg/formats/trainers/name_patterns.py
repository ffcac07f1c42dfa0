"""What the names of checkpoint files and folders tell, for any trainer: step_500.pt, epoch=3-val_loss=0.12.ckpt."""

from __future__ import annotations

import re

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
# Others, of files that are known as checkpoints only by their first bytes.
OTHER_SUFFIX = re.compile(
    r"\.(?!(?:ep|epoch|step|iter|update|ba|avg|ave|average|swa|ema|best|last|latest|final|v|rank)\d*$)[A-Za-z]{1,10}\d?$"
)
UNFINISHED = re.compile(r".*\.(tmp|temp|part|partial|incomplete|crdownload|download|filepart)\d*([-._]\w+)?")
# Suffixes of files that are not looked into, of which a folder may have very many.
NO_CHECKPOINTS = (
    ".json", ".jsonl", ".yaml", ".yml", ".txt", ".log", ".md", ".csv", ".tsv", ".py", ".sh", ".ini", ".toml", ".html",
    ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".wav", ".flac", ".mp3", ".mp4", ".npy", ".npz", ".gz", ".zst",
    ".distcp", ".nemo",
)  # fmt: skip
# Suffixes of other formats, with what writes them; nothing where a run folder's files need no such word.
OTHER_FORMATS = {
    ".h5": "HDF5, as Keras writes it",
    ".hdf5": "HDF5, as Keras writes it",
    ".keras": "Keras",
    ".index": "TensorFlow",
    ".meta": "TensorFlow",
    ".npz": "a numpy archive",
    ".npy": "a numpy array",
    ".pdparams": "PaddlePaddle",
    ".msgpack": "Flax",
    ".params": "MXNet",
    ".gguf": "GGUF, whose weights are quantized",
    ".onnx": "ONNX",
    ".tflite": "TensorFlow Lite",
    ".pt2": "an exported program of torch",
    ".zip": "a zip archive",
    ".pkl": "a pickle",
    ".pickle": "a pickle",
    ".tar": "a tar archive",
    ".nemo": "a NeMo archive",
    ".jit": "TorchScript",
    **dict.fromkeys((".pyth", ".chkpt", ".t7", ".th", ".model", ".torch"), ""),
    **dict.fromkeys((".torchscript", ".ptl", ".pte", ".mar", ".joblib"), ""),
    **dict.fromkeys((".ort", ".mlmodel", ".mlpackage", ".engine", ".trt", ".ggml", ".pb", ".caffemodel"), ""),
    **dict.fromkeys((".parquet", ".arrow", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".sha256"), ""),
}
UNFINISHED_FOLDERS = "tmp-"  # what their names begin with

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
    r"(?<![A-Za-z0-9])(?:lr|learning_rate|wd|weight_decay|bs|batch(?:_?size)?|seed|dropout|hidden|dim|layers|heads|width|"
    r"depth|alpha|beta|gamma|momentum|warmup|temperature|epochs|(?:max|num|n|total)_[a-z]\w*)[-_=]*\d",
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
# Numbers of the parts of one checkpoint, such as those of ranks, which are never a step. A number before a noun counts:
# 12layers_2 is step 2 of a model with 12 layers.
PART = re.compile(
    r"(?<![A-Za-z])(?!(?<=\d)(?:gpu|worker|process|proc|node|host|device|layer|expert)s?[-_.=])"
    r"(?:(?:local|global|world|node|data|model|tensor|pipeline|expert|[mtpdce]p)[-_]?)?"
    r"(?:rank|shard|part|partition|chunk|slice|piece|segment|[mtpd]p|[fsd]dp|gpu|worker|process|proc|node|host|device|layer|"
    r"expert)s?[-_.=]?(?P<number>\d+)",
    re.IGNORECASE,
)
# The same next to a number of parallel parts: alone or next to a rank, ep is an epoch and cp a checkpoint.
PARALLEL = re.compile(r"(?<![A-Za-z])[mtpd]p", re.IGNORECASE)
PART_TOO = re.compile(r"(?:^|(?<=[-_.]))(?:[ce]|et)p[-_.=]?(?P<number>\d+)", re.IGNORECASE)
# After the suffix: pytorch_model.bin.0.pt, checkpoint_10.th.1.
PART_AFTER_SUFFIX = re.compile(r".*\.(?:safetensors|pth?|th|bin|ckpt|tar)\.(?P<number>\d+)(?:\.\w+)?")
PART_OF = re.compile(r"(?<![A-Za-z0-9])(?P<number>\d+)[-_]?of[-_]?(?P<count>\d+)", re.IGNORECASE)
WORLD_SIZE = re.compile(r"world[-_]?size[-_.=]?(?P<count>\d+)", re.IGNORECASE)
# Words before the number of a training: checkpoints with different ones are not of one run.
SERIES = re.compile(
    r"(?<![A-Za-z])(?P<word>k?folds?|seed|split|cv|trial|run|exp|experiment|replica|member|ensemble|attempt|try|agent|clone|"
    r"bag|lr|bs|config|cfg|hp|job|task|stage|phase)[-_.=]?(?P<number>\d{1,4})(?!\d)",
    re.IGNORECASE,
)
# Of these words, some are also the name of what is trained, and the number that of steps: agent_1000, run-2000.
RUN_NUMBER = re.compile(r"(?<![A-Za-z])(?:run|exp|experiment|agent)[-_=.]?(?P<step>\d+)(?P<unit>)$", re.IGNORECASE)
# Suffixes of second versions and of ranks, which say nothing about step and epoch.
VERSION = re.compile(r"([-_.]?version[-_.]?\d+)|(-v\d+)?$", re.IGNORECASE)
PRETRAINED = re.compile(r"(^|[-_.])pretrained([-_.]|$)", re.IGNORECASE)
ALIASES = {"last", "latest", "best", "final"}
AVERAGE = re.compile(
    r"(^|[-_.])(ave|avg|average|averaged|swa)(?=$|[-_.\d])(?![-_.]?(pool|meter))|(^|[-_.])avg\d+$", re.IGNORECASE
)


def other_format(name: str) -> str:
    """Returns what writes files with such a suffix, if that is another library; empty otherwise."""
    if re.search(r"\.data-\d+-of-\d+$", name):
        return "TensorFlow"
    return next((what for suffix, what in OTHER_FORMATS.items() if name.lower().endswith(suffix)), "")
