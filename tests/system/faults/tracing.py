"""What strace says of a run: its system calls, and which of them might have changed a file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

REQUIRE = "CKPT_AVG_TEST_REQUIRE"  # names what must not be skipped, for CI: "strace", "mount"
_LINE = re.compile(r"(?:\d+ +)?(\w+)\((.*)")

# Whatever can change a file or a folder; names that an architecture does not have are skipped by strace.
CHANGES = (
    "creat", "truncate", "ftruncate", "fallocate", "write", "pwrite64", "writev", "pwritev", "pwritev2",
    "copy_file_range", "sendfile", "unlink", "unlinkat", "rename", "renameat", "renameat2", "link", "linkat",
    "symlink", "symlinkat", "mkdir", "mkdirat", "mknod", "mknodat", "rmdir", "chmod", "fchmod", "fchmodat",
    "fchmodat2", "chown", "fchown", "lchown", "fchownat", "utime", "utimes", "futimesat", "utimensat", "setxattr",
    "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr",
)  # fmt: skip
OPENS = ("open", "openat", "openat2")
# All threads, descriptors with their paths, and none of what is written, which may name an input.
TRACE = ("-f", "-y", "-s", "0", "-e", "trace=poll,?" + ",?".join([*OPENS, *CHANGES]))
WRITING = re.compile(r"\b(O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND|O_TMPFILE)\b")


@dataclass(frozen=True)
class Call:
    """A system call as strace prints it: its name, and the rest of the line."""

    name: str
    text: str

    @property
    def is_injected(self) -> bool:
        """Whether it was made to fail."""
        return self.text.endswith("(INJECTED)")


def refuse_or_skip(what: str, reason: str) -> NoReturn:
    """Skips the test; fails it where the environment says that this may not be missing."""
    import pytest

    if what in os.environ.get(REQUIRE, ""):
        pytest.fail(f"{REQUIRE} asks for {what}: {reason}")
    pytest.skip(reason)


def parse(trace: str) -> list[Call]:
    """Returns the calls in strace's output, except the ``poll`` at which a run waits until it is traced."""
    found = []
    for line in trace.splitlines():
        match = _LINE.match(line)
        if match is not None and match[1] != "poll":
            found.append(Call(match[1], match[2]))
    return found


def changes(calls: Sequence[Call], folder: Path) -> list[Call]:
    """Returns the calls that might change the folder or what is in it: opened for writing, or changed otherwise."""
    names = re.compile(rf'["<]{re.escape(str(folder))}[/">]')
    return [
        call
        for call in calls
        if names.search(call.text) and (call.name in CHANGES or (call.name in OPENS and WRITING.search(call.text)))
    ]
