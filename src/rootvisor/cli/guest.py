# SPDX-License-Identifier: Apache-2.0
"""`rootvisor guest`: run a command in a child Linux, a guest in the root partition."""

from __future__ import annotations

import os
from typing import Any

import click

from rootvisor.cli import options as types
from rootvisor.cli.errors import CRASHED, INTERRUPTED, OWN_FAILURE, RESET, TIMED_OUT, TRIPLE_FAULT, USAGE
from rootvisor.cli.help import DocumentedCommand, debug_option, option
from rootvisor.cli.output import Progress, say
from rootvisor.cli.partition_options import engine_option, kernel_option, scheduler_option
from rootvisor.vmm.agent_run import STATUS_CRASH, STATUS_RESET, STATUS_TRIPLE_FAULT

_GUEST = "Guest"
_ROOT = "Root partition (from outside)"
_HOW = "How it runs"
_WATCH = "Watching it"

_EXAMPLES = (
    ("A shell in a child Linux, on this machine's files", "rootvisor guest"),
    ("Standard streams and exit status pass through three layers", "echo hi | rootvisor guest -- tr a-z A-Z"),
    (
        "Two processors, the distribution's own kernel",
        "rootvisor guest --kernel stock --vps 2 --memory 1G -- uname -a",
    ),
    (
        "Every hypercall that the root makes for its guest",
        "rootvisor guest --trace guest.trace -- true && rootvisor trace report guest.trace",
    ),
)
_STATUSES = (
    ("0", "the guest powered off, or CMD ended with 0"),
    ("1-117", "CMD's own exit status"),
    (str(STATUS_TRIPLE_FAULT), "the guest died of a triple fault"),
    (str(STATUS_RESET), "the guest was reset (reboot)"),
    (str(STATUS_CRASH), "the guest's kernel crashed; the end of its console is shown"),
    (f"{TRIPLE_FAULT}, {RESET}, {CRASHED}", "the same of the root partition, as for rootvisor run"),
    (str(TIMED_OUT), "--timeout ran out"),
    (
        str(OWN_FAILURE),
        "Rootvisor itself failed, or this machine lacks something; the message says what mends it",
    ),
    ("126-255", "CMD's own exit status, as a shell gives it (127: not found, 128+N: killed by signal N)"),
    (str(USAGE), "the command line is wrong"),
    (str(INTERRUPTED), "Ctrl-C"),
)


@click.command(
    cls=DocumentedCommand,
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
    examples=_EXAMPLES,
    statuses=_STATUSES,
)
@kernel_option(group=_GUEST, help="Kernel of the guest: mshv, the distribution's (stock), or an image.")
@option("--append", group=_GUEST, type=types.APPEND, default="", help="More words for its command line.")
@option(
    "--vps",
    group=_GUEST,
    type=types.VPS,
    default=1,
    show_default=True,
    help="Virtual processors of the guest, 1 to 64.",
)
@option(
    "--memory",
    "memory_bytes",
    group=_GUEST,
    type=types.MEMORY,
    default="512M",
    show_default=True,
    help="Memory of the guest, at least 128M.",
)
@option(
    "--root-vps",
    group=_ROOT,
    type=types.VPS,
    default=1,
    show_default=True,
    help="Virtual processors of the root partition.",
)
@option(
    "--root-memory",
    "root_memory_bytes",
    group=_ROOT,
    type=types.MEMORY,
    help="Memory of the root partition, with its guest's; by default 512M more than the guest's.",
)
@scheduler_option(group=_ROOT)
@engine_option(group=_ROOT)
@option(
    "--timeout",
    "timeout_s",
    group=_HOW,
    type=types.SECONDS,
    help="End everything after this time, with status 124.",
)
@option(
    "--trace",
    group=_WATCH,
    type=types.FILE,
    help="Write the root partition's hypercalls, synthetic MSRs and intercepts to a file; see: rootvisor trace.",
)
@option(
    "--report",
    group=_WATCH,
    type=types.FILE,
    help="Write how the root partition's run went (times, exits, hypercalls) to a file (JSON).",
)
@option("-v", "--verbose", group=_WATCH, is_flag=True, help="Show the guest's console on stderr.")
@debug_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD [ARG]...]")
@click.pass_context
def guest(ctx: click.Context, /, command: tuple[str, ...], **values: Any) -> int:
    """Run CMD in a child Linux: a guest of the root partition, started by Rootvisor's own VMM.

    It sees this machine's files as the root partition does, read-only below a layer in memory. stdin, stdout and
    stderr pass through unchanged, and CMD's exit status is the exit status. Without CMD, open a shell there.

    Outside, a root partition is started first, and ends with the guest. In a root partition (where /dev/mshv is) the
    guest starts directly.
    """
    from rootvisor.cli.guest_plan import GuestOptions, in_root_partition, plan_outside, start_inside

    options = GuestOptions(
        command=command or None, debug=bool(ctx.find_root().meta.get("rootvisor.debug")), **values
    )
    with Progress() as progress:
        if in_root_partition():
            return start_inside(options, progress=progress, environment=os.environ)
        plan = plan_outside(options, progress=progress)
    if plan.description.tty and options.command is None:
        say("rootvisor: Ctrl-] x ends the run, Ctrl-] h shows more")
    from rootvisor.cli.launch import launch

    return launch(plan)
