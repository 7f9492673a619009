# SPDX-License-Identifier: Apache-2.0
"""What PCI functions need of the guest's machine, by way of /dev/mshv."""

from __future__ import annotations

from ..bus.address_space import MmioSpace, PortSpace
from .interrupts import MshvVector, MsiRoutes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..bus.address_space import GuestMemory
    from ..mshv import Partition


class MshvPlatform:
    """The :class:`rootvisor.pci.platform.PciPlatform` of a child partition."""

    __slots__ = ("_partition", "_routes", "_vectors", "memory", "mmio", "ports")

    def __init__(self, partition: Partition, memory: GuestMemory) -> None:
        self._partition = partition
        self._routes = MsiRoutes(partition)
        self._vectors: dict[int, list[MshvVector]] = {}
        self.memory = memory
        self.mmio = MmioSpace()
        self.ports = PortSpace()

    def msi_vector(self, bdf: int) -> MshvVector:
        """A vector of function ``bdf``."""
        vector = MshvVector(self._routes)
        self._vectors.setdefault(bdf, []).append(vector)
        return vector

    def add_ioeventfd(self, gpa: int, size: int, fd: int, datamatch: int | None) -> None:
        """Guest writes to ``gpa`` signal ``fd``. OSError when the driver takes no more of them."""
        self._partition.add_doorbell(gpa, fd, size, datamatch)

    def remove_ioeventfd(self, gpa: int, size: int, fd: int, datamatch: int | None) -> None:
        """Undoes :meth:`add_ioeventfd`."""
        self._partition.remove_doorbell(gpa, fd, size, datamatch)

    def coalesce_writes(self, gpa: int, size: int, enable: bool) -> None:
        """The interface has nothing of the kind: each write is an intercept."""

    def forget(self, bdf: int) -> None:
        """The function is unplugged."""
        for vector in self._vectors.pop(bdf, ()):
            vector.close()

    def close(self) -> None:
        """Closes what the vectors hold."""
        for bdf in list(self._vectors):
            self.forget(bdf)
