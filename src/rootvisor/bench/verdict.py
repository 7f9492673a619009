# SPDX-License-Identifier: Apache-2.0
"""The targets, and what a result says about each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BOOT_RATIO = 0.6
"""Time to user space, at most this part of QEMU's."""

RESIDENT_KIB = 40 * 1024
"""Resident memory of the hypervisor without guest memory, at most."""

EXIT_RATIO = 1.3
"""Cost of an I/O or MSR exit, at most this many times that of the C loop."""

HYPERCALL_RATIO = 1.6
"""Cost of a hypercall, at most this many times that of the C loop."""


@dataclass(frozen=True, slots=True)
class Target:
    """One target: what is measured, the value, the limit, in which unit."""

    name: str
    value: float
    limit: float
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Whether the value is within the limit."""
        return self.value <= self.limit


def targets(result: dict[str, Any]) -> list[Target]:
    """The targets that a result has values for."""
    found = []
    boot = result.get("boot")
    if boot:
        found.append(Target("boot to user space, of QEMU's", boot["userspace_ratio"], BOOT_RATIO))
        found.append(
            Target(
                "resident memory",
                round(boot["rootvisor"]["resident_kib"] / 1024, 1),
                RESIDENT_KIB / 1024,
                " MiB",
            )
        )
    for kind, limit in (("io", EXIT_RATIO), ("msr", EXIT_RATIO), ("hypercall", HYPERCALL_RATIO)):
        exits = result.get("exits")
        if exits:
            found.append(Target(f"{kind} exit, of the C loop's", exits[kind]["ratio"], limit))
    return found
