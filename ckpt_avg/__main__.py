"""``python -m ckpt_avg``."""

from ckpt_avg.cli.main import main

main()
