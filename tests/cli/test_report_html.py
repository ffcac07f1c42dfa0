"""The report as a page: nothing from outside, nothing of a name becomes markup, readable colours, a bounded size."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from cli.reports import made_report
from commands.json_schema import problems
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_avg.cli.report_html import report_html
from ckpt_avg.cli.report_style import STYLE
from ckpt_avg.cli.svg_charts import Marks, Row, heat_map, line_chart, row_chart
from ckpt_avg.output.paths import HTML_MARK

VOID = {"meta", "br"}
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text())


class Reader(HTMLParser):
    """Reads a page, and fails if an element is not closed."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def test_the_made_reports_are_such_as_the_command_writes() -> None:
    """If it failed, the tests of the page would be about something else."""
    assert list(problems(made_report(), SCHEMA, SCHEMA)) == []


def test_a_page_loads_nothing_and_runs_nothing() -> None:
    """If it failed, whoever opens a report would tell somebody, or run what a checkpoint brought."""
    page = report_html(made_report())
    read = Reader(page)
    assert {tag for tag, _ in read.tags} & {
        "script",
        "iframe",
        "img",
        "link",
        "object",
        "embed",
        "form",
        "use",
    } == set()
    for tag, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style", "srcset")], tag
        assert attributes.get("href", "#").startswith("#")
    assert b"://" not in page.replace(b"http-equiv", b"")
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    policy = next(each["content"] for each in read.all("meta") if "http-equiv" in each)
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'")
    assert f"<style>{STYLE}</style>".encode() in page


def test_the_first_bytes_say_that_it_is_ours_and_its_encoding() -> None:
    """If it failed, the next run would refuse to replace it, or a browser would guess how to read it."""
    page = report_html(made_report(name="é_{}.pt"))
    assert page.startswith(HTML_MARK)
    assert b'<meta charset="utf-8">' in page[:1024]
    assert report_html(made_report(name="é_{}.pt")) == page


def test_a_page_says_what_it_shows_to_those_who_hear_it() -> None:
    """If it failed, a screen reader would find charts without words, and tables without headers."""
    read = Reader(report_html(made_report()))
    assert read.all("html")[0]["lang"] == "en"
    assert len(read.all("h1")) == 1
    charts = [each for each in read.all("svg") if each.get("aria-hidden") != "true"]
    assert len(charts) >= 8
    assert all(each["role"] == "img" and each["aria-label"] for each in charts)
    assert len(read.all("desc")) == len(charts)
    assert all(each["scope"] in ("row", "col") for each in read.all("th"))
    assert len(read.all("caption")) == len(read.all("table"))
    regions = [each for each in read.all("div") if each.get("role") == "region"]
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in regions)
    anchors = [each["id"] for each in read.all("h2") if "id" in each]
    assert len(set(anchors)) == len(anchors)
    assert {f"#{anchor}" for anchor in anchors} >= {each["href"] for each in read.all("a")}
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "]]><!--",
    "</title></style></svg>",
    "\u202egnp.tp",
    "\udc80",
    "a\nb\x00c",
    "{}",
    "javascript:alert(1)",
    "&lt;b&gt;",
    "שלום",
    "`${1}`",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_name_becomes_markup(text: str) -> None:
    """If it failed, the name of a checkpoint, a metric, a tensor or a layer could change the page."""
    _refuse_markup(text)


@settings(deadline=None, max_examples=20)
@given(st.text(st.characters(), min_size=1, max_size=30))
def test_no_text_becomes_markup(text: str) -> None:
    """If it failed, there would be a name that changes the page."""
    _refuse_markup(text)


def _refuse_markup(text: str) -> None:
    name = text.replace("{", "(").replace("}", ")")

    def tags(name: str) -> list[str]:
        report = made_report(2, 2, layers=1, name=f"{name}_{{}}", tensor=f"{name}_{{}}", metric=name, notices=[name])
        path = os.fsdecode(f"a/{name}".encode(errors="surrogatepass"))  # what the system can name a file
        page = report_html({**report, "command_line": [name], "output": path, "split": name})
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x09\x0b-\x1f]", page.decode())
        return [tag for tag, _ in Reader(page).tags]

    assert tags(name) == tags("x")


def test_many_checkpoints_and_tensors_are_a_page_that_can_be_opened() -> None:
    """If it failed, the report of a long run would be too large to attach, or to read."""
    page = report_html(made_report(100, 2000, layers=300, name="checkpoint-{}00000"))
    assert len(page) < 2_000_000
    assert "The 20 of 2,000 tensors" in Reader(page).text


@pytest.mark.parametrize(
    "change",
    [
        {"evaluations": [], "comparison": None, "requirements": []},
        {"compared": None, "compare_failure": "OSError: gone"},
        {"batch_norm_changes": []},
        {"run": [], "rates": []},
        {"weights": None},
        {"comparison": {"averaging": [], "refresh": []}},
        {"comparison": None},
    ],
)
def test_what_was_not_measured_is_left_out(change: dict[str, Any]) -> None:
    """If it failed, the report of a plain average would be empty charts, or none at all."""
    Reader(report_html({**made_report(), **change}))


def test_numbers_that_are_not_finite_have_no_mark() -> None:
    """If it failed, one NaN would make a chart empty."""
    document = made_report()
    for each in (*document["evaluations"], *document["run"], *document["sources"]):
        each["metrics"] = {"loss": None}
    for each in document["compared"]["checkpoints"][:2]:
        each.update(norm=None, to_mean=None, relative=None, to_previous=None, plane=[None, None])
    document["compared"]["distances"][0] = [None] * 6
    page = report_html(document).decode()
    assert "nan" not in page.lower().replace("provenance", "")
    assert ">inf<" not in page


@pytest.mark.parametrize(
    ("verdicts", "written", "said"),
    [
        (["better"], True, "✓ Yes"),
        (["better", "worse"], True, "Some metrics are better, some worse"),
        (["worse", "equal"], True, "✗ No, it is worse"),
        (["equal"], True, "No difference"),
        (["within the spread"], True, "No difference"),
        ([""], True, "The metric's direction is unknown"),
    ],
)
def test_the_first_box_says_whether_averaging_helped(verdicts: list[str], written: bool, said: str) -> None:
    """If it failed, the first line of a report would be wrong."""
    changes = [
        {"metric": f"m{place}", "difference": 0.1, "spread": None, "verdict": each}
        for place, each in enumerate(verdicts)
    ]
    document = {**made_report(), "comparison": {"averaging": changes, "refresh": []}, "written": written}
    assert f"Did averaging help?{said}" in Reader(report_html(document)).text


def test_an_unmet_requirement_is_the_first_thing_said() -> None:
    """If it failed, a refused release would look like a good one."""
    document = made_report()
    document["requirements"][0]["met"] = False
    document["written"] = False
    assert "Did averaging help?Not published✓ Yes" in Reader(report_html(document)).text


# -- Colours --------------------------------------------------------------------------------------------------------


def _palettes() -> list[dict[str, str]]:
    found = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", each)) for each in found]


def _contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", _palettes(), ids=["light", "dark", "print"])
def test_text_and_marks_stand_out(palette: dict[str, str]) -> None:
    """If it failed, people with weak eyes could not read the page. (WCAG 2.2: 4.5 for text, 3 for graphics.)"""
    for ground in ("page", "box"):
        for text in ("text", "soft", "good", "bad", "link"):
            if text in palette:
                assert _contrast(palette[text], palette[ground]) >= 4.5, (text, ground)
        for mark in ("blue", "orange", "red", "green", "grey"):
            assert _contrast(palette[mark], palette[ground]) >= 3, (mark, ground)


# -- Charts ---------------------------------------------------------------------------------------------------------


def _circles(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_points_are_where_their_numbers_are() -> None:
    """If it failed, a chart would show another run than the table beside it."""
    points = [(0.0, 1.0), (10.0, 3.0), (20.0, 2.0)]
    placed = _circles(line_chart("t", "d", "x", "y", [Marks("", points)]))
    across = [(after[0] - before[0]) for before, after in itertools.pairwise(placed)]
    assert across[0] == pytest.approx(across[1], abs=0.02)
    assert placed[0][1] - placed[1][1] == pytest.approx(2 * (placed[0][1] - placed[2][1]), abs=0.02)


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1.7e308, -1.7e308], [5e-324, 1e-300], [1.0, 1.0 + 2**-52]])
def test_any_numbers_can_be_drawn(values: list[float]) -> None:
    """If it failed, a run whose metric never changes would have no report."""
    points = list(enumerate(values))
    for svg in (
        line_chart("t", "d", "x", "y", [Marks("", [(float(x), y) for x, y in points])]),
        row_chart("t", "d", [Row("a", value, "") for value in values]),
        row_chart("t", "d", [Row("a", abs(value), "") for value in values], log=True, bars=False),
        heat_map("t", "d", ["a"] * len(values), [[abs(value) for value in values] for _ in values]),
    ):
        assert "nan" not in svg
        assert all(-1 <= x <= 401 for x, _ in _circles(svg))
