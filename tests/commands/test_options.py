"""One declaration per option: the Python keywords, the command line and their help follow from it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import click
import pytest

import ckpt_avg
from ckpt_avg.cli.help import HEADINGS
from ckpt_avg.cli.main import cli
from ckpt_avg.commands import requests
from ckpt_avg.commands.requests import AverageRequest, RecordedOptions, options_of
from ckpt_avg.errors import UsageError

# The options that say how results are shown, or that a Python caller has in another place.
OF_THE_COMMAND_LINE = {
    "app_dir",
    "card",
    "as_json",
    "color",
    "version",
    "wide",
    "output",
    "overwrite",
    "plot",
    "quiet",
    "rank_timeout",
    "report",
    "tensors",
    "verbose",
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "average": ckpt_avg.average,
    "check": ckpt_avg.check,
    "inspect": ckpt_avg.inspect,
    "compare": ckpt_avg.compare,
    "refresh-bn": ckpt_avg.refresh_weights,
    "soup": ckpt_avg.soup,
    "sweep": ckpt_avg.sweep,
    "verify": ckpt_avg.verify,
}
commands = pytest.mark.parametrize("name", FUNCTIONS)


@commands
def test_every_option_reaches_the_function_with_the_same_default(name: str) -> None:
    command, signature = cli.commands[name], inspect.signature(FUNCTIONS[name]).parameters
    context = click.Context(command)
    options = [each for each in command.params if isinstance(each, click.Option)]
    # Of `verify`, --sources is a flag before the sources.
    shared = [each for each in options if each.name in signature and each.name not in ("output", "sources")]
    assert {each.name for each in options} - {each.name for each in shared} <= OF_THE_COMMAND_LINE | {"sources"}
    for each in shared:
        assert each.type_cast_value(context, each.get_default(context)) == signature[str(each.name)].default, each.name


@commands
def test_every_option_is_explained_in_few_words(name: str, in_process: Callable[..., tuple[int, str, str]]) -> None:
    """Under a heading, as an imperative of three to ten words."""
    code, out, _ = in_process(name, "--help")
    assert code == 0
    for option in cli.commands[name].params:
        if isinstance(option, click.Option):
            assert max(option.opts, key=len) in out
            assert option.help is not None
            assert option.help.endswith("."), option.name
            assert 3 <= len(option.help.split()) <= 11, option.help
            assert f"\n{option.heading}:\n" in out  # type: ignore[attr-defined]
    assert max(map(len, out.splitlines())) <= 80


@commands
def test_the_docstring_explains_every_argument(name: str) -> None:
    """For `help()`: each with its text, and with its choices where it has some."""
    function = FUNCTIONS[name]
    parameters, text = inspect.signature(function).parameters, function.__doc__ or ""
    assert "The fields of" not in text
    explained = re.findall(r"^ {8,}(\w+): ", text, re.MULTILINE)
    assert [each for each in explained if each in parameters] == list(parameters)
    assert name != "average" or "``bfloat16``" in text


def test_an_unknown_keyword_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(
        TypeError, match=r"average\(\) got an unexpected keyword argument 'evry'\. Did you mean 'every'\?"
    ):
        ckpt_avg.average("run", "out", evry=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"average\(\) missing a required argument: 'output'"):
        ckpt_avg.average("run")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"average\(\) too many positional.* Name all but sources and output\.$"):
        ckpt_avg.average("run", "out", 8)  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"check\(\) got an unexpected keyword argument 'bn'\.$"):
        ckpt_avg.check("run", bn="keep")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "--dtype: 'bf16' is not one of keep, float64, float32, bfloat16, float16. Did you mean "),
        (
            {"dtype": "fp32"},
            "--dtype: 'fp32' is not one of keep, float64, float32, bfloat16, float16. Did you mean 'float32'",
        ),
        ({"io": "direct"}, "--io: 'direct' is not one of auto, mmap, pread."),
        ({"bn_batches": 0}, "--bn-batches: 0 is out of range. Use 1 or more."),
        ({"threads": 2000}, "--threads: 2,000 is out of range. Use 1 to 1,024."),
        ({"device": "cuda:300"}, "--device: 'cuda:300' cannot be used. Use auto, cpu, cuda or cuda:N."),
        ({"ema": True, "state_key": "net"}, "--ema and --state-key net: both choose the weights. Use one of them."),
    ],
)
def test_a_value_that_is_not_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        AverageRequest("run", "out", **options)
    assert str(caught.value).startswith(message)


def test_none_means_the_default() -> None:
    """So a caller can pass on what it was not given."""
    given = {option.name: None for _, option in options_of(AverageRequest) if option.kw_only}
    found, expected = AverageRequest("run", "out", **given), AverageRequest("run", "out")
    assert all(getattr(found, name) == getattr(expected, name) for name in given)


@pytest.mark.parametrize(
    "recorded",
    [
        {"dtype": "int4"},
        {"dtype": None},
        {"ema": 1},
        {"ema": True, "state_key": "net"},
        {"state_key": 3},
        {"allow_nonfinite": "yes"},
        {"threads": 4},
        {"unknown": None},
    ],
    ids=str,
)
def test_recorded_options_that_are_not_valid(recorded: dict[str, Any]) -> None:
    """The metadata of a file is not to be trusted; a later version may record what this one does not know."""
    assert RecordedOptions.read(recorded) is None


def test_what_is_recorded_can_be_read_again() -> None:
    request = AverageRequest("run", "out", dtype="float64", non_float="last", strip_prefix="m.", threads=3)
    found = RecordedOptions.read(RecordedOptions.values(request))
    assert found == RecordedOptions(dtype="float64", non_float="last", strip_prefix="m.")


def test_the_list_of_commands_cuts_no_summary(in_process: Callable[..., tuple[int, str, str]]) -> None:
    out = in_process("--help")[1]
    assert max(map(len, out.splitlines())) <= 80
    assert re.findall(r"^  ([a-z-]+)  +[A-Z].*\.$", out.partition("Commands:")[2], re.MULTILINE) == list(cli.commands)
    assert "...\n" not in out.partition("Commands:")[2]


def test_everyday_options_come_first(in_process: Callable[..., tuple[int, str, str]]) -> None:
    first = re.search(r"^Everyday options:\n(.*?)\n\n", in_process("average", "--help")[1], re.DOTALL | re.MULTILINE)
    assert first is not None
    everyday = ["--output", "--last", "--best", "--model", "--data", "--bn", "--eval", "--dry-run"]
    assert re.findall(r"^  (?:-\w, )?(--[\w-]+)", first[1], re.MULTILINE) == everyday


def test_every_heading_is_the_same_everywhere() -> None:
    kinds = [each for each in vars(requests).values() if isinstance(each, type) and each.__name__.endswith("Request")]
    assert len(kinds) >= 9
    headings = {heading for kind in kinds for heading, option in options_of(kind) if option.metadata.get("help")}
    assert headings <= set(HEADINGS)
