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

_MISSING = object()


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


class Reference:
    """An option's ``MODULE:NAME``, which is imported when it is needed. NAME may be dotted.

    Args:
        reference: the option's value.
        option: its flag.
        app_dir: the folder that comes first on ``sys.path``.

    Raises:
        UsageError: the reference is malformed, or there is no such folder.
    """

    def __init__(self, reference: str, option: str, app_dir: str | os.PathLike[str]) -> None:
        self.module, separator, self.__qualname__ = reference.partition(":")
        self._what = f"{option} {reference}"
        if "/" in self.module or self.module.endswith(".py"):
            place, file = os.path.split(self.module)
            where = f"--app-dir {argument(place)} " if place else ""
            raise UsageError(
                f"{self._what}: expected a module, not a file. Write {where}{option} "
                f"{file.removesuffix('.py')}:{self.__qualname__ or 'NAME'}."
            )
        if not separator or not self.__qualname__ or not all(self.module.split(".")):
            module, _, last = self.module.rpartition(".")
            near = f" Did you mean {module}:{last}?" if module and last and not separator else ""
            raise UsageError(f"{self._what}: expected MODULE:NAME, for example train:make_model.{near}")
        self._app_dir, self._folder = app_dir, os.path.abspath(app_dir)
        if not os.path.isdir(self._folder):
            why = "is not a folder. Name the one that contains your module."
            raise UsageError(f"--app-dir {app_dir}: {why if os.path.exists(self._folder) else missing(app_dir)}")

    def load(self) -> Any:
        """Imports the module and returns what the reference names.

        Raises:
            UsageError: there is no such module, or nothing of this name in it.
            UserCodeError: the import fails.
        """
        if sys.path[:1] != [self._folder]:
            sys.path.insert(0, self._folder)
        with user_errors(f"{self._what}: importing {self.module} failed:"):
            try:
                found: Any = importlib.import_module(self.module)
            except SystemExit as error:
                raise UserCodeError(
                    f"{self._what}: importing {self.module} ends the program (SystemExit: {error}). Put what "
                    "trains under if __name__ == '__main__':, so that the module can be imported."
                ) from error
            except ModuleNotFoundError as error:
                if error.name is None or not (self.module + ".").startswith(error.name + "."):
                    raise
                missed = error.name.rpartition(".")[2]
                near = suggestion(missed, _modules_in(os.path.join(self._folder, *error.name.split(".")[:-1])))
                raise UsageError(
                    f"{self._what}: no module {error.name!r} in {self._folder} or among the installed packages."
                    f"{near or _advice_on_folders(error.name, self._app_dir)}"
                ) from None
        for part in self.__qualname__.split("."):
            owner, found = found, getattr(found, part, _MISSING)
            if found is _MISSING:
                file = getattr(sys.modules[self.module], "__file__", None) or "a package"
                advice = _advice_on_names(part, owner) or " Name a function of this module."
                raise UsageError(f"{self._what}: {self.module} (from {file}) has no {self.__qualname__!r}.{advice}")
        if found is None:  # which means elsewhere that the option was not given
            raise UsageError(f"{self._what}: is None. Name a function of the module.")
        return found

    def beside(self, name: str) -> Any:
        """Returns what else the module has by a name, once it is imported; None if it has nothing."""
        return getattr(sys.modules[self.module], name, None)


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
