# SPDX-License-Identifier: Apache-2.0
"""The lists of HVCALL_GET/SET_VP_REGISTERS for a VP of the caller's own partition, register by register.

A VMM's lists for its children are many and long, and have loops of their own (:mod:`.vp_registers`).
"""

from __future__ import annotations

from struct import Struct

from ..tlfs import registers as tlfs
from ..tlfs import status
from .errors import GeneralProtection, HvError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_VALUE = Struct("<QQ").pack_into
_ELEMENT = Struct("<I12xQQ").unpack_from
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def read_each(
    names: memoryview, output: memoryview, start: int, count: int, read: Callable[[int], int]
) -> None:
    """What ``read`` says of ``names[start:count]``, to their places in ``output``, 16 bytes each. Its HvError goes on,
    with the number done."""
    index = start
    try:
        for index in range(start, count):
            value = read(names[index])
            _VALUE(output, index * tlfs.VALUE_SIZE, value & _MASK64, value >> 64)
    except HvError as error:
        error.reps = index
        raise


def write_each(elements: memoryview, start: int, count: int, write: Callable[[int, int], object]) -> None:
    """Elements of 32 bytes (name, value of 128 bits at 16) in order to ``write``. Its HvError goes on with the number
    done; GeneralProtection is INVALID_REGISTER_VALUE."""
    index = start
    try:
        for index in range(start, count):
            name, low, high = _ELEMENT(elements, index * tlfs.SET_ELEMENT_SIZE)
            write(name, low | high << 64)
    except HvError as error:
        error.reps = index
        raise
    except GeneralProtection:
        raise HvError(status.INVALID_REGISTER_VALUE, index) from None
