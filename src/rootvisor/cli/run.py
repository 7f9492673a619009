# SPDX-License-Identifier: Apache-2.0
"""`rootvisor run`: boot the root partition, with a command or an interactive console."""

from __future__ import annotations

from typing import Any

import click

from rootvisor.cli import options as types
from rootvisor.cli.description import Disk, RunOptions
from rootvisor.cli.errors import EXIT_STATUSES
from rootvisor.cli.help import DocumentedCommand, debug_option, option
from rootvisor.cli.output import Progress, say
from rootvisor.cli.partition_options import engine_option, scheduler_option, vps_option
from rootvisor.hypervisor.hidden import HIDEABLE

_PARTITION = "Partition"
_SOFTWARE = "Kernel and files"
_DEVICES = "Devices"
_HOW = "How it runs"
_WATCH = "Watching it"

_EXAMPLES = (
    ("A shell in the root partition, on this machine's files", "rootvisor run"),
    ("The device through which a VMM creates child partitions", "rootvisor run -- ls -l /dev/mshv"),
    ("Standard streams and exit status pass through", "echo hi | rootvisor run -- tr a-z A-Z"),
    (
        "Four processors, 2 GiB, the distribution's own kernel",
        "rootvisor run --kernel stock --vps 4 --memory 2G -- nproc",
    ),
    ("A kernel of your own, with its log", "rootvisor run --kernel arch/x86/boot/bzImage --console stderr"),
    ("An ordinary Hyper-V guest instead of the root", "rootvisor run --as guest -- uname -a"),
    (
        "A bare-metal test kernel (multiboot); its exit port gives the status",
        "rootvisor run --as guest --vps 2 --kernel x86/hyperv_synic.flat",
    ),
    ("A raw disk image", "rootvisor run --disk path=disk.img -- lsblk"),
    (
        "Every hypercall and synthetic MSR of a boot",
        "rootvisor run --trace boot.trace -- true; rootvisor trace report boot.trace",
    ),
)


@click.command(
    cls=DocumentedCommand,
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
    examples=_EXAMPLES,
    statuses=EXIT_STATUSES,
)
@option(
    "--kernel",
    group=_SOFTWARE,
    type=types.KERNEL,
    help="Kernel: built with /dev/mshv (mshv, the default), the distribution's (stock), or an image.",
)
@option(
    "--rootfs",
    group=_SOFTWARE,
    type=types.ROOTFS,
    default="host",
    show_default=True,
    help="Root file system: this machine's files, a folder (both read-only below a writable "
    "layer in memory), or none but the initial ramdisk.",
)
@option(
    "--initrd",
    group=_SOFTWARE,
    type=types.INITRD,
    help="Use this initial ramdisk as it is, without Rootvisor's agent: the kernel console is the terminal. "
    "none: no ramdisk, the root file system is on a disk (--append root=/dev/...).",
)
@option(
    "--append", group=_SOFTWARE, type=types.APPEND, default="", help="More words for the kernel command line."
)
@option(
    "--as",
    "role",
    group=_PARTITION,
    type=click.Choice(["root", "guest"]),
    default="root",
    show_default=True,
    help="What the kernel runs as: the root partition, or an ordinary partition without /dev/mshv.",
)
@option(
    "--hide",
    group=_PARTITION,
    type=click.Choice(sorted(HIDEABLE)),
    multiple=True,
    help="A part of the hypervisor's interface that the guest is not offered; may be given several times.",
)
@vps_option(1, group=_PARTITION)
@option(
    "--memory",
    "memory_bytes",
    group=_PARTITION,
    type=types.MEMORY,
    default="1G",
    show_default=True,
    help="Memory of the root partition, at least 128M.",
)
@scheduler_option(group=_PARTITION)
@option(
    "--child-timers",
    group=_PARTITION,
    is_flag=True,
    help="Children have synthetic timers if their VMM asks. Linux then ticks by them, at an exit for each tick.",
)
@option(
    "--on-reboot",
    group=_PARTITION,
    type=click.Choice(["exit", "restart"]),
    default="exit",
    show_default=True,
    help="What a reset of the partition does.",
)
@option(
    "--disk",
    "disks",
    group=_DEVICES,
    type=types.DISK,
    multiple=True,
    help="A raw image or block device as a virtio disk; may be given several times.",
)
@option(
    "--device",
    "hardware",
    group=_DEVICES,
    type=types.HARDWARE,
    multiple=True,
    help="A physical PCI device for the root alone: one of this machine's (see: rootvisor devices), or "
    "in the appliance emulated:nvme,path=FILE, emulated:nic[,forward=PORT:PORT], emulated:display; may be given "
    "several times.",
)
@option(
    "--screenshot",
    group=_DEVICES,
    type=types.FILE,
    help="With --device emulated:display: save what the root shows there at the end of CMD, as PNG.",
)
@option(
    "--devices",
    group=_DEVICES,
    type=types.DEVICES,
    default="all",
    show_default=True,
    help="Virtio devices: any of console,rng,fs,disk, or all, or none.",
)
@engine_option(
    group=_HOW, help="This machine's KVM, or an emulated machine that has one; auto tests KVM first."
)
@option(
    "--timeout",
    "timeout_s",
    group=_HOW,
    type=types.SECONDS,
    help="End the run after this time, with status 124.",
)
@option(
    "--dry-run",
    group=_HOW,
    is_flag=True,
    help="Check everything and show what would run; build and start nothing.",
)
@option("--json", "as_json", group=_HOW, is_flag=True, help="With --dry-run: as one JSON document on stdout.")
@option(
    "--console",
    "console_log",
    group=_WATCH,
    type=types.CONSOLE,
    help="Copy the kernel's log to stderr or to a file.",
)
@option(
    "--trace",
    group=_WATCH,
    type=types.FILE,
    help="Write hypercalls, synthetic MSRs and intercepts to a file (JSON lines); see: rootvisor trace.",
)
@option(
    "--report",
    group=_WATCH,
    type=types.FILE,
    help="Write how the run went (times, exits, hypercalls) to a file (JSON).",
)
@option(
    "--watch-deposits",
    group=_WATCH,
    is_flag=True,
    help="Report on stderr when the root touches memory that it has deposited with the hypervisor.",
)
@option("-v", "--verbose", group=_WATCH, is_flag=True, help="Say on stderr what is done.")
@debug_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD [ARG]...]")
@click.pass_context
def run(
    ctx: click.Context,
    /,
    command: tuple[str, ...],
    disks: tuple[Disk, ...],
    hardware: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    **values: Any,
) -> int:
    """Boot Linux as the root partition of the Microsoft hypervisor, or as a guest.

    With CMD, run it in the root partition: stdin, stdout and stderr pass through unchanged, and its exit
    status is the exit status. Without, open a shell there. Changes to files stay in memory and are gone
    afterwards.

    At a terminal, Ctrl-] is the escape key: Ctrl-] x ends the run at once, Ctrl-] p presses the power button,
    Ctrl-] h shows what else there is. SIGPWR presses the power button, too.
    """
    options = RunOptions(
        disks=disks,
        hardware=hardware,
        command=command or None,
        debug=bool(ctx.find_root().meta.get("rootvisor.debug")),
        **values,
    )
    return perform(options, dry_run=dry_run, as_json=as_json)


def perform(options: RunOptions, *, dry_run: bool = False, as_json: bool = False) -> int:
    """Check, describe and start a run; the exit status. With engine kvm a good start does not return."""
    from rootvisor.cli.errors import usage_error
    from rootvisor.cli.prepare import prepare

    if as_json and not dry_run:
        raise usage_error("--json reports what would run", "add --dry-run")
    with Progress() as progress:
        plan = prepare(options, progress=progress, build=not dry_run)
    if dry_run:
        from rootvisor.cli.dry_run import show

        show(plan, as_json)
        return 0
    if options.verbose:
        kernel = plan.description.kernel
        say(f"rootvisor: engine {plan.engine.name} ({plan.engine.reason})")
        say(f"rootvisor: kernel {kernel.name} {kernel.version} ({kernel.vmlinux or kernel.image})")
    if plan.description.tty and options.command is None:
        say("rootvisor: Ctrl-] x ends the run, Ctrl-] h shows more")
    from rootvisor.cli.launch import launch

    return launch(plan)
