# SPDX-License-Identifier: Apache-2.0
"""PCI configuration space as memory: a kernel reads it thousands of times, and no read leaves the guest.

The whole ECAM window is one read-only memory slot: each function's 4 KiB at its place, all ones where there is none.
Writes leave as MMIO. While reads of a function have side effects (virtio's open PCI_CFG window) the slot is gone, and
reads leave, too.
"""

from __future__ import annotations

from ..kvm.abi import MEM_READONLY
from ..kvm.memory import PAGE, SharedMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..kvm.vm import Vm
    from ..pci.function import PciFunction
    from ..pci.root import PciRoot

#: The memory slot of the window; 0 and 1 are RAM.
_SLOT = 2


class Ecam:
    """The IO handler of the ECAM window at ``gpa``."""

    __slots__ = ("_functions", "_gpa", "_mapped", "_memory", "_root", "_vm")

    def __init__(self, vm: Vm, root: PciRoot, gpa: int) -> None:
        self._vm = vm
        self._root = root
        self._gpa = gpa
        self._memory: SharedMemory | None = None
        self._functions: dict[int, PciFunction] = {}
        self._mapped = False

    def map_functions(self) -> None:
        """Maps the functions that are plugged in; called once, before the guest runs."""
        self._memory = memory = SharedMemory("pci-config", self._root.ecam_bytes)
        memory.view[:] = b"\xff" * memory.size
        self._functions = self._root.functions
        for bdf, function in self._functions.items():
            function.config.move_to(memory.view[bdf * PAGE : (bdf + 1) * PAGE])
        self._follow()

    def read(self, offset: int, size: int) -> int:
        """Reads come here while the window is not mapped."""
        return self._root.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Every write."""
        self._root.write(offset, size, value)
        self._follow()

    def _follow(self) -> None:
        plain = all(function.config_is_plain for function in self._functions.values())
        if plain != self._mapped and self._memory is not None:
            size, flags = (self._memory.size, MEM_READONLY) if plain else (0, 0)
            self._vm.set_memory(_SLOT, self._gpa, size, self._memory.address, flags)
            self._mapped = plain

    def close(self) -> None:
        """Frees the pages; the VM is closed."""
        if self._memory is not None:
            self._memory.close()
