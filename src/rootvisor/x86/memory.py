# SPDX-License-Identifier: Apache-2.0
"""Operands in memory of any size and place, in accesses of 1, 2, 4 or 8 bytes that stay within a page."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .processor import Processor

PAGE = 0x1000
_OFFSET = PAGE - 1
_LINEAR = 0xFFFF_FFFF_FFFF_FFFF


def read(processor: Processor, address: int, size: int, write_intent: bool) -> int:
    """The operand as a little-endian number. A fault comes before the first access."""
    if size <= 8 and (address & _OFFSET) + size <= PAGE:
        return processor.read(address, size, write_intent)
    _probe_second_page(processor, address, size, write_intent)
    value = shift = 0
    for at, length in pieces(address, size):
        value |= processor.read(at, length, write_intent) << shift
        shift += length * 8
    return value


def write(processor: Processor, address: int, size: int, value: int) -> None:
    """Writes the low ``size`` bytes of ``value``. A fault comes before the first access."""
    if size <= 8 and (address & _OFFSET) + size <= PAGE:
        processor.write(address, size, value & (1 << size * 8) - 1)
        return
    _probe_second_page(processor, address, size, True)
    for at, length in pieces(address, size):
        processor.write(at, length, value & (1 << length * 8) - 1)
        value >>= length * 8


def probe(processor: Processor, address: int, size: int, write: bool) -> None:
    """Faults if an access would, and does nothing else."""
    processor.probe(address, min(size, PAGE - (address & _OFFSET)), write)
    _probe_second_page(processor, address, size, write)


def _probe_second_page(processor: Processor, address: int, size: int, write: bool) -> None:
    beyond = (address & _OFFSET) + size - PAGE
    if beyond > 0:
        processor.probe(address + size - beyond & _LINEAR, beyond, write)


def pieces(address: int, size: int) -> list[tuple[int, int]]:
    """Addresses and sizes of the accesses, in order."""
    result = []
    while size:
        room = min(size, 8, PAGE - (address & _OFFSET))
        length = 1 << room.bit_length() - 1
        result.append((address, length))
        address = address + length & _LINEAR
        size -= length
    return result
