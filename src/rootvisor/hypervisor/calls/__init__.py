# SPDX-License-Identifier: Apache-2.0
"""Hypercalls, a module per family. Each declares its calls in :data:`rootvisor.hypervisor.hypercall_table.TABLE`."""

from __future__ import annotations


def load() -> None:
    """Imports every family, which declares its calls."""
    from . import (  # noqa: F401
        cpuid,
        device_interrupts,
        gpa_mapping,
        identity,
        intercepts,
        interrupts,
        ipi,
        logical_processors,
        memory_pool,
        messages,
        partitions,
        ports,
        properties,
        statistics,
        system,
        virtual_processors,
        vp_registers,
        vp_state,
    )
