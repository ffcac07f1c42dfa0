"""Compiles the native engine into the wheel, where a C compiler is found.

Without one, or where compiling fails, the wheel has no kernel and torch does the work, slower and with the same bytes.
While building, ``CKPT_AVG_ENGINE=native`` makes that an error, and ``CKPT_AVG_ENGINE=torch`` compiles nothing.

The kernel uses the stable ABI, so that one wheel serves Python 3.11 and all later ones. Buffers are not in the stable
ABI of Python 3.10, and builds of Python without the interpreter lock have none: these get a wheel of their own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SOURCE = "ckpt_avg/mean/kernel.c"
_STABLE = sys.version_info >= (3, 11) and not sysconfig.get_config_var("Py_GIL_DISABLED")
_SUFFIX = ".abi3.so" if _STABLE else str(sysconfig.get_config_var("EXT_SUFFIX"))
# No fast-math and no contraction to FMA: the order of operations decides about bits. Traps and errno, which nothing
# looks at, would only keep the compiler from vector instructions.
_FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-fast-math", "-ffp-contract=off"),
    *("-fno-trapping-math", "-fno-math-errno"),
    *(("-DPy_LIMITED_API=0x030b0000",) if _STABLE else ()),
    *(("-bundle", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)),
)


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]  # hatchling names no type of its configuration
    """Adds the kernel to wheels; an editable install has it beside the sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the wheel is made."""
        if self.target_name != "wheel":
            return
        name = f"ckpt_avg/_kernel{_SUFFIX}"
        if version == "editable":
            self._compile(Path(self.root, name))
            return
        self._folder = tempfile.TemporaryDirectory()
        target = Path(self._folder.name, Path(name).name)
        if self._compile(target):
            python = f"cp{sys.version_info.major}{sys.version_info.minor}"
            abi = "cp311-abi3" if _STABLE else f"{python}-{python}{getattr(sys, 'abiflags', '')}"
            system = re.sub(r"[-.]", "_", sysconfig.get_platform())
            build_data.update(pure_python=False, tag=f"{abi}-{system}")
            build_data["force_include"][str(target)] = name

    def _compile(self, target: Path) -> bool:
        engine = os.environ.get("CKPT_AVG_ENGINE", "")
        problem = "CKPT_AVG_ENGINE=torch" if engine == "torch" else _compile(Path(self.root, _SOURCE), target)
        if problem and engine == "native":
            raise RuntimeError(f"{_SOURCE}: not compiled: {problem}")
        if problem:
            target.unlink(missing_ok=True)  # an older one
            self.app.display_warning(f"{_SOURCE}: not compiled, so torch does the work, slower: {problem}")
        return not problem


def _compile(source: Path, target: Path, flags: Sequence[str] = ()) -> str:
    """Compiles the kernel; returns what is wrong, or nothing."""
    if sys.platform == "win32":
        return "it is not for Windows"
    candidates = [os.environ.get("CC", ""), str(sysconfig.get_config_var("CC") or ""), "cc", "gcc", "clang"]
    compiler = next((words for words in map(shlex.split, candidates) if words and shutil.which(words[0])), None)
    if compiler is None:
        return "there is no C compiler"
    own = shlex.split(os.environ.get("CFLAGS", ""))
    files = (f"-I{sysconfig.get_path('include')}", str(source), "-lm", "-o", str(target))
    command = [*compiler, *own, *_FLAGS, *flags, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (the user's compiler)
    return "" if done.returncode == 0 else f"{shlex.join(command)}: {done.stderr.strip()}"
