"""The layers of the package: a module imports from lower layers only, or from its own package."""

import ast
from pathlib import Path

import ckpt_avg

SOURCE = Path(ckpt_avg.__file__).parent
LAYERS = (
    ("text", "limits", "version", "choices", "argument_types"),
    ("wording", "results"),
    ("errors", "progress", "tables"),
    ("engine", "progress_lines"),
    ("files", "machine", "distributed"),
    ("checkpoint",),
    ("formats.pickles",),
    ("formats.trainers",),
    ("formats",),
    ("runs", "mean", "user_code"),
    ("output", "batchnorm"),
    ("commands",),
    ("cli",),
)


def room(module: str) -> str:
    """The package or top-level module that a module of `ckpt_avg` is in, without the prefix."""
    words = module.split(".")[1:]
    return ".".join(words[:2] if words[:1] == ["formats"] and words[1:2] in (["pickles"], ["trainers"]) else words[:1])


def imports(path: Path) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    return {room(node.module or "") for node in nodes if (node.module or "").startswith("ckpt_avg.")}


def test_modules_import_from_lower_layers_only() -> None:
    """An upward or sideways import ties rooms together that a reader can otherwise take one at a time."""
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    paths = [path for path in SOURCE.rglob("*.py") if path not in (SOURCE / "__init__.py", SOURCE / "__main__.py")]
    homes = {path: room(".".join(("ckpt_avg", *path.relative_to(SOURCE).with_suffix("").parts))) for path in paths}
    wrong = [
        (path.name, to) for path, home in homes.items() for to in imports(path) - {home} if layer[to] >= layer[home]
    ]
    assert wrong == []
    assert {"batchnorm", "runs", "mean", "user_code"} <= imports(SOURCE / "commands" / "prepare.py")  # it sees imports


def test_only_the_command_line_knows_click() -> None:
    """The package can be used without the parts of the command line."""
    knowing = {
        path.relative_to(SOURCE).parts[0]
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
        if name.split(".")[0] == "click"
    }
    assert knowing == {"cli"}
