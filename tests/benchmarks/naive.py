"""What people write by hand: one tensor at a time through safe_open, float64 sums, save_file.

Usage: naive.py OUTPUT INPUT...
"""

import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def main() -> None:
    output, *inputs = sys.argv[1:]
    readers = [safe_open(path, framework="pt") for path in inputs]
    result = {}
    for name in readers[0].keys():  # noqa: SIM118 (the reader is no dict)
        total = readers[0].get_tensor(name).double()
        for reader in readers[1:]:
            total += reader.get_tensor(name)
        result[name] = (total / len(readers)).to(torch.float32)
    save_file(result, output)


main()
