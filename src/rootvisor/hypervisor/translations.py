# SPDX-License-Identifier: Apache-2.0
"""Where a guest kernel's pages lie: translations that a child VP remembers between its intercepts.

A kernel makes most of its intercepts at a few places, with a few addresses. What is remembered of a page is its last
table entry, which is compared with the table each time; the page is forgotten when the entry or anything in the child's
memory has changed. Only the upper half of the 64-bit address space is remembered, which kernels have in common for all
their address spaces.
"""

from __future__ import annotations

from ..kvm import abi
from . import page_walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .child_vp import ChildVp

_CR0 = (abi.SYNC_SREGS_AT + abi.SREGS_CR0) // 8
_CR0_PG = 1 << 31
_LIMIT = 1024
_ENTRY_SIZE = 8
_EMPTY = memoryview(b"")


class Page:
    """One remembered page: ``gpa`` of its first byte, and its memory (empty if it cannot be read)."""

    __slots__ = ("entry", "generation", "gpa", "view", "was")

    def __init__(self, generation: int, entry: memoryview, gpa: int, view: memoryview) -> None:
        self.generation = generation
        self.entry = entry
        self.was = bytes(entry)
        self.gpa = gpa
        self.view = view


class Translations:
    """Those of one VP; used by its own thread with ``Hypervisor.lock``."""

    __slots__ = ("_asked", "_pages", "_vp")

    def __init__(self, vp: ChildVp) -> None:
        self._vp = vp
        self._pages: dict[int, Page] = {}
        #: page -> generation in which it was asked for; what is asked for twice is worth a walk
        self._asked: dict[int, int] = {}

    def forget(self) -> None:
        """Nothing is remembered."""
        self._pages.clear()
        self._asked.clear()

    def page(self, linear: int) -> Page | None:
        """The page around ``linear``, if it is remembered and still right."""
        page = self._pages.get(linear >> 12)
        if page is None:
            return None
        if page.generation == self._vp.partition.memory.generation and page.entry == page.was:
            return page
        del self._pages[linear >> 12]
        return None

    def find(self, linear: int) -> int:
        """The GPA of ``linear``, or -1."""
        if linear >> 63:
            page = self.page(linear)
            if page is not None:
                return page.gpa | linear & 0xFFF
            gpa = self._vp.ask_kvm(linear)
            if gpa >= 0:
                self._remember(linear, gpa)
            return gpa
        if not self._vp.u64[_CR0] & _CR0_PG:
            return linear & 0xFFFF_FFFF
        return self._vp.ask_kvm(linear)

    def _remember(self, linear: int, gpa: int) -> None:
        memory = self._vp.partition.memory
        generation = memory.generation
        number = linear >> 12
        if self._asked.get(number) != generation:
            if len(self._asked) >= _LIMIT:
                self.forget()
            self._asked[number] = generation
            return
        trail: list[int] = []
        walk = page_walk.translate(self._vp, linear, trail=trail)
        table = memory.page(trail[-1] >> 12) if trail else None
        if walk.code or walk.gpa != gpa or table is None:
            return
        at = trail[-1] & 0xFFF
        view = memory.page(gpa >> 12)
        self._pages[number] = Page(
            generation, table[at : at + _ENTRY_SIZE], gpa & ~0xFFF, view if view is not None else _EMPTY
        )
