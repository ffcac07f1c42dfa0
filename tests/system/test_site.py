"""The documentation site builds without a warning, shows everything, and loads nothing from elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ckpt_avg
from ckpt_avg.cli.main import cli

DOCS = Path(__file__).parents[2] / "docs"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A broken link, or a page that nothing leads to, is a warning, and each of them an error."""
    if "docs" not in os.environ.get("CKPT_AVG_TEST_REQUIRE", ""):
        pytest.importorskip("furo", reason="pip install 'ckpt-avg[docs]' builds the site")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(folder / "trees")]
    done = subprocess.run(
        [*command, str(DOCS), str(folder / "html")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    """It works without a network, and tells nobody who reads it."""
    pages = list(site.glob("**/*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\"([^\"]+)", page.read_text())
        loaded += re.findall(r"<link[^>]* rel=\"(?:stylesheet|icon|preload)\"[^>]* href=\"([^\"]+)", page.read_text())
        assert not [each for each in loaded if re.match(r"(?:\w+:)?//", each)], page.name
    for style in site.glob("_static/**/*.css"):
        assert not re.search(r"(?:url\(|@import)\W*(?:\w+:)?//", style.read_text()), style.name


def test_the_references_have_every_command_option_and_name(site: Path) -> None:
    commands, names = ((site / page).read_text() for page in ("commands.html", "api.html"))
    for command in cli.commands.values():
        assert f'id="{command.name}"' in commands
        for parameter in command.params:
            if parameter.param_type_name == "option" and not getattr(parameter, "hidden", False):
                assert max(parameter.opts, key=len) in commands
    for name in set(ckpt_avg.__all__) - {"__version__"}:
        assert f'id="ckpt_avg.{name}"' in names, name


def test_no_page_is_wider_than_a_phone(site: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    pages = sorted(str(page.relative_to(site)) for page in site.glob("*.html"))
    # Frames of a phone's width, because a window cannot be that narrow.
    (site / "frames.html").write_text(
        "<body><script>const widths = {}; const pages = "
        + json.dumps(pages)
        + """;
        (async () => {
          for (const page of pages) {
            const frame = document.createElement("iframe");
            frame.width = 375; frame.height = 800; frame.src = page;
            await new Promise(done => { frame.onload = done; document.body.append(frame); });
            widths[page] = frame.contentDocument.documentElement.scrollWidth;
            frame.remove();
          }
          document.body.textContent = "WIDTHS" + JSON.stringify(widths) + "END";
        })();</script>"""
    )
    command = [chromium, "--headless", "--no-sandbox", "--allow-file-access-from-files", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=60000", "--dump-dom", (site / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r"WIDTHS(\{.*?\})END", done.stdout)
    assert found, done.stderr
    widths = json.loads(found[1])
    assert set(widths) == set(pages)
    assert {page: width for page, width in widths.items() if width > 375} == {}
