# SPDX-License-Identifier: Apache-2.0
"""What a child's guest may see of the hypervisor, from the property SYNTHETIC_PROC_FEATURES that its VMM sets.

A VMM asks for what it knows; the guest is offered what is asked for and exists here. The rest is neither advertised in
CPUID nor there.
"""

from __future__ import annotations

from ..tlfs import partition_properties as tlfs
from ..tlfs import privileges

#: Bit of the property -> privileges in CPUID 0x40000003 EBX:EAX.
_PRIVILEGES = {
    tlfs.SYNTHETIC_REFERENCE_COUNTER: privileges.ACCESS_PARTITION_REFERENCE_COUNTER,
    tlfs.SYNTHETIC_SYNIC: privileges.ACCESS_SYNIC_REGS | privileges.POST_MESSAGES,
    tlfs.SYNTHETIC_TIMERS: privileges.ACCESS_SYNTHETIC_TIMER_REGS,
    tlfs.SYNTHETIC_APIC_MSRS: privileges.ACCESS_INTR_CTRL_REGS,
    tlfs.SYNTHETIC_HYPERCALL_MSRS: privileges.ACCESS_HYPERCALL_MSRS,
    tlfs.SYNTHETIC_VP_INDEX: privileges.ACCESS_VP_INDEX,
    tlfs.SYNTHETIC_REFERENCE_TSC: privileges.ACCESS_PARTITION_REFERENCE_TSC,
    tlfs.SYNTHETIC_FREQUENCY: privileges.ACCESS_FREQUENCY_REGS,
    tlfs.SYNTHETIC_SIGNAL_EVENTS: privileges.SIGNAL_EVENTS,
    tlfs.SYNTHETIC_VP_REGISTERS: privileges.ACCESS_VP_REGISTERS,
    tlfs.SYNTHETIC_FAST_OUTPUT: privileges.FAST_HYPERCALL_OUTPUT,
}
#: Bit of the property -> features in CPUID 0x40000003 EDX.
_FEATURES = {
    tlfs.SYNTHETIC_HYPERCALL_MSRS: privileges.FEATURE_XMM_INPUT,
    tlfs.SYNTHETIC_FREQUENCY: privileges.FEATURE_FREQUENCY_MSRS,
    tlfs.SYNTHETIC_FAST_OUTPUT: privileges.FEATURE_XMM_OUTPUT,
    tlfs.SYNTHETIC_DIRECT_TIMERS: privileges.FEATURE_DIRECT_TIMERS,
}
_PRESENT = tlfs.SYNTHETIC_HYPERVISOR_PRESENT | tlfs.SYNTHETIC_HV1
#: With ``rootvisor run --child-timers``.
TIMERS = tlfs.SYNTHETIC_TIMERS | tlfs.SYNTHETIC_DIRECT_TIMERS
#: What a VMM can have: property ASSIGNABLE_SYNTHETIC_PROC_FEATURES.
ASSIGNABLE = _PRESENT
for _bit in (*_PRIVILEGES, *_FEATURES):
    ASSIGNABLE |= _bit & ~TIMERS


def hypervisor_present(synthetic: int) -> bool:
    """Whether the guest sees a hypervisor with the interface "Hv#1". The bits for the one and the other make sense
    together only."""
    return synthetic & _PRESENT == _PRESENT


def privileges_of(synthetic: int) -> int:
    """Privileges for a value of the property: none unless the hypervisor and its interface are to be seen."""
    return _sum(_PRIVILEGES, synthetic)


def features_of(synthetic: int) -> int:
    """Features for a value of the property. Direct mode is one of timers that are there."""
    total = _sum(_FEATURES, synthetic)
    return total if synthetic & tlfs.SYNTHETIC_TIMERS else total & ~privileges.FEATURE_DIRECT_TIMERS


def _sum(table: dict[int, int], synthetic: int) -> int:
    if not hypervisor_present(synthetic):
        return 0
    total = 0
    for bit, granted in table.items():
        if synthetic & bit:
            total |= granted
    return total
