# SPDX-License-Identifier: Apache-2.0
"""`rootvisor guest`: what the VMM in the root partition is told, and how it gets there.

From outside, a run of the root partition carries the guest's description as its command's job; inside a root partition
this process becomes the VMM.
"""

from __future__ import annotations

import marshal
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rootvisor.cli.description import CommandRequest, KernelImage, RunOptions
from rootvisor.cli.errors import UserError, usage_error
from rootvisor.cli.kernel_choice import choose_kernel
from rootvisor.cli.launch import become, inherited_file, inner_argv
from rootvisor.cli.output import Progress, format_bytes
from rootvisor.cli.prepare import DEFAULT_PATH, RunPlan, Standard, prepare, user_command
from rootvisor.cli.ramdisk import JOB, base_archive, request_part
from rootvisor.vmm.agent_machine import KERNEL_WORDS

DEVICE = "/dev/mshv"
"""What a root partition has."""

_DEVICES = ("console", "rng", "fs")
"""Devices of the guest whose drivers its initial ramdisk brings."""

ROOT_BYTES = 512 << 20
"""Memory of the root partition beyond that of its guest: Linux, the VMM, the file server."""

_SERVER_FD = "3"
"""Descriptor of the file server's listening socket (`rootvisor.daemons`)."""


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """The command line of `guest`, parsed and not yet checked against the host.

    `root_memory_bytes` None: as much as the guest needs, and `ROOT_BYTES`.
    """

    command: tuple[str, ...] | None
    kernel: str = "mshv"
    append: str = ""
    vps: int = 1
    memory_bytes: int = 512 << 20
    root_vps: int = 1
    root_memory_bytes: int | None = None
    scheduler: str = "hypervisor"
    engine: str = "auto"
    trace: str | None = None
    report: str | None = None
    timeout_s: float | None = None
    verbose: bool = False
    debug: bool = False


def in_root_partition() -> bool:
    """Whether this Linux is a root partition, whose VMMs need no other one around them."""
    return os.path.exists(DEVICE)


def guest_document(
    options: GuestOptions,
    kernel: KernelImage,
    command: CommandRequest,
    server: tuple[str, ...],
    timeout_s: float | None,
) -> bytes:
    """The guest's description (see `rootvisor.vmm.agent_run`), as `inner` reads it."""
    from rootvisor.vmm import config
    from rootvisor.vmm.schema import ConfigError

    words = ["rdinit=/init", "console=hvc0", KERNEL_WORDS, *([] if options.verbose else ["quiet"])]
    if options.append:
        words.append(options.append)
    try:
        vm = config.VM.check(
            {
                "cpus": {"boot_vcpus": options.vps},
                "memory": {"size": options.memory_bytes},
                "payload": {"kernel": kernel.vmlinux or kernel.image, "cmdline": " ".join(words)},
                "console": {"mode": "Tty" if command.tty else "Off"},
                "serial": {"mode": "Off"},
            }
        )
    except ConfigError as error:
        raise usage_error(str(error)) from error
    guest = {
        "vm": vm,
        "initrds": [base_archive(kernel, _DEVICES), request_part(command, "host", _DEVICES)],
        "file_server": [word.replace("{fd}", _SERVER_FD) for word in server],
        "tty": command.tty,
        "verbose": options.verbose,
        "timeout_s": timeout_s,
    }
    return marshal.dumps({"guest": guest}, 2)


def plan_outside(options: GuestOptions, *, progress: Progress) -> RunPlan:
    """The run of a root partition whose command is the VMM."""
    memory = options.root_memory_bytes
    if memory is None:
        memory = options.memory_bytes + ROOT_BYTES
    elif memory < options.memory_bytes + (128 << 20):
        raise usage_error(
            f"--root-memory: the guest's {format_bytes(options.memory_bytes)} are part of the root partition's "
            f"{format_bytes(memory)}",
            "give the root partition more, or the guest less",
        )
    kernel = choose_kernel(options.kernel, progress=progress, build=True)
    plan = prepare(
        RunOptions(
            kernel="mshv",
            vps=options.root_vps,
            memory_bytes=memory,
            scheduler=options.scheduler,
            engine=options.engine,
            trace=options.trace,
            report=options.report,
            timeout_s=options.timeout_s,
            debug=options.debug,
            command=options.command,
        ),
        progress=progress,
    )
    asked = plan.description.command
    assert asked is not None
    job = guest_document(options, kernel, asked, confined_server(), None)
    environment = {name: asked.env[name] for name in ("LANG", "TERM") if name in asked.env}
    vmm = CommandRequest(
        argv=tuple(inner_argv(JOB, options.debug)),
        cwd="/",
        env={"PATH": DEFAULT_PATH, "HOME": "/root", "PWD": "/", **environment},
        tty=asked.tty,
        job=job,
    )
    return replace(plan, description=replace(plan.description, command=vmm))


def start_inside(options: GuestOptions, *, progress: Progress, environment: Mapping[str, str]) -> int:
    """Become the VMM; a good start does not return."""
    kernel = choose_kernel(options.kernel, progress=progress, build=True)
    command = user_command(options.command, "host", Standard.of_process(), environment)
    document = guest_document(options, kernel, command, confined_server(), options.timeout_s)
    progress.clear()
    fd = inherited_file("guest", document)
    return become(inner_argv(f"/proc/self/fd/{fd}", options.debug))


def confined_server() -> tuple[str, ...]:
    """The command line of the server of the guest's root file system, in the root partition: root runs it, and what it
    serves it cannot write."""
    from rootvisor.files import virtiofsd

    try:
        server = virtiofsd.find()
    except virtiofsd.FileServerError as error:
        raise UserError(error.what, error.mend) from error
    root_s = virtiofsd.Virtiofsd(server.path, server.rust, namespace=False)
    return tuple(virtiofsd.confined(root_s, virtiofsd.command(root_s, "/", virtiofsd.SOCKET, root=True)))
