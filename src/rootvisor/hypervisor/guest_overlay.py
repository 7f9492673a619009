# SPDX-License-Identifier: Apache-2.0
"""Overlay pages of a guest with a computer of its own (TLFS "GPA Overlay Pages").

KVM sees the guest's RAM through a mapping of its own, in which an enabled page lies over whatever is underneath: that
comes back untouched when the page moves or is disabled, and the page's contents travel with it. Where there is no RAM
the page gets a memory slot, and memory of the computer's own (configuration space) is shown around it. Devices see the
RAM underneath (what DMA into an overlay does is undefined).
"""

from __future__ import annotations

from ..kvm.abi import MEM_READONLY
from ..kvm.errors import KvmError
from ..kvm.memory import SharedMemory
from ..kvm.reservation import Reservation
from ..tlfs.msrs import PAGE_GPN_SHIFT
from .errors import HypervisorError
from .overlay import PAGE_SIZE, MovableOverlay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..bus.address_space import GuestMemory, MemoryRegion
    from ..kvm.vm import Vm

#: The first memory slot of pages over holes; below are RAM and the computer's own.
_FIRST_SLOT = 16


class GuestOverlayPages:
    """The pages of one guest, ``count`` of them; ``address_bits`` is the width of its GPAs. Its methods (but for
    :meth:`allocate`) are called with :attr:`lock`."""

    __slots__ = (
        "_alias", "_next", "_own", "_pieces", "_regions", "_shown", "_slots", "_vm", "_window", "_window_at",
        "gpn_limit", "lock",
    )  # fmt: skip

    def __init__(self, vm: Vm, memory: GuestMemory, count: int, address_bits: int) -> None:
        """Gives KVM the other mapping: memory slot n is region n of ``memory``."""
        from _thread import RLock

        self.lock = RLock()
        self._vm = vm
        self._regions = memory.regions
        self.gpn_limit = 1 << (address_bits - PAGE_GPN_SHIFT)
        self._own = SharedMemory("overlays", count * PAGE_SIZE)
        self._next = 0
        #: page number -> overlays there, the visible one last
        self._shown: dict[int, list[MovableOverlay]] = {}
        #: page number -> memory slot of a page over a hole
        self._slots: dict[int, int] = {}
        #: memory of the computer's own by page number; the memory slots that show it; slot, address and flags for them
        self._window = range(0)
        self._pieces: list[int] = []
        self._window_at = (0, 0, 0)
        self._alias = [Reservation(region.size) for region in self._regions]
        for slot, (alias, region) in enumerate(zip(self._alias, self._regions, strict=True)):
            alias.map_file(0, region.size, region.fd, region.fd_offset, True)
            vm.set_memory(slot, region.gpa, region.size, alias.address)

    def allocate(self, writable: bool = True) -> MovableOverlay:
        """The next page, zeroed."""
        offset = self._next
        if offset >= self._own.size:
            raise MemoryError("a guest has no more overlay pages")
        self._next += PAGE_SIZE
        return MovableOverlay(self, offset, self._own.view[offset : offset + PAGE_SIZE], writable)

    def visible(self, gpn: int) -> MovableOverlay | None:
        """The overlay that the guest sees at a page number."""
        pages = self._shown.get(gpn)
        return pages[-1] if pages else None

    def _place(self, gpn: int) -> tuple[Reservation, MemoryRegion, int] | None:
        for alias, region in zip(self._alias, self._regions, strict=True):
            offset = (gpn << PAGE_GPN_SHIFT) - region.gpa
            if 0 <= offset < region.size:
                return alias, region, offset
        return None

    def show(self, page: MovableOverlay) -> None:
        """Lays the page over what the guest has at its page number."""
        if page.gpn >= self.gpn_limit:
            return
        self._shown.setdefault(page.gpn, []).append(page)
        self._put(page.gpn, page)

    def hide(self, page: MovableOverlay) -> None:
        """Takes it away; another overlay there, or what the guest has, is visible again."""
        pages = self._shown.get(page.gpn)
        if pages is None or page not in pages:
            return
        pages.remove(page)
        self._put(page.gpn, pages[-1] if pages else None)
        if not pages:
            del self._shown[page.gpn]

    def untouch(self, page: MovableOverlay) -> bool:
        """Has KVM forget where the page is, until the guest comes there again; on return no processor runs with a
        translation from before. False where the page is not seen in RAM."""
        with self.lock:
            place = self._place(page.gpn) if page.enabled and self.visible(page.gpn) is page else None
            if place is None:
                return False
            alias, _region, offset = place
            alias.untouch(offset, PAGE_SIZE)
        return True

    def _put(self, gpn: int, page: MovableOverlay | None) -> None:
        place = self._place(gpn)
        if place is None:
            self._put_over_hole(gpn, page)
            return
        alias, region, offset = place
        try:
            if page is None:
                alias.map_file(offset, PAGE_SIZE, region.fd, region.fd_offset + offset, True)
            else:
                alias.map_file(offset, PAGE_SIZE, self._own.fd, page.offset, page.writable)
        except OSError as error:
            raise HypervisorError(f"cannot map an overlay page: {error.strerror}") from error

    def _put_over_hole(self, gpn: int, page: MovableOverlay | None) -> None:
        slot = self._slots.pop(gpn, None)
        if slot is not None:
            self._vm.set_memory(slot, gpn << PAGE_GPN_SHIFT, 0, 0)
        if gpn in self._window:
            self._clear_window()
        if page is not None:
            self._show_over_hole(gpn, page, self._free_slot() if slot is None else slot)
        if gpn in self._window:
            self._fill_window()

    def _free_slot(self) -> int:
        used = {*self._slots.values(), *self._pieces}
        return next(
            number for number in range(_FIRST_SLOT, _FIRST_SLOT + len(used) + 1) if number not in used
        )

    def _show_over_hole(self, gpn: int, page: MovableOverlay, slot: int) -> None:
        try:
            self._vm.set_memory(
                slot,
                gpn << PAGE_GPN_SHIFT,
                PAGE_SIZE,
                self._own.address + page.offset,
                0 if page.writable else MEM_READONLY,
            )
        except KvmError:
            return  # a page of KVM's own, the local APIC's: an overlay as well, which is the one to be seen then
        self._slots[gpn] = slot

    # --- memory of the computer's own -----------------------------------------------------------------------------
    def show_window(self, slot: int, gpa: int, size: int, address: int, flags: int) -> None:
        """As Vm.set_memory, for memory that overlays may lie over; there is one. Size 0 takes it away. While a page
        comes or goes, the guest's accesses leave as to a hole."""
        with self.lock:
            self._clear_window()
            self._window = range(gpa >> PAGE_GPN_SHIFT, gpa + size >> PAGE_GPN_SHIFT)
            self._window_at = (slot, address, flags)
            self._fill_window()

    def _clear_window(self) -> None:
        for slot in self._pieces:
            self._vm.set_memory(slot, 0, 0, 0)
        self._pieces.clear()

    def _fill_window(self) -> None:
        """Slots for what lies before, between and behind the overlays there."""
        slot, address, flags = self._window_at
        first = self._window.start
        for gpn in (*sorted(gpn for gpn in self._slots if gpn in self._window), self._window.stop):
            if gpn > first:
                number = self._free_slot() if self._pieces else slot
                self._vm.set_memory(
                    number,
                    first << PAGE_GPN_SHIFT,
                    gpn - first << PAGE_GPN_SHIFT,
                    address + (first - self._window.start << PAGE_GPN_SHIFT),
                    flags,
                )
                self._pieces.append(number)
            first = gpn + 1

    def close(self) -> None:
        """The machine is gone."""
        for alias in self._alias:
            alias.close()
        self._own.close()
