"""``MODULE:NAME`` → the user's own code. It is trusted: the command line names it, never a checkpoint."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from ckpt_avg.errors import CkptAvgError, UsageError, UserCodeError, is_out_of_memory
from ckpt_avg.text import suggestion
from ckpt_avg.wording import worded


@contextlib.contextmanager
def user_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turns anything that the user's code raises, even sys.exit(), into a UserCodeError that begins with ``what``.

    Our own errors, interrupts and out of memory are not changed.
    """
    try:
        yield
    except CkptAvgError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        text = f"{worded(what)} {type(error).__name__}: {error}{worded(advice)}"
        raise UserCodeError(text, verbatim=True) from error


def load_user_code(reference: str, option: str, app_dir: str | os.PathLike[str]) -> Any:
    """Imports a module, with ``app_dir`` first on ``sys.path``; returns what ``MODULE:NAME`` names. NAME may be dotted.

    Raises UsageError if the option's reference is malformed or names nothing, UserCodeError if the import fails.
    """
    module_name, separator, name = reference.partition(":")
    if not separator or not name or not all(module_name.split(".")):
        raise UsageError(f"{option} {reference}: expected MODULE:NAME, for example train:make_model.")
    if module_name.endswith(".py"):
        raise UsageError(f"{option} {reference}: expected a module, not a file. Remove '.py'.")
    folder = os.path.abspath(app_dir)
    if not os.path.isdir(folder):
        kind = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise UsageError(f"--app-dir {app_dir}: {kind}. Name the folder that contains your module.")
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    with user_errors(f"{option} {reference}: importing {module_name} failed:"):
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise
            raise UsageError(
                f"{option} {reference}: no module {module_name!r} in {folder} or among the installed packages. Name "
                "its folder with --app-dir."
            ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            file = getattr(sys.modules[module_name], "__file__", None) or "a package"
            advice = suggestion(part, dir(found)) or " Name a function of this module."
            raise UsageError(f"{option} {reference}: {module_name} (from {file}) has no {name!r}.{advice}")
        found = getattr(found, part)
    return found


def forward_batch_of(reference: str) -> Any:
    """Returns the function ``forward_batch`` of the module in a reference, which has been imported; None without it."""
    return getattr(sys.modules[reference.partition(":")[0]], "forward_batch", None)
