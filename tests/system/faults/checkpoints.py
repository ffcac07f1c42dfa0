"""Three checkpoints of one small model, in every form: each maker fills a folder and returns what to name."""

from __future__ import annotations

import warnings
from pathlib import Path

import layouts
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file


def safetensors_files(folder: Path) -> list[Path]:
    paths = [folder / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        save_file(layouts.state(seed), path)
    return paths


def zip_files(folder: Path) -> list[Path]:
    return [layouts.save({"model": layouts.state(seed)}, folder / f"{seed}.pt") for seed in range(3)]


def stream_files(folder: Path) -> list[Path]:
    return [layouts.save(layouts.state(seed), folder / f"{seed}.pt", stream=True) for seed in range(3)]


def sharded_folders(folder: Path) -> list[Path]:
    paths = [folder / f"checkpoint-{seed}" for seed in range(3)]
    for seed, path in enumerate(paths):
        path.mkdir()
        layouts.sharded(path, layouts.state(seed))
    return paths


def dcp_folders(folder: Path) -> list[Path]:
    paths = [folder / f"step_{seed}" for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, path in enumerate(paths):
            dcp.save(layouts.state(seed), checkpoint_id=path, no_dist=True)
    return paths


def run_folder(folder: Path) -> list[Path]:
    layouts.torchvision(folder, ema=False)
    return [folder]


def symbolic_links(folder: Path) -> list[Path]:
    (folder / "real").mkdir()
    paths = []
    for real in safetensors_files(folder / "real"):
        paths.append(folder / f"link-{real.name}")
        paths[-1].symlink_to(real)
    return paths


FORMS = [safetensors_files, zip_files, stream_files, sharded_folders, dcp_folders, run_folder, symbolic_links]
