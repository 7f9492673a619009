# SPDX-License-Identifier: Apache-2.0
"""The memory of a child partition: which page of the root lies at which of its guest page numbers, with what rights.

The child's whole address space is one reservation without access, given to KVM once; pages are pieces of the root's
memory file mapped over it (docs/develop/children.md). Everything here is called under ``Hypervisor.lock``, except for
:meth:`ChildMemory.state` and :meth:`ChildMemory.prefault`.

Execute rights cannot be taken away (KVM has no such memory slot), and a page that is writable is readable.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from mmap import mmap

from ..bus.address_space import AddressError
from ..kvm.errors import KvmError
from ..kvm.prefault import prefault
from ..kvm.reservation import Reservation
from ..tlfs import gpa as tlfs
from ..tlfs import status
from .errors import HvError
from .gpa_ranges import NO_ACCESS, READ_ONLY, UNMAPPED, WRITABLE, GpaRanges

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..bus.address_space import GuestMemory, MemoryRegion
    from ..kvm.vm import Vm
    from .dirty_log import DirtyLog
    from .gpa_ranges import Piece
    from .hypervisor import Hypervisor
    from .vp import VirtualProcessor

__all__ = ["NO_ACCESS", "READ_ONLY", "UNMAPPED", "WRITABLE", "ChildMemory", "NotAccessible"]

PAGE = 4096
#: Bits of guest physical address. More would cost KVM memory: 2 MiB for each TiB of a slot.
WIDTH_MAX = 40
#: KVM serves the local APIC where no memory slot lies.
APIC_GPA = 0xFEE00000
_BELOW_APIC, _ABOVE_APIC = 0, 1
_LEAF_ADDRESS_WIDTH = 0x80000008
#: So much of what was mapped last is told to KVM before a VP runs again. What a fault brings is one or two pieces.
_FRESH_PIECES = 8
#: A single page comes by its own fault.
_PREFAULT_BYTES = 2 * PAGE


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

    ``mapped_pages`` (with access now) and ``fault_ins`` (calls that gave pages to the child) are statistics.
    ``dirty`` is the log of written pages while tracking is on.
    """

    __slots__ = (
        "_can_prefault", "_files", "_fresh", "_overlay_gfns", "_overlays", "_ranges", "_reservation", "_root", "_vm",
        "dirty", "fault_ins", "gfn_limit", "hypervisor", "mapped_pages", "width",
    )  # fmt: skip

    def __init__(
        self, vm: Vm, hypervisor: Hypervisor, reserve: Callable[[int], Reservation] = Reservation
    ) -> None:
        self._vm = vm
        self.hypervisor = hypervisor
        self.width = address_width(hypervisor.kvm.supported_cpuid())
        self.gfn_limit = 1 << (self.width - 12)
        self.mapped_pages = 0
        self.fault_ins = 0
        self._root: GuestMemory
        self._ranges = GpaRanges()
        #: gfn -> (file, offset, writable, the page) of the hypervisor's pages above the child's memory
        self._overlays: dict[int, tuple[int, int, bool, memoryview]] = {}
        #: their page numbers, sorted
        self._overlay_gfns: list[int] = []
        #: file -> its mapping, of the files that overlay pages come from
        self._files: dict[int, tuple[mmap, memoryview]] = {}
        #: (gpa, bytes) mapped since a VP last ran
        self._fresh: list[tuple[int, int]] = []
        self._can_prefault = True
        self.dirty: DirtyLog | None = None
        self._reservation = reserve(1 << self.width)
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

    @property
    def generation(self) -> int:
        """Another number after every change of what lies where; to remember what was found."""
        return self._ranges.changes

    # --- looking --------------------------------------------------------------------------------------------------
    def state(self, gpa: int) -> int:
        """UNMAPPED, NO_ACCESS, READ_ONLY or WRITABLE, as the child sees it."""
        overlay = self._overlays.get(gpa >> 12)
        if overlay is not None:
            return WRITABLE if overlay[2] else READ_ONLY
        return self._ranges.state(gpa >> 12)

    def overlaid(self, gpa: int) -> bool:
        """Whether a page of the hypervisor's own lies there. The root can change nothing about its rights."""
        return gpa >> 12 in self._overlays

    def uses(self, pages: Sequence[int]) -> bool:
        """Whether one of the root's ``pages``, in ascending order, lies somewhere in the child."""
        return self._ranges.uses(pages)

    def page(self, gfn: int) -> memoryview | None:
        """4096 bytes of the page as the child sees it, or None without access. Writing takes :meth:`view`."""
        overlay = self._overlays.get(gfn)
        if overlay is not None:
            return overlay[3]
        state, page = self._ranges.find(gfn)
        if state < READ_ONLY:
            return None
        return self._root.view(page << 12, PAGE)

    def view(self, gpa: int, length: int) -> memoryview:
        """Writable memory inside one page, for as long as the lock is held. NotAccessible; AddressError when it crosses
        a page."""
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
            state = self.state(at)
            if state != WRITABLE:
                raise NotAccessible(at, state, True)
            at = (at | 0xFFF) + 1
        done = 0
        while done < len(data):
            at = gpa + done
            size = min(PAGE - (at & 0xFFF), len(data) - done)
            self.view(at, size)[:] = data[done : done + size]
            done += size

    # --- changing -------------------------------------------------------------------------------------------------
    def map(self, gfn: int, count: int, flags: int, pages: Sequence[int] | None) -> None:
        """Maps ``count`` elements (of 512 pages with MAP_LARGE_PAGE) from ``gfn`` on to the root's ``pages`` (a tuple;
        None with MAP_NO_ACCESS). What was there is replaced; on return no VP reaches it.

        HvError with the number of elements done: INVALID_PARAMETER beyond the address space (none is done) or for pages
        that are not the root's to give; NO_RESOURCES when this process has no room for more pieces (vm.max_map_count).
        """
        unit = tlfs.LARGE_PAGES if flags & tlfs.MAP_LARGE_PAGE else 1
        end = gfn + count * unit
        if end > self.gfn_limit:
            raise HvError(status.INVALID_PARAMETER, 0)
        if pages is None:
            self._revoke(gfn, end, NO_ACCESS)
            return
        self.fault_ins += 1
        state = WRITABLE if flags & tlfs.MAP_WRITABLE else READ_ONLY
        fresh = all(piece[2] < READ_ONLY for piece in self._ranges.pieces(gfn, end))
        plain = not self._overlays_in(gfn, end)
        owns = self.hypervisor.owns
        map_file = self._reservation.map_file
        region = self._root.regions[0]
        low, high = _span(region)
        new: list[Piece] = []
        at = gfn
        element = 0
        failure = status.SUCCESS
        for first, elements in _runs(pages, unit):
            size = elements * unit
            if not low <= first < high:
                region = self._region(first)
                low, high = _span(region)
            if first < low or first + size > high or owns(first, size):
                failure = status.INVALID_PARAMETER
                elements = self._given(first, size) // unit
                size = elements * unit
                if not size:
                    break
            last = at + size
            piece = (at, last, state, first)
            # Two VPs that fault at once have the same pages mapped twice: then KVM's tables stay as they are.
            if fresh or self._ranges.pieces(at, last) != [piece]:
                offset = region.fd_offset + (first - low << 12)
                try:
                    if plain:
                        map_file(at << 12, size << 12, region.fd, offset, state == WRITABLE)
                    else:
                        self._map_piece(at, last, region.fd, offset, state == WRITABLE)
                except OSError:
                    failure = status.NO_RESOURCES
                    break
            new.append(piece)
            at = last
            element += elements
            if failure:
                break
        if failure == status.NO_RESOURCES:
            # Half a mapping is none: what this run was to cover has no access, and may be asked for again.
            run_end = at + size
            lost = self._take(at, run_end)
            new.append((at, run_end, NO_ACCESS, -1))
            self._replace(gfn, run_end, new)
            if lost:
                self._lose(*lost)
        else:
            self._replace(gfn, at, new)
        if at - gfn >= _PREFAULT_BYTES >> 12:
            self._freshly_mapped(gfn << 12, at - gfn << 12)
        if failure:
            raise HvError(failure, element)

    def unmap(self, gfn: int, count: int) -> None:
        """Nothing is mapped at ``count`` pages from ``gfn`` on. INVALID_PARAMETER beyond the address space."""
        if gfn + count > self.gfn_limit:
            raise HvError(status.INVALID_PARAMETER, 0)
        self._revoke(gfn, gfn + count, UNMAPPED)

    def _map_piece(self, start: int, end: int, fd: int, offset: int, writable: bool) -> None:
        """A piece of a file at [start, end), where no overlay lies above."""
        for first, last in self._uncovered(start, end):
            self._reservation.map_file(
                first << 12, last - first << 12, fd, offset + (first - start << 12), writable
            )

    def _region(self, page: int) -> MemoryRegion:
        """The root's memory around a page; any if there is none."""
        gpa = page << 12
        for region in self._root.regions:
            if region.gpa <= gpa < region.gpa + region.size:
                return region
        return self._root.regions[0]

    def _given(self, page: int, count: int) -> int:
        """How many of the root's pages, from ``page`` on, are the root's to give."""
        low, high = _span(self._region(page))
        if not low <= page < high:
            return 0
        count = min(count, high - page)
        owns = self.hypervisor.owns
        if owns(page, count):
            count = next(index for index in range(count) if owns(page + index, 1))
        return count

    def _replace(self, start: int, end: int, new: Sequence[Piece]) -> None:
        """Changes the table, and the count of pages with it."""
        count = 0
        for first, last, state, _page in self._ranges.pieces(start, end):
            if state >= READ_ONLY:
                count -= last - first
        for first, last, state, _page in new:
            if state >= READ_ONLY:
                count += last - first
        self.mapped_pages += count
        self._ranges.replace(start, end, new)

    def _revoke(self, start: int, end: int, state: int) -> None:
        """No VP reaches [start, end) any more, which is in ``state`` (UNMAPPED or NO_ACCESS)."""
        # What the child never had needs no work. The rest goes in one piece.
        low = high = -1
        for first, last, before, _page in self._ranges.pieces(start, end):
            if before >= READ_ONLY:
                if low < 0:
                    low = first
                high = last
                self.mapped_pages -= last - first
        lost = self._take(low, high) if low >= 0 else None
        self._ranges.set(start, end, state)
        if lost:
            self._lose(*lost)

    # --- where the map count is at its limit (vm.max_map_count) -----------------------------------------------------
    def _take(self, start: int, end: int) -> tuple[int, int] | None:
        """Takes the access to [start, end) away, except for overlays. For want of room for one more piece it may take
        more, which it returns; the caller then calls :meth:`_lose` when the table is up to date."""
        try:
            for first, last in self._uncovered(start, end):
                self._reservation.clear(first << 12, last - first << 12)
            return None
        except OSError:
            pass
        everything = 0, self.gfn_limit
        for first, last in (self._ranges.whole(start, end), everything):
            try:
                self._reservation.forbid(first << 12, last - first << 12)
            except OSError:
                continue
            return first, last
        # The root takes memory back that the child can still write to: nothing can go on.
        raise KvmError("cannot take memory away from a child partition; raise vm.max_map_count")

    def _lose(self, start: int, end: int) -> None:
        """Pages that went with others have no access; the root maps them again when the child asks for them."""
        for first, last, state, _page in self._ranges.pieces(start, end):
            if state >= READ_ONLY:
                self.mapped_pages -= last - first
                self._ranges.set(first, last, NO_ACCESS)
        for gfn in self._overlays_in(start, end):
            fd, offset, writable, _view = self._overlays[gfn]
            try:
                self._reservation.map_file(gfn << 12, PAGE, fd, offset, writable)
            except OSError:
                self._forget_overlay(gfn)

    # --- the hypervisor's pages above -----------------------------------------------------------------------------
    def put_overlay(self, gfn: int, fd: int, offset: int, writable: bool = True) -> None:
        """Lays one page of a file over whatever is at ``gfn``, in place of an overlay there. KvmError: no room."""
        try:
            self._reservation.map_file(gfn << 12, PAGE, fd, offset, writable)
        except OSError as error:
            raise KvmError(f"cannot map a page of a child partition: {error.strerror}") from error
        if gfn not in self._overlays:
            insort(self._overlay_gfns, gfn)
        self._overlays[gfn] = (fd, offset, writable, self._file(fd)[offset : offset + PAGE])
        self._ranges.changes += 2

    def remove_overlay(self, gfn: int) -> None:
        """What is below comes back."""
        if gfn not in self._overlays:
            return
        self._forget_overlay(gfn)
        state, page = self._ranges.find(gfn)
        if state >= READ_ONLY:
            try:
                region = self._region(page)
                offset = region.fd_offset + (page << 12) - region.gpa
                self._reservation.map_file(gfn << 12, PAGE, region.fd, offset, state == WRITABLE)
                return
            except OSError:  # the root maps it again when the child asks for it
                self._replace(gfn, gfn + 1, [(gfn, gfn + 1, NO_ACCESS, -1)])
        lost = self._take(gfn, gfn + 1)
        if lost:
            self._lose(*lost)

    def _forget_overlay(self, gfn: int) -> None:
        self._ranges.changes += 2
        del self._overlays[gfn]
        del self._overlay_gfns[bisect_left(self._overlay_gfns, gfn)]

    def _overlays_in(self, start: int, end: int) -> list[int]:
        gfns = self._overlay_gfns
        low = bisect_left(gfns, start)
        if low == len(gfns) or gfns[low] >= end:
            return []
        return gfns[low : bisect_left(gfns, end, low)]

    def _uncovered(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of [start, end) that no overlay page hides."""
        parts = []
        for gfn in self._overlays_in(start, end):
            if start < gfn:
                parts.append((start, gfn))
            start = gfn + 1
        if start < end:
            parts.append((start, end))
        return parts

    def _file(self, fd: int) -> memoryview:
        entry = self._files.get(fd)
        if entry is None:
            mapping = mmap(fd, os.fstat(fd).st_size)
            entry = self._files[fd] = mapping, memoryview(mapping)
        return entry[1]

    # --- before a VP runs -----------------------------------------------------------------------------------------
    def _freshly_mapped(self, gpa: int, size: int) -> None:
        fresh = self._fresh
        if fresh:
            last_gpa, last_size = fresh[-1]
            if last_gpa + last_size == gpa:
                fresh[-1] = last_gpa, last_size + size
                return
        fresh.append((gpa, size))
        if len(fresh) > _FRESH_PIECES:
            del fresh[0]

    def prefault(self, vp: VirtualProcessor) -> None:
        """On the VP's thread, without the lock: what was just mapped enters KVM's page tables at once."""
        while self._fresh:
            try:
                gpa, size = self._fresh.pop()
            except IndexError:  # another VP's thread was quicker
                return
            if self._can_prefault and self.dirty is None:  # KVM takes such pages for written
                self._can_prefault = prefault(vp.vcpu.fd, gpa, size)

    # --- dirty pages ----------------------------------------------------------------------------------------------
    def start_tracking(self) -> None:
        """Every page is clean from now on. No VP runs. HvError NO_RESOURCES: KVM has no room for the bitmaps."""
        from .dirty_log import DirtyLog

        if self.dirty is None:
            self.dirty = DirtyLog(self, self._vm)
        try:
            self.dirty.start([piece[:2] for piece in self._ranges.pieces(0, self.gfn_limit)])
        except KvmError:
            self.dirty = None
            raise HvError(status.NO_RESOURCES) from None

    def stop_tracking(self) -> None:
        """No VP runs."""
        if self.dirty is not None:
            self.dirty.stop()
            self.dirty = None

    def access_states(self, gfn: int, count: int, flags: int) -> bytes:
        """One byte per page (STATE_ACCESSED, STATE_DIRTY) from before the change that ``flags`` asks for; 0 for pages
        that are not mapped, which do not change either. Nothing is dirty without tracking.

        A page that is not accessible now may be dirty. Accessed is what is in this process' page tables on behalf of
        the child: the child has touched it, or something near it (the host maps up to 2 MiB at once), or it was mapped
        together with such a page; so it may be too much, never too little.
        """
        end = gfn + count
        pieces = self._ranges.pieces(gfn, min(end, self.gfn_limit))
        accessible = [(first, last) for first, last, state, _page in pieces if state >= READ_ONLY]
        parts = []
        at = gfn
        for first, last in accessible:
            parts.append(bytes(first - at))
            parts.append(self._reservation.touched(first << 12, last - first))
            at = last
        parts.append(bytes(end - at))
        states = b"".join(parts)
        if flags & tlfs.ACCESS_CLEAR_ACCESSED:
            for first, last in accessible:
                self._reservation.untouch(first << 12, last - first << 12)
        elif flags & tlfs.ACCESS_SET_ACCESSED:
            for first, last in accessible:
                self._reservation.touch(first << 12, last - first << 12)
        if self.dirty is None:
            return states
        mapped = bytearray(count)
        writable = bytearray(count)
        for first, last, state, _page in pieces:
            mapped[first - gfn : last - gfn] = b"\2" * (last - first)
            if state == WRITABLE:
                writable[first - gfn : last - gfn] = b"\1" * (last - first)
        dirty = self.dirty.read(gfn, count, bytes(writable))
        if flags & (tlfs.ACCESS_CLEAR_DIRTY | tlfs.ACCESS_SET_DIRTY):
            for first, last, _state, _page in pieces:
                self.dirty.change(first, last, not flags & tlfs.ACCESS_CLEAR_DIRTY)
        if not any(dirty):
            return states
        number = int.from_bytes
        bits = number(states, "little") | number(dirty, "little") << 1 & number(mapped, "little")
        return bits.to_bytes(count, "little")

    # --- the end --------------------------------------------------------------------------------------------------
    def clear(self) -> None:
        """Nothing is mapped any more, overlays included."""
        self._overlays.clear()
        self._overlay_gfns.clear()
        self._fresh.clear()
        self._take(0, self.gfn_limit)
        self._ranges.clear()
        self.mapped_pages = 0

    def close(self) -> None:
        """Gives the addresses back; the machine is closed, or about to be."""
        self._ranges.clear()
        self._overlays.clear()
        self._overlay_gfns.clear()
        for mapping, view in self._files.values():
            try:
                view.release()
                mapping.close()
            except BufferError:
                pass  # somebody still has a page; the mapping goes with the last one
        self._files.clear()
        self._reservation.close()


def _span(region: MemoryRegion) -> tuple[int, int]:
    """[first, end) of its page numbers."""
    return region.gpa >> 12, region.gpa + region.size >> 12


def _runs(pages: Sequence[int], unit: int) -> Iterator[tuple[int, int]]:
    """Splits page numbers into runs that rise by ``unit``: (first page, elements). Long runs are found by comparing
    whole slices, which is much faster than a loop over their elements."""
    count = len(pages)
    index = 0
    while index < count:
        first = pages[index]
        if index + 1 == count or pages[index + 1] != first + unit:
            yield first, 1
            index += 1
            continue
        run = 2
        step = 4
        while index + run < count:
            size = min(step, count - index - run)
            following = first + run * unit
            if pages[index + run : index + run + size] == tuple(
                range(following, following + size * unit, unit)
            ):
                run += size
                step *= 4
                continue
            while pages[index + run] == first + run * unit:
                run += 1
            break
        yield first, run
        index += run
