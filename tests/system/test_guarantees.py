"""docs/guarantees.md, docs/cases.md and the tests say the same: `pytest.mark.guarantee` names what a test shows."""

from __future__ import annotations

import re

from system.guarantees import PAGE, TESTS, promised, shown_by, with_tests


def test_each_guarantee_has_a_test() -> None:
    assert set(promised(PAGE.read_text())) - shown_by().keys() == set()


def test_markers_name_guarantees_of_the_page() -> None:
    assert shown_by().keys() - set(promised(PAGE.read_text())) == set()


def test_the_list_of_tests_is_up_to_date() -> None:
    assert with_tests(PAGE.read_text()) == PAGE.read_text(), "run: python tests/system/guarantees.py --write"


def test_the_tests_that_the_page_of_cases_names_exist() -> None:
    """A case whose test was renamed or removed would look as if it were held."""
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE.with_name("cases.md").read_text())
    assert len(named) > 40
    sources = {file: (TESTS / file).read_text() for file, _ in named}
    assert [f"{file}::{name}" for file, name in named if f"\ndef {name}(" not in sources[file]] == []
