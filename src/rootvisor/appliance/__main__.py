# SPDX-License-Identifier: Apache-2.0
"""``python -m rootvisor.appliance [--writable DIR] -- CMD``: a developer's door into the appliance."""

from __future__ import annotations

import argparse
import os
import sys

from . import ApplianceError, ApplianceKernel, Request, hardware, run


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run CMD."""
    parser = argparse.ArgumentParser(
        prog="python -m rootvisor.appliance",
        description="Run a command of this machine where /dev/kvm works.",
    )
    parser.add_argument("--writable", metavar="DIR", action="append", default=[], help="share DIR read-write")
    parser.add_argument("--memory", metavar="MIB", type=int, default=4096)
    parser.add_argument("--cpus", metavar="N", type=int)
    parser.add_argument("--timeout", metavar="SECONDS", type=float)
    parser.add_argument("--ready-timeout", metavar="SECONDS", type=float, default=60.0)
    parser.add_argument("--tty", action="store_true", help="give CMD a terminal")
    parser.add_argument("--console", action="store_true", help="show the kernel's messages on standard error")
    parser.add_argument("--kernel", metavar="FILE", help="vmlinux or bzImage, with --modules")
    parser.add_argument("--modules", metavar="DIR", help="folder with modules.dep")
    parser.add_argument("--append", metavar="ARGS", default="", help="more for the kernel command line")
    parser.add_argument(
        "--qemu-arg", metavar="ARG", action="append", default=[], help="one more word for QEMU"
    )
    parser.add_argument(
        "--device",
        metavar="KIND[,path=FILE]",
        action="append",
        default=[],
        help=f"an emulated PCI device behind an IOMMU: {', '.join(hardware.KINDS)}",
    )
    parser.add_argument("command", nargs="+", metavar="CMD")
    options = parser.parse_args(arguments)
    if bool(options.kernel) != bool(options.modules):
        parser.error("--kernel and --modules go together")
    kernel = (
        ApplianceKernel(os.path.abspath(options.kernel), os.path.abspath(options.modules))
        if options.kernel
        else None
    )
    devices = tuple(
        hardware.EmulatedDevice(kind, path.removeprefix("path=") or None)
        for kind, _, path in (text.partition(",") for text in options.device)
    )
    words, kernel_args, modules = hardware.for_request(devices)
    try:
        return run(
            Request(
                argv=options.command,
                cwd=os.getcwd(),
                env=dict(os.environ),
                tty=options.tty,
                writable=[os.path.abspath(folder) for folder in options.writable],
                memory_mib=options.memory,
                cpus=options.cpus,
                timeout=options.timeout,
                ready_timeout=options.ready_timeout,
                qemu_args=[*words, *options.qemu_arg],
                kernel_args=[*kernel_args, *options.append.split()],
                modules=modules,
                kernel=kernel,
                console_fd=2 if options.console else None,
            )
        )
    except ApplianceError as error:
        print(f"rootvisor: {error}", file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main())
