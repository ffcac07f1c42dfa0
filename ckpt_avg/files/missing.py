"""What to do about a path that does not exist: the nearest name, or how to copy a remote one to this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ckpt_avg.text import argument, nearest

_URL = re.compile(r"(?P<scheme>[a-zA-Z][\w+.-]+):/+(?P<rest>.*)", re.DOTALL)
_HUB = re.compile(r"(?:https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:/+)(?:models/)?([\w.-]+/[\w.-]+)")
_HOST = re.compile(r"[\w.-]+@[\w.-]+:.*|[\w.-]{2,}:[~/].*", re.DOTALL)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_COPY = {  # scheme → commands for a file and for a folder
    "s3": ("aws s3 cp {url} .", "aws s3 sync {url} {name}"),
    "gs": ("gcloud storage cp {url} .", "gcloud storage rsync --recursive {url} {name}"),
    "hdfs": ("hdfs dfs -get {url} .", "hdfs dfs -get {url} ."),
    "http": ("curl -LO {url}", "curl -LO {url}"),
    "https": ("curl -LO {url}", "curl -LO {url}"),
}


def missing(path: str | os.PathLike[str], what: str = "no such file or folder") -> str:
    """Returns what is wrong with a path that does not exist, and what to do."""
    text = os.fspath(path)
    if advice := _how_to_copy(text):
        return f"is not on this machine. {advice}"
    if set(text) & set("*?["):
        return f"{what}. A pattern that matches nothing stays as it is: check it, or name the folder."
    if re.match(r"~|\$\w|\$\{", text):
        return f"{what}. The shell did not expand it: remove the quotes, or write the path in full."
    if near := _sibling(text):
        return f"{what}. Did you mean {near!r}?"
    if _HUB_NAME.fullmatch(text) and not os.path.exists(text.split("/")[0]):
        return f"{what}. If it is a model of the Hugging Face Hub, download it: {_download(text)}"
    return f"{what}. Check the path."


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path that does not exist is a URL, or names another machine."""
    return bool(_how_to_copy(os.fspath(path)))


def _sibling(path: str) -> str:
    """Returns an existing path that differs in one name, which is like that in ``path``, or an empty string."""
    parts = Path(path).parts
    count = next((count for count in range(len(parts)) if not os.path.lexists(Path(*parts[: count + 1]))), 0)
    folder = Path(*parts[:count])
    try:
        near = nearest_name(parts[count], os.listdir(folder)) if parts else None
    except OSError:
        return ""
    found = folder / near / Path(*parts[count + 1 :]) if near else folder
    return str(found) if near and os.path.lexists(found) else ""


def nearest_name(name: str, names: Sequence[str]) -> str | None:
    """Returns the nearest name with the same suffix, or else the nearest one."""
    stem, suffix = os.path.splitext(name)
    near = nearest(stem, [each.removesuffix(suffix) for each in names if each.endswith(suffix)], 0.7)
    return near + suffix if near else nearest(name, names, 0.9)


def _how_to_copy(text: str) -> str:
    if found := _HUB.match(text):
        return f"Download it first: {_download(found[1])}"
    if url := _URL.fullmatch(text):
        scheme, rest = url["scheme"].lower(), url["rest"]
        if scheme == "file":
            return f"Write its path: /{rest}"
        name = rest.rstrip("/").rpartition("/")[2]
        commands = _COPY.get(scheme)
        if commands is None:
            return "Copy it to this machine first, and name the copy."
        is_folder = not re.search(r"\.[A-Za-z]\w*$", name)
        command = commands[is_folder].format(url=argument(f"{scheme}://{rest}"), name=argument(name or "."))
        return f"Copy it first: {command}"
    if _HOST.fullmatch(text):
        return f"Copy it first: scp -r {argument(text)} ."
    return ""


def _download(name: str) -> str:
    return f"hf download {name} --local-dir {name.rpartition('/')[2]}"
