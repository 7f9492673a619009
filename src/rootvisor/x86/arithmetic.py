# SPDX-License-Identifier: Apache-2.0
"""Additions, subtractions, logic, multiplication and division on numbers of 8 to 64 bits, with exact status flags.

Functions of two operands take ``(a, b, flags, bits)`` and return the result and RFLAGS.
"""

from __future__ import annotations

from .flags import AF, CF, OF, PARITY, SF, STATUS, ZF, result_flags
from .processor import DIVIDE_ERROR, Fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Binary = Callable[[int, int, int, int], tuple[int, int]]
    Unary = Callable[[int, int, int], tuple[int, int]]


def add(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """ADD."""
    return _add(a, b, 0, flags, bits)


def adc(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """ADC."""
    return _add(a, b, flags & CF, flags, bits)


def sub(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """SUB, CMP."""
    return _subtract(a, b, 0, flags, bits)


def sbb(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """SBB."""
    return _subtract(a, b, flags & CF, flags, bits)


def _add(a: int, b: int, carry: int, flags: int, bits: int) -> tuple[int, int]:
    total = a + b + carry
    result = total & (1 << bits) - 1
    sign = 1 << bits - 1
    status = PARITY[result & 0xFF] | total >> bits | (a ^ b ^ result) & AF
    if not result:
        status |= ZF
    if result & sign:
        status |= SF
    if (a ^ result) & (b ^ result) & sign:
        status |= OF
    return result, flags & ~STATUS | status


def _subtract(a: int, b: int, borrow: int, flags: int, bits: int) -> tuple[int, int]:
    total = a - b - borrow
    result = total & (1 << bits) - 1
    sign = 1 << bits - 1
    status = PARITY[result & 0xFF] | (a ^ b ^ result) & AF
    if total < 0:
        status |= CF
    if not result:
        status |= ZF
    if result & sign:
        status |= SF
    if (a ^ b) & (a ^ result) & sign:
        status |= OF
    return result, flags & ~STATUS | status


def logical_or(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """OR."""
    return _logic(a | b, flags, bits)


def logical_and(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """AND, TEST."""
    return _logic(a & b, flags, bits)


def logical_xor(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """XOR."""
    return _logic(a ^ b, flags, bits)


def and_not(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """ANDN: the first operand is inverted."""
    return _logic(~a & b, flags, bits)


def _logic(result: int, flags: int, bits: int) -> tuple[int, int]:
    return result, flags & ~STATUS | result_flags(result, 1 << bits - 1)


#: In the order of opcodes 0x00 to 0x3F and of group 1.
GROUP_1: tuple[Binary, ...] = (add, logical_or, adc, sbb, logical_and, sub, logical_xor, sub)


def increment(a: int, flags: int, bits: int) -> tuple[int, int]:
    """INC, which leaves CF."""
    result, status = _add(a, 1, 0, flags, bits)
    return result, status & ~CF | flags & CF


def decrement(a: int, flags: int, bits: int) -> tuple[int, int]:
    """DEC, which leaves CF."""
    result, status = _subtract(a, 1, 0, flags, bits)
    return result, status & ~CF | flags & CF


def invert(a: int, flags: int, bits: int) -> tuple[int, int]:
    """NOT, which leaves all flags."""
    return a ^ (1 << bits) - 1, flags


def negate(a: int, flags: int, bits: int) -> tuple[int, int]:
    """NEG."""
    return _subtract(0, a, 0, flags, bits)


def signed(value: int, bits: int) -> int:
    """A number of ``bits`` bits as a signed one."""
    sign = 1 << bits - 1
    return (value ^ sign) - sign


def multiply(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """MUL: the product has twice the bits."""
    product = a * b
    return product, _product_flags(product, flags, bits, bool(product >> bits))


def multiply_signed(a: int, b: int, flags: int, bits: int) -> tuple[int, int]:
    """IMUL: the product has twice the bits."""
    product = signed(a, bits) * signed(b, bits)
    limit = 1 << bits - 1
    overflow = not -limit <= product < limit
    return product & (1 << 2 * bits) - 1, _product_flags(product, flags, bits, overflow)


def _product_flags(product: int, flags: int, bits: int, overflow: bool) -> int:
    status = result_flags(product & (1 << bits) - 1, 1 << bits - 1) & ~ZF
    return flags & ~STATUS | status | (CF | OF if overflow else 0)


def divide(dividend: int, divisor: int, bits: int) -> tuple[int, int]:
    """DIV of a number of twice the bits: quotient and remainder. Fault for what does not fit."""
    if not divisor or dividend // divisor >> bits:
        raise Fault(DIVIDE_ERROR)
    return dividend // divisor, dividend % divisor


def divide_signed(dividend: int, divisor: int, bits: int) -> tuple[int, int]:
    """IDIV, which rounds to zero: quotient and remainder. Fault for what does not fit."""
    a, b = signed(dividend, 2 * bits), signed(divisor, bits)
    if not b:
        raise Fault(DIVIDE_ERROR)
    quotient = abs(a) // abs(b)
    if (a < 0) != (b < 0):
        quotient = -quotient
    limit = 1 << bits - 1
    if not -limit <= quotient < limit:
        raise Fault(DIVIDE_ERROR)
    mask = (1 << bits) - 1
    return quotient & mask, a - quotient * b & mask
