"""The devices of the sums and of the model."""

from __future__ import annotations

from ckpt_avg.distributed.launch import Launch
from ckpt_avg.errors import UsageError
from ckpt_avg.text import plural
from ckpt_avg.wording import setting


def choose_mean_device(name: str, launch: Launch | None = None) -> str:
    """Returns the device of the sums that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means.

    ``auto`` sums on the CPU: each input byte is used once, so a GPU gains little there. If several ranks share a
    machine, ``cuda`` is a GPU for each of them.

    Raises:
        UsageError: there is no such device.
    """
    return "cpu" if name in ("auto", "cpu") else _cuda_device(name, launch)


def choose_model_device(name: str, launch: Launch | None = None) -> str:
    """Returns the device of the model; ``auto`` is a CUDA device if torch finds one. Raises as `choose_mean_device`."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if name == "cpu" else _cuda_device(name, launch)


def _cuda_device(name: str, launch: Launch | None) -> str:
    import torch

    if name == "cuda" and launch is not None and torch.cuda.is_available():
        name = f"cuda:{launch.local_rank % torch.cuda.device_count()}"
    if (torch.device(name).index or 0) >= torch.cuda.device_count():
        found = plural(torch.cuda.device_count(), "CUDA device")
        raise UsageError(f"{setting('--device', name)}: torch finds {found} on this machine. Use --device cpu.")
    return name
