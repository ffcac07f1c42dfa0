"""The name of the weights in an output folder: the one that the last checkpoint's own loader looks for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from ckpt_avg.output.side_file import json_of
from ckpt_avg.output.side_file_names import ADAPTER_CONFIG, CONFIG

_KNOWN = re.compile(
    r"(?P<stem>model|pytorch_model|adapter_model|diffusion_pytorch_model)(?P<variant>\.\w+)?(-\d+-of-\d+)?"
    r"\.(safetensors|bin)"
)
_VARIANTS = {".fp16": "float16", ".bf16": "bfloat16", ".fp32": "float32"}


def without_variant(name: str) -> str:
    """Returns a name without a variant such as ``fp16``: loaders expect it elsewhere in the names of shards."""
    folder, _, file = name.rpartition("/")
    match = _KNOWN.fullmatch(file)
    return str(PurePosixPath(folder, f"{match['stem']}.safetensors")) if match else name


def weights_name(source: str, side_files: Mapping[str, Path], dtypes: Collection[str]) -> str:
    """Returns the name.

    Args:
        source: the name of the last checkpoint's file of weights, or of the first of them.
        side_files: the last checkpoint's side files. Without a known name, they say which loader it is.
        dtypes: the names in torch of the output's floating-point dtypes. A variant such as ``fp16`` stays in the name
            as long as it is true.
    """
    if match := _KNOWN.fullmatch(source):
        stem = match["stem"].removeprefix("pytorch_")
        variant = match["variant"] or ""
        is_true = variant not in _VARIANTS or list(dtypes) == [_VARIANTS[variant]]
        return f"{stem}{variant if is_true else ''}.safetensors"
    if ADAPTER_CONFIG in side_files and CONFIG not in side_files:
        return "adapter_model.safetensors"
    if CONFIG in side_files and "_class_name" in json_of(side_files[CONFIG]):
        return "diffusion_pytorch_model.safetensors"
    return "model.safetensors"
