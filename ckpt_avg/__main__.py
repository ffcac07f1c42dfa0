"""``python -m ckpt_avg``."""

from ckpt_avg.cli import main

main()
