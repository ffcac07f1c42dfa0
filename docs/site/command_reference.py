"""The directive ``command-reference``: every command of ``ckpt-avg`` with its options, from what ``--help`` prints."""

from __future__ import annotations

from collections.abc import Iterator

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from ckpt_avg.cli.help import HEADINGS
from ckpt_avg.cli.main import cli


class CommandReference(SphinxDirective):
    """One section for each command: what it does, how it is called, its options by heading."""

    def run(self) -> list[nodes.Node]:
        """Returns the sections."""
        context = click.Context(cli, info_name="ckpt-avg", **cli.context_settings)
        return [
            section
            for name in sorted(cli.commands)
            for section in self.parse_text_to_nodes("\n".join(_section(name, context)), allow_section_headings=True)
        ]


def _section(name: str, parent: click.Context) -> Iterator[str]:
    """Yields the lines of a command's section, in MyST's Markdown."""
    command = cli.commands[name]
    context = click.Context(command, info_name=name, parent=parent)
    summary, _, rest = (command.help or "").partition("\n\n")
    example = "\n".join(line for line in rest.splitlines() if line.strip("\b"))
    yield from (f"## {name}", "", " ".join(summary.split()), "")
    yield from ("```text", " ".join([f"ckpt-avg {name}", *command.collect_usage_pieces(context)]), "```", "")
    if example:
        yield from (
            "```console",
            *(line if line.startswith(" ") else f"$ {line}" for line in example.splitlines()),
            "```",
        )
    headings: dict[str, list[str]] = {}
    for option in command.get_params(context):
        record = option.get_help_record(context) if isinstance(option, click.Option) else None
        if record is not None:
            flag, text = record
            entry = f"`{flag}`\n: {_escaped(text)}\n"
            headings.setdefault(getattr(option, "heading", HEADINGS[-1]), []).append(entry)
    for heading in sorted(headings, key=HEADINGS.index):
        yield from ("", f"**{heading}**", "", *headings[heading])


def _escaped(text: str) -> str:
    return "".join(f"\\{character}" if character in "\\`*_[]<>|" else character for character in text)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Makes the directive known."""
    app.add_directive("command-reference", CommandReference)
    return {"parallel_read_safe": True}
