# SPDX-License-Identifier: Apache-2.0
"""Synthetic MSRs of a VP: each is a read and a write function, present only with its privilege (TLFS appendix).

Absent functions raise #GP. Values are 64 bit.
"""

from __future__ import annotations

from time import clock_gettime_ns

from ..kvm.abi import MSR_TSC
from ..tlfs import msrs, privileges
from .errors import GeneralProtection
from .hypercall_abi import write_page

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .overlay import OverlayPage
    from .synthetic_timers import SyntheticTimer
    from .vp import VirtualProcessor

    Read = Callable[[], int]
    Write = Callable[[int], None]
    Accessors = tuple[Read | None, Write | None]

_X2APIC_TPR = 0x808
_X2APIC_EOI = 0x80B
_X2APIC_ICR = 0x830
_ICR_BUSY = 1 << 12
_CRASH_CAPABILITIES = msrs.CRASH_NOTIFY | msrs.CRASH_MESSAGE
_CRASH_MESSAGE_MAX = 4096


def synthetic_msrs(vp: VirtualProcessor) -> dict[int, Accessors]:
    """The MSRs of ``vp`` by number."""
    partition = vp.partition
    granted = partition.privileges
    table: dict[int, Accessors] = {}
    if granted & privileges.ACCESS_HYPERCALL_MSRS:
        table[msrs.GUEST_OS_ID] = (lambda: partition.guest_os_id), _write_guest_os_id(vp)
        table[msrs.HYPERCALL] = (lambda: partition.hypercall_page.value), _write_hypercall(vp)
    if granted & privileges.ACCESS_VP_INDEX:
        table[msrs.VP_INDEX] = (lambda: vp.index), None
    if granted & privileges.ACCESS_RESET_REG:
        table[msrs.RESET] = (lambda: 0), _write_reset(vp)
    if granted & privileges.ACCESS_VP_RUNTIME:
        table[msrs.VP_RUNTIME] = (lambda: clock_gettime_ns(vp.cpu_clock) // 100), None
    if granted & privileges.ACCESS_PARTITION_REFERENCE_COUNTER:
        table[msrs.TIME_REF_COUNT] = (lambda: partition.reference_time.at(vp.vcpu.get_msr(MSR_TSC))), None
    if granted & privileges.ACCESS_PARTITION_REFERENCE_TSC:
        table[msrs.REFERENCE_TSC] = (lambda: partition.tsc_page.value), _write_reference_tsc(vp)
    if granted & privileges.ACCESS_FREQUENCY_REGS and partition.features & privileges.FEATURE_FREQUENCY_MSRS:
        table[msrs.TSC_FREQUENCY] = (lambda: partition.reference_time.tsc_hz), None
        table[msrs.APIC_FREQUENCY] = (lambda: partition.apic_hz), None
    if granted & privileges.ACCESS_INTR_CTRL_REGS:
        table[msrs.EOI] = None, _write_eoi(vp)
        table[msrs.ICR] = _read_icr(vp), _write_icr(vp)
        table[msrs.TPR] = _read_tpr(vp), _write_tpr(vp)
        table[msrs.VP_ASSIST_PAGE] = (lambda: vp.assist_page.value), _write_assist_page(vp)
    if granted & privileges.ACCESS_SYNIC_REGS:
        table.update(_synic_msrs(vp))
    if granted & privileges.ACCESS_SYNTHETIC_TIMER_REGS:
        for timer in vp.timers:
            at = msrs.STIMER0_CONFIG + timer.index * 2
            table[at], table[at + 1] = _timer_msrs(timer)
    if granted & privileges.ACCESS_GUEST_IDLE_REG and partition.features & privileges.FEATURE_GUEST_IDLE:
        table[msrs.GUEST_IDLE] = vp.idle, None
    if partition.features & privileges.FEATURE_CRASH_MSRS:
        for number in range(5):
            table[msrs.CRASH_P0 + number] = _crash_parameter(vp, number)
        table[msrs.CRASH_CTL] = (lambda: _CRASH_CAPABILITIES), _write_crash_control(vp)
    if granted & privileges.ACCESS_TSC_INVARIANT_CONTROLS:
        table[msrs.TSC_INVARIANT_CONTROL] = (lambda: partition.tsc_invariant), _write_tsc_invariant(vp)
    return table


def _timer_msrs(timer: SyntheticTimer) -> tuple[Accessors, Accessors]:
    return (timer.read_config, timer.write_config), ((lambda: timer.count), timer.write_count)


def _synic_msrs(vp: VirtualProcessor) -> dict[int, Accessors]:
    synic = vp.synic

    def page(overlay: OverlayPage) -> Accessors:
        return (lambda: overlay.value), (lambda value: synic.write_page(overlay, value))

    def sint(number: int) -> Accessors:
        return (lambda: synic.sints[number]), (lambda value: synic.write_sint(number, value))

    table: dict[int, Accessors] = {
        msrs.SCONTROL: ((lambda: synic.scontrol), synic.write_scontrol),
        msrs.SVERSION: ((lambda: 1), None),
        msrs.SIEFP: page(synic.siefp),
        msrs.SIMP: page(synic.simp),
        msrs.SIRBP: page(synic.sirbp),
        msrs.EOM: ((lambda: 0), lambda _value: synic.end_of_message()),
    }
    for number in range(16):
        table[msrs.SINT0 + number] = sint(number)
    return table


def _write_guest_os_id(vp: VirtualProcessor) -> Write:
    partition = vp.partition

    def write(value: int) -> None:
        partition.guest_os_id = value
        if not value:
            partition.hypercall_page.disable()

    return write


def _write_hypercall(vp: VirtualProcessor) -> Write:
    partition = vp.partition

    def write(value: int) -> None:
        if partition.hypercall_page.value & 2:  # locked until reset
            raise GeneralProtection
        if not partition.hypercall_page.can_move(value):
            raise GeneralProtection
        if not partition.guest_os_id:
            value &= ~msrs.PAGE_ENABLE  # enable silently stays off without an OS identity
        page = partition.hypercall_page
        page.write(value)
        if value & msrs.PAGE_ENABLE:
            write_page(page.view)

    return write


def _write_reset(vp: VirtualProcessor) -> Write:
    def write(value: int) -> None:
        if value & ~1:
            raise GeneralProtection
        if value:
            vp.partition.end("reset", "HV_X64_MSR_RESET")

    return write


def _write_reference_tsc(vp: VirtualProcessor) -> Write:
    partition = vp.partition

    def write(value: int) -> None:
        partition.tsc_page.write(value)
        if value & msrs.PAGE_ENABLE:
            partition.reference_time.write_page(partition.tsc_page.view)

    return write


def _write_assist_page(vp: VirtualProcessor) -> Write:
    def write(value: int) -> None:
        enabled = vp.assist_page.enabled
        vp.assist_page.write(value)
        if value & msrs.PAGE_ENABLE and not enabled:
            vp.assist_page.view[0:4] = bytes(4)  # no EOI is left out; the rest may have been migrated
        vp.assist_page_changed()
        outlet = vp.synic.outlet
        if value & msrs.PAGE_ENABLE and outlet is not None:
            outlet.came_online()  # the sign of a CPU that begins anew: see event_rings

    return write


# The APIC registers go to KVM's local APIC: by its x2APIC MSRs, or, while it is in xAPIC mode and refuses those, by
# KVM's own copies of these very MSRs (``arch/x86/kvm/hyperv.c:kvm_hv_vapic_msr_write``), which only the host sees.


def _write_apic(vp: VirtualProcessor, x2apic: int, value: int, synthetic: int, plain: int) -> None:
    if not vp.vcpu.set_msr(x2apic, value) and not vp.vcpu.set_msr(synthetic, plain):
        raise GeneralProtection


def _read_apic(vp: VirtualProcessor, x2apic: int, synthetic: int) -> tuple[int, bool]:
    """The value, and whether it is the x2APIC's."""
    value = vp.vcpu.try_msr(x2apic)
    if value is not None:
        return value, True
    value = vp.vcpu.try_msr(synthetic)
    if value is None:
        raise GeneralProtection
    return value, False


def _write_eoi(vp: VirtualProcessor) -> Write:
    def write(value: int) -> None:
        if value >> 32:
            raise GeneralProtection
        _write_apic(vp, _X2APIC_EOI, 0, msrs.EOI, 0)

    return write


def _read_icr(vp: VirtualProcessor) -> Read:
    def read() -> int:
        value, x2apic = _read_apic(vp, _X2APIC_ICR, msrs.ICR)
        return (value >> 32 & 0xFF) << 56 | value & 0xFFFFFFFF if x2apic else value

    return read


def _write_icr(vp: VirtualProcessor) -> Write:
    def write(value: int) -> None:
        # xAPIC layout: destination in 63:56; the x2APIC register wants it in 63:32.
        low = value & 0xFFFFFFFF & ~_ICR_BUSY
        _write_apic(vp, _X2APIC_ICR, (value >> 56) << 32 | low, msrs.ICR, value & 0xFF << 56 | low)

    return write


def _read_tpr(vp: VirtualProcessor) -> Read:
    return lambda: _read_apic(vp, _X2APIC_TPR, msrs.TPR)[0]


def _write_tpr(vp: VirtualProcessor) -> Write:
    def write(value: int) -> None:
        if value >> 8:
            raise GeneralProtection
        _write_apic(vp, _X2APIC_TPR, value, msrs.TPR, value)

    return write


def _crash_parameter(vp: VirtualProcessor, number: int) -> Accessors:
    parameters = vp.partition.crash_parameters

    def write(value: int) -> None:
        parameters[number] = value

    return (lambda: parameters[number]), write


def _write_crash_control(vp: VirtualProcessor) -> Write:
    partition = vp.partition

    def write(value: int) -> None:
        if not value & msrs.CRASH_NOTIFY:
            return
        message = b""
        if value & msrs.CRASH_MESSAGE:
            gpa, length = partition.crash_parameters[3], partition.crash_parameters[4]
            try:
                message = bytes(partition.memory.view(gpa, min(length, _CRASH_MESSAGE_MAX)))
            except ValueError:
                message = b"(the report's text lies outside memory)"
        partition.crash(message)

    return write


def _write_tsc_invariant(vp: VirtualProcessor) -> Write:
    partition = vp.partition

    def write(value: int) -> None:
        if value & ~1 or (partition.tsc_invariant and not value):
            raise GeneralProtection
        partition.tsc_invariant = value
        vp.vcpu.set_msr(msrs.TSC_INVARIANT_CONTROL, value)  # CPUID of every VP follows

    return write
