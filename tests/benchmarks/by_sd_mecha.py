"""Averages with sd-mecha's recipe of `n_average`, in float64, by 2 threads.

Usage: by_sd_mecha.py OUTPUT INPUT...
"""

import sys

import sd_mecha
import torch


def main() -> None:
    output, *inputs = sys.argv[1:]
    recipe = sd_mecha.n_average(*map(sd_mecha.model, inputs))
    sd_mecha.merge(recipe, merge_dtype=torch.float64, output_dtype=torch.float32, threads=2, output=output)


main()
