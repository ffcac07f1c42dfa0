"""Damaged and hostile bytes: no reader crashes, hangs, eats memory or raises anything but the documented exception."""

from __future__ import annotations

import io
import json
import signal
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from system.fuzz.campaign import MEMORY, SECONDS, Findings, run
from system.fuzz.corpus import PARSERS, SEEDS
from system.fuzz.mutate import inputs
from system.fuzz.planted import wrong_exception
from system.fuzz.targets import make_target

linux = pytest.mark.skipif(sys.platform != "linux", reason="address space is limited by Linux's own means")


def assert_nothing_found(found: Findings, count: int) -> None:
    assert found.finds == {}
    assert found.count == count
    assert 0 < found.accepted < count  # both answers are reached
    assert found.worst_seconds <= SECONDS
    assert found.worst_bytes <= MEMORY


@pytest.mark.guarantee("hostile-bytes")
@pytest.mark.parametrize("parser", PARSERS)
def test_only_our_exceptions(parser: str, tmp_path: Path) -> None:
    assert set(map(make_target(parser, tmp_path), islice(inputs(parser, 4), 300))) == {True, False}


@pytest.mark.guarantee("hostile-bytes")
@pytest.mark.slow
@pytest.mark.parametrize("parser", PARSERS)
def test_only_our_exceptions_in_bounded_time_and_memory(parser: str) -> None:
    assert_nothing_found(run(parser, 1_000), 1_000)


@pytest.mark.slow
@pytest.mark.parametrize("parser", PARSERS)
def test_the_peak_memory_of_each_input(parser: str) -> None:
    assert_nothing_found(run(parser, 100, seed=1, trace=True), 100)


@pytest.mark.guarantee("hostile-bytes")
@pytest.mark.campaign
@pytest.mark.parametrize("parser", PARSERS)
def test_a_million_inputs(parser: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(parser, 1_000_000, seed=2, timeout=3600)
    with capsys.disabled():
        print(f"\n{parser}: {json.dumps({key: value for key, value in vars(found).items() if key != 'finds'})}")
    assert_nothing_found(found, 1_000_000)


@pytest.mark.campaign
@pytest.mark.parametrize("parser", PARSERS)
def test_the_peak_memory_of_many_inputs(parser: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(parser, 20_000, seed=3, trace=True, timeout=3600)
    with capsys.disabled():
        print(f"\n{parser}: at most {found.worst_bytes:,} bytes, traced")
    assert_nothing_found(found, 20_000)


# --- the harness itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parser", PARSERS)
def test_mutations_are_many_and_repeat_with_their_seed(parser: str) -> None:
    """Else a campaign would try a few inputs a million times, or a find could not be had again."""
    first, again, other = ([*zip(range(500), inputs(parser, seed), strict=False)] for seed in (7, 7, 8))
    assert first == again != other
    assert len({content for _, content in first}) > 400
    assert max(len(content) for _, content in first) < 200_000


def test_a_reader_with_another_exception_is_caught() -> None:
    with pytest.raises(IndexError):
        list(map(wrong_exception, islice(inputs("safetensors", 4), 300)))


def test_torch_itself_loads_the_seeds() -> None:
    """The corpus is what torch would write, not what this package takes for it."""
    for parser in ("zip", "stream"):
        loaded = [
            torch.load(io.BytesIO(seed.content), weights_only=True) for seed in SEEDS[parser] if _plain(seed.pieces)
        ]
        assert len(loaded) >= 2
        for contents in loaded:
            weights = contents.get("model", contents)
            assert torch.equal(weights["w"], torch.arange(6.0).view(2, 3))


def _plain(pieces: tuple[bytes, ...]) -> bool:
    """Whether weights_only knows all its names: no numpy, no module, no opcode of protocol 5."""
    body = b"".join(pieces)
    return b"numpy" not in body and b"nn.modules" not in body and not body.startswith(b"\x80\x05")


@pytest.mark.guarantee("hostile-bytes")
@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    ("reader", "what"),
    [
        ("wrong exception", "IndexError"),
        ("endless loop", "TooSlowError"),
        ("trusted length", "MemoryError"),
        ("crash", f"signal {int(signal.SIGBUS)}"),
    ],
)
def test_a_planted_bug_is_caught(reader: str, what: str) -> None:
    """Were the harness blind, the tests above would say nothing."""
    found = run(reader, 60, limit=0.05, timeout=60)
    assert [kind for kind in found.finds if kind.startswith(what)], found.finds.keys()
    assert all(bytes.fromhex(content) for content in found.finds.values())


@pytest.mark.slow
def test_a_planted_allocation_is_measured() -> None:
    found = run("trusted length", 40, trace=True)
    assert found.worst_bytes > MEMORY
    assert any("bytes of memory" in kind for kind in found.finds)


@pytest.mark.slow
def test_a_silent_child_is_caught(tmp_path: Path) -> None:
    found = run("safetensors", 10_000_000, timeout=1)
    assert list(found.finds) == ["no answer in 1 s"]
