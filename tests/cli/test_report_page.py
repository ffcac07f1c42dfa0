"""The report in a browser: nothing on the console, no requests, nothing wider than the window."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.chromium import Page, browser
from cli.reports import made_report

from ckpt_avg.cli.report_html import report_html

pytestmark = pytest.mark.slow

# What is wider than the window, or cut off by the chart that it is in.
_TOO_WIDE = """[...document.querySelectorAll('body *')].filter(each => {
    if (each.closest('.scroll') && !each.matches('.scroll')) return false;
    return each.getBoundingClientRect().right > innerWidth + 1;
}).map(each => each.tagName + ' ' + each.textContent.slice(0, 40))"""
_CUT = """[...document.querySelectorAll('figure svg text')].filter(each => {
    const text = each.getBoundingClientRect(), all = each.ownerSVGElement.getBoundingClientRect();
    return text.left < all.left - 1 || text.right > all.right + 1 || text.top < all.top - 1
        || text.bottom > all.bottom + 1;
}).map(each => each.textContent)"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def real(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the real run, measured and required."""
    from ckpt_avg.cli.exits import run
    from ckpt_avg.cli.main import cli

    folder = tmp_path_factory.mktemp("real")
    words = ["average", run_folder, "--last", "4", "-o", folder / "swa.safetensors", "--app-dir", run_folder]
    words += ["--model", "train:make_model", "--data", "train:train_loader", "--bn-batches", "2"]
    words += ["--eval", "train:evaluate", "--require", "loss<=last+1", "--report", folder / "report.html", "-q"]
    assert run(cli, list(map(str, words))) == 0
    return folder / "report.html"


@pytest.mark.parametrize(("width", "media"), [(375, ""), (1280, ""), (1280, "dark"), (794, "print")])
def test_a_page_fits_its_window(page: Page, real: Path, tmp_path: Path, width: int, media: str) -> None:
    """If it failed, people on a phone would scroll sideways, paper would cut numbers, or a label would be cut off."""
    large = tmp_path / "large.html"
    large.write_bytes(
        report_html(made_report(100, 2000, layers=40, name="checkpoint-{}" + "0" * 60, tensor="a" * 80 + "{}"))
    )
    for path in (real, large):
        page.open(path, width=width, dark=media == "dark", print_=media == "print")
        assert page.messages == []
        assert page.requests == [path.as_uri()]
        assert page.value("document.documentElement.scrollWidth") <= width
        assert page.value(_TOO_WIDE) == []
        assert page.value(_CUT) == []


def test_names_of_checkpoints_run_nothing(page: Page, tmp_path: Path) -> None:
    """If it failed, opening a report would run what somebody called a checkpoint."""
    path = tmp_path / "odd.html"
    name = "<img src=x onerror=document.title='run'><script>document.title='run'</script>_{}"
    path.write_bytes(report_html(made_report(name=name, metric=name.replace("{}", ""), tensor=name)))
    page.open(path)
    assert page.value("document.title") == "swa.safetensors"
    assert page.value("document.scripts.length + document.images.length") == 0
    assert (page.messages, page.requests) == ([], [path.as_uri()])


def test_the_answers_are_on_the_first_screen(page: Page, real: Path) -> None:
    """If it failed, whoever opens the page would have to search for what it is about."""
    page.open(real, width=1280, height=800)
    assert page.value("document.querySelectorAll('.answer').length") == 3
    assert page.value(
        "[...document.querySelectorAll('.answer')].every(each => each.getBoundingClientRect().bottom < innerHeight)"
    )


def test_a_dark_page_is_dark(page: Page, real: Path) -> None:
    """If it failed, the page would dazzle at night."""
    colours = []
    for dark in (False, True):
        page.open(real, dark=dark)
        colours.append(page.value("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]
