"""Averages as timm's avg_checkpoints.py does: one whole checkpoint after the other, float64 sums, one division.

Usage: as_timm.py OUTPUT INPUT...
"""

import sys

import torch
from safetensors.torch import load_file, save_file


def main() -> None:
    output, *inputs = sys.argv[1:]
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    for path in inputs:
        for name, tensor in load_file(path).items():
            if name in sums:
                sums[name] += tensor.to(torch.float64)
            else:
                sums[name] = tensor.clone().to(torch.float64)
            counts[name] = counts.get(name, 0) + 1
    for name, count in counts.items():
        sums[name].div_(count)
    limits = torch.finfo(torch.float32)
    save_file({name: total.clamp(limits.min, limits.max).to(torch.float32) for name, total in sums.items()}, output)


main()
