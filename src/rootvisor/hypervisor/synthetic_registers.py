# SPDX-License-Identifier: Apache-2.0
"""Registers that belong to the hypervisor rather than to the processor: SynIC, overlay pages, clocks, crash, versions.

They are the synthetic MSRs under another name, but whoever reads and writes them here stands above the partition: no
privilege is needed, and a locked or half set-up page can be replaced (a VMM restores a saved guest). All of them work
on a running VP.
"""

from __future__ import annotations

from ..tlfs import cpuid, msrs, status
from ..tlfs import registers as names
from .errors import HvError
from .hypercall_abi import write_page

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .overlay import OverlayPage
    from .vp import VirtualProcessor

    Get = Callable[[VirtualProcessor], int]
    Set = Callable[[VirtualProcessor, int], None]

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF
#: Names that show a leaf of the hypervisor's CPUID, EAX lowest.
_LEAVES = {
    names.HYPERVISOR_VERSION: cpuid.VERSION,
    names.PRIVILEGES_AND_FEATURES_INFO: cpuid.FEATURES,
    names.FEATURES_INFO: cpuid.RECOMMENDATIONS,
    names.IMPLEMENTATION_LIMITS_INFO: cpuid.LIMITS,
    names.HARDWARE_FEATURES_INFO: cpuid.HARDWARE_FEATURES,
    names.CPU_MANAGEMENT_FEATURES_INFO: cpuid.CPU_MANAGEMENT,
    names.SVM_FEATURES_INFO: cpuid.SVM,
    names.SKIP_LEVEL_FEATURES_INFO: cpuid.SVM + 1,
    names.NESTED_VIRT_FEATURES_INFO: cpuid.NESTED,
    names.IPT_FEATURES_INFO: cpuid.NESTED + 1,
}


def _leaf(number: int) -> Get:
    def read(vp: VirtualProcessor) -> int:
        from .partition_cpuid import hypervisor_leaves

        for leaf, _index, _flags, eax, ebx, ecx, edx in hypervisor_leaves(vp.partition):
            if leaf == number:
                return eax | ebx << 32 | ecx << 64 | edx << 96
        return 0

    return read


def _set_guest_os_id(vp: VirtualProcessor, value: int) -> None:
    vp.partition.guest_os_id = value
    if not value:
        vp.partition.hypercall_page.disable()


def _set_hypercall(vp: VirtualProcessor, value: int) -> None:
    page = vp.partition.hypercall_page
    if value != page.value:
        page.write(value)
        if value & msrs.PAGE_ENABLE:
            write_page(page.view)


def _set_reference_tsc(vp: VirtualProcessor, value: int) -> None:
    partition = vp.partition
    if value != partition.tsc_page.value:
        partition.tsc_page.write(value)
        if value & msrs.PAGE_ENABLE:
            partition.reference_time.write_page(partition.tsc_page.view)


def _set_synic_page(vp: VirtualProcessor, page: OverlayPage, value: int) -> None:
    if value != page.value:
        vp.synic.write_page(page, value)


def _set_assist_page(vp: VirtualProcessor, value: int) -> None:
    if value != vp.assist_page.value:
        vp.assist_page.write(value)
        vp.assist_page_changed()


def _sint(number: int) -> tuple[Get, Set]:
    return (
        lambda vp: vp.synic.sints[number],
        lambda vp, value: vp.synic.write_sint(number, value),
    )


def _crash_parameter(number: int) -> tuple[Get, Set]:
    def write(vp: VirtualProcessor, value: int) -> None:
        vp.partition.crash_parameters[number] = value

    return (lambda vp: vp.partition.crash_parameters[number]), write


def _table() -> dict[int, tuple[Get, Set | None]]:
    return {
        names.HYPERCALL: ((lambda vp: vp.partition.hypercall_page.value), _set_hypercall),
        names.GUEST_OS_ID: ((lambda vp: vp.partition.guest_os_id), _set_guest_os_id),
        names.VP_INDEX: ((lambda vp: vp.index), None),
        names.VP_ASSIST_PAGE: ((lambda vp: vp.assist_page.value), _set_assist_page),
        names.REFERENCE_TSC: ((lambda vp: vp.partition.tsc_page.value), _set_reference_tsc),
        names.SCONTROL: ((lambda vp: vp.synic.scontrol), lambda vp, value: vp.synic.write_scontrol(value)),
        names.SVERSION: ((lambda _vp: 1), None),
        names.SIEFP: (
            lambda vp: vp.synic.siefp.value,
            lambda vp, value: _set_synic_page(vp, vp.synic.siefp, value),
        ),
        names.SIMP: (
            lambda vp: vp.synic.simp.value,
            lambda vp, value: _set_synic_page(vp, vp.synic.simp, value),
        ),
        names.SIRBP: (
            lambda vp: vp.synic.sirbp.value,
            lambda vp, value: _set_synic_page(vp, vp.synic.sirbp, value),
        ),
        names.EOM: ((lambda _vp: 0), (lambda vp, _value: vp.synic.end_of_message())),
        names.GUEST_CRASH_CTL: ((lambda _vp: msrs.CRASH_NOTIFY | msrs.CRASH_MESSAGE), None),
        **{names.SINT0 + number: _sint(number) for number in range(16)},
        **{names.GUEST_CRASH_P0 + number: _crash_parameter(number) for number in range(5)},
        **{name: (_leaf(leaf), None) for name, leaf in _LEAVES.items()},
    }  # fmt: skip


_TABLE = _table()


def get(vp: VirtualProcessor, name: int) -> int:
    """The value. HV_STATUS_INVALID_PARAMETER for a name that is not one of these."""
    entry = _TABLE.get(name)
    if entry is None:
        raise HvError(status.INVALID_PARAMETER)
    return entry[0](vp)


def set(vp: VirtualProcessor, name: int, value: int) -> None:
    """Stores the low 64 bits. HV_STATUS_INVALID_PARAMETER: unknown or read-only; GeneralProtection: invalid."""
    entry = _TABLE.get(name)
    if entry is None or entry[1] is None:
        raise HvError(status.INVALID_PARAMETER)
    entry[1](vp, value & _MASK64)
