# SPDX-License-Identifier: Apache-2.0
"""Synthetic MSRs (TLFS appendix; ``include/hyperv/hvgdk_mini.h``)."""

from __future__ import annotations

FIRST = 0x40000000
#: Everything from FIRST on that is trapped; 0x4000108x is the nested block.
COUNT = 0x2000

GUEST_OS_ID = 0x40000000
HYPERCALL = 0x40000001
VP_INDEX = 0x40000002
RESET = 0x40000003
VP_RUNTIME = 0x40000010
TIME_REF_COUNT = 0x40000020
REFERENCE_TSC = 0x40000021
TSC_FREQUENCY = 0x40000022
APIC_FREQUENCY = 0x40000023
EOI = 0x40000070
ICR = 0x40000071
TPR = 0x40000072
VP_ASSIST_PAGE = 0x40000073
SCONTROL = 0x40000080
SVERSION = 0x40000081
SIEFP = 0x40000082
SIMP = 0x40000083
EOM = 0x40000084
SIRBP = 0x40000085
SINT0 = 0x40000090
SINT15 = 0x4000009F
STIMER0_CONFIG = 0x400000B0
GUEST_IDLE = 0x400000F0
CRASH_P0 = 0x40000100
CRASH_P4 = 0x40000104
CRASH_CTL = 0x40000105
REENLIGHTENMENT_CONTROL = 0x40000106
TSC_EMULATION_CONTROL = 0x40000107
TSC_EMULATION_STATUS = 0x40000108
TSC_INVARIANT_CONTROL = 0x40000118

NAMES = {
    value: name
    for name, value in list(globals().items())
    if name.isupper() and isinstance(value, int) and name not in ("FIRST", "COUNT")
}

#: Page MSRs and HYPERCALL: bit 0 enables, bits 63:12 are the guest page number.
PAGE_ENABLE = 1
PAGE_GPN_SHIFT = 12

SINT_VECTOR = 0xFF
SINT_MASKED = 1 << 16
SINT_AUTO_EOI = 1 << 17
SINT_POLLING = 1 << 18
SINT_AS_INTERCEPT = 1 << 19

CRASH_NOTIFY = 1 << 63
CRASH_MESSAGE = 1 << 62


def msr_name(index: int) -> str:
    """``HV_X64_MSR_X``, or the number."""
    if SINT0 < index <= SINT15:
        return f"HV_X64_MSR_SINT{index - SINT0}"
    if CRASH_P0 < index < CRASH_P4:
        return f"HV_X64_MSR_CRASH_P{index - CRASH_P0}"
    name = NAMES.get(index)
    return f"HV_X64_MSR_{name}" if name else f"{index:#010x}"
