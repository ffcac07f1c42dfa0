"""Uploads an output folder to the Hugging Face Hub, by huggingface_hub (the extra ``hub``)."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ckpt_avg.errors import OutputError, UsageError
from ckpt_avg.text import argument, one_line
from ckpt_avg.version import __version__
from ckpt_avg.wording import setting

_FLAG = "--push-to-hub"
_LOGIN = "Run hf auth login, or set HF_TOKEN."
# The rules of huggingface_hub.utils.validate_repo_id, with the namespace required.
_NAME = re.compile(r"(?!.*(--|\.\.|\.git$))[\w][\w.-]*/\b[\w.-]{1,96}\b", re.ASCII)
_UNAUTHORIZED = 401  # the status of HTTP


def refuse_unusable(repository: str, notice: Callable[[str], None]) -> None:
    """Checks, before the work begins, that there is what an upload needs.

    Raises:
        UsageError: huggingface_hub or a token is missing, the Hub does not know the token, or ``repository`` is no name
            of a repository.
    """
    if not _NAME.fullmatch(repository):
        near = re.search(r"([\w.-]+/[\w.-]+)/*$", repository) if "://" in repository else None
        advice = f"Use {setting(_FLAG, near[1])}" if near else "Write ORG/NAME, for example my-org/my-model"
        raise UsageError(f"{setting(_FLAG, repository)}: is not the name of a repository. {advice}.")
    hub = _import()
    if importlib.import_module("huggingface_hub.constants").HF_HUB_OFFLINE:
        raise UsageError(f"{_FLAG}: HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it.")
    try:
        has_token = hub.get_token() is not None
    except Exception as error:
        raise UsageError(f"{_FLAG}: the token cannot be had: {_first_line(error)}. Set HF_TOKEN.") from error
    if not has_token:
        raise UsageError(f"{_FLAG}: there is no token. {_LOGIN}")
    try:
        _api(hub).whoami()
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) == _UNAUTHORIZED:
            raise UsageError(f"{_FLAG}: the Hub does not accept the token. {_LOGIN}") from error
        notice(f"{_FLAG}: the Hub cannot be asked about the token now: {_first_line(error)}")


def upload(folder: Path, shown: str, repository: str, *, private: bool) -> str:
    """Uploads all files of a folder in one commit, and creates the repository if there is none.

    Args:
        folder: what is uploaded; it is published by now.
        shown: the path that the user gave.
        repository: ``ORG/NAME``.
        private: whether a new repository is private.

    Returns:
        The URL of the repository.

    Raises:
        OutputError: it failed. The folder is complete.
    """
    try:
        api = _api(_import())
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        message = f"Average of checkpoints, by ckpt-avg {__version__}"
        with _without_bars():  # a line of our own says what is done
            api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:
        command = f"hf upload {repository} {argument(os.path.join(shown, ''))} ."
        raise OutputError(
            f"{shown}: is complete, but was not uploaded to {repository}: {_first_line(error)}. Upload it with: "
            f"{command}"
        ) from error
    return str(url)


def _import() -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UsageError(f"{_FLAG} needs huggingface_hub. Run: pip install 'ckpt-avg[hub]'") from error


def _api(hub: ModuleType) -> Any:
    return hub.HfApi(library_name="ckpt-avg", library_version=__version__)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Hides the progress bars of huggingface_hub, unless HF_HUB_DISABLE_PROGRESS_BARS=0 asks for them."""
    bars = importlib.import_module("huggingface_hub.utils")
    is_asked = importlib.import_module("huggingface_hub.constants").HF_HUB_DISABLE_PROGRESS_BARS is False
    if is_asked or bars.are_progress_bars_disabled():
        yield
        return
    bars.disable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bars()


def _first_line(error: BaseException) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return one_line(f"{type(error).__name__}: {first}").rstrip(".: ")
