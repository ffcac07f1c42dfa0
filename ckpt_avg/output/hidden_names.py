"""The hidden names under which outputs are written, and the removal of what killed runs have left under them.

A name is ``.OUTPUT.<machine>.<12 hex digits>.tmp``, next to the output. What a living run writes is locked, so the next
run for the same output can tell the two apart.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from pathlib import Path

from ckpt_avg.files import platform


def hidden_name(target: Path) -> str:
    """Returns a new hidden name for an output."""
    return f"{_prefix(target)}{os.urandom(6).hex()}.tmp"


def remove_leftovers(target: Path) -> None:
    """Removes what runs that were killed on this machine have left of an output: what nobody has locked."""
    pattern = re.compile(rf"{re.escape(_prefix(target))}[0-9a-f]{{12}}\.tmp")
    names: list[str] = []
    with contextlib.suppress(OSError):  # a folder can be writable and not readable
        names = os.listdir(target.parent)
    for name in filter(pattern.fullmatch, names):
        path = target.with_name(name)
        with contextlib.suppress(OSError):  # it only costs space
            is_folder = path.is_dir() and not path.is_symlink()
            # NFS locks only files that are open for writing.
            descriptor = platform.open_folder(path) if is_folder else os.open(path, platform.WRITE_FLAGS)
            if platform.lock(descriptor):
                remove_folder(path) if is_folder else os.unlink(path)
            platform.close(descriptor)


def remove_folder(path: Path) -> None:
    """Removes a folder and what is in it, as far as the system allows."""
    shutil.rmtree(path, ignore_errors=True)


def _prefix(target: Path) -> str:
    # Cut, so that a name at the system's limit still has room for the rest. The machine is named because locks on
    # network storage may not be known to other machines.
    machine = hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:6] if hasattr(os, "uname") else "0" * 6
    return f".{target.name.encode(errors='surrogateescape')[:200].decode(errors='ignore')}.{machine}."
