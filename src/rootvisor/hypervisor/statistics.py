# SPDX-License-Identifier: Apache-2.0
"""Fills the statistics pages that the root has mapped.

Readers see the pages without an exit, so they are filled when they are mapped and then once a second, by the main
thread (:meth:`Statistics.tick`). Only what somebody really counts is there; all else stays 0. The PARENT areas stay 0
too: the driver then takes the SELF area's counter.
"""

from __future__ import annotations

from time import clock_gettime_ns, monotonic_ns

from ..kvm import abi
from ..tlfs import hypercalls, intercepts
from ..tlfs import statistics as tlfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_partition import ChildPartition
    from .hypervisor import Hypervisor
    from .partition import Partition
    from .vp import VirtualProcessor

_INTERVAL_NS = 1_000_000_000
#: hypercall -> the counter of its family, beside the one of all
_FAMILIES = {
    **dict.fromkeys((0x4B, 0x4C, 0xC9), tlfs.VP_GPA_SPACE_HYPERCALLS),
    **dict.fromkeys((0x04, 0x76), tlfs.VP_LOGICAL_PROCESSOR_HYPERCALLS),
    0x08: tlfs.VP_LONG_SPIN_WAIT_HYPERCALLS,
    **dict.fromkeys(
        (0x58, 0x5B, 0x5C, 0x5D, 0x8B, 0x95, 0x96, 0xC0, 0xC1), tlfs.VP_SYNTHETIC_INTERRUPT_HYPERCALLS
    ),
    **dict.fromkeys((0x0B, 0x15, 0x56, 0x94), tlfs.VP_VIRTUAL_INTERRUPT_HYPERCALLS),
    0x52: tlfs.VP_VIRTUAL_MMU_HYPERCALLS,
    **dict.fromkeys(
        (0x4D, 0x4E, 0x4F, 0x50, 0x51, 0x91, 0xE1, 0xE2, 0xE3, 0xE4, 0xF4),
        tlfs.VP_VIRTUAL_PROCESSOR_HYPERCALLS,
    ),
    **dict.fromkeys((0x48, 0x49), tlfs.VP_DEPOSIT_HYPERCALLS),
}
_PORTS, _MSRS = (abi.EXIT_IO,), (abi.EXIT_X86_RDMSR, abi.EXIT_X86_WRMSR)
_MEMORY = (abi.EXIT_MMIO, abi.EXIT_MEMORY_FAULT)
#: Returns from KVM_RUN that are no intercepts.
_NO_INTERCEPTS = (abi.EXIT_UNKNOWN, abi.EXIT_INTR)


class Statistics:
    """``pages``: (type, identity without padding) -> the root's page. Under Hypervisor.lock."""

    __slots__ = ("_began", "_due", "_hypervisor", "_refreshes", "pages")

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        self._began = monotonic_ns()
        self._due = 0
        self._refreshes = 0
        self.pages: dict[tuple[int, bytes], int] = {}

    def tick(self) -> None:
        """Refreshes all pages if a second has passed; the main thread calls it now and then, without the lock."""
        if not self.pages:
            return
        now = monotonic_ns()
        if now < self._due:
            return
        self._due = now + _INTERVAL_NS
        self._refreshes += 1
        for key in list(self.pages):
            with self._hypervisor.lock:  # a page at a time: a VP waits for one at most
                gpn = self.pages.get(key)
                if gpn is not None:
                    self.fill(key, gpn)

    def fill(self, key: tuple[int, bytes], gpn: int) -> None:
        """Writes an object's counters, if it still exists."""
        kind, identity = key
        if identity[-1] != hypercalls.STATS_AREA_SELF:
            return
        hypervisor = self._hypervisor
        page = hypervisor.root.memory.view(gpn << 12, 4096).cast("Q")
        if kind == hypercalls.STATS_HYPERVISOR:
            self._hypervisor_page(page)
        elif kind == hypercalls.STATS_LOGICAL_PROCESSOR:
            self._logical_processor(page, int.from_bytes(identity[:4], "little"))
        else:
            partition_id = int.from_bytes(identity[:8], "little")
            if partition_id == hypercalls.SELF:
                partition_id = hypervisor.root.id
            partition = hypervisor.partitions.get(partition_id)
            if partition is None:
                return
            if kind == hypercalls.STATS_PARTITION:
                self._partition(page, partition)
            else:
                index = int.from_bytes(identity[8:12], "little")
                for vp in partition.vps:
                    if vp.index == index:
                        _virtual_processor(page, vp)
                        if partition is not hypervisor.root:
                            _messages(page, vp.told)  # type: ignore[attr-defined]

    def _hypervisor_page(self, page: memoryview) -> None:
        hypervisor = self._hypervisor
        partitions = hypervisor.partitions.values()
        page[tlfs.HV_LOGICAL_PROCESSORS] = len(hypervisor.logical_processors)
        page[tlfs.HV_PARTITIONS] = len(partitions)
        page[tlfs.HV_TOTAL_PAGES] = len(hypervisor.deposited)
        page[tlfs.HV_VIRTUAL_PROCESSORS] = sum(len(partition.vps) for partition in partitions)

    def _logical_processor(self, page: memoryview, index: int) -> None:
        """An LP runs the root's VP on it, and its share of the children that no counter here knows."""
        root = self._hypervisor.root
        apic_id = self._hypervisor.logical_processors.get(index)
        vp = root.vp_by_apic_id(apic_id) if apic_id is not None else None
        if vp is None:
            return
        # the host's clock: a VP's TSC cannot be read while it runs
        now = (monotonic_ns() - self._began) // 100
        page[tlfs.LP_GLOBAL_TIME] = now
        page[tlfs.LP_TOTAL_RUN_TIME] = _run_time(vp)
        page[tlfs.LP_ROOT_VP_INDEX] = vp.index
        page[tlfs.LP_COUNTER_REFRESH_SEQUENCE_NUMBER] = self._refreshes
        page[tlfs.LP_COUNTER_REFRESH_REFERENCE_TIME] = now

    def _partition(self, page: memoryview, partition: Partition) -> None:
        hypervisor = self._hypervisor
        root = hypervisor.root
        page[tlfs.PT_VIRTUAL_PROCESSORS] = len(partition.vps)
        page[tlfs.PT_DEPOSITED_PAGES] = partition.deposits.total
        page[tlfs.PT_PARTITION_ID] = partition.id
        if partition is root:
            interrupts = root.interrupts
            page[tlfs.PT_GPA_PAGES] = root.memory.size >> 12
            page[tlfs.PT_ATTACHED_DEVICES] = len(interrupts.devices)
            page[tlfs.PT_DEVICE_INTERRUPT_MAPPINGS] = sum(entry is not None for entry in interrupts.entries)
            page[tlfs.PT_DEVICE_INTERRUPT_ERRORS] = interrupts.blocked
            page[tlfs.PT_ACTIVE_CHILD_PARTITIONS] = len(hypervisor.partitions) - 1
        else:
            child: ChildPartition = partition  # type: ignore[assignment]
            page[tlfs.PT_GPA_PAGES] = child.memory.mapped_pages
            page[tlfs.PT_GPA_SPACE_MODIFICATIONS] = child.memory.fault_ins


def _run_time(vp: VirtualProcessor) -> int:
    """What the VP's thread has computed, guest and hypervisor."""
    try:
        return clock_gettime_ns(vp.cpu_clock) // 100 if vp.cpu_clock else 0
    except OSError:  # the thread has ended
        return 0


def _virtual_processor(page: memoryview, vp: VirtualProcessor) -> None:
    calls = vp.hypercalls.copy()
    total = sum(calls.values())
    families = dict.fromkeys(_FAMILIES.values(), 0)
    families[tlfs.VP_OTHER_HYPERCALLS] = 0
    for code, count in calls.items():
        families[_FAMILIES.get(code, tlfs.VP_OTHER_HYPERCALLS)] += count
    for index, count in families.items():
        page[index] = count
    exits = vp.exits
    ports = sum(exits[reason] for reason in _PORTS)
    msrs = sum(exits[reason] for reason in _MSRS)
    memory = sum(exits[reason] for reason in _MEMORY)
    no_intercepts = sum(exits[reason] for reason in _NO_INTERCEPTS)
    page[tlfs.VP_TOTAL_RUN_TIME] = _run_time(vp)
    page[tlfs.VP_HYPERCALLS] = total
    page[tlfs.VP_IO_INSTRUCTIONS] = max(ports - total, 0)  # a hypercall is an OUT
    page[tlfs.VP_HLT_INSTRUCTIONS] = exits[abi.EXIT_HLT]
    page[tlfs.VP_MSR_ACCESSES] = msrs
    page[tlfs.VP_NESTED_PAGE_FAULT_INTERCEPTS] = memory
    page[tlfs.VP_OTHER_INTERCEPTS] = sum(exits) - ports - msrs - memory - exits[abi.EXIT_HLT] - no_intercepts
    page[tlfs.VP_VIRTUAL_INTERRUPTS] = vp.interrupts


def _messages(page: memoryview, told: dict[int, int]) -> None:
    """Intercept messages of a child's VP, by type."""
    ports = told.get(intercepts.X64_IO_PORT_INTERCEPT, 0)
    memory = told.get(intercepts.GPA_INTERCEPT, 0) + told.get(intercepts.UNMAPPED_GPA, 0)
    page[tlfs.VP_IO_INTERCEPT_MESSAGES] = ports
    page[tlfs.VP_MEMORY_INTERCEPT_MESSAGES] = memory
    page[tlfs.VP_OTHER_MESSAGES] = sum(told.copy().values()) - ports - memory
