"""Rules in a few letters: the options that they stand for, and the words that give these to `average`."""

from __future__ import annotations

import pytest

from ckpt_avg.cli.main import cli
from ckpt_avg.mean.weighting_rules import options_of_rule, parse_rules


@pytest.mark.parametrize(
    ("text", "by", "words"),
    [
        ("mean", "auto", ""),
        ("mean", "index", ""),
        ("minus-sqrt", "auto", "--weighting minus-sqrt"),
        ("linear", "step", "--weighting linear --weighting-by step"),
        ("ema:1000", "auto", "--weighting ema --half-life 1000"),
        ("ema:12.5%", "index", "--weighting ema --half-life 12.5% --weighting-by index"),
        ("power:0.1", "auto", "--weighting power --width 0.1"),
        ("power:0.10000000000000002", "auto", "--weighting power --width 0.10000000000000002"),
    ],
)
def test_the_words_for_average_give_the_same_options(text: str, by: str, words: str) -> None:
    """If a digit was lost, the printed command would make another file."""
    [(name, options)] = parse_rules(text, by).items()
    assert name == text
    assert options_of_rule(options) == words.split()
    given = cli.commands["average"].make_context("average", ["run", "-o", "out.safetensors", *words.split()]).params
    for field in ("weighting", "weighting_by", "width"):
        assert given[field] == getattr(options, field)
    assert str(given["half_life"]) == str(options.half_life)


def test_lists_and_text_are_the_same() -> None:
    assert parse_rules(["mean", "ema:5,linear"], "auto") == parse_rules(" mean , ema:5, linear", "auto")
