# SPDX-License-Identifier: Apache-2.0
"""Shifts and rotates of numbers of 8 to 64 bits: ``(a, count, flags, bits)`` to the result and RFLAGS.

The count is taken as the instruction has it and masked here. Where the manuals leave a flag undefined, it is what the
formula for a count of 1 gives.
"""

from __future__ import annotations

from .flags import AF, CF, OF, STATUS, result_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .arithmetic import Binary


def _count(count: int, bits: int) -> int:
    return count & (63 if bits == 64 else 31)


def rotate_left(a: int, count: int, flags: int, bits: int) -> tuple[int, int]:
    """ROL."""
    count = _count(count, bits)
    if not count:
        return a, flags
    by = count % bits
    result = (a << by | a >> bits - by) & (1 << bits) - 1
    carry = result & 1
    return result, _carry_and_overflow(flags, carry, result >> bits - 1 ^ carry)


def rotate_right(a: int, count: int, flags: int, bits: int) -> tuple[int, int]:
    """ROR."""
    count = _count(count, bits)
    if not count:
        return a, flags
    by = count % bits
    result = (a >> by | a << bits - by) & (1 << bits) - 1
    carry = result >> bits - 1
    return result, _carry_and_overflow(flags, carry, carry ^ result >> bits - 2 & 1)


def rotate_left_through_carry(a: int, count: int, flags: int, bits: int) -> tuple[int, int]:
    """RCL."""
    count = _count(count, bits) % (bits + 1)
    if not count:
        return a, flags
    whole = (flags & CF) << bits | a
    whole = (whole << count | whole >> bits + 1 - count) & (1 << bits + 1) - 1
    result, carry = whole & (1 << bits) - 1, whole >> bits
    return result, _carry_and_overflow(flags, carry, result >> bits - 1 ^ carry)


def rotate_right_through_carry(a: int, count: int, flags: int, bits: int) -> tuple[int, int]:
    """RCR."""
    count = _count(count, bits) % (bits + 1)
    if not count:
        return a, flags
    whole = (flags & CF) << bits | a
    whole = (whole >> count | whole << bits + 1 - count) & (1 << bits + 1) - 1
    result, carry = whole & (1 << bits) - 1, whole >> bits
    return result, _carry_and_overflow(flags, carry, (result >> bits - 1 ^ result >> bits - 2) & 1)


def _carry_and_overflow(flags: int, carry: int, overflow: int) -> int:
    return flags & ~(CF | OF) | carry | (OF if overflow else 0)


def shift_left(a: int, count: int, flags: int, bits: int) -> tuple[int, int]:
    """SHL."""
    count = _count(count, bits)
    if not count:
        return a, flags
    wide = a << count
    result, carry = wide & (1 << bits) - 1, wide >> bits & 1
    return result, _shifted(result, carry, result >> bits - 1 ^ carry, flags, bits)


def shift_right(a: int, count: int, flags: int, bits: int) -> tuple[int, int]:
    """SHR."""
    count = _count(count, bits)
    if not count:
        return a, flags
    return a >> count, _shifted(a >> count, a >> count - 1 & 1, a >> bits - 1, flags, bits)


def shift_right_arithmetic(a: int, count: int, flags: int, bits: int) -> tuple[int, int]:
    """SAR."""
    count = _count(count, bits)
    if not count:
        return a, flags
    sign = 1 << bits - 1
    number = (a ^ sign) - sign
    result = number >> count & (1 << bits) - 1
    return result, _shifted(result, number >> count - 1 & 1, 0, flags, bits)


#: In the order of group 2.
GROUP_2: tuple[Binary, ...] = (
    rotate_left,
    rotate_right,
    rotate_left_through_carry,
    rotate_right_through_carry,
    shift_left,
    shift_right,
    shift_left,
    shift_right_arithmetic,
)


def shift_left_double(a: int, low: int, count: int, flags: int, bits: int) -> tuple[int, int]:
    """SHLD: bits of ``low`` come in from the right."""
    count = _count(count, bits)
    if not count:
        return a, flags
    wide = (
        (a << bits | low) << bits | a
    ) << count  # a second round: a count beyond 16 bits is undefined, not wrong
    result, carry = wide >> 2 * bits & (1 << bits) - 1, wide >> 3 * bits & 1
    return result, _shifted(result, carry, (a ^ result) >> bits - 1, flags, bits)


def shift_right_double(a: int, high: int, count: int, flags: int, bits: int) -> tuple[int, int]:
    """SHRD: bits of ``high`` come in from the left."""
    count = _count(count, bits)
    if not count:
        return a, flags
    wide = (a << bits | high) << bits | a
    result, carry = wide >> count & (1 << bits) - 1, wide >> count - 1 & 1
    return result, _shifted(result, carry, (a ^ result) >> bits - 1, flags, bits)


def _shifted(result: int, carry: int, overflow: int, flags: int, bits: int) -> int:
    status = result_flags(result, 1 << bits - 1) | carry | (OF if overflow else 0)
    return flags & ~(STATUS & ~AF) | status
