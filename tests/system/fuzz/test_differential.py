"""What this package accepts as safetensors, the library safetensors accepts: over mutated headers and files."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pytest
import safetensors
from system.fuzz.mutate import inputs
from system.fuzz.planted import lax
from system.fuzz.targets import make_rewrite, memory_folder

from ckpt_avg.errors import CheckpointFormatError
from ckpt_avg.formats.open import open_checkpoint

# What a refusal's message says → why.
_REASONS = {
    r"duplicate key": "a key twice",
    r"expected the fields .*": "unknown or missing fields",
    r"dtype F\S+ packs several": "several numbers in a byte",
    r"expected one of the dtypes": "a dtype that torch has not",
    r"expected a safetensors file or": "no object at byte 8",
    r"at most \d+ sizes": "a shape over the limits",
    r"overflows 63 bits": "a shape over 63 bits",
    r"expected a name of at most|has a NUL character": "a name over the limit, or with NUL",
    r"lone surrogate|no UTF-8|is no text": "a lone surrogate",
    r"expected data_offsets \[begin, end\]": "offsets that are none",
    r"leaves a hole|overlaps": "a hole or an overlap",
    r"not valid JSON": "JSON that Python does not take",
    r"nests too deeply": "deep nesting",
    r"a great many other values": "a great many other values",
    r"__metadata__: expected an object": "metadata that is no object of strings",
}


@dataclass
class Difference:
    """How two readers of safetensors differ: ``laxer`` holds what was taken here and refused there."""

    count: int = 0
    both: int = 0
    laxer: list[bytes] = field(default_factory=list)
    stricter: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


def theirs(content: bytes, path: Path) -> bool:
    """Whether both doors of the library are open to a file."""
    try:
        safetensors.deserialize(content)
        with safetensors.safe_open(path, framework="np"):
            return True
    except safetensors.SafetensorError:
        return False


def ours(content: bytes, path: Path) -> str:
    """Returns why a file is refused; nothing if it is accepted with the tensors and bytes that the library finds."""
    try:
        with open_checkpoint(path) as checkpoint:
            found = {
                name: (tensor.dtype.name, list(tensor.shape), checkpoint.files[0].read(tensor.offset, tensor.nbytes))
                for name, tensor in checkpoint.spec.tensors.items()
            }
    except CheckpointFormatError as error:
        return str(error)
    if theirs(content, path):
        read = {
            name: (entry["dtype"], entry["shape"], bytes(entry["data"]))
            for name, entry in safetensors.deserialize(content)
        }
        assert {name: (kind, shape, data) for name, (kind, shape, data) in found.items()} == read
    return ""


def compare(reader: Callable[[bytes, Path], str], count: int, seed: int) -> Difference:
    """Feeds both with the same inputs."""
    result = Difference()
    with tempfile.TemporaryDirectory(dir=memory_folder(), prefix="fuzz-") as folder:
        path = Path(folder) / "input.safetensors"
        rewrite = make_rewrite(path)
        for content in islice(inputs("safetensors", seed), count):
            rewrite(content)
            refusal, accepted = reader(content, path), theirs(content, path)
            result.count += 1
            result.both += accepted and not refusal
            if accepted and refusal:
                result.stricter[_reason(refusal)] += 1
                result.examples.setdefault(_reason(refusal), refusal)
            elif not accepted and not refusal:
                result.laxer.append(content)
    return result


def _reason(refusal: str) -> str:
    return next((why for pattern, why in _REASONS.items() if re.search(pattern, refusal)), refusal)


def assert_no_laxer(found: Difference, count: int) -> None:
    assert found.laxer[:20] == []
    assert found.count == count
    assert found.both > count // 200  # both answers are reached
    unexplained = found.stricter.keys() - set(_REASONS.values())
    assert not unexplained, {why: found.examples[why] for why in unexplained}


@pytest.mark.guarantee("not-laxer")
def test_nothing_is_accepted_that_safetensors_rejects() -> None:
    """And whatever it accepts and we do not, is refused for one of the known reasons."""
    assert_no_laxer(compare(ours, 4_000, seed=0), 4_000)


@pytest.mark.guarantee("not-laxer")
@pytest.mark.campaign
def test_nothing_of_a_million_is_accepted_that_safetensors_rejects(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    found = compare(ours, 1_000_000, seed=1)
    with capsys.disabled():
        print(f"\n{found.count:,} inputs, {found.both:,} accepted by both, in {time.monotonic() - start:.0f} s")
        print(json.dumps(dict(found.stricter.most_common()), indent=1))
        print(json.dumps(found.examples, indent=1))
    assert_no_laxer(found, 1_000_000)


@pytest.mark.guarantee("not-laxer")
def test_a_laxer_reader_is_caught() -> None:
    """A reader that trusts json and looks at no gaps, no fields and no shapes: the test above can fail."""
    found = compare(lambda content, _: "" if lax(content) else "refused", 500, seed=0)
    assert len(found.laxer) > 10
    with pytest.raises(AssertionError):
        assert_no_laxer(found, 500)
