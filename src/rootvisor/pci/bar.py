# SPDX-License-Identifier: Apache-2.0
"""Base address registers: what a function decodes, and where it is decoded at the moment."""

from __future__ import annotations

from . import registers as reg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .platform import IoHandler


class Bar:
    """One base address register and the handlers behind parts of its range.

    `size` is a power of two (at least 16 bytes for memory, 4 for IO). Bytes that no handler covers read as all ones.
    `mapped_at` is the address at which the platform routes accesses here, `None` while it does not.
    """

    __slots__ = ("index", "io", "mapped_at", "prefetchable", "regions", "size", "wide")

    def __init__(
        self, index: int, size: int, *, io: bool = False, wide: bool = False, prefetchable: bool = False
    ) -> None:
        if size & size - 1 or size < (4 if io else 16) or (size > 1 << 31 and not wide) or (io and wide):
            raise ValueError(f"BAR {index}: a size of {size:#x} bytes cannot be expressed")
        if not 0 <= index < reg.BAR_COUNT - (1 if wide else 0):
            raise ValueError(f"no BAR {index}")
        self.index = index
        self.size = size
        self.io = io
        self.wide = wide
        self.prefetchable = prefetchable
        self.regions: list[tuple[int, int, IoHandler]] = []
        self.mapped_at: int | None = None

    @property
    def flags(self) -> int:
        """The read-only low bits of the register."""
        if self.io:
            return reg.BAR_IO
        return (reg.BAR_MEMORY_64 if self.wide else 0) | (reg.BAR_PREFETCHABLE if self.prefetchable else 0)

    @property
    def register(self) -> int:
        """Offset of the (first) register in configuration space."""
        return reg.BAR_0 + 4 * self.index

    @property
    def register_bytes(self) -> int:
        """How many bytes of configuration space the BAR takes."""
        return 8 if self.wide else 4

    @property
    def mask(self) -> int:
        """The address bits the guest may write."""
        return ~(self.size - 1) & ((1 << 8 * self.register_bytes) - 1)

    def is_decoded(self, command: int, value: int) -> bool:
        """Whether the function answers there, by its command register and the value of this register."""
        return bool(command & (reg.COMMAND_IO if self.io else reg.COMMAND_MEMORY))

    def add_region(self, offset: int, length: int, handler: IoHandler) -> None:
        """Put a handler behind `length` bytes at `offset` of the BAR; its offsets count from `offset`."""
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise ValueError(f"BAR {self.index}: {offset:#x}+{length:#x} is outside its {self.size:#x} bytes")
        for start, taken, _ in self.regions:
            if offset < start + taken and start < offset + length:
                raise ValueError(f"BAR {self.index}: regions overlap at {offset:#x}")
        self.regions.append((offset, length, handler))

    def read(self, offset: int, size: int) -> int:
        """Read as the guest would at BAR offset `offset`, mapped or not (virtio's PCI_CFG window)."""
        for start, length, handler in self.regions:
            if start <= offset and offset + size <= start + length:
                return handler.read(offset - start, size)
        return reg.all_ones(size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write as the guest would at BAR offset `offset`, mapped or not."""
        for start, length, handler in self.regions:
            if start <= offset and offset + size <= start + length:
                handler.write(offset - start, size, value)
                return


class RomBar(Bar):
    """The expansion ROM's base address register. `index` is the one after the last BAR's, as VFIO counts regions."""

    __slots__ = ()

    def __init__(self, size: int) -> None:
        if size < reg.ROM_MIN_BYTES:
            raise ValueError(f"the expansion ROM: a size of {size:#x} bytes cannot be expressed")
        super().__init__(0, size)
        self.index = reg.BAR_COUNT

    @property
    def register(self) -> int:
        """Offset of the register in configuration space."""
        return reg.ROM_BASE

    def is_decoded(self, command: int, value: int) -> bool:
        """It has a switch of its own besides."""
        return bool(value & reg.ROM_ENABLE) and super().is_decoded(command, value)
