"""Checkpoints of any size for measurements: real numbers, or sparse files that take no disk."""

from __future__ import annotations

import json
import struct
from pathlib import Path

LAYER = {"q": (2048, 2048), "k": (2048, 2048), "v": (2048, 2048), "o": (2048, 2048)}


def layout(nbytes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a float32 model of about ``nbytes``: attention-like layers and one large embedding."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (nbytes // 4 // 4 // 1024, 1024)}
    room = nbytes - 4 * shapes["embedding"][0] * 1024
    layer = 0
    while room >= 4 * 4 * 2048 * 2048:
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in LAYER.items()}
        room -= 4 * 4 * 2048 * 2048
        layer += 1
    shapes["head"] = (room // 4,)
    return shapes


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "F32", itemsize: int = 4) -> None:
    """Writes a safetensors file of zeros that occupies one block on the disk."""
    fields: dict[str, object] = {}
    position = 0
    for name, shape in shapes.items():
        count = itemsize
        for extent in shape:
            count *= extent
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + count]}
        position += count
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + position)


def write_random(folder: Path, count: int, nbytes: int) -> list[Path]:
    """Writes ``count`` float32 checkpoints of random numbers, each a little different from the one before."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in layout(nbytes).items()}
    paths = []
    for index in range(count):
        for tensor in tensors.values():
            tensor.mul_(1.0009765625)
        paths.append(folder / f"step_{index}.safetensors")
        save_file(tensors, paths[-1])
    return paths
