# SPDX-License-Identifier: Apache-2.0
"""Pages that the hypervisor provides at a GPA: hypercall, reference TSC, VP assist, SIMP, SIEFP, SIRBP.

A root partition keeps the GPA that the hypervisor chose (``hv_root_partition`` paths in the kernel read the MSR and
write it back with the enable bit). A kernel that takes itself for a guest writes a GPA of its own: the page then moves
there, contents and all.
"""

from __future__ import annotations

from ..bus.address_space import AddressError
from ..tlfs.msrs import PAGE_ENABLE, PAGE_GPN_SHIFT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from threading import RLock
    from typing import Protocol

    from ..bus.address_space import GuestMemory

    class OverlaySet(Protocol):
        """The pages of one partition."""

        lock: RLock
        gpn_limit: int

        def show(self, page: MovableOverlay) -> None:
            """Lays the page over what is at its page number."""

        def hide(self, page: MovableOverlay) -> None:
            """Takes it away again."""


PAGE_SIZE = 4096


class OverlayPage:
    """One page with its MSR: ``view`` is always the page's present memory."""

    __slots__ = ("_below", "_memory", "gpn", "home", "value", "view")

    def __init__(self, memory: GuestMemory, gpn: int) -> None:
        self._memory = memory
        self.home = gpn
        self.gpn = gpn
        self.view = memory.view(gpn << PAGE_GPN_SHIFT, PAGE_SIZE)
        #: what the page hides while it lies over memory that is not the hypervisor's
        self._below: bytes | None = None
        self.value = gpn << PAGE_GPN_SHIFT

    @property
    def enabled(self) -> bool:
        """Bit 0 of the MSR."""
        return bool(self.value & PAGE_ENABLE)

    def write(self, value: int) -> None:
        """An MSR write: bit 0 enables, 11:1 are kept, 63:12 move the page. A GPA without memory is accepted; the page
        is then nowhere, as if not backed (TLFS: "the page is not accessible")."""
        gpn = value >> PAGE_GPN_SHIFT
        if gpn != self.gpn:
            contents = bytes(self.view)
            if self._below is not None:
                self.view[:] = self._below
                self._below = None
            try:
                view = self._memory.view(gpn << PAGE_GPN_SHIFT, PAGE_SIZE)
                if gpn != self.home:
                    self._below = bytes(view)
                view[:] = contents
            except AddressError:
                view = memoryview(bytearray(contents))
            self.gpn = gpn
            self.view = view
        self.value = value

    def can_move(self, value: int) -> bool:
        """Whether the page of this MSR value is memory."""
        gpn = value >> PAGE_GPN_SHIFT
        if gpn == self.gpn:
            return True
        try:
            self._memory.view(gpn << PAGE_GPN_SHIFT, PAGE_SIZE)
        except AddressError:
            return False
        return True

    def disable(self) -> None:
        """Clears bit 0; the GPA stays readable, because a root reads it again after off-line and on-line."""
        self.value &= ~PAGE_ENABLE

    def reset(self) -> None:
        """INIT: as :meth:`disable`."""
        self.disable()


class MovableOverlay(OverlayPage):
    """A page of its own memory that is laid over whatever a partition has at a GPA of the partition's choice.

    ``view`` never changes. It starts disabled, zeroed, with 0 in its MSR.
    """

    __slots__ = ("_pages", "offset", "writable")

    def __init__(self, pages: OverlaySet, offset: int, view: memoryview, writable: bool) -> None:
        self._pages = pages
        self.offset = offset
        self.view = view
        #: whether the guest may write to it
        self.writable = writable
        self.gpn = self.home = 0
        self.value = 0

    def write(self, value: int) -> None:
        """An MSR write: bit 0 enables, 11:1 are kept, 63:12 move the page. A GPA beyond the address space is accepted;
        the page is then nowhere."""
        gpn = value >> PAGE_GPN_SHIFT
        with self._pages.lock:
            if gpn != self.gpn or bool(value & PAGE_ENABLE) != self.enabled:
                if self.enabled:
                    self._pages.hide(self)
                self.gpn = gpn
                if value & PAGE_ENABLE:
                    self._pages.show(self)
            self.value = value

    def can_move(self, value: int) -> bool:
        """Whether the page of this MSR value lies in the address space."""
        return value >> PAGE_GPN_SHIFT < self._pages.gpn_limit

    def disable(self) -> None:
        """Clears bit 0."""
        self.write(self.value & ~PAGE_ENABLE)

    def reset(self) -> None:
        """As after creation: disabled, 0 in the MSR. The contents stay, as TLFS zeroes them at creation only."""
        self.write(0)


class OwnedPages:
    """A block of GPAs that belong to the hypervisor, handed out page by page.

    The block is RAM that the root's boot loader (machine) has reserved, so that the kernel's direct map reaches it.
    """

    __slots__ = ("_first", "_last", "_next", "memory")

    def __init__(self, memory: GuestMemory, gpa: int, pages: int) -> None:
        self.memory = memory
        self._first = self._next = gpa >> PAGE_GPN_SHIFT
        self._last = self._next + pages

    def allocate(self) -> OverlayPage:
        """The next page, zeroed."""
        if self._next >= self._last:
            raise MemoryError("the block of hypervisor-owned pages is too small")
        gpn = self._next
        self._next += 1
        return OverlayPage(self.memory, gpn)

    def contains(self, gpn: int) -> bool:
        """Whether the page number lies in the block."""
        return self._first <= gpn < self._last

    def overlaps(self, gpn: int, count: int) -> bool:
        """Whether one of the page numbers gpn .. gpn + count - 1 lies in the block."""
        return gpn < self._last and gpn + count > self._first

    @staticmethod
    def needed(vps: int) -> int:
        """Pages for a partition of ``vps`` VPs: hypercall, TSC, and four per VP."""
        return 2 + 4 * vps
