"""``python -m ckpt_avg``, and the entry point of the command."""

import os
import signal


def main() -> None:
    """Runs the command. Until it listens for signals, Ctrl-C ends the process without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    from ckpt_avg.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
