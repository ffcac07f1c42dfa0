"""What is shown of the progress: exact lines by a clock of the test's own, on a terminal and in a log."""

from __future__ import annotations

import io
import sys

import pytest
from recorded import on_screen

from ckpt_avg.progress import Phase
from ckpt_avg.progress_lines import Lines, duration, shown

GB = 10**9


class Shown:
    """Lines that are drawn when the test says so, at the time that it says."""

    def __init__(self, *, is_terminal: bool) -> None:
        self.time = 100.0
        self.stream = io.StringIO()
        self.lines = Lines(self.stream, is_terminal=is_terminal, clock=lambda: self.time)
        self.lines._ended.set()  # no thread of its own draws

    def after(self, seconds: float) -> str:
        """What is written next, so many seconds later, if the state is drawn."""
        self.time += seconds
        return self.written(self.lines.draw)

    def written(self, what: object, *arguments: object, **options: object) -> str:
        self.stream.seek(0)
        self.stream.truncate()
        what(*arguments, **options)  # type: ignore[operator]
        return self.stream.getvalue()


def test_a_phase_is_redrawn_and_leaves_its_line() -> None:
    screen = Shown(is_terminal=True)
    screen.lines.phase(Phase("opening checkpoints"))
    screen.lines.step(Phase("opening checkpoints", 8, "checkpoints"))
    assert screen.after(0.25) == "\r[1/…] opening checkpoints: 0.2 s, 0 %"
    screen.lines.advance(2)
    assert on_screen(screen.after(0.25)) == ["[1/…] opening checkpoints: 25 %, 4 checkpoints/s, 1.5 s left"]
    screen.lines.advance(6)
    screen.time += 0.5
    done = screen.written(screen.lines.phase, Phase("averaging 8 × 1.0 GB", 8 * GB, "bytes", left=1))
    assert on_screen(done) == ["[1/3] opening checkpoints: 1.0 s, 8 checkpoints/s", ""]
    screen.lines.advance(2 * GB)
    assert on_screen(screen.after(0.5)) == ["[2/3] averaging 8 × 1.0 GB: 25 %, 4.0 GB/s, 1.5 s left"]
    screen.lines.advance(6 * GB)
    screen.time += 1.5
    done = screen.written(screen.lines.phase, Phase("completing the output, 1.0 GB", left=0))
    assert on_screen(done) == ["[2/3] averaging 8 × 1.0 GB: 2.0 s, 4.0 GB/s", ""]
    screen.time += 0.4
    assert screen.written(screen.lines.close, failed=False) == "[3/3] completing the output, 1.0 GB: 0.4 s\n"


def test_results_of_a_sweep_come_with_their_windows() -> None:
    screen = Shown(is_terminal=True)
    screen.lines.phase(Phase("measuring 20 windows", 20, "windows", left=0))
    screen.lines.step(Phase("averaging 12 × 1.0 GB", 12 * GB, "bytes"))
    screen.lines.advance(6 * GB)
    assert on_screen(screen.after(2)) == ["[1/1] window 1 of 20, averaging 12 × 1.0 GB: 50 %, 3.0 GB/s"]
    screen.lines.step(Phase("refreshing", 32, "batches"))
    screen.lines.step(Phase("measuring"))
    screen.time += 2
    found = screen.written(screen.lines.measured, "the last 1", {"accuracy": 0.97123456, "loss": 0.1})
    assert on_screen(found) == ["window 1 of 20, the last 1: accuracy 0.971235, loss 0.1, 4.0 s", ""]
    screen.lines.step(Phase("refreshing", 32, "batches"))
    screen.lines.advance(8)
    assert on_screen(screen.after(1)) == ["[1/1] window 2 of 20, refreshing: 25 %, 8 batches/s, 75 s left"]
    assert on_screen(screen.after(9))[0].endswith("72 s left"), "a window that takes longer does not promise less"
    screen.lines.step(Phase("measuring"))
    screen.lines.measured("the last 2", {"accuracy": 1.0})
    known = screen.written(screen.lines.measured, "the last 3", {"accuracy": 1.0})
    assert on_screen(known) == ["window 3 of 20, the last 3: accuracy 1, known before", ""], "from a file of --resume"
    screen.lines.step(Phase("refreshing", 32, "batches"))
    assert on_screen(screen.after(0))[0].endswith(", 1 min 59 s left"), "17 windows, of 7 s each"
    for number in range(4, 21):
        screen.lines.measured(f"the last {number}", {"accuracy": 1.0})
    assert screen.written(screen.lines.close, failed=False) == "[1/1] measuring 20 windows: 14 s, 0.7 s each\n"


def test_a_single_measurement_is_in_the_line_of_its_phase() -> None:
    screen = Shown(is_terminal=True)
    screen.lines.phase(Phase("measuring epoch_20.pt", left=0))
    screen.lines.step(Phase("measuring"))
    assert screen.after(1.5) == "\r[1/1] measuring epoch_20.pt: 1.5 s"
    assert screen.written(screen.lines.measured, "epoch_20.pt", {"loss": 0.25}) == ""
    assert on_screen(screen.written(screen.lines.close, failed=False)) == [
        "[1/1] measuring epoch_20.pt: loss 0.25, 1.5 s",
        "",
    ]


def test_of_many_metrics_the_first_are_shown() -> None:
    """Those that decide come first."""
    screen = Shown(is_terminal=True)
    screen.lines.phase(Phase("measuring 2 windows", 2, "windows", left=0))
    screen.lines.step(Phase("measuring"))
    found = screen.written(screen.lines.measured, "x" * 99, {f"metric_{number}": 0.123456789 for number in range(12)})
    assert found.endswith(": metric_0 0.123457, metric_1 0.123457, metric_2 0.123457, … 9 more, 0.00 s\n")
    assert len(found) < 140


def test_a_run_that_is_over_at_once_leaves_nothing() -> None:
    """Before the first line would be drawn, also if it fails."""
    for failed in (True, False):
        screen = Shown(is_terminal=True)
        screen.lines.phase(Phase("opening checkpoints"))
        screen.lines.phase(Phase("averaging 8 × 1.0 MB", 8_000_000, "bytes", left=0))
        assert screen.written(screen.lines.close, failed=failed) == ""


def test_an_interrupt_ends_the_line() -> None:
    """The message that follows begins on a line of its own; the percentage tells where it was."""
    screen = Shown(is_terminal=True)
    screen.lines.phase(Phase("averaging 8 × 1.0 GB", 8 * GB, "bytes", left=1))
    screen.lines.advance(2 * GB)
    screen.after(3)
    ended = on_screen(screen.written(screen.lines.close, failed=True))
    assert ended == ["[1/2] averaging 8 × 1.0 GB: stopped after 3.0 s, 25 %", ""]
    assert screen.after(1) == "", "nothing is drawn afterwards"


def test_notices_and_what_the_user_prints_stay_above_the_line() -> None:
    screen = Shown(is_terminal=True)
    screen.lines.phase(Phase("measuring epoch_20.pt", left=0))
    screen.after(1)
    assert on_screen(screen.written(screen.lines.notice, "one\ntwo")) == [r"Notice: one\ntwo", ""]
    screen.after(1)
    assert on_screen(screen.written(screen.lines.pass_on, "half a li")) == ["half a li"]
    assert screen.after(1) == "", "the user's own line is not drawn over"
    assert screen.written(screen.lines.pass_on, "ne\n") == "ne\n"
    assert screen.after(1) == "\r[1/1] measuring epoch_20.pt: 4.0 s"


def test_a_long_line_fits_into_80_columns() -> None:
    screen = Shown(is_terminal=True)
    screen.lines.phase(Phase(f"measuring {'x' * 100}.pt", left=0))
    line = screen.after(1).removeprefix("\r")
    assert len(line) == 79
    assert (line[:15], line[-6:]) == ("[1/1] measuring", " 1.0 s")


def test_a_log_has_lines_only_of_what_takes_long() -> None:
    """No carriage return; a short run leaves nothing but its results, and a long phase a line every half minute."""
    log = Shown(is_terminal=False)
    log.lines.phase(Phase("opening checkpoints"))
    assert log.after(29) == ""
    assert log.written(log.lines.phase, Phase("averaging 8 × 99 GB", 800 * GB, "bytes", left=1)) == ""
    log.lines.advance(10 * GB)
    assert log.after(29) == ""
    assert log.after(1) == "[2/3] averaging 8 × 99 GB: 1 %, 333 MB/s, 39 min 30 s left\n"
    assert log.after(29) == ""
    log.lines.advance(790 * GB)
    assert log.written(log.lines.phase, Phase("measuring 2 windows", 2, "windows", left=0)) == (
        "[2/3] averaging 8 × 99 GB: 59 s, 14 GB/s\n"
    )
    log.lines.step(Phase("measuring"))
    found = log.written(log.lines.measured, "the last 1", {"loss": 0.5})
    assert found == "window 1 of 2, the last 1: loss 0.5, 0.00 s\n"
    assert log.written(log.lines.close, failed=True) == ""


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(quiet=True) as progress:
        progress.phase(Phase("averaging", 2, "windows"))
        progress.measured("the last 1", {"loss": 0.5})
        progress.notice("there is something to know")
    assert capsys.readouterr() == ("", "")


def test_a_broken_stderr_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Broken())
    with shown() as progress:
        progress.phase(Phase("measuring 2 windows", 2, "windows"))
        progress.measured("the last 1", {"loss": 0.5})
        progress.notice("there is something to know")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0.00 s"),
        (0.094, "0.09 s"),
        (0.096, "0.1 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (99.6, "1 min 40 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
