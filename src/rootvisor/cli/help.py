# SPDX-License-Identifier: Apache-2.0
"""Help worth reading: options in named groups, then examples, then what the exit statuses mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])

_OTHER = "Other"


class NamedType:
    """A parameter type whose name is shown in help as it is written, and not in capitals."""

    name: str


class GroupedOption(click.Option):
    """An option that belongs to a named group of its command's help."""

    def __init__(self, *args: Any, group: str = _OTHER, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group
        if self.metavar is None and isinstance(self.type, NamedType):
            self.metavar = self.type.name


class DocumentedCommand(click.Command):
    """A command whose help ends with examples and, where they matter, the exit statuses."""

    def __init__(
        self,
        *args: Any,
        examples: Sequence[tuple[str, str]] = (),
        statuses: Sequence[tuple[str, str]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.statuses = tuple(statuses)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options group by group, in the order in which the groups first appear."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", _OTHER), []).append(record)
        other = groups.pop(_OTHER, [])
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)
        with formatter.section(_OTHER if groups else "Options"):
            formatter.write_dl(other)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples and the table of exit statuses."""
        super().format_epilog(ctx, formatter)
        _write_examples(formatter, self.examples)
        if self.statuses:
            with formatter.section("Exit status"):
                formatter.write_dl(self.statuses)


class DocumentedGroup(click.Group):
    """A group of commands, listed in the order in which they were added, with examples at the end."""

    command_class = DocumentedCommand

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, most useful first (the order of definition)."""
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        super().format_epilog(ctx, formatter)
        _write_examples(formatter, self.examples)


class DocumentedCommandWithParts(DocumentedGroup, DocumentedCommand):
    """A command that does something by itself and has commands below it; its help is that of a command, and the list
    of those."""

    def __init__(
        self,
        *args: Any,
        examples: Sequence[tuple[str, str]] = (),
        statuses: Sequence[tuple[str, str]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, invoke_without_command=True, **kwargs)
        self.examples = tuple(examples)
        self.statuses = tuple(statuses)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples and the table of exit statuses."""
        DocumentedCommand.format_epilog(self, ctx, formatter)


def _write_examples(formatter: click.HelpFormatter, examples: Sequence[tuple[str, str]]) -> None:
    """Write each example as the command that runs as it stands, under a line that says what it does."""
    if not examples:
        return
    with formatter.section("Examples"):
        for index, (purpose, command) in enumerate(examples):
            if index:
                formatter.write("\n")
            formatter.write(f"{'':>{formatter.current_indent}}# {purpose}\n")
            formatter.write(f"{'':>{formatter.current_indent}}{command}\n")


def option(*names: str, group: str = _OTHER, **attributes: Any) -> Callable[[_F], _F]:
    """`click.option` with the name of its group in the help."""
    return click.option(*names, cls=GroupedOption, group=group, **attributes)


def json_option(function: _F) -> _F:
    """`--json`, the same on every command that reports."""
    decorate: Callable[[_F], _F] = option(
        "--json", "as_json", is_flag=True, help="Print the report as one JSON document on stdout."
    )
    return decorate(function)


def debug_option(function: _F) -> _F:
    """`--debug`, the same on every command; takes effect when the command line is parsed."""

    def remember(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if value:
            ctx.find_root().meta["rootvisor.debug"] = True

    decorate: Callable[[_F], _F] = option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=remember,
        is_eager=True,
        help="Show tracebacks of internal errors.",
    )
    return decorate(function)
