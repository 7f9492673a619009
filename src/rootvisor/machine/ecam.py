# SPDX-License-Identifier: Apache-2.0
"""PCI configuration space as memory: a kernel reads it thousands of times, and no read leaves the guest.

Each function's 4 KiB lie in a page of ours that is mapped read-only at its place in the ECAM window; writes, and reads
of functions that are absent, leave as MMIO. A function whose reads have side effects for the moment (virtio's PCI_CFG
window) loses its page meanwhile.
"""

from __future__ import annotations

from ..kvm.abi import MEM_READONLY
from ..kvm.memory import PAGE, SharedMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..kvm.vm import Vm
    from ..pci.function import PciFunction
    from ..pci.root import PciRoot

#: Memory slots from here on, one per function.
_FIRST_SLOT = 16


class Ecam:
    """The IO handler of the ECAM window at ``gpa``."""

    __slots__ = ("_gpa", "_mapped", "_memory", "_root", "_vm")

    def __init__(self, vm: Vm, root: PciRoot, gpa: int) -> None:
        self._vm = vm
        self._root = root
        self._gpa = gpa
        self._memory: SharedMemory | None = None
        #: bdf -> (slot, user address, mapped now)
        self._mapped: dict[int, tuple[int, int, bool]] = {}

    def map_functions(self) -> None:
        """Maps the functions that are plugged in; called once, before the guest runs."""
        functions = self._root.functions
        self._memory = memory = SharedMemory("pci-config", len(functions) * PAGE)
        for number, (bdf, function) in enumerate(functions.items()):
            function.config.move_to(memory.view[number * PAGE : (number + 1) * PAGE])
            self._mapped[bdf] = (_FIRST_SLOT + number, memory.address + number * PAGE, False)
            self._follow(bdf, function)

    def read(self, offset: int, size: int) -> int:
        """An absent function, or one that is not mapped now."""
        return self._root.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Every write."""
        self._root.write(offset, size, value)
        bdf = offset >> 12
        function = self._root.functions.get(bdf)
        if function is not None:
            self._follow(bdf, function)

    def _follow(self, bdf: int, function: PciFunction) -> None:
        slot, address, mapped = self._mapped[bdf]
        plain = function.config_is_plain
        if plain != mapped:
            size, flags = (PAGE, MEM_READONLY) if plain else (0, 0)
            self._vm.set_memory(slot, self._gpa + (bdf << 12), size, address, flags)
            self._mapped[bdf] = (slot, address, plain)

    def close(self) -> None:
        """Frees the pages; the VM is closed."""
        if self._memory is not None:
            self._memory.close()
