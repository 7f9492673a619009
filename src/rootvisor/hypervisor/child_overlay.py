# SPDX-License-Identifier: Apache-2.0
"""Overlay pages of a child: hypercall, reference TSC, VP assist, SynIC pages, at GPAs that its guest chooses.

The pages are memory of their own, in one memory file per child. While a page is enabled it lies over whatever the child
has at that GPA; what is underneath comes back when it is moved or disabled, and its contents travel with it (TLFS "GPA
Overlay Pages").
"""

from __future__ import annotations

import mmap
import os

from ..tlfs.msrs import PAGE_GPN_SHIFT
from .overlay import PAGE_SIZE, MovableOverlay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_partition import ChildPartition

#: A page of KVM's own inside the child: the local APIC.
_APIC_GPN = 0xFEE00
#: Pages of a full child: hypercall and TSC page, four per VP, of at most 256.
PAGE_LIMIT = 2 + 4 * 256


class OverlayPages:
    """A child's overlay pages. Under Hypervisor.lock."""

    __slots__ = ("_fd", "_free", "_map", "_next", "_pages", "_shown", "_view", "child", "gpn_limit", "lock")

    def __init__(self, child: ChildPartition) -> None:
        self.child = child
        self.lock = child.hypervisor.lock
        self.gpn_limit = 1 << (child.memory.width - PAGE_GPN_SHIFT)
        self._next = 0
        #: offsets of pages that were given back
        self._free: list[int] = []
        #: pages in use, by their offsets
        self._pages: dict[int, MovableOverlay] = {}
        #: page number -> overlays there, the visible one last
        self._shown: dict[int, list[MovableOverlay]] = {}
        self._fd = os.memfd_create("rootvisor-overlays", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, PAGE_LIMIT * PAGE_SIZE)
            self._map = mmap.mmap(self._fd, PAGE_LIMIT * PAGE_SIZE)
        except OSError:
            os.close(self._fd)
            raise
        self._view = memoryview(self._map)

    @property
    def allocated(self) -> int:
        """Pages in use."""
        return self._next - len(self._free)

    def allocate(self, writable: bool = True) -> MovableOverlay:
        """A page, zeroed; ``writable`` tells whether the guest may write to it."""
        if self._free:
            offset = self._free.pop()
        elif self._next < PAGE_LIMIT:
            offset = self._next * PAGE_SIZE
            self._next += 1
        else:
            raise MemoryError("a child has no more overlay pages")
        page = MovableOverlay(self, offset, self._view[offset : offset + PAGE_SIZE], writable)
        self._pages[offset] = page
        return page

    def free(self, page: MovableOverlay) -> None:
        """Takes a page back whose VP is gone."""
        page.write(0)
        page.view[:] = bytes(PAGE_SIZE)
        page.view.release()
        del self._pages[page.offset]
        self._free.append(page.offset)

    def show(self, page: MovableOverlay) -> None:
        """Lays the page over the child's memory at its page number."""
        if page.gpn >= self.gpn_limit or page.gpn == _APIC_GPN:
            return
        self._shown.setdefault(page.gpn, []).append(page)
        self.child.memory.put_overlay(page.gpn, self._fd, page.offset, page.writable)

    def hide(self, page: MovableOverlay) -> None:
        """Takes it away; another overlay there, or the child's memory, is visible again."""
        pages = self._shown.get(page.gpn)
        if pages is None or page not in pages:
            return
        pages.remove(page)
        if pages:
            below = pages[-1]
            self.child.memory.put_overlay(page.gpn, self._fd, below.offset, below.writable)
        else:
            del self._shown[page.gpn]
            self.child.memory.remove_overlay(page.gpn)

    def close(self) -> None:
        """Frees the memory; the child's VPs have stopped."""
        self._shown.clear()
        for page in self._pages.values():
            page.view.release()
        self._pages.clear()
        self._view.release()
        try:
            self._map.close()  # and with it a second descriptor of the file
        except BufferError:
            pass  # somebody still looks at a page; it goes with the last of them
        os.close(self._fd)
