# SPDX-License-Identifier: Apache-2.0
"""The `rootvisor` command: its groups, and the one place where errors become a line and an exit status."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

import rootvisor
from rootvisor.cli.errors import INTERRUPTED, OWN_FAILURE, USAGE, UserError, error_chain
from rootvisor.cli.help import DocumentedGroup

_COMPLETE = "_ROOTVISOR_COMPLETE"
"""Variable with which a shell asks for completions (click's convention)."""

_COMMANDS = {
    "run": ("rootvisor.cli.run:run", "Boot Linux as the root partition; run a command in it"),
    "guest": ("rootvisor.cli.guest:guest", "Run a command in a Linux guest of the root partition"),
    "demo": ("rootvisor.cli.demo:demo", "Boot the root partition and a guest; show the evidence"),
    "kernel": ("rootvisor.cli.kernel:kernel", "Build, list, find and remove kernels"),
    "doctor": ("rootvisor.cli.doctor:doctor", "Check this machine, and say how to mend what is missing"),
    "devices": ("rootvisor.cli.devices:devices", "List the PCI devices that the root partition can be given"),
    "trace": ("rootvisor.cli.trace:trace", "Look at files that run --trace FILE wrote"),
    "bench": ("rootvisor.cli.bench:bench", "Measure boots, exits, children and guests beside QEMU"),
    "peer": ("rootvisor.cli.peer:peer", "Boot guests with an unmodified QEMU in the root partition"),
    "vmm": ("rootvisor.cli.vmm:vmm", "Run a Linux guest, from within a root partition"),
}
"""Command name to `module:attribute`, and its line in the list. A command's module is imported when it is used:
start-up stays quick.
"""


class _LazyGroup(DocumentedGroup):
    """A group that imports a command only when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, most useful first."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, or None."""
        if cmd_name not in _COMMANDS:
            return None
        target, summary = _COMMANDS[cmd_name]
        module, _, attribute = target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        command.short_help = summary
        return command


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    examples=(
        ("See it work: boots a root partition and shows the evidence", "rootvisor demo"),
        (
            "A shell in the root partition, on this machine's files (read-only, changes are forgotten)",
            "rootvisor run",
        ),
        (
            "One command in the root partition; its output and exit status are yours",
            "rootvisor run -- uname -a",
        ),
        ("What this machine can do, what is missing, and what mends it", "rootvisor doctor"),
    ),
)
@click.version_option(rootvisor.__version__, prog_name="rootvisor")
def cli() -> None:
    """Boot Linux as the root partition of the Microsoft hypervisor, on any Linux machine.

    The hypervisor is this program, Linux KVM is its processor. Where the machine has no usable KVM, the same
    commands run inside an emulated machine (the appliance), more slowly and without further set-up.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the `rootvisor` command: run it and leave with its exit status."""
    instruction = os.environ.get(_COMPLETE)
    if instruction:
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(cli, {}, "rootvisor", _COMPLETE, instruction))
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: that of the process), print any error as one line, return the exit
    status.
    """
    meta: dict[str, Any] = {}
    context: click.Context | None = None
    try:
        with cli.make_context("rootvisor", list(sys.argv[1:] if arguments is None else arguments)) as context:
            meta = context.meta
            result = cli.invoke(context)
            _flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return _flushed(stop.exit_code)
    except click.UsageError as error:
        return _usage(error)
    except click.ClickException as error:
        return _complain(error.format_message(), OWN_FAILURE)
    except UserError as error:
        return _complain(str(error), error.status)
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        return _quiet_stdout()
    except OSError as error:
        if error.errno == errno.EPIPE:
            return _quiet_stdout()
        return _internal(error, meta)
    except Exception as error:
        return _internal(error, meta)


def _usage(error: click.UsageError) -> int:
    """One line for a wrong command line, with the help that explains it; the help itself for a bare group."""
    if type(error).__name__ == "NoArgsIsHelpError" and error.ctx is not None:  # from click 8.2 on
        click.echo(error.ctx.get_help(), err=True)
        return USAGE
    name = error.ctx.command_path if error.ctx is not None else "rootvisor"
    text = " ".join(error.format_message().split()).rstrip(".")
    return _complain(f"{text}; see: {name} --help", USAGE)


def _internal(error: Exception, meta: dict[str, Any]) -> int:
    """An error that nobody expected: one line, or the traceback with `--debug`."""
    if meta.get("rootvisor.debug") or os.environ.get("ROOTVISOR_DEBUG"):
        traceback.print_exception(error)
        return OWN_FAILURE
    kind = type(error).__name__
    return _complain(
        f"internal error: {kind}: {error_chain(error)}; run with --debug for the traceback", OWN_FAILURE
    )


def _complain(text: str, status: int) -> int:
    """One line on stderr; a stderr that is gone is no further error."""
    try:
        click.echo(f"rootvisor: {' '.join(text.split())}", err=True)
    except OSError:
        pass
    return status


def _flush() -> None:
    sys.stdout.flush()


def _flushed(status: int) -> int:
    try:
        _flush()
    except BrokenPipeError:
        return _quiet_stdout()
    return status


def _quiet_stdout() -> int:
    """The reader of stdout went away (`rootvisor ... | head`): end quietly, as SIGPIPE would."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    return 128 + 13
