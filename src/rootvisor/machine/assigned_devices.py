# SPDX-License-Identifier: Apache-2.0
"""Physical devices of the root partition: taken from the host, wired to the root's bus and memory, and given back."""

from __future__ import annotations

import sys

from ..vfio.binding import Binding
from ..vfio.container import Container
from ..vfio.device import VfioDevice
from ..vfio.device_memory import DeviceMemory
from ..vfio.errors import VfioError
from ..vfio.fault_log import FaultLog
from ..vfio.host_device import find, obstacle
from ..vfio.pci_function import AssignedFunction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vfio.host_device import HostDevice
    from .computer import Computer

_PAGE = 4096


class AssignedDevices:
    """The functions at ``addresses`` of the host (``0000:01:00.0``), all in one IOMMU container.

    They reach the partition's RAM, except for the pages that the hypervisor owns, and with the watch of deposits those
    that the root has deposited. The constructor raises :class:`VfioError`; what was taken goes back then.
    """

    __slots__ = ("_binding", "_computer", "_container", "_faults", "_functions", "_memory")

    def __init__(self, computer: Computer, addresses: list[str]) -> None:
        self._binding: Binding | None = None
        self._container: Container | None = None
        self._memory: DeviceMemory | None = None
        self._functions: list[AssignedFunction] = []
        self._computer = computer
        self._faults = FaultLog(addresses)
        try:
            self._take(computer, [find(address) for address in addresses])
        except BaseException:
            self.close()
            raise

    def _take(self, computer: Computer, devices: list[HostDevice]) -> None:
        for host in devices:
            problem = obstacle(host)
            if problem is not None:
                raise problem
        self._binding = Binding(devices)
        self._container = container = Container()
        groups = [container.add_group(host.group) for host in devices if host.group is not None]
        watch = computer.partition.hypervisor.deposited.watch
        self._memory = DeviceMemory(container, _dma_ranges(computer), by_page=watch is not None)
        if watch is not None:
            watch.devices = self
        for host, group in zip(devices, groups, strict=True):
            device = VfioDevice(group, host.address)
            try:
                device.reset()
                function = AssignedFunction(device, computer.platform, _report)
            except BaseException:
                device.close()
                raise
            self._functions.append(function)
            computer.add_function(function)

    @property
    def fault_fd(self) -> int:
        """Readable when DMA may have been refused: :meth:`report_faults`. -1 where the host does not tell."""
        return self._faults.fd

    def report_faults(self) -> None:
        """Says which device wanted to reach what."""
        for fault in self._faults.read():
            verb = "write to" if fault.write else "read"
            what = self._what_lies_at(fault.iova)
            _report(f"DMA of {fault.device} was refused: it wanted to {verb} {fault.iova:#x}, {what}")

    def _what_lies_at(self, gpa: int) -> str:
        layout = self._computer.layout
        partition = self._computer.partition
        if 0 <= gpa - layout.owned_gpa < layout.owned_pages * _PAGE:
            return "a page of the hypervisor"
        if self._memory is not None and gpa // _PAGE in self._memory.withheld:
            owner, _time = partition.hypervisor.deposited.given.get(gpa // _PAGE, (partition.id, 0))
            return f"memory that the root deposited for {'itself' if owner == partition.id else f'partition {owner}'}"
        if any(0 <= gpa - region.gpa < region.size for region in partition.memory.regions):
            return "memory of the root partition"
        return "where no memory is"

    # --- what the watch of deposits wants, under Hypervisor.lock ----------------------------------------------------
    def withhold(self, first: int, count: int) -> None:
        """Pages from number ``first`` on are the hypervisor's: no device reaches them any more."""
        if self._memory is not None:
            try:
                self._memory.withhold(first, count)
            except VfioError as error:
                _report(str(error))

    def restore(self, first: int, count: int) -> None:
        """They are the root's again."""
        if self._memory is not None:
            try:
                self._memory.restore(first, count)
            except VfioError as error:
                _report(str(error))

    def close(self) -> None:
        """Resets the devices and gives them back to their drivers. The partition does not run any more."""
        for function in self._functions:
            function.close()
        self._functions.clear()
        self._faults.close()
        self._memory = None
        if self._container is not None:
            self._container.close()
            self._container = None
        if self._binding is not None:
            self._binding.close()
            self._binding = None


def _report(problem: str) -> None:
    sys.stderr.write(f"rootvisor: {problem}\n")


def _dma_ranges(computer: Computer) -> list[tuple[int, int, int]]:
    """(GPA, size, address in this process) of the RAM that devices may reach: all but the hypervisor's own pages."""
    layout = computer.layout
    owned, end = layout.owned_gpa, layout.owned_gpa + layout.owned_pages * _PAGE
    ranges = []
    for region in computer.partition.memory.regions:
        pieces = [(region.gpa, region.gpa + region.size)]
        if owned and region.gpa <= owned < region.gpa + region.size:
            pieces = [(region.gpa, owned), (end, region.gpa + region.size)]
        ranges += [(low, high - low, region.address + low - region.gpa) for low, high in pieces if low < high]
    return ranges
