"""Puts tables that the benchmarks printed into docs/benchmarks.md, below the comment with the name of their section.

python tests/benchmarks/run.py --only warm | tee LOG; python tests/benchmarks/page.py LOG...
"""

import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def filled(page: str, log: str) -> str:
    """Returns the page with the tables of a log; a section that printed no whole table is left as it was."""
    for section in log.split("\n## ")[1:]:
        name, *lines = section.splitlines()
        rows = [line for line in lines if line.startswith("|")]
        sizes = [line for line in lines if line.startswith("*")]
        if "Traceback" not in section and len(rows) > 2:
            new = "\n".join((f"<!-- {name} -->", "", *rows, "", *sizes[:1], ""))
            page = re.sub(rf"<!-- {name} -->\n(\n\|[^\n]*(\n\|[^\n]*)*\n\n\*[^\n]*\*\n)?", lambda _, new=new: new, page)
    return page


if __name__ == "__main__":
    text = PAGE.read_text()
    for path in sys.argv[1:]:
        text = filled(text, Path(path).read_text())
    PAGE.write_text(text)
