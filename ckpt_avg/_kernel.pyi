"""What mean/kernel.c offers. See mean/native.py, which calls it."""

from typing_extensions import Buffer

MEMORY: int
MAP: int
READ: int
DONE: int
NOT_FINITE: int
OUT_OF_RANGE: int
NOT_MAPPED: int
NOT_READ: int
LOST: int
CHECK_FINITE: int
CHECK_RANGE: int
ROW: int
DTYPES: dict[str, int]

def mean(
    table: Buffer, memory: Buffer, slot: int, elements: int, dtype: int, output: Buffer, check: int, /
) -> tuple[int, int, int, float]: ...
def copy(
    source: Buffer,
    begin: int,
    target: Buffer,
    start: int,
    extents: tuple[int, ...],
    from_steps: tuple[int, ...],
    to_steps: tuple[int, ...],
    size: int,
    /,
) -> None: ...
def nonfinite(values: Buffer, dtype: int, width: int, infinities: bool, /) -> tuple[int, int]: ...
def advise(descriptor: int, offset: int, length: int, /) -> None: ...
