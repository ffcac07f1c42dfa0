"""Other dtypes and formats of the same total bytes: bytes per second, as a ratio to float32 safetensors."""

from __future__ import annotations

from pathlib import Path

from checking import difference, same
from inputs import Form, files_of, write_random
from programs import ours
from rounds import Runs, Setup, importing, in_turn, median, output_of, remove, row, table, walls

CASES: dict[str, tuple[str, Form]] = {
    "bfloat16 safetensors": ("bfloat16", "safetensors"),
    "float16 safetensors": ("float16", "safetensors"),
    "float32 `torch.save`": ("float32", "zip"),
    "float32 safetensors, 4 shards with an index": ("float32", "shards"),
}
PLAIN, IMPORT = "float32 safetensors", "import torch"


def measure_formats(setup: Setup) -> None:
    """Each format is measured beside float32 safetensors, in the same rounds, and its output is checked."""
    if not setup.has_room("formats", (2 * setup.checkpoints + 2) * setup.nbytes):
        return
    print(
        f"{setup.checkpoints} checkpoints of {setup.nbytes / 1e9:.2f} GB in each format, page cache warm, "
        f"medians of {setup.rounds} rounds. Bytes are those of the inputs; ratios are to float32 safetensors in the "
        "same rounds.\n"
    )
    table(
        *("format", "wall, s", "MB/s", "ratio of MB/s"),
        *("without `import torch`, s", "MB/s", "ratio of MB/s", "peak RSS, MiB", "output"),
    )
    for name, (dtype, form) in CASES.items():
        folder, outputs = setup.scratch(), setup.scratch()
        inputs = write_random(folder, setup.checkpoints, setup.nbytes, dtype=dtype, form=form)
        programs = {IMPORT: importing("torch"), PLAIN: ours(setup.plain()), name: ours(inputs)}
        runs = in_turn(programs, setup.rounds, outputs)
        plain, mine = (output_of(each, programs, outputs) for each in (PLAIN, name))
        if name == next(iter(CASES)):
            if (found := difference(plain, setup.plain())).wrong:
                raise AssertionError(f"{PLAIN}: {found}")
            _row(PLAIN, runs, setup.plain(), setup.plain(), "exact")
        if dtype == "float32":
            checked, right = "bits of float32 safetensors", same(mine, plain)
        else:
            found = difference(mine, inputs)
            checked, right = str(found), not found.wrong
        if not right:
            raise AssertionError(f"{name}: {checked}")
        _row(name, runs, inputs, setup.plain(), checked)
        remove(folder)
        remove(outputs)


def _row(name: str, runs: Runs, inputs: list[Path], plain: list[Path], checked: str) -> None:
    mine, theirs = (sum(file.stat().st_size for file in files_of(paths)) / 1e6 for paths in (inputs, plain))
    cells: list[object] = []
    for without in (None, runs[IMPORT]):
        seconds, reference = walls(runs[name], without), walls(runs[PLAIN], without)
        relative = median(mine / one / (theirs / other) for one, other in zip(seconds, reference, strict=True))
        cells += [median(seconds), f"{mine / median(seconds):.0f}", relative]
    row(name, *cells, f"{max(one.peak for one in runs[name]):.0f}", checked)
