"""The result of `compare` as text: a table of checkpoints, their cosines, and what is far off, in 80 columns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ckpt_avg.cli.shared_text import skipped_lines
from ckpt_avg.tables import WIDTH, shortened, table, wrapped
from ckpt_avg.text import distinct_names, escaped, plural

if TYPE_CHECKING:
    from ckpt_avg.commands.compare import CompareResult
    from ckpt_avg.commands.distances import ComparedCheckpoint, ComparedTensor

_MOST_COLUMNS = 12  # of a matrix of cosines
_MOST_TENSORS = 20
_ALIKE = 0.9  # cosines of checkpoints that are all above this say little


def comparison_text(
    result: CompareResult, *, tensors: bool = False, verbose: bool = False, width: float = WIDTH
) -> str:
    """Returns the text; with ``tensors`` those that moved most, with ``verbose`` the skipped files."""
    weights = sum(each.group == "weights" for each in result.tensors)
    lines = [
        f"{plural(len(result.checkpoints), 'checkpoint')}, {plural(result.elements, 'weight')} in "
        f"{plural(weights, 'tensor')}; norm of the mean {result.norm:.4g}",
        *_checkpoints(result, width),
        "",
        *_path(result),
        *_cosines(result),
    ]
    if tensors:
        lines += ["", *_tensors(result, width)]
    lines += ["", *_findings(result, width)]
    if verbose:
        lines += skipped_lines(result.skipped)
    return "\n".join(lines)


def _checkpoints(result: CompareResult, width: float) -> list[str]:
    far = {path for finding in result.findings for path in finding.checkpoints}
    unit = _unit(result)
    rows = [["checkpoint", unit, "norm", "to mean", "relative", "to previous", "statistics", ""]]
    for name, each in zip(_names(result), result.checkpoints, strict=True):
        cells = [_number(each, unit), _figure(each.norm), _figure(each.to_mean), _share(each.relative)]
        cells += [_figure(each.to_previous), _share(each.statistics_to_mean), "far off" if each.path in far else ""]
        rows.append([name, *cells])
    return table(rows, width, constant=[unit, "statistics"])


def _path(result: CompareResult) -> list[str]:
    shown = sum(not each.nonfinite for each in result.checkpoints)
    lines = []
    if shown > 2 and not math.isnan(result.straightness):
        lines.append(
            f"first to last: {result.straightness:.2f} of the path (straight 1, random walk "
            f"{(shown - 1) ** -0.5:.2f}, one point {1 / (shown - 1):.2f})"
        )
        lines.append(
            f"two main directions: {_share(result.shares[0])} and {_share(result.shares[1])} of the squared distances"
        )
    return lines


def _cosines(result: CompareResult) -> list[str]:
    count = len(result.checkpoints)
    known = [value for row in result.cosines for value in row if not math.isnan(value)]
    lowest = min(known, default=1.0)
    matrix, what = result.cosines, "cosines of the checkpoints"
    if lowest > _ALIKE and count > 2:
        matrix = result.centred_cosines
        least = math.floor(lowest * 1000) / 1000
        what = f"cosines of the differences from the mean (of the checkpoints: {least:g} or more)"
    if count > _MOST_COLUMNS:
        return [f"{what}: --json has them"]
    numbers = [_number(each, _unit(result)) for each in result.checkpoints]
    labels = (
        numbers if "-" not in numbers and max(map(len, numbers)) < 5 else [str(place + 1) for place in range(count)]
    )
    rows = [["", *labels]]
    rows += [[label, *(_cosine(value) for value in row[: place + 1]), *[""] * (count - place - 1)]
             for place, (label, row) in enumerate(zip(labels, matrix, strict=True))]  # fmt: skip
    return [f"{what}:", *table(rows)]


def _tensors(result: CompareResult, width: float) -> list[str]:
    lines = []
    for group, title in (("weights", "tensor"), ("statistics", "statistics")):
        found = [each for each in result.tensors if each.group == group]
        rows = [[title, "shape", "norm", "relative", "farthest", ""]]
        rows += [[escaped(each.name), *_tensor(each, result)] for each in found[:_MOST_TENSORS]]
        lines += table(rows, width) if found else []
        if len(found) > _MOST_TENSORS:
            lines.append(f"… and {len(found) - _MOST_TENSORS:,} more (--json lists all)")
    return lines


def _tensor(tensor: ComparedTensor, result: CompareResult) -> list[str]:
    known = [(distance, place) for place, distance in enumerate(tensor.to_mean) if not math.isnan(distance)]
    distance, place = max(known, default=(math.nan, 0))
    shape = "×".join(map(str, tensor.shape)) or "scalar"
    label = _number(result.checkpoints[place], _unit(result))
    farthest = _share(distance / tensor.norm if tensor.norm else math.nan)
    return [shape, _figure(tensor.norm), _share(tensor.relative), farthest,
            f"by {shortened(_names(result)[place], 16) if label == '-' else f'{_unit(result)} {label}'}"]  # fmt: skip


def _findings(result: CompareResult, width: float) -> list[str]:
    if not result.findings:
        return ["nothing is far off"]
    lines = ["far off:"]
    for finding in result.findings:
        lines += wrapped(f"- {finding.text}", width)
    return lines


def _unit(result: CompareResult) -> str:
    return "epoch" if all(each.step is None for each in result.checkpoints) else "step"


def _number(checkpoint: ComparedCheckpoint, unit: str) -> str:
    number = checkpoint.epoch if unit == "epoch" else checkpoint.step
    return "-" if number is None else str(number)


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.3g} %"


def _cosine(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.0f}"


def _names(result: CompareResult) -> list[str]:
    return [escaped(name) for name in distinct_names([each.path for each in result.checkpoints])]
