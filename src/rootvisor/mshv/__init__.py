# SPDX-License-Identifier: Apache-2.0
"""/dev/mshv from Python: partitions, processors, memory, interrupts. Works on any root partition, not only ours.

A guest that writes a byte to a port::

    from rootvisor.mshv import IoPort, Memory, Mshv, Segment

    with Mshv() as mshv, mshv.create_partition() as partition:
        partition.initialize()
        memory = Memory(0x1000)
        memory.view[:5] = b"\\xb0A\\xe6\\x10\\xf4"            # mov al, 'A'; out 0x10, al; hlt
        partition.map(0x1000, memory)
        vp = partition.create_vp(0)
        vp.set_registers(rip=0, cs=Segment.real_code(0x100))
        message = vp.run()
        assert isinstance(message, IoPort) and chr(message.value) == "A"

Only the standard library and ``rootvisor.tlfs`` are imported, and nothing of them that is slow to import.
"""

from __future__ import annotations

from .errors import MshvError
from .memory import Memory
from .messages import (
    EXECUTE,
    READ,
    WRITE,
    ApicEoi,
    Cpuid,
    ExceptionIntercept,
    Halt,
    Hypercall,
    Intercept,
    InterruptionDeliverable,
    InvalidRegister,
    IoPort,
    MemoryAccess,
    Message,
    Msr,
    SintDeliverable,
    Sipi,
    UnrecoverableException,
    UnsupportedFeature,
)
from .partition import (
    ANY_VP,
    EXTINT,
    FIXED,
    INIT,
    LINT0,
    LINT1,
    LOWEST_PRIORITY,
    NMI,
    SIPI,
    Mshv,
    Partition,
    Region,
)
from .register_page import RegisterPage
from .segments import Segment, Table
from .vp import STATE_LAPIC, STATE_SIEFP, STATE_SIMP, STATE_SYNTHETIC_TIMERS, STATE_XSAVE, Vp
from .vp_calls import Translation

__all__ = [
    "ANY_VP",
    "EXECUTE",
    "EXTINT",
    "FIXED",
    "INIT",
    "LINT0",
    "LINT1",
    "LOWEST_PRIORITY",
    "NMI",
    "READ",
    "SIPI",
    "STATE_LAPIC",
    "STATE_SIEFP",
    "STATE_SIMP",
    "STATE_SYNTHETIC_TIMERS",
    "STATE_XSAVE",
    "WRITE",
    "ApicEoi",
    "Cpuid",
    "ExceptionIntercept",
    "Halt",
    "Hypercall",
    "Intercept",
    "InterruptionDeliverable",
    "InvalidRegister",
    "IoPort",
    "Memory",
    "MemoryAccess",
    "Message",
    "Mshv",
    "MshvError",
    "Msr",
    "Partition",
    "Region",
    "RegisterPage",
    "Segment",
    "SintDeliverable",
    "Sipi",
    "Table",
    "Translation",
    "UnrecoverableException",
    "UnsupportedFeature",
    "Vp",
]
