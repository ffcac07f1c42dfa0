"""Workers share their items and stop together."""

from __future__ import annotations

import threading

import pytest

from ckpt_avg.mean.workers import SharedItems, run_workers


def test_each_item_goes_to_one_worker() -> None:
    found: list[int] = []
    run_workers(4, iter(range(1000)), found.extend)
    assert sorted(found) == list(range(1000))


def test_the_first_error_is_raised_and_the_others_get_no_more_items() -> None:
    """Without it an error would be known only when every other block has been computed."""
    started, failed = threading.Barrier(3), threading.Event()
    endless = iter(int, 1)

    def work(items: SharedItems[int]) -> None:
        if started.wait(10) == 0:
            failed.set()
            raise ValueError("broken")
        failed.wait(10)
        for _ in items:
            pass

    with pytest.raises(ValueError, match="broken"):
        run_workers(3, endless, work)


def test_an_interrupt_stops_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ckpt_avg.mean.workers.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_workers(2, iter(int, 1), lambda items: [None for _ in items])
