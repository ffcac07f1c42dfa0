"""A signal at any moment ends a run with its exit code and no litter.

`test_output` sends signals at chosen system calls, and to commands; here they come at moments spread over a run.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from pathlib import Path

import pytest
from system.faults.outputs import TIGHT, Averaging, begin, few_or, litter, make_averaging, state_after
from system.faults.runs import Ended, Runs

pytestmark = pytest.mark.slow

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Averaging:
    """Three small checkpoints."""
    return make_averaging(tmp_path_factory.mktemp("sources"), 300_000)


def interrupt(
    runs: Runs,
    run: Averaging,
    output: Path,
    number: int,
    hits: int,
    *,
    unnamed: bool | None = None,
    wrong: tuple[str, ...] = (),
) -> tuple[Counter[str], list[str]]:
    """Sends a signal at moments spread over runs, until so many were hit.

    In turn with an old output and without one, and with `O_TMPFILE` and without, unless ``unnamed`` says so. Returns
    how often each state of the output was found, and what was wrong.
    """
    wrong = (*wrong, "writing_slowly")
    usual = []
    for _ in range(1 if hits < 10 else 3):
        options = begin(output, overwrite=True)
        usual.append(runs.run(*run.command(output, *TIGHT, *options), wrong=wrong).seconds)
    rng = random.Random(number)
    found: Counter[str] = Counter()
    complaints = []
    while found["hit"] < hits and found["runs"] < 4 * hits:
        overwrite = found["runs"] % 2 == 1
        can_be_unnamed = found["runs"] // 2 % 2 == 0 if unnamed is None else unnamed
        # In turn from equal parts of the duration, so that none is skipped.
        moment = (found["runs"] % hits + rng.random()) / hits * sorted(usual)[len(usual) // 2]
        arguments = run.command(output, *TIGHT, *begin(output, overwrite=overwrite))
        ended = runs.run(*arguments, signalled=(number, moment), unnamed=can_be_unnamed, wrong=wrong)
        left = state_after(output, run.new, overwrite)
        found[left] += 1
        found["runs"] += 1
        found["hit"] += ended.code != 0
        found["litter"] += len(litter(output))
        fact = complaint(ended, number, left)
        complaints += [f"{signal.Signals(number).name} after {moment:.3f} s: {fact}\n{ended.error}"] if fact else []
    return found, complaints


def complaint(ended: Ended, number: int, left: str) -> str | None:
    """Returns what is wrong with the exit."""
    if ended.code == 0:
        return None if left == "new" else f"exit 0, and the output is {left}"
    if number == signal.SIGKILL:
        return None if ended.code == -number else f"exit {ended.code}"
    if ended.code != 128 + number:
        return f"exit {ended.code}"
    return "a traceback" if "Traceback" in ended.error or "Error: " not in ended.error else None


@pytest.mark.guarantee("signals")
@pytest.mark.parametrize("hits", few_or(200, 6))
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_at_a_random_moment_ends_the_run_cleanly(
    runs: Runs, run: Averaging, output: Path, number: int, hits: int
) -> None:
    found, complaints = interrupt(runs, run, output, number, hits)
    print(found)
    assert complaints == []
    assert (found["partial"], found["lost"], found["litter"]) == (0, 0, 0), found
    assert found["hit"] == hits


@pytest.mark.guarantee("all-or-nothing")
@pytest.mark.campaign
def test_kills_at_many_random_moments_leave_the_old_output_or_the_new_without_unnamed_files(
    runs: Runs, run: Averaging, output: Path
) -> None:
    """Where the system has no O_TMPFILE; a file under a hidden name may be left then."""
    found, complaints = interrupt(runs, run, output, signal.SIGKILL, 200, unnamed=False)
    print(found)
    assert complaints == []
    assert (found["partial"], found["lost"]) == (0, 0), found
    assert found["hit"] == 200


@pytest.mark.guarantee("signals")
def test_signals_catch_a_writer_that_leaves_its_hidden_file(runs: Runs, run: Averaging, output: Path) -> None:
    """A control of what counts as litter."""
    found, _ = interrupt(runs, run, output, signal.SIGTERM, 6, unnamed=False, wrong=("keeping_hidden_files",))
    assert found["litter"] >= 1, found


def test_signals_catch_a_writer_that_opens_the_output_itself(runs: Runs, run: Averaging, output: Path) -> None:
    """A control of what counts as partial."""
    found, _ = interrupt(runs, run, output, signal.SIGINT, 6, wrong=("in_place",))
    assert found["partial"] + found["lost"] >= 1, found


def test_signals_catch_a_command_that_ends_with_another_code(runs: Runs, run: Averaging, output: Path) -> None:
    """A control of the exit code, with a command that takes every signal for Ctrl-C."""
    _, complaints = interrupt(runs, run, output, signal.SIGTERM, 2, wrong=("taking_signals_for_one",))
    assert len(complaints) == 2
    assert all("exit 130" in fact for fact in complaints), complaints
