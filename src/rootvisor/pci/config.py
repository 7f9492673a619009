# SPDX-License-Identifier: Apache-2.0
"""The 4 KiB configuration space of one function, with a mask of the bits that the guest may write."""

from __future__ import annotations

from . import registers as reg


class ConfigSpace:
    """Bytes plus write masks. A set mask bit is writable; every other bit keeps its value.

    BAR sizing (write all ones, read the size back) needs no further code: the mask of a BAR has its size's low bits
    clear.
    """

    __slots__ = ("_data", "_mask", "_next_capability", "_tail")

    def __init__(self) -> None:
        self._data: bytearray | memoryview = bytearray(reg.CONFIG_SPACE_BYTES)
        self._mask = bytearray(reg.CONFIG_SPACE_BYTES)
        self._next_capability = reg.FIRST_CAPABILITY
        self._tail = reg.CAPABILITY_POINTER

    def move_to(self, storage: memoryview) -> None:
        """Keep the 4 KiB in `storage` from now on: a page that the guest can be shown without a detour."""
        storage[:] = self._data
        self._data = storage

    def get(self, offset: int, size: int) -> int:
        """The `size` bytes at `offset`, which the caller has checked."""
        return int.from_bytes(self._data[offset : offset + size], "little")

    def set(self, offset: int, size: int, value: int) -> None:
        """Put a value in place, past the masks (the device's own side)."""
        self._data[offset : offset + size] = value.to_bytes(size, "little")

    def set_mask(self, offset: int, size: int, mask: int) -> None:
        """Declare which bits the guest may write."""
        self._mask[offset : offset + size] = mask.to_bytes(size, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write; bits outside the mask are dropped."""
        mask = int.from_bytes(self._mask[offset : offset + size], "little")
        if mask:
            self.set(offset, size, self.get(offset, size) & ~mask | value & mask)

    def add_capability(self, capability_id: int, body: bytes) -> int:
        """Append a capability: `body` follows the id and next-pointer bytes. Returns its offset.

        Raises `ValueError` when the 256 bytes of conventional configuration space are full.
        """
        offset = self._next_capability
        end = offset + 2 + len(body)
        if end > 256:
            raise ValueError(f"no room for capability {capability_id:#x} in configuration space")
        self._data[offset] = capability_id
        self._data[offset + 1] = 0
        self._data[offset + 2 : end] = body
        self._data[self._tail] = offset
        self._tail = offset + 1
        self._next_capability = end + 3 & ~3
        self._data[reg.STATUS] |= reg.STATUS_CAPABILITY_LIST
        return offset

    def save(self) -> bytes:
        """All bytes, the zeroes at the end left out."""
        return bytes(self._data).rstrip(b"\0")

    def restore(self, saved: bytes) -> None:
        """Put back what the guest can write; everything else stays as this function has it."""
        saved = saved.ljust(reg.CONFIG_SPACE_BYTES, b"\0")
        for offset, mask in enumerate(self._mask):
            if mask:
                self._data[offset] = self._data[offset] & ~mask & 0xFF | saved[offset] & mask

    def clear_writable(self) -> None:
        """Zero every bit the guest may write, as a reset does."""
        for offset, mask in enumerate(self._mask):
            if mask:
                self._data[offset] &= ~mask & 0xFF
