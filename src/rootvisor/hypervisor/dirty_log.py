# SPDX-License-Identifier: Apache-2.0
"""Which pages a child has written since tracking began (property GPA_PAGE_ACCESS_TRACKING).

KVM's dirty log wants a bitmap as large as its memory slot. While tracking is on, the child's address space is cut into
slots around what is mapped, and only those are logged, in parts: asking for a few pages then costs one part. What is
mapped elsewhere later is not logged, and counts as dirty while it is writable.

A page stays dirty when it is revoked, and when it is mapped again: what was written must be copied again by whoever
moves the child.
"""

from __future__ import annotations

from bisect import bisect_right

from ..kvm.abi import MEM_LOG_DIRTY_PAGES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..kvm.vm import Vm
    from .child_memory import ChildMemory

_APIC_GFN = 0xFEE00
#: Ranges closer than this (pages) are logged together: KVM has 32,764 slots, and a change of one costs time.
_GAP = 4096
#: Pages of a logged slot (128 MiB), more where there would be too many slots.
_PART = 1 << 15
_PARTS = 512
_FIRST_SLOT = 2


class _Part:
    """A logged slot with pages [first, end); bit n of ``bits`` is page first + n."""

    __slots__ = ("bits", "end", "first", "slot")

    def __init__(self, slot: int, first: int, end: int) -> None:
        self.slot = slot
        self.first = first
        self.end = end
        self.bits = 0


class DirtyLog:
    """Bits by guest page number. Called under Hypervisor.lock; :meth:`start` and :meth:`stop` while no VP runs."""

    __slots__ = ("_firsts", "_memory", "_parts", "_slots", "_vm")

    def __init__(self, memory: ChildMemory, vm: Vm) -> None:
        self._memory = memory
        self._vm = vm
        self._slots = 0
        self._parts: list[_Part] = []
        self._firsts: list[int] = []

    def start(self, ranges: list[tuple[int, int]]) -> None:
        """Cuts the slots anew around ``ranges`` (sorted, in pages); all bits are clear.

        KvmError: KVM has no room for them; the plain slots are back.
        """
        self.stop()
        self._memory.remove_plain_slots()
        try:
            at = 0
            for first, last in self._logged(ranges):
                self._add_plain(at, first)
                self._add_logged(first, last)
                at = last
            self._add_plain(at, self._memory.gfn_limit)
        except BaseException:
            if not self._slots:
                self._memory.set_plain_slots()
            self.stop()
            raise

    def stop(self) -> None:
        """The plain slots are back."""
        if self._slots:
            for slot in range(_FIRST_SLOT, _FIRST_SLOT + self._slots):
                self._vm.set_memory(slot, 0, 0, 0)
            self._memory.set_plain_slots()
        self._slots = 0
        self._parts.clear()
        self._firsts.clear()

    def _logged(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """What is logged, in slots: ranges without small gaps, in parts, the local APIC's page left out."""
        joined: list[tuple[int, int]] = []
        for first, last in ranges:
            for low, high in _around_apic(first, last):
                if (
                    joined
                    and low - joined[-1][1] <= _GAP
                    and (joined[-1][1] <= _APIC_GFN) == (high <= _APIC_GFN)
                ):
                    joined[-1] = (joined[-1][0], high)
                else:
                    joined.append((low, high))
        part = _PART
        while sum(high - low for low, high in joined) > part * _PARTS:
            part *= 2
        parts = []
        for low, high in joined:
            while low < high:
                end = min(high, low // part * part + part)
                parts.append((low, end))
                low = end
        return parts

    def _add_plain(self, first: int, last: int) -> None:
        for low, high in _around_apic(first, last):
            self._add_slot(low, high, 0)

    def _add_logged(self, first: int, last: int) -> None:
        self._parts.append(_Part(self._add_slot(first, last, MEM_LOG_DIRTY_PAGES), first, last))
        self._firsts.append(first)

    def _add_slot(self, first: int, last: int, flags: int) -> int:
        slot = _FIRST_SLOT + self._slots
        at = self._memory.address + (first << 12)
        self._vm.set_memory(slot, first << 12, last - first << 12, at, flags)
        self._slots += 1
        return slot

    def _parts_in(self, first: int, last: int) -> list[_Part]:
        index = max(bisect_right(self._firsts, first) - 1, 0)
        found = []
        while index < len(self._parts) and self._firsts[index] < last:
            if self._parts[index].end > first:
                found.append(self._parts[index])
            index += 1
        return found

    def mark(self, gfn: int) -> None:
        """The hypervisor itself has written, or is about to."""
        for part in self._parts_in(gfn, gfn + 1):
            part.bits |= 1 << (gfn - part.first)

    def read(self, gfn: int, count: int, unlogged: bytes) -> bytes:
        """A byte for each page, 1 if it is dirty; ``unlogged`` has them for pages that are not logged."""
        end = gfn + count
        states = []
        at = gfn
        for part in self._parts_in(gfn, end):
            # KVM gives its bits and starts anew: a write from now on is logged again.
            news = self._vm.dirty_log(part.slot, (part.end - part.first + 63) // 64 * 8)
            part.bits |= int.from_bytes(news, "little")
            first, last = max(part.first, gfn), min(part.end, end)
            states.append(unlogged[at - gfn : first - gfn])
            states.append(_spread(part.bits >> (first - part.first), last - first))
            at = last
        states.append(unlogged[at - gfn :])
        return b"".join(states)

    def change(self, start: int, end: int, dirty: bool) -> None:
        """Bits of the pages [start, end) on or off. What :meth:`read` has not seen yet stays."""
        for part in self._parts_in(start, end):
            first, last = max(part.first, start), min(part.end, end)
            mask = (1 << (last - first)) - 1 << (first - part.first)
            part.bits = part.bits | mask if dirty else part.bits & ~mask


def _around_apic(first: int, last: int) -> list[tuple[int, int]]:
    """[first, last) without the local APIC's page."""
    parts = ((first, min(last, _APIC_GFN)), (max(first, _APIC_GFN + 1), last))
    return [(low, high) for low, high in parts if low < high]


_DIGITS = bytes.maketrans(b"01", b"\0\1")


def _spread(bits: int, count: int) -> bytes:
    """The lowest ``count`` bits, each as a byte."""
    one_more = bits & (1 << count) - 1 | 1 << count  # keeps leading zeros
    return f"{one_more:b}".encode()[:0:-1].translate(_DIGITS)
