"""Commands and options whose ``--help`` groups the options under the same headings everywhere."""

from __future__ import annotations

from typing import Any

import click

from ckpt_avg.errors import UsageError

EVERYDAY = "Everyday options"
HEADINGS = (
    EVERYDAY,
    *("Selection", "Reading", "Mean", "Weights", "BatchNorm", "Evaluation", "Output", "Performance"),
    "Help",
)
_OPTION_WIDTH = 24  # of 80; a longer option has a line of its own
_DOCS = "The folder docs of the source distribution explains every option with examples."


class Option(click.Option):
    """An option that ``--help`` lists under a heading."""

    def __init__(self, *arguments: Any, heading: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.heading = heading


class Command(click.Command):
    """A command whose ``--help`` lists options under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options."""
        sections: dict[str, list[click.Option]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "heading", HEADINGS[-1]), []).append(parameter)
        for heading in sorted(sections, key=HEADINGS.index):
            with formatter.section(heading):
                required_first = sorted(sections[heading], key=lambda option: not option.required)
                records = [option.get_help_record(ctx) or ("", "") for option in required_first]
                formatter.write_dl([(term.ljust(_OPTION_WIDTH), text) for term, text in records], col_max=_OPTION_WIDTH)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Says where the documentation is."""
        _write_docs(formatter)


class Group(click.Group):
    """The commands, in the order in which they were added."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reads the command line; without any word, shows the help and exits as for an invalid one."""
        if not args:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(UsageError.exit_code)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Returns the command that the first word names; raises click's UsageError without one."""
        if args[0] not in self.commands:
            ctx.fail(f"No such command {args[0]!r}.")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of the commands."""
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Says how to get the help of a command, and where the documentation is."""
        _write_docs(formatter, "ckpt-avg help COMMAND lists the options of a command.")


def _write_docs(formatter: click.HelpFormatter, *sentences: str) -> None:
    formatter.write_paragraph()
    for sentence in (*sentences, _DOCS):
        formatter.write_text(sentence)
