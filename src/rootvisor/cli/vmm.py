# SPDX-License-Identifier: Apache-2.0
"""`rootvisor vmm`: the help and the errors of the command; its options are the table in `rootvisor.vmm.options`."""

from __future__ import annotations

import click

from rootvisor.cli.help import DocumentedCommand, GroupedOption, debug_option
from rootvisor.vmm.options import OPTIONS, CommandLine, Option, parse_command_line
from rootvisor.vmm.schema import ConfigError

_EXAMPLES = (
    (
        "A guest on the serial port (in a root partition: rootvisor run -- rootvisor vmm ...)",
        'rootvisor vmm --kernel vmlinux --initrd initrd.img --append "console=ttyS0" --serial tty',
    ),
    (
        "Two processors, 1 GiB, a disk, network without privileges, a shared folder",
        "rootvisor vmm --kernel bzImage --cpus boot=2 --memory size=1G --disk path=disk.qcow2,image_type=qcow2 "
        '--net default --fs tag=srv,path=/srv --append "root=/dev/vda console=hvc0"',
    ),
    (
        "A VMM that waits for calls of its API",
        "rootvisor vmm --api-socket path=/run/vmm.sock --event-monitor path=/run/vmm.events",
    ),
    (
        "Call it",
        "curl --unix-socket /run/vmm.sock http://localhost/api/v1/vmm.ping",
    ),
)

_STATUSES = (
    ("0", "the guest powered off, or vmm.shutdown was called"),
    (
        "1",
        "the VMM or the machine failed, or the root partition lacks something; the message says what mends it",
    ),
    ("2", "the command line is wrong"),
    ("128+N", "ended by signal N (SIGINT, SIGTERM, SIGHUP)"),
)


class _VmmCommand(DocumentedCommand):
    """A command whose arguments are parsed by the VMM's own parser; click knows its options for the help only."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as in a root partition; help and usage errors as everywhere."""
        if any(word in ctx.help_option_names for word in args):
            return super().parse_args(ctx, ["--help"])
        if "--debug" in args:
            ctx.find_root().meta["rootvisor.debug"] = True
        try:
            ctx.params["command_line"] = parse_command_line(args)
        except ConfigError as error:
            raise click.UsageError(str(error), ctx) from error
        return []


def _documented(option: Option) -> click.Option:
    """An option as click shows it."""
    return GroupedOption(
        list(option.names),
        group=option.group,
        metavar=option.metavar or None,
        is_flag=option.is_switch,
        multiple=option.repeats,
        help=option.full_help,
        expose_value=False,
    )


@click.command(cls=_VmmCommand, options_metavar="OPTIONS", examples=_EXAMPLES, statuses=_STATUSES)
@debug_option
def vmm(command_line: CommandLine) -> int:
    """Run a Linux guest in a child partition, from within a root partition: a VMM on /dev/mshv.

    Options, and the API on --api-socket, are those of Cloud Hypervisor where it has the thing. SIGPWR presses the
    guest's power button; SIGINT, SIGTERM and SIGHUP end it at once.
    """
    from rootvisor.vmm.main import run

    return run(command_line)


vmm.params[:0] = [_documented(option) for option in OPTIONS]
