"""The options that say which tensors of a checkpoint are read."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckpt_avg.errors import OptionGroup, UsageError


@dataclass(frozen=True, kw_only=True)
class Reading(OptionGroup):
    """The options that say which tensors of a checkpoint are its weights."""

    heading = "What to read"
    state_key: str | None = field(
        default=None,
        metadata={
            "help": "Read the state dict of torch files from this key.",
            "doc": "Read the state dict of torch files from this dotted key, for example ``model.encoder``. By default "
            "it is found where trainers store it.",
            "metavar": "DOTTED.KEY",
            "recorded": True,
        },
    )
    ema: bool = field(
        default=False,
        metadata={"help": "Read the running average (EMA) that trainers store.", "recorded": True},
    )
    strip_prefix: str | None = field(
        default=None,
        metadata={
            "help": "Remove PREFIX from tensor names, for example 'model.'.",
            "doc": "Remove this prefix from tensor names, for example ``model.``. Prefixes of wrappers (``module.``, "
            "``_orig_mod.`` and the like) are always removed if all names have them.",
            "metavar": "PREFIX",
            "recorded": True,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema and self.state_key is not None:
            raise UsageError(f"--ema and --state-key {self.state_key}: both choose the weights. Use one of them.")
