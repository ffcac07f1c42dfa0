"""docs/guarantees.md and the tests say the same: `pytest.mark.guarantee` names what a test shows."""

from __future__ import annotations

from system.guarantees import PAGE, promised, shown_by, with_tests


def test_each_guarantee_has_a_test() -> None:
    assert set(promised(PAGE.read_text())) - shown_by().keys() == set()


def test_markers_name_guarantees_of_the_page() -> None:
    assert shown_by().keys() - set(promised(PAGE.read_text())) == set()


def test_the_list_of_tests_is_up_to_date() -> None:
    assert with_tests(PAGE.read_text()) == PAGE.read_text(), "run: python tests/system/guarantees.py --write"
