# SPDX-License-Identifier: Apache-2.0
"""Which pages a child has written since tracking began (property GPA_PAGE_ACCESS_TRACKING).

KVM's dirty log wants a bitmap as large as its memory slot. While tracking is on, the child's address space is cut into
slots around what is mapped, and only those are logged. A page that is mapped outside of them later counts as dirty.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..kvm.vm import Vm
    from .child_memory import ChildMemory

_APIC_GFN = 0xFEE00
#: Ranges closer than this (pages) share a slot: KVM has 32,764 slots, and a change costs time for each.
_GAP = 4096
_FIRST_SLOT = 2


class DirtyLog:
    """Bits by guest page number. Called under Hypervisor.lock; start and stop while no VP runs."""

    __slots__ = ("_memory", "_slots", "_vm")

    def __init__(self, memory: ChildMemory, vm: Vm) -> None:
        self._memory = memory
        self._vm = vm
        #: (slot, first gfn, end gfn, bitmap or None for memory that is not logged)
        self._slots: list[tuple[int, int, int, bytearray | None]] = []

    def start(self, ranges: list[tuple[int, int]]) -> None:
        """Cuts the slots anew around ``ranges`` (sorted, in pages); all bits are clear."""
        self._remove_slots()
        logged: list[tuple[int, int]] = []
        for first, last in ranges:
            for low, high in ((first, min(last, _APIC_GFN)), (max(first, _APIC_GFN + 1), last)):
                if low >= high:
                    continue
                same_side = bool(logged) and (logged[-1][1] <= _APIC_GFN) == (high <= _APIC_GFN)
                if same_side and low - logged[-1][1] <= _GAP:
                    logged[-1] = (logged[-1][0], high)
                else:
                    logged.append((low, high))
        self._memory.remove_plain_slots()
        at = 0
        for first, last in [*logged, (self._memory.gfn_limit, self._memory.gfn_limit)]:
            for low, high in ((at, min(first, _APIC_GFN)), (max(at, _APIC_GFN + 1), first)):
                if low < high:
                    self._add_slot(low, high, False)
            if first < last:
                self._add_slot(first, last, True)
            at = last

    def _add_slot(self, first: int, last: int, logged: bool) -> None:
        from ..kvm import abi

        slot = _FIRST_SLOT + len(self._slots)
        flags = abi.MEM_LOG_DIRTY_PAGES if logged else 0
        self._vm.set_memory(
            slot, first << 12, last - first << 12, self._memory.address + (first << 12), flags
        )
        self._slots.append((slot, first, last, bytearray((last - first + 63) // 64 * 8) if logged else None))

    def _remove_slots(self) -> None:
        if not self._slots:
            return
        for slot, *_ in self._slots:
            self._vm.set_memory(slot, 0, 0, 0)
        self._slots.clear()
        self._memory.set_plain_slots()

    def stop(self) -> None:
        """The plain slots are back."""
        self._remove_slots()

    def harvest(self, first: int, last: int) -> None:
        """Takes over what KVM has logged for the slots that [first, last) touches."""
        for slot, low, high, bitmap in self._slots:
            if bitmap is not None and low < last and first < high:
                news = self._vm.dirty_log(slot, len(bitmap))
                bits = int.from_bytes(bitmap, "little") | int.from_bytes(news, "little")
                bitmap[:] = bits.to_bytes(len(bitmap), "little")

    def mark(self, gfn: int) -> None:
        """The hypervisor itself has written, or is about to."""
        for _slot, low, high, bitmap in self._slots:
            if bitmap is not None and low <= gfn < high:
                bitmap[gfn - low >> 3] |= 1 << (gfn - low & 7)

    def read(self, gfn: int, states: bytearray, value: int) -> None:
        """Adds ``value`` to the state of each dirty page from ``gfn`` on."""
        end = gfn + len(states)
        self.harvest(gfn, end)
        for _slot, low, high, bitmap in self._slots:
            for page in range(max(gfn, low), min(end, high)):
                if bitmap is None:
                    if states[page - gfn]:
                        states[page - gfn] |= value
                elif bitmap[page - low >> 3] >> (page - low & 7) & 1:
                    states[page - gfn] |= value

    def clear(self, gfn: int, count: int) -> None:
        """Bits off; KVM notices the next write."""
        self._change(gfn, count, False)

    def set(self, gfn: int, count: int) -> None:
        """Bits on."""
        self._change(gfn, count, True)

    def _change(self, gfn: int, count: int, value: bool) -> None:
        for _slot, low, high, bitmap in self._slots:
            if bitmap is None:
                continue
            for page in range(max(gfn, low), min(gfn + count, high)):
                if value:
                    bitmap[page - low >> 3] |= 1 << (page - low & 7)
                else:
                    bitmap[page - low >> 3] &= ~(1 << (page - low & 7))
