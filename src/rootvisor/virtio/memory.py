# SPDX-License-Identifier: Apache-2.0
"""Guest RAM as devices see it, and the error for an address that is none."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..pci.platform import GuestMemory as GuestMemory
    from ..pci.platform import MemoryRegion as MemoryRegion


class GuestMemoryError(ValueError):
    """A range of guest physical addresses that is not wholly inside one region of guest RAM."""
