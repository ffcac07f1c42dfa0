"""Running statistics of BatchNorm layers."""
