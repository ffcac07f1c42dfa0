"""The targets of this folder under atheris, libFuzzer for Python: coverage leads it where the mutator does not go.

    pip install atheris
    python tests/system/fuzz/fuzz_with_atheris.py PARSER [FOLDER_OF_INPUTS] [libFuzzer options]

For example ``… zip -max_total_time=300``. It runs until it finds something or is stopped. A find is written as
``crash-<digest>`` to the current folder; once it is understood, the smallest bytes of it become a test in `test_found`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

try:
    import atheris
except ImportError:
    sys.exit("expected the package atheris, got none. Install it: pip install atheris (it needs Linux or macOS).")

with atheris.instrument_imports(include=["ckpt_avg", "pickle", "json"]):
    from system.fuzz.corpus import PARSERS, SEEDS
    from system.fuzz.targets import make_target, memory_folder

SCRATCH = "--scratch="  # says to the process that fuzzes where to work; libFuzzer ends it without cleaning up


def main() -> int:
    """Starts the process that fuzzes, or is that process."""
    if len(sys.argv) < 2 or sys.argv[1] not in PARSERS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(PARSERS)} [FOLDER_OF_INPUTS] [libFuzzer options]")
    parser, options = sys.argv[1], sys.argv[2:]
    if options and options[0].startswith(SCRATCH):
        fuzz(parser, Path(options[0].removeprefix(SCRATCH)), options[1:])
    with tempfile.TemporaryDirectory(dir=memory_folder(), prefix="atheris-") as folder:
        return subprocess.call([sys.executable, __file__, parser, f"{SCRATCH}{folder}", *options])


def fuzz(parser: str, folder: Path, options: list[str]) -> None:
    """Runs the target of a parser from its seeds, or from a folder of inputs that the options name."""
    scratch, seeds = folder / "scratch", folder / "seeds"
    scratch.mkdir()
    seeds.mkdir()
    for number, seed in enumerate(SEEDS[parser]):
        (seeds / str(number)).write_bytes(seed.content)
    target = make_target(parser, scratch)

    def one(content: bytes) -> None:
        target(content)

    inputs = [] if any(not option.startswith("-") for option in options) else [str(seeds)]
    atheris.Setup([sys.argv[0], "-timeout=2", "-rss_limit_mb=1024", *options, *inputs], one)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
