"""Checkpoints of any size for measurements: real numbers in several formats, or sparse files that take no disk."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
Form = Literal["safetensors", "shards", "zip"]

LAYER = {"q": (2048, 2048), "k": (2048, 2048), "v": (2048, 2048), "o": (2048, 2048)}
SHARDS = 4


def layout(nbytes: int, itemsize: int = 4) -> Shapes:
    """Names and shapes of a model of about ``nbytes``: attention-like layers and one large embedding."""
    elements = nbytes // itemsize
    shapes: Shapes = {"embedding": (elements // 4 // 1024, 1024)}
    room = elements - shapes["embedding"][0] * 1024
    layer = 0
    while room >= 4 * 2048 * 2048:
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in LAYER.items()}
        room -= 4 * 2048 * 2048
        layer += 1
    shapes["head"] = (room,)
    return shapes


def many(count: int, nbytes: int) -> Shapes:
    """Names and shapes of ``count`` float32 tensors of ``nbytes`` each."""
    return {f"layers.{index}.weight": (nbytes // 4,) for index in range(count)}


def llama_shapes(hidden: int, width: int, layers: int, vocabulary: int) -> Shapes:
    """Names and shapes of a Llama."""
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, width)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def llama(nbytes: int) -> tuple[Shapes, dict[str, object]]:
    """Names and shapes of a float32 model of about ``nbytes`` with Llama's architecture, and its configuration."""
    layers, vocabulary, elements = 8, 256, nbytes // 4
    hidden = max(64, int((elements / layers / 12) ** 0.5) // 64 * 64)
    fixed = (2 * vocabulary + 1) * hidden + layers * (4 * hidden + 2) * hidden
    width = max(64, round((elements - fixed) / (layers * 3 * hidden)))
    shapes = llama_shapes(hidden, width, layers, vocabulary)
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    sizes = {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers, "vocab_size": vocabulary}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    return shapes, {**kind, **sizes, **heads, "torch_dtype": "float32"}


def write_run(folder: Path, shapes: Shapes, checkpoints: int, shards: int = 1, dtype: str = "F32") -> list[Path]:
    """Writes a run of sparse checkpoints that differ in four bytes each: files, or folders of shards.

    No two files are links of each other. Each takes an inode and a block: 1.6 GB for 400,000 shards.

    Args:
        folder: where; it need not exist.
        shapes: of the tensors of each checkpoint, the first of which has some elements.
        checkpoints: how many.
        shards: files of each; with one there is no folder.
        dtype: ``F32`` or ``BF16``.
    """
    folder.mkdir(exist_ok=True)
    names = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    items = list(shapes.items())
    size = -(-len(items) // shards)
    parts = [dict(items[number * size : (number + 1) * size]) for number in range(shards)]
    itemsize = 4 if dtype == "F32" else 2
    heads = [_sparse_head(part, dtype, itemsize) for part in parts]
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    middle = len(heads[0][0]) + itemsize * (math.prod(items[0][1]) // 2)  # where copies are looked for first
    paths = []
    for step in range(1, checkpoints + 1):
        mark = (struct.pack("<f", step), middle)
        if shards == 1:
            paths.append(folder / f"step_{step}.safetensors")
            _write_sparse(str(paths[-1]), *heads[0], mark)
            continue
        paths.append(folder / f"checkpoint-{step}")
        paths[-1].mkdir()
        (paths[-1] / "model.safetensors.index.json").write_bytes(index)
        for number, (name, head) in enumerate(zip(names, heads, strict=True)):
            _write_sparse(f"{paths[-1]}/{name}", *head, None if number else mark)
    return paths


def _sparse_head(shapes: Shapes, dtype: str, itemsize: int) -> tuple[bytes, int]:
    """Returns the first bytes of a safetensors file, and the size of the whole file."""
    fields: dict[str, object] = {}
    position = 0
    for name, shape in shapes.items():
        count = itemsize * math.prod(shape)
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + count]}
        position += count
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header, 8 + len(header) + position


def _write_sparse(path: str, head: bytes, size: int, mark: tuple[bytes, int] | None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(descriptor, head)
    os.ftruncate(descriptor, size)
    if mark is not None:
        os.pwrite(descriptor, *mark)
    os.close(descriptor)


def write_random(
    folder: Path,
    count: int,
    nbytes: int,
    *,
    dtype: str = "float32",
    form: Form = "safetensors",
    shapes: Shapes | None = None,
    config: dict[str, object] | None = None,
) -> list[Path]:
    """Writes ``count`` checkpoints of random numbers as large as weights, each a little different from the last.

    Args:
        folder: where.
        count: how many.
        nbytes: of each.
        dtype: torch's name of it. The numbers are the same ones in every form, before they are cast.
        form: what to write. Shards are a folder with an index, as transformers writes them.
        shapes: instead of those of `layout`.
        config: written as ``config.json`` next to each checkpoint, in a folder of its own.

    Returns:
        What names each checkpoint on a command line: a file, or the folder of shards.
    """
    import torch

    torch.manual_seed(0)
    target: torch.dtype = getattr(torch, dtype)
    shapes = shapes or layout(nbytes, target.itemsize)
    tensors = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    paths = []
    for index in range(count):
        for tensor in tensors.values():
            tensor.mul_(1.0078125)  # a step that bfloat16 resolves as well
        cast = {name: tensor.to(target) for name, tensor in tensors.items()}
        home = folder
        if config is not None:
            home = folder / f"step_{index}"
            home.mkdir()
            (home / "config.json").write_text(json.dumps(config))
        name = f"step_{index}" if config is None else "model"
        paths.append(_write(home, name, cast, form))
    return paths


def _write(folder: Path, name: str, tensors: dict[str, Tensor], form: Form) -> Path:
    import torch
    from safetensors.torch import save_file

    if form == "safetensors":
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        return folder / f"{name}.safetensors"
    if form == "zip":
        torch.save(tensors, folder / f"{name}.pt")
        return folder / f"{name}.pt"
    home = folder / f"checkpoint-{name.rpartition('_')[2]}"
    home.mkdir()
    weight_map = {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        shard = dict(list(tensors.items())[number::SHARDS])
        save_file(shard, home / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (home / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return home


def files_of(paths: Sequence[Path]) -> list[Path]:
    """Returns the files that hold the tensors of checkpoints."""
    return [file for path in paths for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])]
