# SPDX-License-Identifier: Apache-2.0
"""The guest's RAM: one memory file, mapped here, given to the partition, and shared with the devices' back ends."""

from __future__ import annotations

from ..boot.memory_map import HIGH_RAM_START
from ..bus.address_space import GuestMemory, MemoryRegion
from ..mshv import Memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..boot.memory_map import MemoryMap
    from ..mshv import Partition

_PAGE = 4096


class GuestRam:
    """RAM as ``layout`` has it. ``memory`` is how devices see it, ``low`` the bytes below 4 GiB."""

    __slots__ = ("_backing", "low", "memory")

    def __init__(self, layout: MemoryMap, *, huge_pages: bool = True) -> None:
        self._backing = backing = Memory(layout.size, name="ram", huge_pages=huge_pages)
        view, address, fd = backing.view, backing.address, backing.fd
        self.low = view[: layout.low]
        regions = [MemoryRegion(0, layout.low, self.low, fd, 0, address)]
        if layout.high:
            high = view[layout.low :]
            regions.append(
                MemoryRegion(HIGH_RAM_START, layout.high, high, fd, layout.low, address + layout.low)
            )
        self.memory = GuestMemory(tuple(regions))

    @property
    def fd(self) -> int:
        """The memory file."""
        return self._backing.fd

    @property
    def view(self) -> memoryview:
        """All of it, in the order of the file."""
        return self._backing.view

    def give_to(self, partition: Partition) -> None:
        """Maps it into the partition, which takes pages as the guest touches them."""
        for region in self.memory.regions:
            partition.map(region.gpa, self._backing, offset=region.fd_offset, size=region.size)

    def touch(self) -> None:
        """Has the kernel allocate every page now."""
        view = self._backing.view
        for offset in range(0, len(view), _PAGE):
            view[offset] = view[offset]

    def give_back(self, gpa: int, size: int) -> None:
        """The guest has no use for these bytes (balloon): they read as zeros from now on. ValueError outside RAM."""
        for region in self.memory.regions:
            if region.gpa <= gpa and gpa + size <= region.gpa + region.size:
                self._backing.discard(region.fd_offset + gpa - region.gpa, size)
                return
        raise ValueError(f"no memory at {gpa:#x} + {size:#x}")

    def close(self) -> None:
        """Frees it; the partition is gone."""
        self.low.release()
        for region in self.memory.regions:
            region.view.release()
        self._backing.close()
