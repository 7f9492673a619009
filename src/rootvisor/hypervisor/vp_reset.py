# SPDX-License-Identifier: Apache-2.0
"""The state of a processor after RESET (AMD64 APM volume 2, "Processor Initialization State"), for one that has run.

KVM makes a new processor in this state and keeps processors until the machine goes; one whose VP was deleted serves the
next VP of that index.
"""

from __future__ import annotations

from struct import pack_into

from ..kvm import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_vp import ChildVp

_SEGMENT = "<QIHBBBBBBBBBx"
_CODE, _DATA, _TASK, _TABLE = (0xB, 1), (3, 1), (3, 0), (2, 0)  # type, S
_APIC_BASE, _BOOT_PROCESSOR = 0xFEE00800, 0x100
_LVT_MASKED = 0x10000
#: PAT, and zero in everything else that a kernel sets.
_PAT, _PAT_RESET = 0x277, 0x0007_0406_0007_0406
_ZERO_MSRS = (
    0x174, 0x175, 0x176, 0x2FF, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102, 0xC0000103, 0x1D9,
    *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270),
)  # fmt: skip


def reset(vp: ChildVp) -> None:
    """Puts registers, local APIC, FPU and MSRs of the VP's processor into their state after RESET."""
    vcpu = vp.vcpu
    run = vcpu.u8
    run[abi.SYNC_REGS_AT : abi.SYNC_EVENTS_AT + 64] = bytes(144 + 312 + 64)
    regs = abi.SYNC_REGS_AT // 8
    vcpu.u64[regs + abi.REGS.index("rip")] = 0xFFF0
    vcpu.u64[regs + abi.REGS.index("rflags")] = 2
    for at, selector, base, (kind, s) in (
        (abi.SREGS_CS, 0xF000, 0xFFFF0000, _CODE), (abi.SREGS_DS, 0, 0, _DATA), (abi.SREGS_ES, 0, 0, _DATA),
        (abi.SREGS_FS, 0, 0, _DATA), (abi.SREGS_GS, 0, 0, _DATA), (abi.SREGS_SS, 0, 0, _DATA),
        (abi.SREGS_TR, 0, 0, _TASK), (abi.SREGS_LDT, 0, 0, _TABLE),
    ):  # fmt: skip
        pack_into(_SEGMENT, run, abi.SYNC_SREGS_AT + at, base, 0xFFFF, selector, kind, 1, 0, 0, s, 0, 0, 0, 0)
    for at in (abi.SREGS_GDT, abi.SREGS_IDT):
        pack_into("<QH", run, abi.SYNC_SREGS_AT + at, 0, 0xFFFF)
    sregs = abi.SYNC_SREGS_AT // 8
    vcpu.u64[sregs + abi.SREGS_CR0 // 8] = 0x60000010
    vcpu.u64[sregs + abi.SREGS_APIC_BASE // 8] = _APIC_BASE | (0 if vp.index else _BOOT_PROCESSOR)
    vcpu.u32[(abi.SYNC_EVENTS_AT + abi.EVENTS_FLAGS) // 4] = (
        abi.EVENTS_VALID_SHADOW | abi.EVENTS_VALID_PAYLOAD | abi.EVENTS_VALID_NMI_PENDING
    )
    vcpu.u64[abi.RUN_DIRTY_REGS // 8] = abi.SYNC_REGS | abi.SYNC_SREGS | abi.SYNC_EVENTS
    vcpu.commit_sync_area()
    lapic = vcpu.lapic()
    version = lapic[0x30:0x34]
    lapic[:] = bytes(1024)
    lapic[0x30:0x34] = version
    pack_into("<I", lapic, 0x20, vp.apic_id << 24)
    pack_into("<I", lapic, 0xE0, 0xFFFFFFFF)
    pack_into("<I", lapic, 0xF0, 0xFF)
    for at in (0x320, 0x330, 0x340, 0x350, 0x360, 0x370):
        pack_into("<I", lapic, at, _LVT_MASKED)
    vcpu.set_lapic(lapic)
    image = bytearray(4096)
    vcpu.xsave(image)
    mxcsr_mask = image[28:32]
    image[:] = bytes(4096)
    image[28:32] = mxcsr_mask
    pack_into("<H", image, 0, 0x37F)
    pack_into("<I", image, 24, 0x1F80)
    pack_into("<Q", image, 512, 3)
    vcpu.set_xsave(image)
    debug = bytearray(128)
    pack_into("<QQ", debug, abi.DEBUGREGS_DR6, 0xFFFF0FF0, 0x400)
    vcpu.set_debug_registers(debug)
    vcpu.set_msr(_PAT, _PAT_RESET)
    for index in _ZERO_MSRS:
        vcpu.set_msr(index, 0)
    vp.stored.cpuid_stale = False
    vp.stored.cpuid_final = True
