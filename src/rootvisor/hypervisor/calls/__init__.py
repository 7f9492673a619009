# SPDX-License-Identifier: Apache-2.0
"""Hypercalls, a module per family. Each declares its calls in :data:`rootvisor.hypervisor.hypercall_table.TABLE`.

Modules cost time at every start, so the families that only children need come with the first call that is none of the
others: :meth:`HypercallTable.find`.
"""

from __future__ import annotations

from ..hypercall_table import TABLE


def load() -> None:
    """Imports the families that a root partition needs when it boots, which declares their calls."""
    from . import (  # noqa: F401
        device_interrupts,
        identity,
        ipi,
        logical_processors,
        memory_pool,
        properties,
        statistics,
        system,
        virtual_processors,
    )

    TABLE.more = load_children


def load_children() -> None:
    """Imports the families that are about child partitions."""
    from . import (  # noqa: F401
        cpuid,
        gpa_mapping,
        intercepts,
        interrupts,
        messages,
        partitions,
        ports,
        vp_registers,
        vp_state,
    )


def load_guest() -> None:
    """Imports the families that only a guest with a computer of its own is offered."""
    from . import absent, address_spaces, extended, vp_start  # noqa: F401
