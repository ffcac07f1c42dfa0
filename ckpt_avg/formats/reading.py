"""The options that say what is read of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt_avg.errors import OptionGroup, UsageError, option
from ckpt_avg.wording import setting


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Reading(OptionGroup):
    """Which tensors of a checkpoint are its weights, and their names."""

    heading = "Reading"
    state_key: str | None = option(
        None,
        "Read the state dict of torch files from this key.",
        doc="Read the state dict of torch files from this dotted key, for example ``model.encoder``. By default it is "
        "found where trainers store it.",
        metavar="DOTTED.KEY",
        recorded=True,
    )
    ema: bool = option(False, "Read the running average (EMA) that trainers store.", recorded=True)
    strip_prefix: str | None = option(
        None,
        "Remove PREFIX from tensor names, for example 'model.'; '' removes nothing.",
        doc="Remove this prefix from tensor names, for example ``model.``. Prefixes of wrappers (``module.``, "
        "``_orig_mod.`` and the like) are removed too if all names have them. An empty string keeps every name.",
        metavar="PREFIX",
        recorded=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema and self.state_key is not None:
            key = setting("--state-key", self.state_key)
            raise UsageError(f"--ema and {key}: both choose the weights. Use one of them.")

    @property
    def models(self) -> bool:
        """Whether a folder of several models is opened as one checkpoint with the tensors of all."""
        return False


class AllModels(Reading):
    """The same, of folders of several models, too."""

    @property
    def models(self) -> bool:
        """Yes."""
        return True
