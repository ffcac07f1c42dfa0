"""``MODULE:NAME`` → the user's own code. It is trusted: it is named on the command line, never by a checkpoint."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from ckpt_avg.errors import CkptAvgError, UsageError, UserCodeError, is_out_of_memory


@contextlib.contextmanager
def blaming(what: str, advice: str = "") -> Iterator[None]:
    """Turns whatever the user's code raises, sys.exit() included, into a UserCodeError that says where.

    Our own errors, interrupts and running out of memory pass as they are.
    """
    try:
        yield
    except CkptAvgError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        raise UserCodeError(f"{what} {type(error).__name__}: {error}{advice}") from error


def load_user_code(reference: str, option: str, app_dir: str | os.PathLike[str]) -> Any:
    """Imports a module and returns the attribute that a reference names.

    Args:
        reference: ``MODULE:NAME``; NAME may be dotted.
        option: the option that it was given to, for messages.
        app_dir: the folder that goes on ``sys.path`` first.

    Raises:
        UsageError: the reference is malformed, or names no module or attribute.
        UserCodeError: the module raised while it was imported.
    """
    module_name, separator, name = reference.partition(":")
    if not separator or not name or not all(module_name.split(".")):
        raise UsageError(f"{option} {reference}: expected MODULE:NAME, for example train:make_model.")
    if module_name.endswith(".py"):
        raise UsageError(f"{option} {reference}: expected a module, got a file. Leave out the '.py'.")
    folder = os.path.abspath(app_dir)
    if not os.path.isdir(folder):
        raise UsageError(
            f"--app-dir {app_dir}: expected a folder, got {'a file' if os.path.exists(folder) else 'nothing'} there."
        )
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    with blaming(f"{option} {reference}: importing {module_name} failed:"):
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise
            raise UsageError(
                f"{option} {reference}: there is no module {module_name!r} in {folder} or among the installed "
                "packages. Name its folder with --app-dir."
            ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{option} {reference}: {module_name} (from {_origin(module_name)}) has no {name!r}.")
        found = getattr(found, part)
    return found


def _origin(module_name: str) -> str:
    return getattr(sys.modules[module_name], "__file__", None) or "a package"


def forward_batch_beside(reference: str) -> Any:
    """Returns the function ``forward_batch`` of a module that is imported already, or None."""
    return getattr(sys.modules[reference.partition(":")[0]], "forward_batch", None)
