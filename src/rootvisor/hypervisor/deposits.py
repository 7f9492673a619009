# SPDX-License-Identifier: Apache-2.0
"""Memory that a partition's parent gave to the hypervisor, page by page, with exact accounting.

Pages that the root addresses by number (statistics, VP state) must be its own RAM, so they come from here
(contract: ``page_address(pfn_to_page())`` in the kernel). Nothing else needs a page: the hypervisor asks for one only
to hand it back visibly.
"""

from __future__ import annotations

from ..tlfs import status
from .errors import HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

    from .deposit_watch import DepositWatch

_BLOCK_SHIFT = 9
#: Ranges up to here are looked up page by page.
_FEW = 8


class DepositPool:
    """The deposited pages of one partition: free ones, and ones in use by the hypervisor."""

    __slots__ = ("free", "used")

    def __init__(self) -> None:
        self.free: list[int] = []
        self.used: set[int] = set()

    @property
    def total(self) -> int:
        """Pages deposited and not withdrawn."""
        return len(self.free) + len(self.used)

    def allocate(self) -> int:
        """The page number of a free page, now in use. HV_STATUS_INSUFFICIENT_MEMORY asks for a deposit."""
        if not self.free:
            raise HvError(status.INSUFFICIENT_MEMORY)
        gpn = self.free.pop()
        self.used.add(gpn)
        return gpn

    def release(self, gpn: int) -> None:
        """Gives a page back to the free ones."""
        self.used.remove(gpn)
        self.free.append(gpn)

    def take(self, count: int) -> list[int]:
        """Up to ``count`` free pages, which leave the pool."""
        taken = self.free[-count:] if count else []
        del self.free[len(self.free) - len(taken) :]
        taken.reverse()
        return taken


class DepositedPages:
    """Every page of the root that is in some pool, by number, with who has it since when.

    ``given[gpn]`` is (partition id, reference time of the root in 100 ns).
    """

    __slots__ = ("_blocks", "given", "watch")

    def __init__(self) -> None:
        #: ``--watch-deposits``
        self.watch: DepositWatch | None = None
        self.given: dict[int, tuple[int, int]] = {}
        #: number of 512-page block -> deposited pages in it, so that a large range is looked up at once
        self._blocks: dict[int, int] = {}

    def __contains__(self, gpn: int) -> bool:
        return gpn in self.given

    def __len__(self) -> int:
        return len(self.given)

    def add(self, pages: Collection[int], partition_id: int, time: int) -> None:
        """Pages that are not there yet."""
        blocks = self._blocks
        entry = (partition_id, time)
        for gpn in pages:
            self.given[gpn] = entry
            block = gpn >> _BLOCK_SHIFT
            blocks[block] = blocks.get(block, 0) + 1
        if self.watch is not None:
            self.watch.protect(pages)

    def lend(self, gpn: int) -> None:
        """The root may touch a deposited page: it holds something for it."""
        if self.watch is not None:
            self.watch.release((gpn,))

    def take_back(self, gpn: int) -> None:
        """What :meth:`lend` allowed is over."""
        if self.watch is not None:
            self.watch.protect((gpn,))

    def remove(self, pages: Collection[int]) -> None:
        """Pages that are there: they are the root's again."""
        if self.watch is not None:
            self.watch.release(pages)
        blocks = self._blocks
        for gpn in pages:
            del self.given[gpn]
            block = gpn >> _BLOCK_SHIFT
            blocks[block] -= 1
            if not blocks[block]:
                del blocks[block]

    def overlaps(self, first: int, count: int) -> bool:
        """Whether one of the pages first .. first + count - 1 is there."""
        given = self.given
        if count <= _FEW:
            return any(gpn in given for gpn in range(first, first + count))
        blocks = self._blocks
        if not blocks:
            return False
        end = first + count
        for block in range(first >> _BLOCK_SHIFT, (end - 1 >> _BLOCK_SHIFT) + 1):
            if block in blocks:
                start = block << _BLOCK_SHIFT
                pages = range(max(start, first), min(start + (1 << _BLOCK_SHIFT), end))
                if not given.keys().isdisjoint(pages):
                    return True
        return False
