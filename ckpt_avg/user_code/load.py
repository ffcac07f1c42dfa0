"""``MODULE:NAME`` → the user's own code. It is trusted: the command line names it, never a checkpoint."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ckpt_avg.errors import CkptAvgError, UsageError, UserCodeError, is_out_of_memory
from ckpt_avg.files.missing import missing
from ckpt_avg.text import argument, listing, suggestion, type_of
from ckpt_avg.user_code.raised import own_frames, sentence
from ckpt_avg.wording import worded


@contextlib.contextmanager
def user_errors(what: str, *, call: str = "") -> Iterator[None]:
    """Turns anything that the user's code raises, even sys.exit(), into a UserCodeError that begins with ``what``.

    ``call`` says how the function is called, for one that does not take these arguments. Our own errors, interrupts and
    out of memory are not changed.
    """
    try:
        yield
    except CkptAvgError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        text = f"{worded(what)} {sentence(error)}"
        if call and isinstance(error, TypeError) and not own_frames(error):
            text = f"{text.rstrip('.')}. {worded(call)}"
        raise UserCodeError(text, verbatim=True) from error


def returned(value: object) -> str:
    """Returns the type of what a function of the user's returned, with what to do if that is nothing."""
    return f"{type_of(value)}.{' Is there a return?' if value is None else ''}"


def load_user_code(reference: str, option: str, app_dir: str | os.PathLike[str]) -> Any:
    """Imports a module, with ``app_dir`` first on ``sys.path``; returns what ``MODULE:NAME`` names. NAME may be dotted.

    Raises UsageError if the option's reference is malformed or names nothing, UserCodeError if the import fails.
    """
    module_name, separator, name = reference.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        place, file = os.path.split(module_name)
        where = f"--app-dir {argument(place)} " if place else ""
        raise UsageError(
            f"{option} {reference}: expected a module, not a file. Write {where}{option} "
            f"{file.removesuffix('.py')}:{name or 'NAME'}."
        )
    if not separator or not name or not all(module_name.split(".")):
        module, _, last = module_name.rpartition(".")
        near = f" Did you mean {module}:{last}?" if module and last and not separator else ""
        raise UsageError(f"{option} {reference}: expected MODULE:NAME, for example train:make_model.{near}")
    folder = os.path.abspath(app_dir)
    if not os.path.isdir(folder):
        why = "is not a folder. Name the one that contains your module."
        raise UsageError(f"--app-dir {app_dir}: {why if os.path.exists(folder) else missing(app_dir)}")
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    with user_errors(f"{option} {reference}: importing {module_name} failed:"):
        try:
            found: Any = importlib.import_module(module_name)
        except SystemExit as error:
            raise UserCodeError(
                f"{option} {reference}: importing {module_name} ends the program (SystemExit: {error}). Put what "
                "trains under if __name__ == '__main__':, so that the module can be imported."
            ) from error
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise
            missed = error.name.rpartition(".")[2]
            near = suggestion(missed, _modules_in(os.path.join(folder, *error.name.split(".")[:-1])))
            raise UsageError(
                f"{option} {reference}: no module {error.name!r} in {folder} or among the installed packages."
                f"{near or _advice_on_folders(error.name, app_dir)}"
            ) from None
    for part in name.split("."):
        if not hasattr(found, part):
            file = getattr(sys.modules[module_name], "__file__", None) or "a package"
            advice = _advice_on_names(part, found) or " Name a function of this module."
            raise UsageError(f"{option} {reference}: {module_name} (from {file}) has no {name!r}.{advice}")
        found = getattr(found, part)
    return found


class Reference:
    """An option's ``MODULE:NAME``, which is imported when it is needed. Arguments as of `load_user_code`."""

    def __init__(self, reference: str, option: str, app_dir: str | os.PathLike[str]) -> None:
        self.module, _, self.__qualname__ = reference.partition(":")
        self._arguments = (reference, option, app_dir)

    def load(self) -> Any:
        """Returns what it names. Raises as `load_user_code`."""
        return load_user_code(*self._arguments)

    def beside(self, name: str) -> Any:
        """Returns what else the module has by a name, once it is imported; None if it has nothing."""
        return getattr(sys.modules[self.module], name, None)


def loaded(value: Any) -> Any:
    """Returns what a `Reference` names, and anything else as it is. Raises as `load_user_code`."""
    return value.load() if isinstance(value, Reference) else value


def _modules_in(folder: str) -> list[str]:
    """Returns the names of the modules and packages in a folder."""
    with contextlib.suppress(OSError):
        return [name.removesuffix(".py") for name in os.listdir(folder) if name.removesuffix(".py").isidentifier()]
    return []


def _advice_on_folders(module: str, app_dir: str | os.PathLike[str]) -> str:
    """Says in which folder inside ``app_dir`` a module is, if it is in one."""
    name = module.split(".", maxsplit=1)[0]
    found = min([*Path(app_dir).glob(f"*/{name}.py"), *Path(app_dir).glob(f"*/{name}/__init__.py")], default=None)
    if found is None:
        return " Name its folder with --app-dir."
    return f" Add --app-dir {argument(found.parent if found.stem == name else found.parent.parent)}."


def _advice_on_names(name: str, module: Any) -> str:
    """Suggests what can be called in a module: the nearest name, or all that it defines itself."""
    own = (
        [
            each
            for each, value in vars(module).items()
            if not each.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        if isinstance(module, ModuleType)
        else []
    )
    return suggestion(name, own or dir(module)) or (f" It has {listing(own)}." if own else "")
