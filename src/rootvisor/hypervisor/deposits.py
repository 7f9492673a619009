# SPDX-License-Identifier: Apache-2.0
"""Memory that a partition's parent gave to the hypervisor, page by page, with exact accounting.

Pages that the root addresses by number (statistics, VP state) must be its own RAM, so they come from here
(contract: ``page_address(pfn_to_page())`` in the kernel).
"""

from __future__ import annotations

from ..tlfs import status
from .errors import HvError


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
