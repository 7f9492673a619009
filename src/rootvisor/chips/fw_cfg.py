# SPDX-License-Identifier: Apache-2.0
"""The few numbers that bare-metal test kernels read from QEMU's firmware configuration device (QEMU
``docs/specs/fw_cfg.rst``): signature, memory size, number of processors.
"""

from __future__ import annotations

PORT = 0x510
SIGNATURE, IDENTITY, RAM_SIZE, PROCESSORS, MAX_PROCESSORS = 0x00, 0x01, 0x03, 0x05, 0x0F


class FirmwareConfiguration:
    """Two ports: a selector of 16 bits, and the selected item's bytes, one a read; zero behind its end."""

    __slots__ = ("_at", "_item", "_items")

    def __init__(self, memory_bytes: int, processors: int) -> None:
        self._items = {
            SIGNATURE: b"QEMU",
            IDENTITY: (1).to_bytes(4, "little"),
            RAM_SIZE: memory_bytes.to_bytes(8, "little"),
            PROCESSORS: processors.to_bytes(2, "little"),
            MAX_PROCESSORS: processors.to_bytes(2, "little"),
        }
        self._item = b""
        self._at = 0

    def read(self, offset: int, size: int) -> int:
        """The data port's next byte."""
        if offset != 1 or size != 1:
            return 0
        at = self._at
        self._at += 1
        return self._item[at] if at < len(self._item) else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Selects an item; the data port cannot be written."""
        if offset == 0 and size == 2:
            self._item = self._items.get(value, b"")
            self._at = 0
