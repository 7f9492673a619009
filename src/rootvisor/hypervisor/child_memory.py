# SPDX-License-Identifier: Apache-2.0
"""The memory of a child partition: which page of the root lies at which of its guest page numbers, with what rights.

The child's whole address space is one reservation without access, given to KVM once; pages are pieces of the root's
memory file mapped over it (docs/develop/children.md). Everything here is called under ``Hypervisor.lock``.

Execute rights cannot be taken away (KVM has no such memory slot), and a page that is writable is readable.
"""

from __future__ import annotations

import mmap
from fcntl import ioctl
from struct import pack_into

from ..kvm import abi
from ..kvm.errors import KvmError
from ..kvm.reservation import Reservation
from ..tlfs import gpa as tlfs
from ..tlfs import status
from .address_space import AddressError
from .dirty_log import DirtyLog
from .errors import HvError
from .gpa_ranges import NO_ACCESS, READ_ONLY, UNMAPPED, WRITABLE, GpaRanges

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..kvm.vm import Vm
    from .address_space import GuestMemory, MemoryRegion
    from .hypervisor import Hypervisor
    from .vp import VirtualProcessor

__all__ = ["NO_ACCESS", "READ_ONLY", "UNMAPPED", "WRITABLE", "ChildMemory", "NotAccessible"]

PAGE = 4096
#: Bits of guest physical address. More would cost KVM memory (2 MiB for each TiB of a slot).
WIDTH_MAX = 40
#: KVM serves the local APIC where no memory slot lies.
APIC_GPA = 0xFEE00000
_BELOW_APIC, _ABOVE_APIC = 0, 1
_LEAF_ADDRESS_WIDTH = 0x80000008
#: One KVM_PRE_FAULT_MEMORY at least for this much; single pages come by their own fault.
_PREFAULT_PAGES = 2


class NotAccessible(AddressError):
    """The child's memory at ``gpa`` is in ``state``, which does not allow the access (``write`` or read)."""

    def __init__(self, gpa: int, state: int, write: bool) -> None:
        super().__init__(f"no {'write' if write else 'read'} access at {gpa:#x}")
        self.gpa = gpa
        self.state = state
        self.write = write


def address_width(cpuid: Sequence[tuple[int, ...]]) -> int:
    """Bits of guest physical address of partitions on this host: leaf 0x80000008 EAX 7:0, at most 40."""
    for entry in cpuid:
        if entry[0] == _LEAF_ADDRESS_WIDTH:
            return min(entry[3] & 0xFF, WIDTH_MAX)
    return 36


class ChildMemory:
    """``width`` bits of guest physical addresses; sizes are in 4 KiB pages, positions are guest page numbers (gfn).

    ``mapped_pages`` and ``fault_ins`` (calls that gave pages to the child) are statistics.
    """

    __slots__ = (
        "_fresh", "_overlays", "_ranges", "_reservation", "_root", "_vm", "dirty", "fault_ins", "gfn_limit",
        "hypervisor", "mapped_pages", "width",
    )  # fmt: skip

    def __init__(self, vm: Vm, hypervisor: Hypervisor) -> None:
        self._vm = vm
        self.hypervisor = hypervisor
        self.width = address_width(hypervisor.kvm.supported_cpuid())
        self.gfn_limit = 1 << (self.width - 12)
        self.mapped_pages = 0
        self.fault_ins = 0
        self._root: GuestMemory
        self._ranges = GpaRanges()
        #: gfn -> (file, offset, writable, mapping) of the hypervisor's pages above the child's memory
        self._overlays: dict[int, tuple[int, int, bool, mmap.mmap]] = {}
        #: (gpa, bytes) mapped since a VP last ran
        self._fresh: list[tuple[int, int]] = []
        self._reservation = Reservation(1 << self.width)
        self.dirty: DirtyLog | None = None
        try:
            self.set_plain_slots()
        except KvmError:
            self._reservation.close()
            raise

    def set_plain_slots(self) -> None:
        """The two memory slots, below and above the local APIC."""
        at = self._reservation.address
        self._vm.set_memory(_BELOW_APIC, 0, APIC_GPA, at)
        above = APIC_GPA + PAGE
        self._vm.set_memory(_ABOVE_APIC, above, (1 << self.width) - above, at + above)

    def remove_plain_slots(self) -> None:
        """Makes room for other slots; no VP runs."""
        self._vm.set_memory(_BELOW_APIC, 0, 0, 0)
        self._vm.set_memory(_ABOVE_APIC, 0, 0, 0)

    @property
    def address(self) -> int:
        """Where GPA 0 lies in this process."""
        address: int = self._reservation.address
        return address

    def bind(self, root_memory: GuestMemory) -> None:
        """Names the memory that pages come from; once, before anything is mapped."""
        self._root = root_memory

    # --- looking --------------------------------------------------------------------------------------------------
    def state(self, gpa: int) -> int:
        """UNMAPPED, NO_ACCESS, READ_ONLY or WRITABLE."""
        overlay = self._overlays.get(gpa >> 12)
        if overlay is not None:
            return WRITABLE if overlay[2] else READ_ONLY
        return self._ranges.state(gpa >> 12)

    def page(self, gfn: int) -> memoryview | None:
        """4096 bytes of the page as the child sees it, or None without access."""
        overlay = self._overlays.get(gfn)
        if overlay is not None:
            return memoryview(overlay[3])
        state, page = self._ranges.find(gfn)
        if state < READ_ONLY:
            return None
        return self._root.view(page << 12, PAGE)

    def view(self, gpa: int, length: int) -> memoryview:
        """Writable memory inside one page. NotAccessible; AddressError when it crosses a page."""
        if (gpa & 0xFFF) + length > PAGE:
            raise AddressError(f"{gpa:#x} + {length:#x} crosses a page")
        state = self.state(gpa)
        if state != WRITABLE:
            raise NotAccessible(gpa, state, True)
        page = self.page(gpa >> 12)
        assert page is not None
        if self.dirty is not None:
            self.dirty.mark(gpa >> 12)
        return page[gpa & 0xFFF : (gpa & 0xFFF) + length]

    def read(self, gpa: int, length: int) -> bytes:
        """Bytes that may cross pages. NotAccessible names the first byte without access."""
        data = b""
        while length > 0:
            page = self.page(gpa >> 12)
            if page is None:
                raise NotAccessible(gpa, self.state(gpa), False)
            part = bytes(page[gpa & 0xFFF : (gpa & 0xFFF) + length])
            data += part
            gpa += len(part)
            length -= len(part)
        return data

    def write(self, gpa: int, data: bytes) -> None:
        """Bytes that may cross pages; nothing is written unless all can be."""
        at = gpa
        while at < gpa + len(data):
            if self.state(at) != WRITABLE:
                raise NotAccessible(at, self.state(at), True)
            at = (at | 0xFFF) + 1
        done = 0
        while done < len(data):
            at = gpa + done
            size = min(PAGE - (at & 0xFFF), len(data) - done)
            self.view(at, size)[:] = data[done : done + size]
            done += size

    # --- changing -------------------------------------------------------------------------------------------------
    def map(self, gfn: int, count: int, flags: int, pages: Sequence[int] | None) -> None:
        """Maps ``count`` elements (of 512 pages with MAP_LARGE_PAGE) from ``gfn`` on to the root's ``pages``; None with
        MAP_NO_ACCESS. What was there is replaced; on return no VP reaches it.

        HvError: INVALID_PARAMETER beyond the address space or for pages that are not the root's to give, with the
        number of elements done; NO_RESOURCES when this process has no room for more pieces (vm.max_map_count).
        """
        unit = tlfs.LARGE_PAGES if flags & tlfs.MAP_LARGE_PAGE else 1
        end = gfn + count * unit
        if end > self.gfn_limit:
            raise HvError(status.INVALID_PARAMETER, 0)
        if pages is None:
            self._revoke(gfn, end)
            self._ranges.set(gfn, end, NO_ACCESS)
            return
        self.fault_ins += 1
        writable = bool(flags & tlfs.MAP_WRITABLE)
        index = 0
        while index < count:
            first = pages[index]
            run = index + 1
            following = first + unit
            while run < count and pages[run] == following:
                following += unit
                run += 1
            self._map_run(gfn + index * unit, first, (run - index) * unit, writable, index)
            index = run

    def unmap(self, gfn: int, count: int) -> None:
        """Nothing is mapped at ``count`` pages from ``gfn`` on. INVALID_PARAMETER beyond the address space."""
        if gfn + count > self.gfn_limit:
            raise HvError(status.INVALID_PARAMETER, 0)
        self._revoke(gfn, gfn + count)
        self._ranges.set(gfn, gfn + count, UNMAPPED)

    def _map_run(self, gfn: int, page: int, count: int, writable: bool, element: int) -> None:
        """Consecutive pages of the root at consecutive page numbers of the child."""
        region = self._region(page, count)
        if region is None:
            raise HvError(status.INVALID_PARAMETER, element)
        end = gfn + count
        file_at = region.fd_offset + (page << 12) - region.gpa
        before = sum(
            last - first for first, last, state, _ in self._ranges.pieces(gfn, end) if state >= READ_ONLY
        )
        try:
            for first, last in self._uncovered(gfn, end):
                offset = file_at + (first - gfn << 12)
                self._reservation.map_file(first << 12, last - first << 12, region.fd, offset, writable)
        except OSError:
            # Half a mapping is none: the pages stay reachable by a later fault.
            self._revoke(gfn, end, everything=True)
            self._ranges.set(gfn, end, NO_ACCESS)
            self.mapped_pages -= before
            raise HvError(status.NO_RESOURCES, element) from None
        self._ranges.set(gfn, end, WRITABLE if writable else READ_ONLY, page)
        self.mapped_pages += count - before
        if count >= _PREFAULT_PAGES:
            self._fresh.append((gfn << 12, count << 12))

    def _region(self, page: int, count: int) -> MemoryRegion | None:
        """The root's memory around these pages, unless some are the hypervisor's."""
        gpa, size = page << 12, count << 12
        for region in self._root.regions:
            if region.gpa <= gpa and gpa + size <= region.gpa + region.size:
                if self.hypervisor.owns(page, count):
                    return None
                return region
        return None

    def _revoke(self, start: int, end: int, everything: bool = False) -> None:
        """Takes the access away where there is any. What the map count forbids is retried with larger pieces."""
        for first, last, state, _page in (
            [(start, end, WRITABLE, 0)] if everything else self._ranges.pieces(start, end)
        ):
            if state >= READ_ONLY:
                if self.dirty is not None:
                    self.dirty.harvest(first, last)
                for low, high in self._uncovered(first, last):
                    self._reservation.clear(low << 12, high - low << 12)
                if not everything:
                    self.mapped_pages -= last - first

    def _uncovered(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of [start, end) that no overlay page hides."""
        hidden = sorted(gfn for gfn in self._overlays if start <= gfn < end)
        parts = []
        for gfn in hidden:
            if start < gfn:
                parts.append((start, gfn))
            start = gfn + 1
        if start < end:
            parts.append((start, end))
        return parts

    # --- the hypervisor's pages above -----------------------------------------------------------------------------
    def put_overlay(self, gfn: int, fd: int, offset: int, writable: bool = True) -> None:
        """Lays one page of a file over whatever is at ``gfn``."""
        old = self._overlays.pop(gfn, None)
        if old is not None:
            old[3].close()
        page = mmap.mmap(fd, PAGE, offset=offset)
        self._reservation.map_file(gfn << 12, PAGE, fd, offset, writable)
        self._overlays[gfn] = (fd, offset, writable, page)

    def remove_overlay(self, gfn: int) -> None:
        """What is below comes back."""
        overlay = self._overlays.pop(gfn, None)
        if overlay is None:
            return
        state, page = self._ranges.find(gfn)
        region = self._region(page, 1) if state >= READ_ONLY else None
        if region is None:
            self._reservation.clear(gfn << 12, PAGE)
        else:
            at = region.fd_offset + (page << 12) - region.gpa
            self._reservation.map_file(gfn << 12, PAGE, region.fd, at, state == WRITABLE)
        try:
            overlay[3].close()
        except BufferError:
            pass  # somebody still reads it; it goes with the last view

    # --- before a VP runs -----------------------------------------------------------------------------------------
    def prefault(self, vp: VirtualProcessor) -> None:
        """On the VP's thread: what was just mapped enters KVM's page tables at once (a tenth of the cost of faults)."""
        while self._fresh:
            try:
                gpa, size = self._fresh.pop()
            except IndexError:  # another VP's thread was quicker
                return
            request = bytearray(64)
            pack_into("<QQ", request, 0, gpa, size)
            try:
                ioctl(vp.vcpu.fd, abi.KVM_PRE_FAULT_MEMORY, request)
            except OSError:
                # Older kernels have no such call; a page may have been revoked meanwhile; a signal may ask for us.
                return

    # --- dirty pages ----------------------------------------------------------------------------------------------
    def start_tracking(self) -> None:
        """Every page is clean from now on. No VP runs."""
        if self.dirty is None:
            self.dirty = DirtyLog(self, self._vm)
        ranges = self._ranges.pieces(0, self.gfn_limit)
        self.dirty.start([(first, last) for first, last, _state, _page in ranges])

    def stop_tracking(self) -> None:
        """No VP runs."""
        if self.dirty is not None:
            self.dirty.stop()
            self.dirty = None

    def access_states(self, gfn: int, count: int, flags: int) -> bytes:
        """One byte per page (STATE_ACCESSED, STATE_DIRTY) from before the change that ``flags`` asks for.

        Without tracking nothing is dirty. KVM has no accessed bits for its user: a page counts as accessed while it is
        mapped, which is on first use.
        """
        states = bytearray(count)
        for first, last, state, _page in self._ranges.pieces(gfn, gfn + count):
            if state >= READ_ONLY:
                states[first - gfn : last - gfn] = bytes((tlfs.STATE_ACCESSED,)) * (last - first)
        if self.dirty is not None:
            self.dirty.read(gfn, states, tlfs.STATE_DIRTY)
            if flags & tlfs.ACCESS_CLEAR_DIRTY:
                self.dirty.clear(gfn, count)
            if flags & tlfs.ACCESS_SET_DIRTY:
                self.dirty.set(gfn, count)
        return bytes(states)

    # --- the end --------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Nothing is mapped any more, overlays included."""
        for gfn in list(self._overlays):
            self.remove_overlay(gfn)
        self._reservation.clear(0, 1 << self.width)
        self._ranges.clear()
        self._fresh.clear()
        self.mapped_pages = 0

    def close(self) -> None:
        """Gives the addresses back; the machine is closed, or about to be."""
        for overlay in self._overlays.values():
            try:
                overlay[3].close()
            except BufferError:
                pass
        self._overlays.clear()
        self._reservation.close()
