"""Ranks of torchrun that share one run."""
