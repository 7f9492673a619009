# SPDX-License-Identifier: Apache-2.0
"""The host's programs that the appliance is made of, and what is wrong when they are missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from rootvisor.files.virtiofsd import FileServerError, Virtiofsd
from rootvisor.files.virtiofsd import find as find_virtiofsd

from .errors import ApplianceError

QEMU = "qemu-system-x86_64"
LEAST_FREE_MIB = 768
#: The first release that keeps a page of code locked while it translates it (accel/tcg, 2023).
_SAFE_QEMU = (8, 1)


@dataclass(frozen=True)
class Problem:
    """One thing that keeps the appliance from running: ``what`` it is, and the ``mend``."""

    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what}; {self.mend}"


@dataclass(frozen=True)
class Tools:
    """Everything that was found."""

    qemu: str
    virtiofsd: Virtiofsd


def find_tools() -> tuple[Tools | None, list[Problem]]:
    """Look for the programs; Tools is None when there are problems."""
    problems = []
    qemu = shutil.which(QEMU)
    if not qemu:
        problems.append(Problem(f"{QEMU} is missing", "apt-get install qemu-system-x86"))
    virtiofsd = None
    try:
        virtiofsd = find_virtiofsd()
    except FileServerError as error:
        problems.append(Problem(error.what, error.mend))
    free = available_mib()
    if free is not None and free < LEAST_FREE_MIB:
        problems.append(
            Problem(
                f"only {free} MiB of memory are free, the appliance needs {LEAST_FREE_MIB}",
                "end other programs",
            )
        )
    if qemu and virtiofsd and not problems:
        return Tools(qemu, virtiofsd), []
    return None, problems


def require_tools() -> Tools:
    """The programs; raises :class:`ApplianceError` with the first problem."""
    tools, problems = find_tools()
    if tools is None:
        raise ApplianceError(f"the appliance cannot start: {problems[0]}")
    return tools


def available_mib() -> int | None:
    """MemAvailable of /proc/meminfo in MiB, None where it cannot be read."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) >> 10
    except (OSError, ValueError, IndexError):
        pass
    return None


def processors(qemu: str) -> int:
    """How many processors the appliance has unless asked: two from QEMU 8.1 on, one before.

    Older releases translate a page of code without holding its lock. With several emulated processors the guest's
    kernel then dies now and then of a breakpoint that it had put into its code for a moment and taken out again (int3
    oops, triple fault): seen in 1 of 6 boots with virtual machines in them. One processor is hardly slower here.
    """
    try:
        result = subprocess.run([qemu, "--version"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 1
    found = re.search(rb"version (\d+)\.(\d+)", result.stdout)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    return max(1, min(2, os.cpu_count() or 1)) if release >= _SAFE_QEMU else 1
