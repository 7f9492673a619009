# SPDX-License-Identifier: Apache-2.0
"""The partition's memory as its devices reach it: all of it, or all but pages that are withheld for a while.

VFIO's type 1 undoes whole mappings only, and a mapping cannot be replaced by two while a device uses it: between the
unmapping and what is mapped in its place, the device's transfers to the neighbours would fail. So memory of which
single pages shall be withheld later is mapped page by page from the beginning; the kernel limits their number.
"""

from __future__ import annotations

from .container import MORE_MAPPINGS
from .errors import VfioError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .container import Container

_PAGE = 4096


class DeviceMemory:
    """``ranges`` are (GPA, size, address in this process), in whole pages; bus addresses are GPAs.

    ``withheld`` are the numbers of the pages that devices do not reach now.
    """

    __slots__ = ("_container", "_ranges", "withheld")

    def __init__(self, container: Container, ranges: list[tuple[int, int, int]], by_page: bool) -> None:
        """Maps everything. ``by_page``: :meth:`withhold` will be wanted. Raises :class:`VfioError`."""
        self._container = container
        self._ranges = ranges
        self.withheld: set[int] = set()
        if by_page:
            pages = sum(size for _, size, _ in ranges) // _PAGE
            left = container.mappings_left()
            if left is not None and pages > left:
                raise VfioError(
                    f"to keep deposited memory from devices, each of {pages:,} pages needs a mapping, and the kernel "
                    f"allows {left:,}",
                    f"give less --memory, or: {MORE_MAPPINGS}",
                )
        for gpa, size, address in ranges:
            step = _PAGE if by_page else size
            for at in range(0, size, step):
                container.map(gpa + at, address + at, step)

    def withhold(self, first: int, count: int) -> None:
        """Devices reach these pages no longer when this returns. Raises :class:`VfioError`: they still do."""
        self._container.unmap(first * _PAGE, count * _PAGE)
        self.withheld.update(range(first, first + count))

    def restore(self, first: int, count: int) -> None:
        """Devices reach those of the pages again that were withheld. Raises :class:`VfioError`: not all of them."""
        for gpn in range(first, first + count):
            if gpn in self.withheld:
                gpa = gpn * _PAGE
                for start, size, address in self._ranges:
                    if start <= gpa < start + size:
                        self._container.map(gpa, address + gpa - start, _PAGE)
                        self.withheld.discard(gpn)
