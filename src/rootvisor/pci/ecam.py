# SPDX-License-Identifier: Apache-2.0
"""PCI configuration space as memory: a kernel reads it thousands of times, and no read leaves the guest.

The whole ECAM window is one read-only piece of guest memory: each function's 4 KiB at its place, all ones where
there is none. Writes leave as MMIO. While reads of a function have side effects (virtio's open PCI_CFG window) the
memory is gone, and reads leave, too.
"""

from __future__ import annotations

from . import registers as reg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .function import PciFunction
    from .root import PciRoot


class Ecam:
    """The IO handler of the ECAM window.

    ``storage`` has a byte for each of the window; ``show(True)`` maps it read-only into the guest, ``show(False)``
    takes it away.
    """

    __slots__ = ("_functions", "_root", "_show", "_shown", "_storage")

    def __init__(self, root: PciRoot, storage: memoryview, show: Callable[[bool], None]) -> None:
        self._root = root
        self._storage = storage
        self._show = show
        self._shown = False
        self._functions: dict[int, PciFunction] = {}
        storage[:] = b"\xff" * len(storage)

    def follow(self) -> None:
        """Makes the memory agree with the functions that are plugged in; called before the guest runs, and after each
        function that comes or goes."""
        functions = self._root.functions
        for bdf in self._functions.keys() - functions.keys():
            page = self._page(bdf)
            self._functions[bdf].config.move_to(memoryview(bytearray(reg.CONFIG_SPACE_BYTES)))
            page[:] = b"\xff" * len(page)
        for bdf in functions.keys() - self._functions.keys():
            functions[bdf].config.move_to(self._page(bdf))
        self._functions = functions
        self._update()

    def read(self, offset: int, size: int) -> int:
        """Reads come here while the window is not shown."""
        return self._root.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Every write."""
        self._root.write(offset, size, value)
        self._update()

    def _page(self, bdf: int) -> memoryview:
        return self._storage[bdf * reg.CONFIG_SPACE_BYTES : (bdf + 1) * reg.CONFIG_SPACE_BYTES]

    def _update(self) -> None:
        plain = all(function.config_is_plain for function in self._functions.values())
        if plain != self._shown:
            self._show(plain)
            self._shown = plain
