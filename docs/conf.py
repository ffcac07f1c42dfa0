"""The documentation site: ``sphinx-build -W --keep-going docs site``. Every warning is an error.

No font, script or picture comes from elsewhere, and building needs no network.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ckpt_avg

sys.path.insert(0, str(Path(__file__).parent / "site"))

project = "ckpt-avg"
author = "The ckpt-avg authors"
release = version = ckpt_avg.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "command_reference"]
exclude_patterns = ["site", "study"]
highlight_language = "text"
default_role = "literal"  # single backticks in docstrings

myst_heading_anchors = 4  # links to headings, as on GitHub
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_use_type_comments = False
python_display_short_literal_types = True
python_maximum_signature_line_length = 80
napoleon_use_rtype = False
napoleon_use_ivar = True

smartquotes = False  # two dashes are an option's

html_theme = "furo"
html_title = "ckpt-avg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
