"""A report as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from ckpt_avg.output.paths import HTML_MARK


def report_html(document: Mapping[str, Any]) -> bytes:
    """Returns a report of `commands.report` as one page."""
    text = json.dumps(document, indent=2)
    return (
        HTML_MARK + f'<html lang="en"><meta charset="utf-8"><title>ckpt-avg</title><pre>{escape(text)}</pre>'.encode()
    )
