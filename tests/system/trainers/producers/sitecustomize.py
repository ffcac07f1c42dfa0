"""Python imports this at its start if this folder is on its path: pages then import timm without torchvision."""

import no_torchvision  # noqa: F401
