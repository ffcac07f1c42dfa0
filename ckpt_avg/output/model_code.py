"""The Python files next to weights that a configuration names as the code of the model. They are copied, never run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ckpt_avg.files.status import is_file
from ckpt_avg.output.side_file import json_of, text_in
from ckpt_avg.output.side_file_names import MODULES, PIPELINE

_CLASS = re.compile(r"(\w+)\.\w+")
_IMPORT = re.compile(
    r"^[ \t]*from[ \t]+\.(\w+)[ \t]+import|^[ \t]*from[ \t]+\.[ \t]+import[ \t]+([\w, \t]+)", re.MULTILINE
)


def find_code(found: Mapping[str, Path], notice: Callable[[str], None]) -> dict[str, Path]:
    """Returns the Python files that the side files name, and those that they import, by name.

    Args:
        found: the side files by name.
        notice: called if a named file is missing.
    """
    code: dict[str, Path] = {}
    for path in [each for name, each in found.items() if name.endswith(".json")]:
        config = json_of(path)
        wanted = _auto_map(config)
        for name in wanted:
            if not is_file(path.with_name(f"{name}.py")):
                notice(f"{path.parent}: {path.name} names {name}.py, which is not there")
        wanted += _parts_of(config) if path.name in (PIPELINE, MODULES) else []
        while wanted:
            name = wanted.pop()
            file = path.parent / f"{name}.py"
            if f"{name}.py" in code or not is_file(file):
                continue
            code[f"{name}.py"] = file
            folder = name[: name.rfind("/") + 1]
            imported = [each for pair in _IMPORT.findall(text_in(file)) for each in re.findall(r"\w+", " ".join(pair))]
            wanted += [folder + each for each in imported]
    return code


def _auto_map(config: Any) -> list[str]:
    """Returns the modules that ``auto_map`` names, except those of another repository: ``org/name--module.Class``."""
    mapped = config.get("auto_map") if isinstance(config, dict) else None
    classes = list(mapped.values()) if isinstance(mapped, dict) else [mapped]
    flat = [each for value in classes for each in (value if isinstance(value, list) else [value])]
    return [match[1] for each in flat if isinstance(each, str) and (match := _CLASS.fullmatch(each))]


def _parts_of(config: Any) -> list[str]:
    """Returns the modules of the parts that a pipeline names; most are those of a library, and no file."""
    if isinstance(config, list):  # modules.json
        types = [each.get("type") for each in config if isinstance(each, dict)]
        return [match[1] for each in types if isinstance(each, str) and (match := _CLASS.fullmatch(each))]
    pairs = config.items() if isinstance(config, dict) else ()
    modules = [
        ("" if key == "_class_name" else f"{key}/", value[0])
        for key, value in pairs
        if isinstance(value, list) and value and re.fullmatch(r"\w+", key)
    ]
    return [folder + name for folder, name in modules if isinstance(name, str) and re.fullmatch(r"\w+", name)]
