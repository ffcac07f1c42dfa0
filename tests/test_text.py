"""Names and lists in messages: escaped, cut, counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt_avg.text import argument, distinct_names, escaped, listing, plural, quote, safe_text, size, type_of


@pytest.mark.parametrize("name", ["w", "", "é", "日本語", "it's", 'a"b', 3, None, (1, 2), [1], b"x", 1.5])
def test_short_names_are_their_repr(name: object) -> None:
    assert quote(name) == repr(name)


@pytest.mark.parametrize("name", ["\x1b[31m", "a\nb", "\0", "\x7f", "\u202e", "\ud800", "\u2028", b"\xff", "\r"])
def test_control_characters_never_come_through(name: object) -> None:
    """No escape sequence, line break, direction mark or lone surrogate reaches a terminal."""
    assert quote(name).isprintable()
    assert quote(name).encode("utf-8")


def test_a_path_is_shown_as_its_text() -> None:
    assert quote(Path("a/b c.pt")) == "'a/b c.pt'"


@pytest.mark.parametrize("length", [118, 119, 1000, 10**6])
def test_long_names_are_cut_and_counted(length: int) -> None:
    text = quote("begin" + "x" * (length - 8) + "end")
    if length + 2 <= 120:
        assert text == repr("begin" + "x" * (length - 8) + "end")
    else:
        assert text.startswith("'begin")
        assert "…" in text
        assert text.endswith(f"end' ({length + 2} characters)")
        assert len(text) <= 150


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.pt", "a/y.pt"], ["x.pt", "y.pt"]),
        (["r/a/x.pt", "r/b/x.pt"], ["a/x.pt", "b/x.pt"]),
        (["a/w/x.pt", "b/w/x.pt"], ["a/w/x.pt", "b/w/x.pt"]),
        (["x.pt", "/s/r/x.pt", "/t/r/x.pt"], ["x.pt", "s/r/x.pt", "t/r/x.pt"]),
        (["/x", "x"], ["/x", "x"]),
        (["x", "x"], ["x", "x"]),
    ],
)
def test_as_many_folders_as_tell_names_apart(paths: list[str], names: list[str]) -> None:
    assert distinct_names([Path(path) for path in paths]) == names


def test_names_can_be_shown_without_quotes() -> None:
    assert escaped("it's") == "it's"
    assert escaped(Path("a\nb")) == "a\\nb"
    assert escaped("begin" + "x" * 200 + "end").endswith("xend (208 characters)")


def test_arguments_of_a_command_to_paste() -> None:
    assert argument(Path("a b's.pt")) == "'a b'\"'\"'s.pt'"
    assert argument("plain/path.pt") == "plain/path.pt"
    assert argument("a\nb") == r"'a\nb'"
    assert argument("x" * 501) == quote("x" * 501)


def test_a_number_too_long_to_print_is_described() -> None:
    """Python refuses to print integers over 4,300 digits; a message about one must still come out."""
    for number in (10**5000, -(10**5000), (1, 10**5000), {"a": 10**5000}):
        assert quote(number).isprintable()
        assert len(quote(number)) <= 150


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, ""),
        (1, "0"),
        (3, "0, 1, 2"),
        (20, ", ".join(map(str, range(20)))),
        (21, ", ".join(map(str, range(20))) + ", … and 1 more"),
        (332, ", ".join(map(str, range(20))) + ", … and 312 more"),
        (5020, ", ".join(map(str, range(20))) + ", … and 5,000 more"),
    ],
)
def test_lists_show_at_most_twenty(count: int, expected: str) -> None:
    assert listing(map(str, range(count))) == expected


def test_the_separator_of_a_list() -> None:
    assert listing(["a", "b"], separator="\n") == "a\nb"
    assert listing(map(str, range(22)), separator="; ").endswith("19; … and 2 more")


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1,023 bytes"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20, "1.0 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (2**53, "8192.0 TiB"),
    ],
)
def test_sizes(count: int, expected: str) -> None:
    assert size(count) == expected


@pytest.mark.parametrize(
    ("count", "noun", "expected"),
    [
        (0, "tensor", "0 tensors"),
        (1, "tensor", "1 tensor"),
        (3000, "tensor", "3,000 tensors"),
        (1, "entry", "1 entry"),
        (2, "entry", "2 entries"),
        (2, "key", "2 keys"),
        (2, "byte", "2 bytes"),
    ],
)
def test_plurals(count: int, noun: str, expected: str) -> None:
    assert plural(count, noun) == expected


def test_types_have_their_article() -> None:
    assert [type_of(value) for value in ("", 1, object(), None)] == ["a str", "an int", "an object", "None"]


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize(
    "kind", [tuple, list, lambda pair: {"a": pair[0], "b": pair[1]}], ids=["tuples", "lists", "dicts"]
)
def test_quoting_never_takes_longer_than_what_it_shows(kind: Callable[[tuple[object, object]], object]) -> None:
    """A value that a few bytes of pickle describe can have a text of 2⁴⁰ parts."""
    value: object = "x"
    for _ in range(40):
        value = kind((value, value))
    assert len(quote(value)) < 200
    assert len(quote(list(range(10**6)))) < 200
    assert len(quote("x" * 10**6)) < 200


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本語\ttab\nline", "plain é 日本語\\ttab\nline"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("over\rwritten", "over\\rwritten"),
        ("\x07\x00\x7f\x9b", "\\x07\\x00\\x7f\\x9b"),
        ("\u202egnp.tp", "\\u202egnp.tp"),
        ("\udcff", "\\udcff"),
        ("it's", "it's"),
        ("", ""),
    ],
)
def test_text_for_a_terminal(text: str, shown: str) -> None:
    """Lines stay; whatever else moves a cursor or a direction shows escaped, and nothing else changes."""
    assert safe_text(text) == shown
    assert safe_text(shown) == shown
