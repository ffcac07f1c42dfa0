"""The same targets with edits that hypothesis chooses, and shrinks to the smallest where one is a find."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from system.fuzz.corpus import PARSERS, SEEDS, Seed
from system.fuzz.mutate import tokens_of
from system.fuzz.planted import wrong_exception
from system.fuzz.targets import Target, make_target, memory_folder

_FUZZ = settings(
    max_examples=50, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def contents(parser: str) -> Any:
    """Seeds with up to four edits of their pieces, and up to two of their bytes."""
    where = st.floats(0, 1, exclude_max=True)
    pieces = st.lists(
        st.tuples(where, st.integers(0, 3), st.lists(st.sampled_from(tokens_of(parser)), max_size=2)), max_size=4
    )
    raw = st.lists(st.tuples(where, st.integers(0, 4), st.binary(max_size=4)), max_size=2)
    return st.builds(edited, st.sampled_from(SEEDS[parser]), pieces, raw)


def edited(seed: Seed, pieces: list[tuple[float, int, list[bytes]]], raw: list[tuple[float, int, bytes]]) -> bytes:
    parts = list(seed.pieces)
    for where, removed, inserted in pieces:
        at = int(where * len(parts))
        parts[at : at + removed] = inserted
    content = seed.frame(b"".join(parts))
    for where, removed, inserted in raw:
        at = int(where * len(content))
        content = content[:at] + inserted + content[at + removed :]
    return content


def check(parser: str, target: Target) -> None:
    @_FUZZ
    @given(contents(parser))
    def run(content: bytes) -> None:
        target(content)

    run()


@pytest.mark.guarantee("hostile-bytes")
@pytest.mark.parametrize("parser", PARSERS)
def test_only_our_exceptions(parser: str) -> None:
    with tempfile.TemporaryDirectory(dir=memory_folder(), prefix="fuzz-") as folder:
        check(parser, make_target(parser, Path(folder)))


def test_a_planted_bug_is_caught() -> None:
    """Were nothing but sound files made, the tests above would say nothing."""
    with pytest.raises(IndexError):
        check("safetensors", wrong_exception)
