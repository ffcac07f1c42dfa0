"""Which tests show which guarantee: `pytest.mark.guarantee` on the tests, and the list in docs/guarantees.md.

``python tests/system/guarantees.py --write`` writes that list anew.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "guarantees.md"
HEADING = "## Tests\n"


def promised(page: str) -> list[str]:
    """Returns the names of all guarantees: in the page, each begins a heading or a row of a table."""
    return list(dict.fromkeys(re.findall(r"^(?:###|\|) `([\w-]+)`", page.partition(HEADING)[0], re.MULTILINE)))


def _names(*nodes: ast.expr) -> Iterator[str]:
    for node in nodes:
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.guarantee":
                yield from map(ast.literal_eval, call.args)


def shown_by() -> dict[str, dict[str, list[str]]]:
    """Returns the tests that carry a guarantee: guarantee → file → tests; no tests if the whole file carries it."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(TESTS.glob("**/test_*.py")):
        file = path.relative_to(TESTS).as_posix()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                for name in _names(*node.decorator_list):
                    found[name][file].append(node.name)
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
                for name in _names(node.value):
                    found[name][file]
    return found


def with_tests(page: str) -> str:
    """Returns the page with a list of tests that is up to date."""
    found = shown_by()
    rows = ["| guarantee | tests |", "|---|---|"]
    for name in promised(page):
        files = [
            f"`{file}`" + (": " if tests else "") + ", ".join(f"`{test}`" for test in tests)
            for file, tests in found[name].items()
        ]
        rows.append(f"| `{name}` | {'; '.join(files)} |")
    text, heading, rest = page.partition(HEADING)
    introduction = rest.partition("|")[0].rstrip()
    return f"{text}{heading}{introduction}\n\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    new = with_tests(PAGE.read_text())
    if "--write" in sys.argv[1:]:
        PAGE.write_text(new)
    else:
        print(new.partition(HEADING)[2])
