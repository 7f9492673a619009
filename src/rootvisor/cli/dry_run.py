# SPDX-License-Identifier: Apache-2.0
"""`rootvisor run --dry-run`: what would run, for people and as JSON."""

from __future__ import annotations

import shlex
from typing import Any

import click

from rootvisor.cli.launch import inner_argv
from rootvisor.cli.output import format_bytes, print_json, table
from rootvisor.cli.prepare import AGENT_INITRAMFS, RunPlan
from rootvisor.machine.kernel_arguments import kernel_command_line


def document(plan: RunPlan) -> dict[str, Any]:
    """The whole plan as JSON-able data; `description` is exactly what the machine would be given."""
    return {
        "engine": {"name": plan.engine.name, "reason": plan.engine.reason},
        "kernel_cached": bool(plan.description.kernel.image),
        "agent": plan.agent,
        "description": plan.description.document(),
        "kernel_command_line": kernel_command_line(plan.description.document()),
        "argv": inner_argv("DESCRIPTION", plan.debug),
    }


def show(plan: RunPlan, as_json: bool) -> None:
    """Print the plan on stdout."""
    if as_json:
        print_json(document(plan))
        return
    description = plan.description
    kernel = description.kernel
    command = description.command
    rows: list[tuple[str, str]] = [
        ("engine", f"{plan.engine.name} ({plan.engine.reason})"),
        ("kernel", f"{kernel.name} {kernel.version}".strip()),
        ("image", kernel.vmlinux or kernel.image or "(not in the cache: would be built or fetched first)"),
        ("initial ramdisk", AGENT_INITRAMFS if plan.agent else ", ".join(description.initrds) or "none"),
        ("kernel command line", kernel_command_line(description.document())),
        ("processors", f"{description.vps} VP{'s' if description.vps > 1 else ''}"),
        ("memory", format_bytes(description.memory_bytes)),
        ("scheduler", description.scheduler),
        ("devices", ", ".join(description.devices) or "-"),
        ("root files", description.rootfs_path or "the initial ramdisk only"),
    ]
    if description.file_server is not None and "fs" in description.devices:
        rows.append(("file server", shlex.join(description.file_server)))
    rows += [("disk", f"{disk.path}{' (read-only)' if disk.readonly else ''}") for disk in description.disks]
    if command is not None:
        place = "on a terminal" if command.tty else "with standard streams passed through"
        rows.append(("command", f"{shlex.join(command.argv)} (in {command.cwd}, {place})"))
    rows.append(("on reboot", description.on_reboot))
    if description.timeout_s is not None:
        rows.append(("timeout", f"{description.timeout_s:g} s"))
    rows += [
        (name, path)
        for name, path in (
            ("trace", description.trace),
            ("report", description.report),
            ("kernel log", description.console_log),
        )
        if path
    ]
    click.echo(table(rows))
