"""Prints two times in seconds: of `import ckpt_avg`, and from the end of `import torch` to the first tensor byte.

Usage: first_byte.py OUTPUT INPUT...
"""

import sys
import time

import torch  # noqa: F401 (whose import does not count)

_BEGIN = time.perf_counter()

from ckpt_avg import Progress, average  # noqa: E402

_IMPORTED = time.perf_counter()


class Started(Exception):
    """The next thing would have been to read a tensor. Nothing is written."""


def start(total: int) -> None:
    raise Started


def main() -> None:
    output, *inputs = sys.argv[1:]
    try:
        average(inputs, output, progress=Progress(start=start))
    except Started:
        print(_IMPORTED - _BEGIN, time.perf_counter() - _BEGIN)


main()
